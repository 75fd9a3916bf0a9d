// Prompts that another engine computes: its pool beside this one's, where each request is, and pages that arrive.
// Nothing of it is there for an engine that computes its own prompts.
Object.assign(labkit, (() => {
  const SHOWN = 1200; // ms for which pages that arrived are marked
  const MOST = 12; // pages of a request that are seen flying
  const still = matchMedia("(prefers-reduced-motion: reduce)");

  // Take in where requests are, after `apply`. Returns the pages that have come since: { from, to, color }.
  function takeFar(state, sent) {
    if (sent.full) Object.assign(state, { far: null, elsewhere: new Map(), left: new Map(), carried: [] });
    if (!sent.far) return [];
    const { far, elsewhere } = labkit.read("Pictures", { far: sent.far, elsewhere: sent.elsewhere });
    const before = state.elsewhere, come = [];
    state.far = far;
    state.elsewhere = new Map(elsewhere.map((one) => [one.request, one]));
    for (const { request, computed, blocks } of far.tables) { // whole pages travel
      state.left.set(request, blocks.slice(0, Math.floor(computed / state.meta.block_size)));
    }
    for (const { request, blocks } of sent.full ? [] : state.tables) {
      const from = state.left.get(request) ?? [];
      if (!before.has(request) && !from.length) continue;
      const color = state.lanes.get(request)?.color ?? 0;
      from.slice(0, blocks.length).forEach((block, i) => come.push({ from: block, to: blocks[i], color }));
      if (!state.elsewhere.has(request)) state.left.delete(request);
    }
    for (const id of state.left.keys()) if (state.lanes.get(id)?.ended >= 0) state.left.delete(id); // it never came
    const now = performance.now();
    state.carried = state.carried.filter(({ until }) => until > now).concat(come.map((one) => ({ ...one, until: now + SHOWN })));
    return come;
  }

  // The other pool, as a state that the pictures of a pool can draw.
  function farState(state) {
    const { num_blocks, tables } = state.far, { request } = state.hover;
    const looks = new Map([...state.elsewhere, ...state.lanes]);
    return { ...state, meta: { ...state.meta, num_blocks }, tables, lanes: looks, plan: null, past: null, landed: [],
             owners: labkit.ownersOf(tables, state.meta.block_size), cached: new Uint8Array(Math.ceil(num_blocks / 8)),
             hover: { request }, selected: { request: state.selected.request } };
  }

  function drawFar(ctx, state, theme, width, height) {
    labkit.drawBlocks(ctx, farState(state), theme, width, height);
  }

  // Pages that have just come are framed.
  function drawCarried(ctx, state, theme, width, height) {
    const grid = labkit.blockGrid(state, width, height), now = performance.now();
    if (state.past || grid.per > 1) return;
    for (const { to, until } of state.carried ?? []) {
      if (until < now) continue;
      const [x, y] = labkit.corner(grid, to), size = grid.size - grid.gap;
      labkit.outline(ctx, x - 1, y - 1, size + 2, size + 2, theme.ink, 2);
    }
  }

  // Let pages fly from one picture to the other.
  function carry(canvases, state, come) {
    if (!come.length || still.matches || document.hidden || !canvases.far.clientWidth) return;
    const places = [[canvases.far, farState(state)], [canvases.pages, state]].map(([canvas, of]) => {
      const grid = labkit.blockGrid(of, canvas.clientWidth, canvas.clientHeight), { left, top } = canvas.getBoundingClientRect();
      const zoom = canvas.currentCSSZoom ?? 1, half = (grid.size - grid.gap) / 2;
      return { grid, at: (block) => labkit.corner(grid, block).map((side, i) => [left, top][i] + zoom * (side + half)) };
    });
    if (places.some(({ grid }) => grid.per > 1)) return; // a square stands for several pages
    const [there, here] = places;
    for (const { from, to, color } of come.slice(0, MOST)) {
      labkit.fly(there.at(from), here.at(to), state.palette[color % state.palette.length]);
    }
  }

  // Where a request is, in a sentence; "" if it is here.
  function placeWords(state, id) {
    const one = state.elsewhere?.get(id);
    if (!one) return "";
    if (one.place === "unsent") return "Not sent yet: waits for a seat and for room for its pages here.";
    if (one.place === "arriving") return `Its pages are on their way from the prefill engine: ${labkit.size(one.amount)}.`;
    const held = state.far.tables.find(({ request }) => request === id);
    return `In the prefill engine: ${held?.computed ?? 0} of ${labkit.count(one.amount, "token")} of its prompt computed.`;
  }

  // The other engine in a sentence; "" if there is none.
  function farWords(state) {
    if (!state.far) return "";
    const of = (place) => [...state.elsewhere.values()].filter((one) => one.place === place);
    const owned = new Set(state.far.tables.flatMap(({ blocks }) => blocks)).size, arriving = of("arriving");
    const bytes = arriving.reduce((sum, { amount }) => sum + amount, 0);
    return ` Prefill engine: ${of("there").length} there, ${owned} of ${labkit.count(state.far.num_blocks, "page")} in use; `
      + `${of("unsent").length} unsent, ${arriving.length} arriving${bytes ? ` (${labkit.size(bytes)} in flight)` : ""}.`;
  }

  return { takeFar, farState, drawFar, drawCarried, carry, placeWords, farWords };
})());
