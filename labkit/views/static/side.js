// Beside the pictures: one step in full (the next one while the engine is paused, or one that was clicked), and
// the log of what happened. Everything is set as textContent.
Object.assign(labkit, (() => {
  function part(tag, name, words = "") {
    const made = document.createElement(tag);
    made.className = name;
    made.textContent = words;
    return made;
  }

  function side(root, state, hooks) {
    const title = root.querySelector(".lk-step-title"), lead = root.querySelector(".lk-step-lead");
    const list = root.querySelector(".lk-step-list"), log = root.querySelector(".lk-log");
    const now = root.querySelector(".lk-now"), quiet = root.querySelector(".lk-log-none");
    let shown = "", logged = -1, feed = "";

    now.addEventListener("click", () => hooks.select({}));

    const name = (label, color) => {
      const made = part("span", "lk-name", label);
      made.style.setProperty("--lk-whose", state.palette[color % state.palette.length]);
      return made;
    };

    // A line that belongs to a request: pointing at it marks it everywhere, a click selects it.
    function line(request, label, color, words, extra = "", pick = {}) {
      const made = part("li", "lk-line"), button = part("button", "lk-line-button");
      button.type = "button";
      button.append(name(label, color), part("span", "lk-words", words));
      made.append(button);
      if (extra) made.append(part("p", "lk-extra", extra));
      made.dataset.request = request;
      made.addEventListener("pointerenter", () => hooks.focus(request));
      made.addEventListener("pointerleave", () => hooks.focus(undefined));
      button.addEventListener("click", () => hooks.select({ request, ...pick }));
      return made;
    }

    const heading = (words) => part("li", "lk-heading", words);
    const pages = (blocks) => (blocks.length ? `+ ${labkit.count(blocks.length, "page")}: ${ranges(blocks)}` : "");

    function showPlan(plan) {
      title.textContent = `Next: step ${plan.step}`;
      const tokens = plan.rows.reduce((sum, row) => sum + row[5], 0), { max_num_batched_tokens: budget } = state.meta;
      lead.textContent = plan.rows.length
        ? `Will compute ${labkit.count(tokens, "token")} of a budget of ${budget}, for ` +
          `${labkit.count(plan.rows.length, "request")}; ${labkit.count(plan.free, "page")} stay free.`
        : "Will compute nothing.";
      const items = plan.preempted.map(([id, label, color, blocks]) =>
        line(id, label, color, `preempted: gives ${labkit.count(blocks, "page")} back`));
      items.push(...plan.ended.map(([id, label, color]) => line(id, label, color, "cancelled")));
      for (const row of plan.rows) {
        const shared = plan.shared.find(([id]) => id === row[0]);
        const found = shared ? `${shared[1]} tokens found in pages ${ranges(shared[2])}` : "";
        const enters = plan.admitted.includes(row[0]) ? "gets a seat: " : "";
        const extra = [found, pages(row[6])].filter(Boolean).join("; ");
        const made = line(row[0], row[1], row[2], enters + labkit.rowWords(row), extra);
        if (row[9]?.length) made.append(guesses("Drafts to check:", row[9]));
        items.push(made);
      }
      if (plan.queue.length) items.push(heading("Will wait"));
      for (const [id, label, color] of plan.queue.slice(0, 50)) {
        items.push(line(id, label, color, labkit.whyWords(state, id)));
      }
      if (plan.evicted) items.push(heading(`${labkit.count(plan.evicted, "cached page")} forgotten to make room`));
      if (plan.held_back) items.push(heading("Drafts"), part("li", "lk-line", plan.held_back));
      list.replaceChildren(...items);
    }

    function showPast(facts) {
      title.textContent = `Step ${facts.step}`;
      const tokens = facts.rows.reduce((sum, row) => sum + row[5], 0);
      lead.textContent = `Computed ${labkit.count(tokens, "token")} for ${labkit.count(facts.rows.length, "request")} ` +
        `in ${labkit.seconds(facts.ms / 1000)}; ${labkit.count(facts.free, "page")} free after it.`;
      const ends = new Map(facts.ended.map(([id, , , reason]) => [id, reason]));
      const items = facts.preempted.map(([id, label, color, blocks]) =>
        line(id, label, color, `preempted: gave ${labkit.count(blocks, "page")} back`));
      for (const row of facts.rows) {
        const text = row[6] ? ` → “${row[6]}”` : "", end = ends.has(row[0]) ? ` and ended (${ends.get(row[0])})` : "";
        const table = facts.tables.find(([id]) => id === row[0]), back = facts.returned?.find(([id]) => id === row[0]);
        const held = table ? `${labkit.count(table[2].length, "page")}: ${ranges(table[2])}` : "";
        const given = back ? `; gave back ${ranges(back[1])}, for drafts were wrong` : "";
        const made = line(row[0], row[1], row[2], labkit.rowWords(row) + text + end, held + given, { step: facts.step });
        if (row[9]) made.append(guesses("Drafted:", row[9], row[8]));
        items.push(made);
      }
      if (facts.queue.length) items.push(heading("Waited"));
      facts.queue.slice(0, 50).forEach(([id, label, color], place) => {
        const first = facts.blocked && facts.blocked[0] === id ? `first in line: ${facts.blocked[1]}` : "";
        items.push(line(id, label, color, first || `number ${place + 1} of ${facts.queue.length}`, "", { step: facts.step }));
      });
      if (facts.held_back) items.push(heading("Drafts"), part("li", "lk-line", facts.held_back));
      list.replaceChildren(...items);
    }

    // Drafted tokens, of which so many were right; the others are struck through.
    function guesses(words, tokens, right = tokens.length) {
      const made = part("p", "lk-extra lk-guesses", words);
      tokens.forEach((token, place) => made.append(part(place < right ? "span" : "s", "lk-token", visible(token))));
      return made;
    }

    function showPage(facts) {
      title.textContent = `Page ${facts.block}`;
      const owned = facts.owners.length, last = facts.last && `request ${facts.last[0]}, as block ${facts.last[1]}`;
      lead.textContent = owned > 1 ? `Shared by ${owned} requests: they begin with the same tokens.`
        : owned ? `Owned by one request.${facts.cached ? " It is full, and in the prefix cache." : ""}`
        : facts.cached ? `Only cached: free to take, but its tokens are still known. Held last by ${last || "nobody"}.`
        : `Free.${last ? ` Held last by ${last}.` : ""}`;
      const items = facts.owners.map(([id, position, filled]) => {
        const lane = state.lanes.get(id);
        const words = `block ${position} of its table, ${filled} of ${state.meta.block_size} tokens filled`;
        return line(id, lane?.label ?? id, lane?.color ?? 0, words);
      });
      if (facts.tokens?.length) {
        const row = part("li", "lk-tokens-row");
        for (const token of facts.tokens) row.append(part("span", "lk-token", visible(token)));
        items.push(heading("Its tokens"), row);
      }
      list.replaceChildren(...items);
    }

    function showNothing() {
      title.textContent = "A step in full";
      lead.textContent = "Pause to see what the next step will do. Or click: a column of the batch shows that step, a " +
        "square of the KV cache shows who has the page and which tokens are in it.";
      const items = state.queue.slice(0, 50).map((id) => {
        const lane = state.lanes.get(id);
        return line(id, lane?.label ?? id, lane?.color ?? 0, labkit.whyWords(state, id));
      });
      if (items.length) items.unshift(heading("Waiting"));
      list.replaceChildren(...items);
    }

    // Show what is to be seen now: `facts` of a past step or of a page, if there are any.
    function update(facts, error = "") {
      const key = facts ? JSON.stringify([facts.step, facts.block, facts.owners, facts.tokens])
        : state.plan ? `plan ${state.plan.key}` : `${state.step} ${state.queue.join(" ")}`;
      if (key !== shown) {
        shown = key;
        const top = list.scrollTop;
        if (facts?.owners) showPage(facts);
        else if (facts) showPast(facts);
        else if (state.plan) showPlan(state.plan);
        else showNothing();
        list.scrollTop = top;
      }
      if (error) lead.textContent = error;
      now.hidden = !facts && !error;
      updateLog();
    }

    function updateLog() {
      if (feed !== state.feed) {
        feed = state.feed;
        logged = -1;
        log.replaceChildren();
      }
      const news = state.events.filter((event) => event.step > logged);
      if (news.length) logged = news.at(-1).step;
      for (const event of news) {
        const { request } = event, lane = state.lanes.get(request), words = labkit.eventWords(event);
        const made = request
          ? line(request, lane?.label ?? request, lane?.color ?? 0, words, "", { step: event.step })
          : part("li", "lk-line lk-alone", words);
        made.prepend(part("span", "lk-when", String(event.step)));
        made.dataset.kind = event.kind;
        log.prepend(made);
      }
      while (log.children.length > 200) log.lastElementChild.remove();
      quiet.hidden = log.children.length > 0;
    }

    return { update };
  }

  const visible = (token) => token.replaceAll("\n", "↵") || "·";

  // Page numbers, runs of them as one: 3–5, 9.
  function ranges(blocks) {
    const runs = [];
    for (const block of blocks) {
      const run = runs.at(-1);
      if (run && run[1] === block - 1) run[1] = block;
      else runs.push([block, block]);
    }
    const words = runs.slice(0, 12).map(([from, to]) => (from === to ? String(from) : `${from}–${to}`));
    return words.join(", ") + (runs.length > 12 ? ", …" : "");
  }

  return { side, part, ranges };
})());
