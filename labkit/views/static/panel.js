// The pictures on a page: canvases that follow the pointer and the keys, the engine's clock, and what is selected.
// What people typed is only ever set as textContent. `ask(name, argument)` reaches the engine's side.
Object.assign(labkit, (() => {
  // -- pictures -----------------------------------------------------------------------------------

  function pictures(root, state, hooks, within) {
    const canvases = {};
    for (const name of ["pages", "timeline", "meters", "far"]) {
      canvases[name] = root.querySelector(`canvas[data-picture="${name}"]`);
    }
    const tip = root.querySelector(".lk-tip");
    const listeners = [];
    let theme = null, due = false;

    function draw() {
      due = false;
      if (!state.meta || !canvases.pages.clientWidth) return; // another tab is in front, or the page is gone
      theme ??= labkit.themeOf(root, state);
      root.classList.toggle("lk-apart", Boolean(state.far));
      const most = Math.max(120, Math.min(280, window.innerHeight * 0.22));
      canvases.pages.style.height = `${labkit.blocksHeight(state, canvases.pages.clientWidth, most)}px`;
      root.classList.toggle("lk-sending", labkit.sends(state.steps));
      if (state.far) {
        canvases.far.style.height = `${labkit.blocksHeight(labkit.farState(state), canvases.far.clientWidth, most)}px`;
        paint("far", labkit.drawFar);
      }
      paint("pages", (...all) => { labkit.drawBlocks(...all); labkit.drawCarried(...all); });
      paint("timeline", labkit.drawTimeline);
      paint("meters", labkit.drawMeters);
      state.drawn = state.step;
      state.frames += 1;
    }

    function paint(name, picture) {
      const { ctx, width, height } = labkit.context(canvases[name]);
      if (width && height) picture(ctx, state, theme, width, height);
    }

    function redraw() {
      if (due) return;
      due = true;
      requestAnimationFrame(draw);
    }

    function restyle() {
      theme = null;
      if (state.meta) legend(root, state, labkit.themeOf(root, state));
      redraw();
    }

    function hover(next, lines, x, y) {
      const changed = ["request", "block", "step"].some((key) => next[key] !== state.hover[key]);
      state.hover = next;
      say(lines, x, y);
      if (!changed) return;
      redraw();
      for (const listener of listeners) listener(labkit.focusOf(state));
      if (next.block !== undefined && labkit.perCell(state) === 1) hooks.peek(next.block, x, y);
    }

    // Words beside the pointer.
    function say(lines, x, y) {
      tip.hidden = !lines.length;
      tip.replaceChildren(...lines.map((line) => Object.assign(document.createElement("div"), { textContent: line })));
      if (lines.length) place(tip, x, y);
    }

    const finders = {
      pages: (width, height, x, y) => {
        const block = labkit.blockAt(state, width, height, x, y);
        if (block === undefined) return [{}, []];
        const per = labkit.perCell(state), { request } = labkit.ownersAt(state, block)[0] ?? {};
        return [{ block, request }, per > 1 ? labkit.regionWords(state, block, per) : labkit.blockWords(state, block)];
      },
      timeline: (width, height, x, y) => {
        const lane = labkit.laneAt(state, width, height, y), step = labkit.stepAt(state, width, x);
        const inside = lane && step !== undefined && step >= lane.arrived && (lane.ended < 0 || step <= lane.ended);
        if (inside) return [{ request: lane.request, step }, labkit.laneWords(state, lane, step)];
        return [{ request: lane?.request, step }, lane ? [`Request ${lane.request}`] : []];
      },
      far: (width, height, x, y) => {
        const there = labkit.farState(state), block = labkit.blockAt(there, width, height, x, y);
        if (block === undefined) return [{}, []];
        return [{ request: labkit.ownersAt(there, block)[0]?.request }, ["In the prefill engine", ...labkit.blockWords(there, block)]];
      },
      meters: (width, height, x) => {
        const step = labkit.stepAt(state, width, x);
        return [{ step }, step === undefined ? [] : labkit.meterWords(state, step)];
      },
    };
    for (const [name, canvas] of Object.entries(canvases)) {
      const find = ({ clientX, clientY }) => {
        const { left, top, width } = canvas.getBoundingClientRect(), zoom = width / canvas.clientWidth || 1;
        return finders[name](canvas.clientWidth, canvas.clientHeight, (clientX - left) / zoom, (clientY - top) / zoom);
      };
      const look = (event) => {
        if (!state.meta) return;
        const [next, lines] = find(event);
        hover(next, lines, event.clientX, event.clientY);
      };
      canvas.addEventListener("pointermove", look);
      canvas.addEventListener("pointerdown", look); // a finger does not hover
      canvas.addEventListener("pointerleave", () => hover({}, [], 0, 0));
      canvas.addEventListener("click", (event) => {
        if (!state.meta) return;
        const [next] = find(event);
        if (next.step > state.step) delete next.step; // it is still to come
        hooks.select(next);
      });
    }
    for (const item of within.querySelectorAll("[data-hint]")) hint(item, say);
    new ResizeObserver(redraw).observe(root);
    new MutationObserver(restyle).observe(document.body, { attributes: true, attributeFilter: ["class"] });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);
    const focus = (request) => hover(request === undefined ? {} : { request }, [], 0, 0);
    const notify = () => { for (const listener of listeners) listener(labkit.focusOf(state)); };
    return { redraw, restyle, focus, notify, say, onHover: (listener) => listeners.push(listener), canvases };
  }

  // What a thing means, while the pointer or the keyboard is on it.
  function hint(item, say) {
    const show = () => {
      const { left, bottom } = item.getBoundingClientRect();
      say([item.dataset.hint], left - 14, bottom - 12);
    };
    item.addEventListener("pointerenter", show);
    item.addEventListener("focusin", show);
    for (const end of ["pointerleave", "focusout"]) item.addEventListener(end, () => say([], 0, 0));
    item.setAttribute("aria-description", item.dataset.hint);
  }

  // Beside the pointer, and never outside the window.
  function place(tip, x, y) {
    const left = Math.min(x + 14, window.innerWidth - tip.offsetWidth - 8);
    const top = y + 18 + tip.offsetHeight > window.innerHeight ? y - tip.offsetHeight - 12 : y + 18;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${Math.max(8, top)}px`;
  }

  // The legend is drawn with the pictures' own strokes.
  function legend(root, state, theme) {
    const lanes = new Map([["a", { color: 0, label: "" }], ["b", { color: 1, label: "" }]]);
    const sample = { ...state, meta: { block_size: 16 }, lanes };
    for (const swatch of root.querySelectorAll("canvas[data-swatch]")) {
      const kind = swatch.dataset.swatch, { ctx, width, height } = labkit.context(swatch);
      const owner = (request, filled) => ({ request, filled, position: 1 });
      const owners = { owned: [owner("a", 10)], shared: [owner("a", 16), owner("b", 16)] }[kind] || [];
      const block = ["free", "cached", "owned", "shared"].includes(kind);
      if (block) labkit.drawBlock(ctx, sample, theme, 0, 0, height, kind, owners);
      else if (kind === "next") labkit.promise(ctx, 0, 0, width, height, theme.palette[0]);
      else labkit.drawSpan(ctx, theme, kind, theme.palette[0], 0, 0, width, height);
    }
  }

  // -- the clock ----------------------------------------------------------------------------------

  function clockControls(root, ask, live) {
    const [pause, step, speed] = [".lk-pause", ".lk-step", ".lk-speed"].map((name) => root.querySelector(name));
    const order = (action, value = null) => ask("control", { action, value }).then(show);
    const toggle = () => order(live.paused ? "resume" : "pause");
    const who = document.createElement("span"); // whose pause it is, for everybody to see
    who.className = "lk-paused-by";
    pause.after(who);
    pause.addEventListener("click", toggle);
    step.addEventListener("click", () => order("step"));
    speed.addEventListener("change", () => order("speed", speed.value ? Number(speed.value) : null));
    function show(clock) {
      if (!clock) return;
      Object.assign(live, clock);
      pause.textContent = live.paused ? "Run" : "Pause";
      pause.setAttribute("aria-pressed", String(live.paused));
      root.classList.toggle("lk-paused", live.paused);
      who.textContent = live.paused && live.by ? `by ${live.by}` : "";
      if (document.activeElement !== speed) choose(live.speed === null ? "" : String(live.speed));
      const notice = root.querySelector(".lk-failure");
      notice.textContent = live.failure ? `The engine stopped: ${live.failure}. Play a preset, or restart it under Engine.`
        : live.notice || "";
      notice.hidden = !notice.textContent;
    }
    function choose(value) {
      const known = [...speed.options].some((option) => option.value === value);
      if (!known) speed.add(new Option(`${value} steps/s`, value));
      speed.value = value;
    }
    return { show, toggle, step: () => order("step") };
  }

  // -- what is selected ---------------------------------------------------------------------------

  // A request, a step or a block is selected once, marked everywhere, and described in the side panel.
  function selection(root, ask, state, live, show, side, within) {
    let facts = null, asked = 0;
    const notice = root.querySelector(".lk-back"), line = root.querySelector(".lk-summary");
    const tell = labkit.joins(root.querySelector(".lk-joins"), state, { select });

    async function select(next) {
      state.selected = next;
      facts = null;
      labkit.lookBack(state, null);
      refresh();
      show.notify();
      const turn = (asked += 1), { step, block } = next;
      if (step === undefined && block === undefined) return;
      side.reveal("step");
      const answer = await ask("look", block === undefined ? { step } : { block });
      if (turn !== asked) return; // something else was selected meanwhile
      if (answer && !answer.error) facts = labkit.read(block === undefined ? "StepFacts" : "BlockFacts", answer);
      if (facts?.tables && step < state.step) labkit.lookBack(state, facts);
      refresh(answer ? answer.error : "No answer from the lab.");
    }

    function refresh(error = "") {
      notice.hidden = !state.past;
      if (state.past) notice.firstElementChild.textContent = `Pages as they were in step ${state.past.step}. `;
      if (state.meta) line.textContent = labkit.summary(state);
      side.update(facts, error);
      tell();
      show.redraw();
    }
    notice.querySelector("button").addEventListener("click", () => select({}));

    // Say the tokens of a block, a moment after the pointer comes to rest on it.
    let resting = 0;
    function peek(block, x, y) {
      clearTimeout(resting);
      resting = setTimeout(async () => {
        const answer = await ask("look", { block, step: state.past?.step });
        if (answer?.tokens && state.hover.block === block) show.say(labkit.blockWords(state, block, answer), x, y);
      }, 150);
    }

    function byStep(move) {
      const now = state.selected.step ?? state.step + (move < 0 ? 1 : 0), next = now + move;
      if (next > state.step) return live.paused ? select({ request: state.selected.request }).then(live.step) : undefined;
      if (state.steps.length && next >= state.steps[0].step) select({ request: state.selected.request, step: next });
    }

    function byRequest(move) {
      const ids = [...state.lanes.keys()], now = ids.indexOf(state.selected.request);
      const next = now < 0 ? (move > 0 ? 0 : ids.length - 1) : now + move;
      const { step } = state.selected;
      if (ids[next] !== undefined) select(step === undefined ? { request: ids[next] } : { request: ids[next], step });
    }

    const keys = {
      " ": live.toggle, ArrowLeft: () => byStep(-1), ArrowRight: () => byStep(1), ArrowUp: () => byRequest(-1),
      ArrowDown: () => byRequest(1), Escape: () => select({}),
    };
    function press(event) {
      if (!root.isConnected) return within.removeEventListener("keydown", press);
      const busy = event.target.closest?.("input, textarea, select, [contenteditable], [role=tab], [role=dialog]");
      const pressed = event.key === " " && event.target.closest?.("button, a, summary");
      const plain = !(event.ctrlKey || event.metaKey || event.altKey || event.shiftKey);
      if (!keys[event.key] || !plain || busy || pressed || !root.offsetParent || !state.meta) return;
      event.preventDefault();
      keys[event.key]();
    }
    within.addEventListener("keydown", press);
    return { select, peek, refresh };
  }

  // -- all together -------------------------------------------------------------------------------

  // Keep asking what is new, one question at a time, and show each update. `extras` add parts of their own to question
  // and answer: { question(), answer(update, state, show) }. `sidePanel(hooks)` gives { update, reveal }. Keys and hints
  // are those of all that is `within`; `pace(update)` says how many ms later to ask again, or null: not until `hurry`.
  // With the address of a `stream` there is nothing to ask: updates come by themselves.
  function mount(root, ask, extras = [], sidePanel = null, { within = document, pace = null, stream = "" } = {}) {
    const state = labkit.createState(), live = { paused: false, speed: null, failure: "" };
    const hooks = {
      select: (next) => chosen.select(next), focus: (request) => show.focus(request), peek: (...at) => chosen.peek(...at),
    };
    const show = pictures(root, state, hooks, within), clock = clockControls(root, ask, live);
    Object.assign(live, { toggle: clock.toggle, step: clock.step });
    const side = sidePanel ? sidePanel(state, hooks) : { update() {}, reveal() {} };
    const chosen = selection(root, ask, state, live, show, side, within);
    const fly = labkit.flights(show.canvases);
    show.select = hooks.select;
    const line = root.querySelector(".lk-summary"), spoken = root.querySelector(".lk-spoken");
    const numbers = [...root.querySelectorAll("[data-number]")];
    const returns = []; // who is told when the other side is there again
    let paused = false, said = 0, timer = 0, asking = false, eagerUntil = 0, following = Boolean(stream);

    function take(update) {
      const { feed, tables, pending } = state, { pictures, plan } = update, before = state.plan?.key ?? 0;
      const fresh = labkit.apply(state, pictures);
      if (fresh) labkit.land(state, pictures.full ? [] : tables);
      const come = labkit.takeFar(state, pictures);
      clock.show(update.live);
      if (plan.key !== before && (plan.plan || !plan.key)) labkit.lookAhead(state, plan.key, plan.plan);
      const planned = (state.plan?.key ?? 0) !== before;
      if (pictures.full) {
        tellFacts(state, within);
        root.querySelector(".lk-squares").textContent = labkit.squareWords(state);
        root.classList.toggle("lk-drafting", Boolean(state.speculative));
        show.restyle();
        if (state.feed !== feed) chosen.select({});
      }
      if (live.paused !== paused) side.reveal(live.paused ? "step" : "");
      ({ paused } = live);
      for (const extra of extras) extra.answer(update, state, show);
      const woken = update.busy !== state.busy || Boolean(update.lab) || pending !== state.pending;
      state.busy = update.busy;
      if (!fresh && !pictures.full && !planned && !woken) return;
      root.classList.toggle("lk-cold", !state.steps.length && !state.plan && !state.busy);
      const words = labkit.numberWords(state);
      for (const item of numbers) item.querySelector("dd").textContent = words[item.dataset.number];
      chosen.refresh();
      for (const canvas of Object.values(show.canvases)) {
        canvas.setAttribute("aria-label", `${canvas.dataset.name}. ${line.textContent}`);
      }
      if (!update.busy || Date.now() - said > 4000) { // to be heard now and then, not ten times a second
        spoken.textContent = line.textContent;
        said = Date.now();
      }
      if (fresh && !pictures.full) fly(state, state.palette);
      labkit.carry(show.canvases, state, come);
    }

    // One question at a time. The longer an answer takes, the longer the pause: a busy lab is asked less.
    async function pull() {
      if (asking) return;
      let wait = 1000;
      asking = true;
      try {
        if (!document.hidden && root.offsetParent) wait = await look();
      } finally {
        asking = false;
        if (root.isConnected && wait !== null) schedule(wait);
      }
    }

    // Ask and show; returns how long to wait before the next time.
    async function look() {
      const begin = performance.now(), question = { feed: state.feed, step: state.step, plan: state.plan?.key ?? 0 };
      for (const extra of extras) Object.assign(question, extra.question());
      const update = await ask("pull", question);
      if (following) return null; // the stream has begun meanwhile, with everything
      lost(!update);
      if (!update) return 1000;
      take(update);
      if (pace) return pace(update);
      const eager = (update.busy && !update.live.paused) || performance.now() < eagerUntil;
      return eager ? Math.max(50 + performance.now() - begin, update.every) : 400;
    }

    function schedule(wait) {
      if (following) return;
      clearTimeout(timer);
      timer = setTimeout(pull, wait);
    }

    function lost(whether) {
      const before = root.classList.contains("lk-lost");
      root.classList.toggle("lk-lost", whether);
      if (before && !whether) for (const listener of returns) listener();
    }

    // With the stream there is nothing to ask; without one, ask.
    function follows(whether) {
      following = whether;
      if (whether) clearTimeout(timer);
      else schedule(0);
    }

    // Something is about to happen: look now, and more often for a while.
    function hurry() {
      eagerUntil = performance.now() + 2000;
      schedule(0);
    }

    document.addEventListener("visibilitychange", hurry);
    for (const event of ["click", "keydown"]) root.addEventListener(event, hurry);
    if (following) labkit.follow(root, stream, { take, lost, follows });
    else schedule(0);
    return { state, live, show, hurry, select: hooks.select, onReturn: (listener) => returns.push(listener) };
  }

  // What the engine runs with, in a line: what was changed since the lab started stands out.
  function tellFacts(state, within = document) {
    const parts = labkit.settings(state.meta, state.speculative, state.changed).map(([words, changed]) => {
      return Object.assign(document.createElement(changed ? "b" : "span"), { textContent: words });
    });
    for (const facts of within.querySelectorAll(".lk-facts")) {
      facts.replaceChildren(...parts.flatMap((made, i) => (i ? [" \u00b7 ", made.cloneNode(true)] : [made.cloneNode(true)])));
    }
  }

  return { mount, tellFacts };
})());
