// One card per request, newest first. Everything typed or generated is set as textContent, never as markup.
Object.assign(labkit, (() => {
  const KEEP = 100; // cards on the page, and more only while that many requests run
  const ENDINGS = {
    stop: "done",
    length: "done: reached max tokens",
    abort: "cancelled",
    error: "failed",
    gone: "over: the lab has forgotten how it ended",
  };

  // Draws into `root`; gives `labkit.mount` what it needs to ask for cards and to show them.
  function cards(root, ask) {
    const list = root.querySelector(".lk-list"), none = root.querySelector(".lk-none");
    const cancelAll = root.querySelector(".lk-cancel-all"), filter = root.querySelector(".lk-filter");
    const who = root.querySelector(".lk-who-name");
    const byId = new Map();
    let since = -1, colors = () => "", focus = () => {}, select = () => {};

    cancelAll.addEventListener("click", () => ask("cancel", { request: null }));
    filter.addEventListener("change", () => root.classList.toggle("lk-only-mine", filter.checked));
    who.addEventListener("change", rename);
    who.value = recall();

    function rename() {
      try { localStorage.setItem("labkit-name", who.value); } catch { /* a browser that keeps nothing */ }
      ask("rename", { name: who.value });
    }

    function recall() {
      try { return localStorage.getItem("labkit-name") || ""; } catch { return ""; }
    }

    function question() {
      const open = {};
      for (const [id, card] of byId) if (!card.reason) open[id] = card.length;
      return { cards: { since, open } };
    }

    function answer(news, state, show) {
      const { reset, since: latest, items, gone } = news.cards;
      if (reset) {
        byId.clear();
        list.replaceChildren();
        state.mine.clear();
      }
      since = latest;
      if (news.pictures.full) {
        colors = (index) => state.palette[index % state.palette.length];
        ({ focus, select } = show);
        if (!root.dataset.linked) show.onHover((request) => mark(request));
        root.dataset.linked = "yes";
      }
      for (const item of items) update(byId.get(item.id) || create(item, state), item);
      for (const id of gone) if (byId.has(id)) end(byId.get(id), "gone");
      for (const [id, card] of byId) if (!card.reason) explain(card, state, id);
      none.hidden = byId.size > 0;
      cancelAll.hidden = ![...byId.values()].some((card) => card.mine && !card.reason);
      evict();
    }

    // Drop the oldest finished cards, other people's before one's own. What still runs stays in sight.
    function evict() {
      const finished = [...byId].filter(([, card]) => card.reason);
      const order = [...finished.filter(([, card]) => !card.mine), ...finished.filter(([, card]) => card.mine)];
      for (const [id, card] of order.slice(0, Math.max(0, byId.size - KEEP))) {
        card.element.remove();
        byId.delete(id);
      }
    }

    function create(item, state) {
      const element = document.createElement("article");
      element.className = "lk-card";
      element.dataset.request = item.id;
      element.tabIndex = 0;
      const part = (tag, name, words = "") => {
        const made = document.createElement(tag);
        made.className = name;
        made.textContent = words;
        return made;
      };
      const head = part("header", "lk-card-head");
      const name = part("span", "lk-name", item.label);
      name.style.setProperty("--lk-whose", colors(item.color));
      const status = part("span", "lk-status"), tokens = part("span", "lk-tokens");
      const whose = item.mine ? "yours" : item.name; // a name that somebody chose: text like any other
      head.append(name, ...(whose ? [part("span", "lk-you", whose)] : []), status, tokens);
      const body = part("p", "lk-text"), why = part("p", "lk-why");
      const card = { element, status, tokens, body, why, mine: item.mine, max: item.max_tokens };
      Object.assign(card, { text: "", length: 0, reason: "" });
      if (item.mine) {
        element.classList.add("lk-mine");
        state.mine.add(item.id);
        card.cancel = part("button", "lk-cancel", "Cancel");
        card.cancel.type = "button";
        card.cancel.setAttribute("aria-label", `Cancel request ${item.label}`);
        card.cancel.addEventListener("click", () => {
          card.cancel.disabled = true;
          ask("cancel", { request: item.id });
        });
        head.append(card.cancel);
      }
      const prompt = part("p", "lk-prompt", item.prompt);
      prompt.title = item.prompt; // it is cut off after a line
      element.append(head, prompt, why, body);
      element.addEventListener("click", (event) => event.target.closest("button") || select({ request: item.id }));
      element.addEventListener("pointerenter", () => focus(item.id));
      element.addEventListener("pointerleave", () => focus(undefined));
      element.addEventListener("focusin", () => focus(item.id));
      element.addEventListener("focusout", () => focus(undefined));
      list.prepend(element);
      byId.set(item.id, card);
      return card;
    }

    // `at` and `length` count characters as the engine does; only the new end of the text was sent.
    function update(card, item) {
      const follows = card.body.scrollTop + card.body.clientHeight >= card.body.scrollHeight - 4;
      card.text = item.at === 0 ? item.text : card.text + item.text;
      card.length = item.length;
      if (card.body.textContent !== card.text) card.body.textContent = card.text;
      if (item.error) card.body.textContent = card.text ? `${card.text}\n${item.error}` : item.error;
      card.tokens.textContent = `${item.tokens} / ${card.max}`;
      card.tokens.title = `${item.tokens} tokens generated, ${card.max} at most`;
      if (item.reason) return end(card, item.reason);
      card.status.textContent = card.element.dataset.status ||= "waiting"; // until `explain` knows better
      if (follows) card.body.scrollTop = card.body.scrollHeight;
    }

    // What it does, and why it does not run if it waits.
    function explain(card, state, id) {
      const seated = state.tables.some(([name]) => name === id);
      const lost = !seated && state.lanes.get(id)?.spans.some((span) => span.kind === "x");
      const status = seated ? "running" : lost ? "preempted" : "waiting";
      if (card.element.dataset.status !== status) card.status.textContent = card.element.dataset.status = status;
      const why = labkit.whyWords(state, id) || (status === "waiting" ? "Waits for its turn." : "");
      if (card.why.textContent !== why) card.why.textContent = why;
    }

    function end(card, reason) {
      card.why.textContent = "";
      card.reason = card.element.dataset.status = reason;
      card.status.textContent = ENDINGS[reason];
      if (card.cancel) card.cancel.remove();
    }

    // Ask for all cards anew.
    function forget() {
      since = -1;
    }

    function mark(request) {
      for (const [id, card] of byId) card.element.classList.toggle("lk-hot", id === request);
    }

    return { question, answer, forget, rename, byId };
  }

  return { cards };
})());
