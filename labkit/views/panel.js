// The pictures on a page: canvases that follow the pointer, the engine's clock, and the words for it all.
// What people typed is only ever set as textContent. `ask(name, argument)` reaches the engine's side.
Object.assign(labkit, (() => {
  const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

  // -- words --------------------------------------------------------------------------------------

  // What the engine runs with, in a line.
  function settings(meta) {
    const pool = `${count(meta.num_blocks, "page")} of ${count(meta.block_size, "token")}`;
    const budget = `${count(meta.max_num_batched_tokens, "token")} a step`;
    const where = meta.dtype && `${meta.dtype} on ${meta.device}`;
    const facts = [meta.model, where, pool, count(meta.max_num_seqs, "seat"), budget, meta.scheduler];
    return facts.filter(Boolean).join(" · ");
  }

  // The pictures in a sentence or two: what they show, for those who do not see them.
  function summary(state) {
    const now = labkit.latest(state), { meta } = state;
    const pool = count(meta.num_blocks, "page");
    const size = count(meta.block_size, "token"), seats = count(meta.max_num_seqs, "seat");
    if (!now) return `Idle. ${pool} of ${size}, all free; ${seats}.`;
    const counts = { free: 0, cached: 0, owned: 0, shared: 0 };
    for (let block = 0; block < meta.num_blocks; block++) counts[labkit.pageKind(state, block)] += 1;
    const used = counts.owned + counts.shared;
    const people = `${state.tables.length} running, ${now.waiting} waiting`;
    const parts = [`Step ${now.step}: ${people}, ${used} of ${pool} in use`];
    if (counts.shared) parts.push(`${counts.shared} shared`);
    if (counts.cached) parts.push(`${counts.cached} cached`);
    const why = now.blocked ? ` Request ${now.blocked[0]} waits: ${now.blocked[1]}.` : "";
    return `${parts.join(", ")}.${why}`;
  }

  function pageWords(state, block) {
    const kind = labkit.pageKind(state, block), owners = state.owners.get(block) || [];
    const size = state.meta.block_size;
    const lines = [`Block ${block}: ${kind === "cached" ? "cached and free" : kind}`];
    for (const { request, position } of owners.slice(0, 6)) {
      lines.push(`request ${request}, block ${position} of its table`);
    }
    if (owners.length > 6) lines.push(`and ${count(owners.length - 6, "more request")}`);
    const filled = Math.max(0, ...owners.map((owner) => owner.filled));
    if (owners.length) lines.push(`${filled} of ${count(size, "token")} filled`);
    const until = owners.length ? "" : " until someone needs the page";
    if (labkit.isCached(state, block)) lines.push(`in the prefix cache${until}`);
    return lines;
  }

  function laneWords(state, lane, step) {
    const lines = [`Request ${lane.id}, step ${step}`];
    for (const span of lane.spans) {
      if (step < span.from || step > span.to) continue;
      const steps = span.from === span.to ? "" : ` since step ${span.from}`;
      const tokens = count(span.tokens, "token");
      if (span.kind === "p") lines.push(`prefill: ${tokens} at once`);
      if (span.kind === "c") lines.push(`a chunk of its prefill: ${tokens}${steps}`);
      if (span.kind === "d") lines.push(`decode: ${tokens}${steps}`);
      if (span.kind === "i") lines.push(`idle: holds a seat, computes nothing${steps}`);
      if (span.kind === "x") lines.push(`preempted: gave ${count(span.tokens, "page")} back`);
      if (span.kind === "w") lines.push(`waiting${steps}`);
    }
    const blocked = state.steps.find((row) => row.step === step)?.blocked;
    if (blocked && blocked[0] === lane.id) lines.push(`because ${blocked[1]}`);
    if (lane.prompt) lines.push(`prompt of ${count(lane.prompt, "token")}`);
    if (lane.ended >= 0 && step >= lane.ended) lines.push(`ended in step ${lane.ended}: ${lane.reason}`);
    return lines;
  }

  function meterWords(state, step) {
    const place = state.steps.findIndex((row) => row.step === step);
    if (place < 0) return [];
    const row = state.steps[place], rate = labkit.rates(state.steps)[place];
    const used = labkit.percent(row.used / state.meta.num_blocks);
    return [
      `Step ${step}: ${(row.seconds * 1000).toPrecision(3)} ms`,
      `${count(row.computed, "token")} computed, ${row.sampled} generated`,
      `${labkit.short(rate)} tokens/s over the last 8 steps`,
      `${row.used} of ${count(state.meta.num_blocks, "page")} in use (${used})`,
      `${row.running} running, ${row.waiting} waiting`,
    ];
  }

  // -- pictures -----------------------------------------------------------------------------------

  function pictures(root, state) {
    const canvases = {};
    for (const name of ["pages", "timeline", "meters"]) {
      canvases[name] = root.querySelector(`canvas[data-picture="${name}"]`);
    }
    const tip = root.querySelector(".lk-tip");
    const listeners = [];
    let theme = null, due = false;

    function draw() {
      due = false;
      if (!state.meta || !root.isConnected) return;
      theme ??= labkit.themeOf(root, state);
      const most = Math.max(120, Math.min(280, window.innerHeight * 0.22));
      canvases.pages.style.height = `${labkit.pagesHeight(state, canvases.pages.clientWidth, most)}px`;
      paint("pages", labkit.drawPages);
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
      tip.hidden = !lines.length;
      const row = (line) => Object.assign(document.createElement("div"), { textContent: line });
      tip.replaceChildren(...lines.map(row));
      if (lines.length) place(tip, x, y);
      if (!changed) return;
      redraw();
      for (const listener of listeners) listener(next.request);
    }

    const finders = {
      pages: (width, height, x, y) => {
        const block = labkit.blockAt(state, width, height, x, y);
        if (block === undefined) return [{}, []];
        const owners = state.owners.get(block) || [];
        return [{ block, request: owners[0]?.request }, pageWords(state, block)];
      },
      timeline: (width, height, x, y) => {
        const lane = labkit.laneAt(state, width, height, y), step = labkit.stepAt(state, width, x);
        const inside = lane && step !== undefined && step >= lane.arrived && (lane.ended < 0 || step <= lane.ended);
        if (inside) return [{ request: lane.id, step }, laneWords(state, lane, step)];
        return [{ request: lane?.id, step }, lane ? [`Request ${lane.id}`] : []];
      },
      meters: (width, height, x) => {
        const step = labkit.stepAt(state, width, x);
        return [{ step }, step === undefined ? [] : meterWords(state, step)];
      },
    };
    for (const [name, canvas] of Object.entries(canvases)) {
      const look = (event) => {
        if (!state.meta) return;
        const [next, lines] = finders[name](canvas.clientWidth, canvas.clientHeight, event.offsetX, event.offsetY);
        hover(next, lines, event.clientX, event.clientY);
      };
      canvas.addEventListener("pointermove", look);
      canvas.addEventListener("pointerdown", look); // a finger does not hover
      canvas.addEventListener("pointerleave", () => hover({}, [], 0, 0));
    }
    new ResizeObserver(redraw).observe(root);
    new MutationObserver(restyle).observe(document.body, { attributes: true, attributeFilter: ["class"] });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);
    const focus = (request) => hover(request === undefined ? {} : { request }, [], 0, 0);
    return { redraw, restyle, focus, onHover: (listener) => listeners.push(listener), canvases };
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
      const page = ["free", "cached", "owned", "shared"].includes(kind);
      if (page) labkit.drawPage(ctx, sample, theme, 0, 0, height, kind, owners);
      else labkit.drawSpan(ctx, theme, kind, theme.palette[0], 0, 0, width, height);
    }
  }

  // -- the clock ----------------------------------------------------------------------------------

  function clockControls(root, ask, live) {
    const [pause, step, speed] = [".lk-pause", ".lk-step", ".lk-speed"].map((name) => root.querySelector(name));
    const order = (action, value = null) => ask("control", { action, value }).then(show);
    pause.addEventListener("click", () => order(live.paused ? "resume" : "pause"));
    step.addEventListener("click", () => order("step"));
    speed.addEventListener("change", () => order("speed", speed.value ? Number(speed.value) : null));
    function show(news) {
      if (!news) return;
      Object.assign(live, news);
      pause.textContent = live.paused ? "Resume" : "Pause";
      pause.setAttribute("aria-pressed", String(live.paused));
      root.classList.toggle("lk-paused", live.paused);
      if (document.activeElement !== speed) choose(live.speed === null ? "" : String(live.speed));
      const notice = root.querySelector(".lk-failure");
      notice.hidden = !live.failure;
      notice.textContent = live.failure ? `The engine stopped: ${live.failure}. Restart the lab to go on.` : "";
    }
    function choose(value) {
      const known = [...speed.options].some((option) => option.value === value);
      if (!known) speed.add(new Option(`${value} steps/s`, value));
      speed.value = value;
    }
    return show;
  }

  // -- all together -------------------------------------------------------------------------------

  // Keep asking what is new, one question at a time, and show it. `extra` adds its own part to question and
  // answer: { question(), answer(news) }.
  function mount(root, ask, extra = null) {
    const state = labkit.createState(), live = { paused: false, speed: null, failure: "" };
    const show = pictures(root, state), showClock = clockControls(root, ask, live);
    const line = root.querySelector(".lk-summary"), spoken = root.querySelector(".lk-spoken");
    const facts = document.querySelector(".lk-facts");
    let said = 0, timer = 0, asking = false, eagerUntil = 0;

    function take(news) {
      const fresh = labkit.apply(state, news.pictures);
      showClock(news.live);
      if (news.pictures.full) {
        if (facts) facts.textContent = settings(state.meta);
        show.restyle();
      }
      if (extra) extra.answer(news, state, show);
      if (!fresh && !news.pictures.full) return;
      root.classList.toggle("lk-cold", !state.steps.length);
      line.textContent = summary(state);
      for (const canvas of Object.values(show.canvases)) {
        canvas.setAttribute("aria-label", `${canvas.dataset.name}. ${line.textContent}`);
      }
      if (!news.busy || Date.now() - said > 4000) { // to be heard now and then, not ten times a second
        spoken.textContent = line.textContent;
        said = Date.now();
      }
      show.redraw();
    }

    // One question at a time. The longer an answer takes, the longer the pause: a busy lab is asked less.
    async function pull() {
      if (asking) return;
      let wait = 1000;
      asking = true;
      try {
        if (!document.hidden) wait = await look();
      } finally {
        asking = false;
        if (root.isConnected) schedule(wait);
      }
    }

    // Ask and show; returns how long to wait before the next time.
    async function look() {
      const begin = performance.now();
      const news = await ask("pull", { feed: state.feed, after: state.step, ...(extra ? extra.question() : {}) });
      root.classList.toggle("lk-lost", !news);
      if (!news) return 1000;
      take(news);
      const eager = (news.busy && !news.live.paused) || performance.now() < eagerUntil;
      return eager ? 50 + performance.now() - begin : 400;
    }

    function schedule(wait) {
      clearTimeout(timer);
      timer = setTimeout(pull, wait);
    }

    // Something is about to happen: look now, and more often for a while.
    function hurry() {
      eagerUntil = performance.now() + 2000;
      schedule(0);
    }

    document.addEventListener("visibilitychange", hurry);
    root.addEventListener("click", hurry);
    schedule(0);
    return { state, live, show, hurry };
  }

  return { mount, summary, pageWords, laneWords, meterWords, count };
})());
