// A tour of five steps on the real page. It is offered once, and starts only when somebody asks for it.
Object.assign(labkit, (() => {
  const { part } = labkit;
  const SEEN = "labkit-tour"; // in the browser's memory, once the tour was taken or declined
  const FIRST = "Tell me a short story about a lighthouse keeper who finds a letter in a bottle.";
  const SECOND = "List ten animals that live in the sea, one per line.";

  const mine = (cards) => [...cards.byId.values()].filter((card) => card.mine); // the oldest first

  // What to look at, what to say, what to do before, and when the visitor has done it (null: when they say so).
  const STEPS = [
    ["#lk-inject", "Inject", "A request is a question and the tokens of its answer. One is written down for you: press Inject.",
      { before: ({ panel }) => write(FIRST, Math.min(160, panel.state.most ?? 160)), done: ({ cards }, begun) => mine(cards).length > begun }],
    [".lk figure:last-of-type", "Prefill", "A row is a request, a column is a step of the engine. The high box at the beginning of "
      + "your row is prefill: all tokens of the question were read in one step. The bar after it is decode: one token a step.", {}],
    [".lk figure:first-of-type", "A page fills", "The squares in your request's colour are its pages of the KV cache, 16 tokens each unless "
      + "somebody changed that. Each step puts one more token into the last one. When it is full, the request takes a free page. Once the answer is over they turn grey and hatched: nobody's, but kept for a prompt that begins alike. Point at one to read it.", {}],
    ["#lk-inject", "A second joins", "Press Inject: your question is asked once more, and while its answer is written the tour sends a second one. "
      + "That gets a row of its own in the next step, and nobody stops: this is continuous batching.",
      { before: ({ panel }) => write(FIRST, longEnough(panel.state)), done: joins }],
    [".lk-pause", "Pause and predict", "Press Pause. Before it runs, the list under Step says what the next step will do: who computes how "
      + "many tokens, who takes which page, and who waits, and why. Guess first, then press Step and see.", { before: keepBusy, done: ({ panel }) => panel.live.paused, last: true }],
  ];

  const SECONDS = 10; // for which the first answer runs, at least, so that the second comes while it does
  const FEWEST = 120, MOST = 1500; // its tokens

  // How many tokens that takes at the pace of the latest steps.
  function longEnough({ steps, most }) {
    const pace = steps.slice(-20).map(({ seconds }) => seconds).sort((one, other) => one - other);
    const tokens = pace.length ? Math.round(SECONDS / pace[pace.length >> 1]) : FEWEST;
    return Math.min(most ?? MOST, Math.max(FEWEST, Math.min(MOST, tokens)));
  }

  // Send the second as soon as the first is on its way; it is done when both have a card.
  function joins({ cards }, begun) {
    const there = mine(cards).length - begun;
    if (there === 1 && document.querySelector(INPUTS[0]).value !== SECOND) {
      write(SECOND, FEWEST);
      document.querySelector("#lk-inject").click();
    }
    return there > 1;
  }

  const INPUTS = ["#lk-prompt textarea", "#lk-max-tokens input"];

  // There must be a next step: ask once more if nothing runs.
  function keepBusy({ panel }) {
    if (panel.state.busy) return;
    write(FIRST, longEnough(panel.state));
    document.querySelector("#lk-inject").click();
  }

  // Type into a form that gradio draws.
  function write(prompt, tokens) {
    [prompt, tokens].forEach((value, place) => {
      const input = document.querySelector(INPUTS[place]);
      input.value = value;
      input.dispatchEvent(new Event("input", { bubbles: true }));
    });
  }

  const remembered = () => { try { return localStorage.getItem(SEEN); } catch { return "yes"; } };
  function remember() {
    try { localStorage.setItem(SEEN, "yes"); } catch { /* a browser that keeps nothing */ }
  }

  function tour(page) {
    const start = document.querySelector(".lk-tour-start"), no = document.querySelector(".lk-tour-no");
    let card = null, place = 0, begun = 0, timer = 0, target = null, typed = null;
    no.hidden = Boolean(remembered());
    start.classList.toggle("lk-offered", !no.hidden);

    function over() {
      remember();
      if (typed) write(...typed); // what stood in the form before
      typed = null;
      no.hidden = true;
      start.classList.remove("lk-offered");
      clearInterval(timer);
      target?.classList.remove("lk-toured");
      card?.remove();
      card = null;
    }

    function begin() {
      over();
      document.querySelector("#lk-live-tab-button")?.click();
      page.controls.turn("prompt");
      typed = INPUTS.map((field) => document.querySelector(field).value);
      card = part("section", "lk-tour");
      card.setAttribute("role", "dialog");
      card.setAttribute("aria-label", "Tour of the page");
      card.tabIndex = -1;
      card.addEventListener("keydown", (event) => {
        const move = { Escape: end, ArrowRight: () => go(place + 1), ArrowLeft: () => go(place - 1) }[event.key];
        if (!move) return;
        event.preventDefault();
        move();
      });
      document.body.append(card);
      timer = setInterval(look, 100);
      go(0);
    }

    function end() {
      over();
      start.focus();
    }

    function go(next) {
      if (next < 0) return;
      if (next >= STEPS.length) return end();
      place = next;
      begun = mine(page.cards).length;
      const [where, title, words, { before }] = STEPS[place];
      before?.(page);
      target?.classList.remove("lk-toured");
      target = document.querySelector(where);
      target.classList.add("lk-toured");
      target.scrollIntoView({ block: "nearest" });
      const head = part("h2", "", `${place + 1} of ${STEPS.length}: ${title}`), text = part("p", "", words), row = part("div", "lk-tour-row");
      const buttons = [["lk-tour-skip", "Skip", end], ["lk-tour-next", place + 1 < STEPS.length ? "Next" : "Done", () => go(place + 1)]];
      for (const [name, label, act] of buttons) {
        const button = part("button", name, label);
        button.type = "button";
        button.addEventListener("click", act);
        row.append(button);
      }
      text.setAttribute("aria-live", "polite");
      card.replaceChildren(head, text, row);
      set();
      card.querySelector(".lk-tour-next").focus({ preventScroll: true });
    }

    // Beside what it speaks of, and never outside the window.
    function set() {
      if (!card) return;
      const box = target.getBoundingClientRect(), { offsetWidth: width, offsetHeight: height } = card, gap = 10;
      const left = box.left - gap - width > 0, right = box.right + gap + width < innerWidth; // the pictures are on the right
      const x = left ? box.left - gap - width : right ? box.right + gap : box.left + 40;
      const beside = right || left, below = box.bottom + gap + height < innerHeight;
      const y = beside ? box.top - 20 : below ? box.bottom + gap : box.top - gap - height;
      card.style.left = `${Math.max(8, Math.min(x, innerWidth - width - 8))}px`;
      card.style.top = `${Math.max(8, Math.min(y, innerHeight - height - 8))}px`;
    }

    // Go on by itself once the visitor has done it.
    function look() {
      if (!card.isConnected || !target.offsetParent) return over(); // another tab is in front
      set();
      const [, , , { done, last }] = STEPS[place];
      if (!done || card.dataset.done === String(place) || !done(page, begun)) return;
      card.dataset.done = String(place);
      if (last) card.querySelector("h2").textContent += " \u2713";
      else setTimeout(() => { if (card?.dataset.done === String(place)) go(place + 1); }, 500);
    }

    start.addEventListener("click", begin);
    no.addEventListener("click", end);
    return { begin, end, place: () => (card ? place : -1) };
  }

  return { tour };
})());
