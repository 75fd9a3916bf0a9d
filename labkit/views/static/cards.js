// One card per request, newest first. Everything typed or generated is set as textContent, never as markup.
Object.assign(labkit, (() => {
  const { part } = labkit;
  const KEEP = 100; // cards on the page, and more only while that many requests run
  const ENDINGS = {
    stop: "done",
    length: "done: reached max tokens",
    abort: "cancelled",
    error: "failed",
    gone: "over: the lab has forgotten how it ended",
  };

  // Draws into `root`, and gives `labkit.mount` what it needs to ask for cards and to show them. `isMine(item)` says
  // which cards are one's own.
  function cards(root, ask, isMine = () => true) {
    const list = root.querySelector(".lk-list"), none = root.querySelector(".lk-none");
    const cancelAll = root.querySelector(".lk-cancel-all"), filter = root.querySelector(".lk-filter");
    const who = root.querySelector(".lk-who-name");
    const byId = new Map();
    let since = -1, feed = "", pictures = null, colors = () => "", focus = () => {}, select = () => {};

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
      const unfinished = {};
      for (const [id, card] of byId) if (!card.reason) unfinished[id] = card.length;
      return { cards: since, unfinished };
    }

    function answer(update, state, show) {
      const { reset, since: latest, items, gone } = update.cards;
      pictures = state;
      if (reset && feed !== state.feed) {
        byId.clear();
        list.replaceChildren();
        for (const known of [state.mine, state.names, state.presets]) known.clear();
        since = -1;
      } else if (reset) { // all of them once more: those that are not among them are no more
        const there = new Set(items.map((item) => item.id));
        gone.push(...[...byId.keys()].filter((id) => !there.has(id) && !byId.get(id).reason));
      }
      ({ feed } = state);
      if (update.pictures.full) {
        colors = (index) => state.palette[index % state.palette.length];
        ({ focus, select } = show);
        if (!root.dataset.linked) show.onHover((request) => mark(request));
        root.dataset.linked = "yes";
      }
      for (const item of items) {
        if (byId.has(item.id)) grow(byId.get(item.id), item);
        else if (!(item.serial <= since)) grow(create(item), item); // else it was dropped before
      }
      since = latest;
      for (const id of gone) if (byId.has(id)) end(byId.get(id), "gone");
      for (const [id, card] of byId) if (!card.reason) explain(card, state, id);
      none.hidden = byId.size > 0;
      tellPending(state, show);
      offer();
      evict();
    }

    // Requests without a row in the batch: no step has run since they came. They get one at once.
    function tellPending(state, show) {
      const none = [...byId.values()].filter(({ reason, item }) => !reason && !state.lanes.has(item.id)).reverse();
      const pending = none.map(({ item }) => ({ request: item.id, label: item.label, color: item.color, prompt_tokens: 0 }));
      if (pending.length === state.pending.length && pending.every(({ request }, i) => request === state.pending[i].request)) return;
      state.pending = pending.reverse();
      show.redraw();
    }

    function offer() {
      cancelAll.hidden = ![...byId.values()].some((card) => card.mine && !card.reason);
    }

    // Drop the oldest finished cards, other people's before one's own. What still runs stays in sight.
    function evict() {
      const finished = [...byId].filter(([, card]) => card.reason);
      const order = [...finished.filter(([, card]) => !card.mine), ...finished.filter(([, card]) => card.mine)];
      for (const [id, card] of order.slice(0, Math.max(0, byId.size - KEEP))) {
        card.element.remove();
        byId.delete(id);
        pictures.names.delete(id);
      }
    }

    function create(item) {
      const element = document.createElement("article");
      element.className = "lk-card";
      element.dataset.request = item.id;
      element.tabIndex = 0;
      const head = part("header", "lk-card-head");
      const name = part("span", "lk-name", item.label);
      name.style.setProperty("--lk-whose", colors(item.color));
      const status = part("span", "lk-status"), tokens = part("span", "lk-tokens");
      const whose = part("span", "lk-you", item.name); // a name that somebody chose: text like any other
      whose.hidden = !item.name;
      head.append(name, whose, status, tokens);
      const body = part("p", "lk-text"), why = part("p", "lk-why");
      const card = { element, head, whose, status, tokens, body, why, item, mine: false, max: item.max_tokens };
      Object.assign(card, { text: "", length: 0, reason: "" });
      if (item.name) pictures.names.set(item.id, item.name);
      if (item.preset) pictures.presets.add(item.id);
      if (isMine(item)) claim(card);
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

    function claim(card) {
      const { id, label } = card.item;
      card.mine = true;
      card.element.classList.add("lk-mine");
      card.whose.textContent = "yours";
      card.whose.hidden = false;
      pictures.mine.add(id);
      if (card.reason) return; // it is over
      card.cancel = part("button", "lk-cancel", "Cancel");
      card.cancel.type = "button";
      card.cancel.setAttribute("aria-label", `Cancel request ${label}`);
      card.cancel.addEventListener("click", () => {
        card.cancel.disabled = true;
        ask("cancel", { request: id });
      });
      card.head.append(card.cancel);
    }

    // `at` and `length` count characters as the engine does; only the new end of the text was sent.
    function grow(card, item) {
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

    // What a request does, and why it does not run if it waits.
    function explain(card, state, id) {
      const seated = state.tables.some(({ request }) => request === id);
      const lost = !seated && state.lanes.get(id)?.spans.some((span) => span.kind === "x");
      const place = state.elsewhere?.get(id)?.place;
      const status = seated ? "running" : lost ? "preempted" : { there: "prefilling", arriving: "arriving" }[place] ?? "waiting";
      if (card.element.dataset.status !== status) card.status.textContent = card.element.dataset.status = status;
      const why = labkit.whyWords(state, id) || (status === "waiting" ? "Waits for its turn." : "");
      if (card.why.textContent !== why) card.why.textContent = why;
    }

    function end(card, reason) {
      card.why.textContent = "";
      card.reason = card.element.dataset.status = reason;
      card.status.textContent = ENDINGS[reason];
      if (card.element.contains(document.activeElement) || card.body.matches(":hover")) return;
      card.body.scrollTop = 0; // now it can be read from its beginning
      if (card.cancel) card.cancel.remove();
      if (card.text && !card.copy) card.head.append(card.copy = labkit.copyButton("Copy", () => card.text));
    }

    // Now it is known which cards are one's own.
    function recognise() {
      for (const card of byId.values()) if (!card.mine && isMine(card.item)) claim(card);
      offer();
    }

    function mark(request) {
      for (const [id, card] of byId) card.element.classList.toggle("lk-hot", id === request);
    }

    // How many cards of what people typed are here, and whether anybody's request is under way.
    function typed() {
      const all = [...byId.values()];
      return { cards: all.filter(({ item }) => !item.preset).length, running: all.some(({ reason }) => !reason) };
    }

    return { question, answer, recognise, rename, typed, byId };
  }

  return { cards };
})());
