// What one more request costs those that run: a line for each newcomer, the latest first, in a box of its own. The lab
// measures and words it, once; a line that has its verdict does not change any more.
Object.assign(labkit, (() => {
  const { part } = labkit;
  const ASKED = "long"; // the scenario behind the question
  const RUNS = "It runs by itself: six answers begin, a short request joins them, then a long one. What each costs the others is said here.";

  // Draws into `root`, a box that is hidden while there is nothing to say. Call what it returns after each change.
  function joins(root, state, hooks) {
    const list = root.querySelector("ul"), note = root.querySelector(".lk-joins-note");
    let shown = "", closed = "", feed = "", before = []; // `before`: what was said of an engine that was restarted since

    root.querySelector(".lk-joins-close").addEventListener("click", () => {
      closed = shown;
      root.hidden = true;
    });

    const isOwn = ({ requests }) => requests.some((request) => state.presets.has(request));

    const isOld = ({ step }) => state.playedAfter !== null && step <= state.playedAfter; // of what was played before

    function line(row, old) {
      const made = part("li", "lk-join-line"), mark = part("span", "lk-name");
      made.classList.toggle("lk-own", !old && isOwn(row));
      made.classList.toggle("lk-old", old);
      made.dataset.request = row.requests[0];
      mark.style.setProperty("--lk-whose", state.palette[row.color % state.palette.length]);
      made.append(mark);
      if (row.verdict) made.append(part("strong", "", `${row.verdict}:`), " ");
      made.append(row.story);
      if (!old) made.addEventListener("click", () => hooks.select({ request: row.requests[0] }));
      return made;
    }

    return () => {
      const asked = state.played === ASKED && state.playedAfter !== null && state.playedFeed === state.feed;
      if (feed !== state.feed) {
        before = list.rows ?? [];
        feed = state.feed;
      }
      if (state.joins.length || asked || (state.played && state.played !== ASKED)) before = [];
      const waits = asked && !state.joins.some((row) => row.verdict && isOwn(row) && !isOld(row)) && (state.busy || !state.steps.length);
      note.textContent = waits ? RUNS : before.length ? "Before the engine was restarted:" : "";
      note.hidden = !note.textContent;
      const rows = before.length ? before : state.joins;
      const key = JSON.stringify([rows, before.length, state.playedAfter, rows.map(isOwn)]);
      if (key !== shown) {
        shown = key;
        list.rows = rows.filter(({ verdict }) => verdict);
        list.replaceChildren(...rows.map((row) => line(row, before.length > 0 || isOld(row))).reverse());
      }
      root.hidden = !(rows.length || waits) || (shown === closed && !waits); // closed until there is more to say
      const { request } = state.selected;
      for (const made of list.children) made.classList.toggle("lk-hot", request !== undefined && made.dataset.request === request);
    };
  }

  return { joins };
})());
