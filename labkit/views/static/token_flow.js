// A token is seen going into its page: from the end of its request's row in the batch to its place in the KV cache.
// The place stays marked until the next token. At full speed, and for readers who want no motion, there is the mark alone.
Object.assign(labkit, (() => {
  const SLOW = 300; // ms between two pictures, from which on a token is worth a flight
  const MOST = 8; // flights at a time
  const still = matchMedia("(prefers-reduced-motion: reduce)");

  // Where each request's latest token lies, if its table grew by one token since `before`, the tables then.
  function land(state, before) {
    const known = new Map(before.map(({ request, computed }) => [request, computed])), size = state.meta.block_size;
    state.landed = [];
    for (const { request, computed, blocks } of state.tables) {
      const last = computed - 1, block = blocks[Math.floor(last / size)];
      if (computed > 0 && block !== undefined && known.get(request) !== computed) {
        state.landed.push({ request, block, slot: last % size, grew: computed - (known.get(request) ?? 0) });
      }
    }
  }

  // Requests that have been handed in, and that no step has seen yet: they wait for the next one.
  function pendingLanes(state) {
    const next = state.step + 1;
    return state.pending.map((one) => ({ ...one, arrived: next, ended: -1, spans: [{ kind: "w", first: next, last: next, tokens: 0 }] }));
  }

  // The mark in a page, which `drawBlocks` asks for.
  function drawLanded(ctx, state, theme, grid) {
    if (state.past) return;
    const size = grid.size - grid.gap, width = Math.max(1.5, Math.min(3, size / state.meta.block_size));
    for (const { block, slot } of state.landed ?? []) {
      const [x, y] = corner(grid, block);
      labkit.box(ctx, x + (size * (slot + 1)) / state.meta.block_size - width, y, width, size, theme.ink);
    }
  }

  const corner = ({ columns, left, top, size }, block) => [left + (block % columns) * size, top + Math.floor(block / columns) * size];

  // `canvases` are those of the pictures. Call what this returns after each new picture.
  function flights(canvases) {
    let before = 0;
    return (state, palette) => {
      const now = performance.now(), slow = now - before > SLOW;
      before = now;
      if (!slow || still.matches || !state.landed || document.hidden) return;
      const { pages, timeline } = canvases, grid = labkit.blockGrid(state, pages.clientWidth, pages.clientHeight);
      if (grid.per > 1) return; // a square stands for several pages
      const rows = labkit.laneRows(state, timeline.clientWidth, timeline.clientHeight), time = labkit.clock(state, timeline.clientWidth);
      const zoom = pages.currentCSSZoom ?? 1; // of a projector: rectangles are of the screen, the rest is not
      const [from, to] = [timeline.getBoundingClientRect(), pages.getBoundingClientRect()];
      for (const { request, block, slot } of state.landed.slice(0, MOST)) {
        const row = rows.shown.findIndex((lane) => lane.request === request);
        if (row < 0) continue;
        const [x, y] = corner(grid, block), size = grid.size - grid.gap;
        const begin = [from.left + zoom * time.x(state.step + 1), from.top + zoom * (row + 0.5) * rows.pitch];
        const end = [to.left + zoom * (x + (size * (slot + 0.5)) / state.meta.block_size), to.top + zoom * (y + size / 2)];
        fly(begin, end, palette[rows.shown[row].color % palette.length]);
      }
    };
  }

  function fly(begin, end, color) {
    const dot = document.createElement("span");
    dot.className = "lk-flying";
    dot.setAttribute("aria-hidden", "true");
    dot.style.background = color;
    document.body.append(dot);
    const at = ([x, y]) => ({ transform: `translate(${x - 4}px, ${y - 4}px)` });
    dot.animate([at(begin), at(end)], { duration: 420, easing: "ease-in" }).finished.finally(() => dot.remove());
  }

  return { pendingLanes, land, drawLanded, flights, fly, corner };
})());
