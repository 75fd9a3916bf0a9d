// Large pools. Above some thousand pages a picture of each would be slow and say nothing: it zooms out, and a cell
// stands for a region of the pool, so many pages side by side, and shows which share of them belongs to whom.
Object.assign(labkit, (() => {
  const CELLS = 4096; // that the picture of the pool has at most

  // How many pages a cell stands for: one, or more of a large pool.
  function perCell({ meta }) {
    return 2 ** Math.max(0, Math.ceil(Math.log2(meta.num_blocks / CELLS)));
  }

  // For each cell, how many of its pages each running request has, how many are only cached, and how many there are.
  // A page of several owners counts in parts.
  function regions(state, { per, cells }) {
    const { tables, owners, cached } = labkit.shown(state), { num_blocks } = state.meta;
    const places = new Map(tables.map(({ request }, place) => [request, place]));
    const owned = tables.map(() => new Float32Array(cells)), only = new Uint16Array(cells);
    for (let block = 0; block < num_blocks; block++) only[Math.floor(block / per)] += (cached[block >> 3] >> (block & 7)) & 1;
    for (const [block, list] of owners) {
      const cell = Math.floor(block / per);
      only[cell] -= (cached[block >> 3] >> (block & 7)) & 1;
      for (const { request } of list) owned[places.get(request)][cell] += 1 / list.length;
    }
    return { owned, only, pages: (cell) => Math.min(per, num_blocks - cell * per) };
  }

  function drawRegions(ctx, state, theme, grid) {
    const { owned, only, pages } = regions(state, grid), { tables } = labkit.shown(state), side = grid.size - grid.gap;
    const focus = tables.findIndex(({ request }) => request === labkit.focusOf(state));
    const colors = tables.map(({ request }) => labkit.colorOf(state, theme, request));
    const marked = new Set([state.hover.block, state.selected.block].map((block) => Math.floor(block / grid.per)));
    const next = new Map();
    if (!state.past) for (const [block, row] of state.plan?.taken ?? []) next.set(Math.floor(block / grid.per), row);
    for (let cell = 0; cell < grid.cells; cell++) {
      const x = grid.left + (cell % grid.columns) * grid.size, y = grid.top + Math.floor(cell / grid.columns) * grid.size;
      const whole = pages(cell), wide = (side * whole) / grid.per;
      let at = x;
      ctx.globalAlpha = focus < 0 || owned[focus][cell] ? 1 : 0.22;
      labkit.box(ctx, x, y, wide, side, theme.free);
      for (let place = 0; place < owned.length; place++) {
        if (!owned[place][cell]) continue;
        const part = (wide * owned[place][cell]) / whole;
        labkit.box(ctx, at, y, part, side, colors[place]);
        at += part;
      }
      if (only[cell]) labkit.box(ctx, at, y, (wide * only[cell]) / whole, side, theme.cached);
      ctx.globalAlpha = 1;
      if (next.has(cell)) labkit.promise(ctx, x, y, side, side, theme.palette[next.get(cell).color]);
      if (marked.has(cell)) labkit.outline(ctx, x - 1, y - 1, side + 2, side + 2, theme.ink, 2);
    }
  }

  // The page of a region that a click means: one that somebody has, or else one that is cached, or else the first.
  function pageOf(state, first, per) {
    const blocks = Array.from({ length: Math.min(per, state.meta.num_blocks - first) }, (_, i) => first + i);
    const { owners } = labkit.shown(state);
    return blocks.find((block) => owners.has(block)) ?? blocks.find((block) => labkit.isCached(state, block)) ?? first;
  }

  function regionWords(state, block, per) {
    const first = Math.floor(block / per) * per, last = Math.min(first + per, state.meta.num_blocks) - 1;
    const counts = { free: 0, cached: 0, owned: 0, shared: 0 }, of = new Map();
    for (let page = first; page <= last; page++) {
      counts[labkit.blockKind(state, page)] += 1;
      for (const { request } of labkit.ownersAt(state, page)) of.set(request, (of.get(request) ?? 0) + 1);
    }
    const named = [["in use", counts.owned + counts.shared], ["only cached", counts.cached], ["free", counts.free]];
    const lines = [`Pages ${first} to ${last}`, named.filter(([, n]) => n).map(([what, n]) => `${n} ${what}`).join(", ")];
    for (const [request, n] of [...of].slice(0, 5)) lines.push(`request ${request} has ${n}`);
    if (of.size > 5) lines.push(`and ${of.size - 5} more requests`);
    return lines;
  }

  // What a square of the picture means.
  function squareWords(state) {
    const per = perCell(state);
    if (per === 1) return "Each square is a page. Its colour says whose it is, the filled part how full.";
    return `Each square is ${per} pages that lie side by side. Its colours say how many are whose, as below.`;
  }

  // How many pages are of each kind, without a look at each.
  function kinds(state) {
    const { owners, cached } = labkit.shown(state);
    let shared = 0, only = 0;
    for (let byte of cached) for (; byte; byte &= byte - 1) only += 1;
    for (const [block, list] of owners) {
      shared += list.length > 1;
      only -= (cached[block >> 3] >> (block & 7)) & 1;
    }
    return { owned: owners.size - shared, shared, cached: only, free: state.meta.num_blocks - owners.size - only };
  }

  return { perCell, drawRegions, pageOf, regionWords, squareWords, kinds };
})());
