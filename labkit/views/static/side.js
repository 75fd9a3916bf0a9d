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
    function line({ request, label, color }, words, extra = "", pick = {}) {
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

    // What a line needs of a request that has a lane.
    const known = (request) => state.lanes.get(request) ?? { request, label: request, color: 0 };

    const heading = (words) => part("li", "lk-heading", words);
    const more = (blocks) => (blocks.length ? `+ ${labkit.count(blocks.length, "page")}: ${ranges(blocks)}` : "");
    const preempted = (tense) => (one) => line(one, `preempted: ${tense} ${labkit.count(one.num_blocks, "page")} back`);
    const total = (rows) => labkit.count(rows.reduce((sum, { tokens }) => sum + tokens, 0), "token");

    function showPlan(plan) {
      title.textContent = `Next: step ${plan.step}`;
      lead.textContent = plan.rows.length
        ? `Will compute ${total(plan.rows)} of a budget of ${state.meta.max_num_batched_tokens}, for ` +
          `${labkit.count(plan.rows.length, "request")}; ${labkit.count(plan.free, "page")} stay free.`
        : "Will compute nothing.";
      const items = plan.preempted.map(preempted("gives"));
      items.push(...plan.ended.map((ended) => line(ended, "cancelled")));
      for (const row of plan.rows) {
        const { request, drafts } = row, shared = plan.shared.find((one) => one.request === request);
        const found = shared ? `${shared.tokens} tokens found in pages ${ranges(shared.blocks)}` : "";
        const enters = plan.admitted.includes(request) ? "gets a seat: " : "";
        const extra = [found, more(row.taken)].filter(Boolean).join("; ");
        const made = line(row, enters + labkit.rowWords(row), extra);
        if (drafts.length) made.append(draftsOf("Drafts to check:", drafts));
        items.push(made);
      }
      if (plan.queue.length) items.push(heading("Will wait"));
      for (const one of plan.queue.slice(0, 50)) items.push(line(one, labkit.whyWords(state, one.request)));
      if (plan.evicted) items.push(heading(`${labkit.count(plan.evicted, "cached page")} forgotten to make room`));
      if (plan.held_back) items.push(heading("Drafts"), part("li", "lk-line", plan.held_back));
      list.replaceChildren(...items);
    }

    function showPast(facts) {
      title.textContent = `Step ${facts.step}`;
      lead.textContent = `Computed ${total(facts.rows)} for ${labkit.count(facts.rows.length, "request")} ` +
        `in ${labkit.seconds(facts.ms / 1000)}; ${labkit.count(facts.free, "page")} free after it.`;
      const items = facts.preempted.map(preempted("gave")), { step, blocked, queue } = facts;
      const sent = labkit.sentWords(state.steps.find((row) => row.step === step) ?? {});
      if (sent) lead.textContent += ` ${sent[0].toUpperCase()}${sent.slice(1)}.`;
      for (const row of facts.rows) {
        const { request, text, drafts } = row, end = facts.ended.find((one) => one.request === request);
        const blocks = facts.tables.find((table) => table.request === request)?.blocks;
        const returned = facts.returned.find((one) => one.request === request);
        const did = labkit.rowWords(row) + (text ? ` → “${text}”` : "") + (end ? ` and ended (${end.reason})` : "");
        const held = blocks ? `${labkit.count(blocks.length, "page")}: ${ranges(blocks)}` : "";
        const back = returned ? `; gave back ${ranges(returned.blocks)}, because drafts were wrong` : "";
        const made = line(row, did, held + back, { step });
        if (drafts.length) made.append(draftsOf("Drafted:", drafts, row.accepted));
        items.push(made);
      }
      if (queue.length) items.push(heading("Waited"));
      queue.slice(0, 50).forEach((one, place) => {
        const first = blocked?.request === one.request ? `first in line: ${blocked.reason}` : "";
        items.push(line(one, first || `number ${place + 1} of ${queue.length}`, "", { step }));
      });
      if (facts.held_back) items.push(heading("Drafts"), part("li", "lk-line", facts.held_back));
      list.replaceChildren(...items);
    }

    // Drafted tokens, of which so many were accepted; the others are struck through.
    function draftsOf(words, tokens, accepted = tokens.length) {
      const made = part("p", "lk-extra lk-guesses", words);
      tokens.forEach((token, place) => made.append(part(place < accepted ? "span" : "s", "lk-token", visible(token))));
      return made;
    }

    function showBlock(facts) {
      title.textContent = `Page ${facts.block}`;
      const owned = facts.owners.length, last = facts.last && `request ${facts.last.request}, as page ${facts.last.position} of its table`;
      lead.textContent = owned > 1 ? `Shared by ${owned} requests: they begin with the same tokens.`
        : owned ? `Owned by one request.${facts.cached ? " It is full, and in the prefix cache." : ""}`
        : facts.cached ? `Only cached: free to take, but its tokens are still known. Held last by ${last || "nobody"}.`
        : `Free.${last ? ` Held last by ${last}.` : ""}`;
      if (facts.begins) lead.textContent += ` It holds the ${labkit.beginsWords(facts.begins)}.`;
      const items = facts.owners.map(({ request, position, filled }) => {
        return line(known(request), `block ${position} of its table, ${filled} of ${state.meta.block_size} tokens filled`);
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
      const items = state.queue.slice(0, 50).map((request) => line(known(request), labkit.whyWords(state, request)));
      if (items.length) items.unshift(heading("Waiting"));
      list.replaceChildren(...items);
    }

    // Show the `facts` of a past step or of a block, if there are any, else the plan, else who waits.
    function update(facts, error = "") {
      const key = facts ? JSON.stringify([facts.step, facts.block, facts.owners, facts.tokens])
        : state.plan ? `plan ${state.plan.key}` : `${state.step} ${state.queue.join(" ")}`;
      if (key !== shown) {
        shown = key;
        const top = list.scrollTop;
        if (facts?.owners) showBlock(facts);
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
      const fresh = state.events.filter((event) => event.step > logged);
      if (fresh.length) logged = fresh.at(-1).step;
      for (const event of fresh) {
        const { request, step } = event, words = labkit.eventWords(event);
        const made = request ? line(known(request), words, "", { step }) : part("li", "lk-line lk-alone", words);
        made.prepend(part("span", "lk-when", String(step)));
        made.dataset.kind = event.kind;
        log.prepend(made);
      }
      while (log.children.length > 200) log.lastElementChild.remove();
      quiet.hidden = log.children.length > 0;
    }

    return { update };
  }

  const visible = (token) => token.replaceAll("\n", "↵") || "·";

  // Block numbers, a run of them as one: 3–5, 9.
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
