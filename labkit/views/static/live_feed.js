// The live pictures: a state, what to do with new pictures, and how to draw. Plain functions over a canvas context,
// which a web page and a notebook share; nothing here knows where the pictures come from.
const labkit = (() => {
  const GUTTER = 46; // left of all pictures: names and scales
  const RIGHT = 6;
  const AXIS = 18; // below the timeline: step numbers
  const EVENTS = 200; // that the log remembers

  // -- state --------------------------------------------------------------------------------------

  // Rows travel as arrays. `WIRE`, which `wire.py` makes, has the names of their fields: read them as objects. `kind`
  // is the name of a row or a message, or a list that holds the name of a row, for several of those.
  function read(kind, sent) {
    if (!kind || sent == null) return sent;
    if (Array.isArray(kind)) return sent.map((row) => read(kind[0], row));
    const named = {};
    Object.entries(WIRE[kind]).forEach(([field, inner], place) => {
      const value = Array.isArray(sent) ? sent[place] : sent[field];
      if (value !== undefined) named[field] = read(inner, value);
    });
    return named;
  }

  // `plan` is the next step while the engine is paused, `past` a step that is looked back at, `hover` and
  // `selected` what the pointer is on and what was clicked: { request, block, step }, each if there is one.
  function createState() {
    return { feed: "", step: -1, meta: null, speculative: "", palette: [], window: 200, tables: [], owners: new Map(),
             cached: new Uint8Array(0), lanes: new Map(), steps: [], events: [], queue: [], held: new Map(),
             joins: [], numbers: {}, busy: false, gutter: GUTTER, names: new Map(), plan: null, past: null, mine: new Set(), presets: new Set(), played: "", playedAfter: null, playedFeed: "", pending: [], hover: {}, selected: {}, drawn: -1, frames: 0 };
  }

  // Take in all pictures (`full`), or what is new since the last ones. Returns whether there was anything new.
  function apply(state, sent) {
    const pictures = read("Pictures", sent);
    if (pictures.full) {
      const { meta, palette, window, feed, speculative = "" } = pictures;
      if (feed !== state.feed) Object.assign(state, { plan: null, past: null, hover: {}, selected: {} });
      Object.assign(state, { feed, meta, palette, window, speculative, lanes: new Map(), steps: [], events: [], step: -1 });
    }
    state.step = pictures.step;
    if (!pictures.steps) return false;
    const { cached, queue, held, numbers, tables, joins = state.joins } = pictures;
    const owners = ownersOf(tables, state.meta.block_size, pictures.full ? undefined : state);
    Object.assign(state, { queue, numbers, tables, joins, cached: bitsOf(cached), owners });
    state.held = new Map(held.map(({ request, parent }) => [request, parent]));
    state.events.push(...pictures.events);
    state.events.splice(0, state.events.length - EVENTS);
    state.steps.push(...pictures.steps);
    state.steps.splice(0, state.steps.length - state.window);
    for (const lane of pictures.lanes) mergeLane(state, lane);
    const horizon = state.steps.length ? state.steps[0].step : 0;
    for (const [id, lane] of state.lanes) if (lane.ended >= 0 && lane.ended < horizon) state.lanes.delete(id);
    return true;
  }

  const bitsOf = (text) => Uint8Array.from(atob(text), (char) => char.charCodeAt(0)); // a bit for each block

  // Look back at a step: its blocks are drawn instead of the present ones. Null ends it.
  function lookBack(state, facts) {
    state.past = facts && {
      step: facts.step, cached: bitsOf(facts.cached), tables: facts.tables,
      owners: ownersOf(facts.tables, state.meta.block_size),
    };
  }

  // Take in the step to come, and which row of it takes which new block. Without a plan there is none.
  function lookAhead(state, key, sent) {
    state.plan = sent ? { ...read("Plan", sent), key, taken: new Map() } : null;
    for (const row of state.plan?.rows ?? []) for (const block of row.taken) state.plan.taken.set(block, row);
  }

  // Which request has which block, where in its block table, and how many tokens lie in it. The owners of a moment
  // `before`, with its tables, are brought up to date: most blocks stay as they were.
  function ownersOf(tables, blockSize, { owners, tables: old } = { owners: new Map(), tables: [] }) {
    const gone = new Map(old.map((table) => [table.request, table]));
    const leave = (request, block) => {
      const left = owners.get(block).filter((owner) => owner.request !== request);
      if (left.length) owners.set(block, left);
      else owners.delete(block);
    };
    for (const { request, computed, blocks } of tables) {
      const before = gone.get(request) ?? { computed: 0, blocks: [] };
      let same = 0;
      while (same < blocks.length && before.blocks[same] === blocks[same]) same += 1;
      for (let i = same; i < before.blocks.length; i++) leave(request, before.blocks[i]);
      const full = Math.floor(Math.min(computed, before.computed) / blockSize); // so many blocks were and are full
      for (let position = Math.min(same, full); position < blocks.length; position++) {
        const filled = Math.max(0, Math.min(blockSize, computed - position * blockSize)), block = blocks[position];
        if (position < same) owners.get(block).find((owner) => owner.request === request).filled = filled;
        else if (owners.has(block)) owners.get(block).push({ request, position, filled });
        else owners.set(block, [{ request, position, filled }]);
      }
      gone.delete(request);
    }
    for (const [request, { blocks }] of gone) for (const block of blocks) leave(request, block);
    return owners;
  }

  function mergeLane(state, part) {
    let lane = state.lanes.get(part.request);
    if (!lane || lane.arrived !== part.arrived) {
      lane = { ...part, spans: [] };
      state.lanes.delete(lane.request);
      state.lanes.set(lane.request, lane);
    }
    lane.ended = part.ended;
    lane.reason = part.reason;
    for (const span of part.spans) {
      const known = lane.spans.find(({ first, kind }) => first === span.first && kind === span.kind);
      if (known) Object.assign(known, span);
      else lane.spans.push(span);
    }
    const horizon = state.step - state.window;
    while (lane.spans.length && lane.spans[0].last < horizon) lane.spans.shift();
  }

  const shown = (state) => state.past || state; // whose blocks are drawn
  const ownersAt = (state, block) => shown(state).owners.get(block) || [];
  const isCached = (state, block) => ((shown(state).cached[block >> 3] >> (block & 7)) & 1) === 1;
  const focusOf = (state) => state.hover.request ?? state.selected.request;
  const colorOf = (state, theme, id) => theme.palette[state.lanes.get(id)?.color ?? 0];
  const shareOf = ({ drafted, accepted }) => (drafted ? accepted / drafted : undefined); // of a span's drafts
  // What became of drafts, in words; before their step nothing is known of that.
  const draftWords = (drafted, accepted) => `${drafted} drafted${accepted == null ? "" : `, ${accepted} of them right`}`;
  const latest = (state) => state.steps[state.steps.length - 1];

  function blockKind(state, block) {
    const owners = ownersAt(state, block);
    if (owners.length) return owners.length > 1 ? "shared" : "owned";
    return isCached(state, block) ? "cached" : "free";
  }

  // -- looks --------------------------------------------------------------------------------------

  // Colours come from CSS variables, so that the page's light and dark themes reach the canvas.
  function themeOf(element, state) {
    const css = getComputedStyle(element);
    const variable = (name) => css.getPropertyValue(`--lk-${name}`).trim();
    const theme = { hatches: new Map(), font: `11px ${css.fontFamily}`, small: `9px ${css.fontFamily}`, bold: `600 11px ${css.fontFamily}` };
    for (const name of ["ink", "muted", "line", "paper", "free", "cached", "waiting", "usage"]) {
      theme[name] = variable(name);
    }
    const lift = Number(variable("lift")) || 0; // towards white, where the page is dark
    theme.palette = state.palette.map((hex) => mix(hex, lift));
    return theme;
  }

  function channels(hex) {
    return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  }

  function mix(hex, share) {
    return "#" + channels(hex).map((v) => Math.round(v + (255 - v) * share).toString(16).padStart(2, "0")).join("");
  }

  function inkOn(hex) {
    const [r, g, b] = channels(hex);
    return 0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#14161b" : "#ffffff";
  }

  function hatch(ctx, theme, color) {
    if (!theme.hatches.has(color)) {
      const ratio = window.devicePixelRatio || 1;
      const tile = document.createElement("canvas");
      tile.width = tile.height = Math.round(5 * ratio);
      const pen = tile.getContext("2d");
      pen.scale(tile.width / 5, tile.width / 5);
      pen.strokeStyle = color;
      pen.lineWidth = 1.5;
      for (const shift of [-5, 0, 5]) {
        pen.beginPath();
        pen.moveTo(shift - 1, 6);
        pen.lineTo(shift + 6, -1);
        pen.stroke();
      }
      const pattern = ctx.createPattern(tile, "repeat");
      pattern.setTransform(new DOMMatrix().scale(5 / tile.width));
      theme.hatches.set(color, pattern);
    }
    return theme.hatches.get(color);
  }

  // Size the canvas for the screen's own pixels and return a clean context in CSS pixels.
  function context(canvas) {
    const ratio = (window.devicePixelRatio || 1) * (canvas.currentCSSZoom ?? 1);
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const ctx = canvas.getContext("2d");
    ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
    ctx.clearRect(0, 0, width, height);
    return { ctx, width, height };
  }

  function text(ctx, words, x, y, color, align = "left") {
    ctx.fillStyle = color;
    ctx.textAlign = align;
    ctx.textBaseline = "middle";
    ctx.fillText(words, x, y);
  }

  // -- blocks -------------------------------------------------------------------------------------

  // The largest square cells with which the whole pool fits; each is a page, or `per` of a large pool.
  function blockGrid(state, width, height) {
    const per = labkit.perCell(state), total = Math.ceil(state.meta.num_blocks / per), room = width - GUTTER - RIGHT;
    const fits = [];
    for (let columns = 8; columns <= 1024; columns += columns < 64 ? 8 : 16) {
      const rows = Math.ceil(total / columns);
      fits.push({ columns, rows, size: Math.min(room / columns, (height - 2) / rows, 32) });
    }
    const most = Math.max(...fits.map((fit) => fit.size));
    const best = fits.findLast((fit) => fit.size > 0.85 * most); // a little smaller, to use the whole width
    if (best.size > 4) best.size = Math.floor(best.size);
    return { ...best, per, cells: total, gap: best.size >= 12 ? 2 : best.size >= 5 ? 1 : 0, left: GUTTER, top: 1 };
  }

  // How high the picture is when it may be `most` high.
  function blocksHeight(state, width, most) {
    const grid = blockGrid(state, width, most);
    return Math.ceil(grid.rows * grid.size) + 2;
  }

  function drawBlocks(ctx, state, theme, width, height) {
    const grid = blockGrid(state, width, height), box = grid.size - grid.gap;
    ctx.font = theme.font;
    const every = Math.max(1, Math.ceil(14 / grid.size));
    for (let row = 0; row < grid.rows; row += every) {
      text(ctx, row * grid.columns * grid.per, GUTTER - 8, grid.top + row * grid.size + box / 2, theme.muted, "right");
    }
    if (grid.per > 1) return labkit.drawRegions(ctx, state, theme, grid);
    const focus = shown(state).tables.find(({ request }) => request === focusOf(state))?.request;
    for (let block = 0; block < state.meta.num_blocks; block++) {
      const x = grid.left + (block % grid.columns) * grid.size;
      const y = grid.top + Math.floor(block / grid.columns) * grid.size;
      const owners = ownersAt(state, block);
      ctx.globalAlpha = focus === undefined || owners.some((owner) => owner.request === focus) ? 1 : 0.22;
      drawBlock(ctx, state, theme, x, y, box, blockKind(state, block), owners);
      ctx.globalAlpha = 1;
      const next = state.past ? undefined : state.plan?.taken.get(block);
      if (next) promise(ctx, x, y, box, box, theme.palette[next.color]);
      if (block === state.hover.block || block === state.selected.block) {
        outline(ctx, x - 1, y - 1, box + 2, box + 2, theme.ink, 2);
      }
    }
    labkit.drawLanded?.(ctx, state, theme, grid); // a replay does without
  }

  // What is about to be: a dashed frame.
  function promise(ctx, x, y, width, height, color) {
    ctx.setLineDash([3, 2]);
    outline(ctx, x, y, width, height, color, 2);
    ctx.setLineDash([]);
  }

  function drawBlock(ctx, state, theme, x, y, size, kind, owners) {
    if (kind === "free") {
      if (size >= 8) outline(ctx, x, y, size, size, theme.free, 1);
      else box(ctx, x, y, size, size, theme.free);
    } else if (kind === "cached") {
      box(ctx, x, y, size, size, hatch(ctx, theme, theme.cached));
      if (size >= 8) outline(ctx, x, y, size, size, theme.cached, 1);
    } else {
      const stripe = size / owners.length;
      owners.forEach(({ request, filled, position }, i) => {
        const color = colorOf(state, theme, request);
        const alpha = ctx.globalAlpha;
        ctx.globalAlpha = alpha * 0.25;
        box(ctx, x, y + i * stripe, size, stripe, color);
        ctx.globalAlpha = alpha;
        box(ctx, x, y + i * stripe, (size * filled) / state.meta.block_size, stripe, color);
        const label = state.lanes.get(request)?.label ?? "";
        if (position === 0 && owners.length === 1 && size >= 16 && label.length <= 3) {
          const ink = filled * 2 > state.meta.block_size ? inkOn(color) : theme.ink;
          text(ctx, label, x + size / 2, y + size / 2 + 0.5, ink, "center");
        }
      });
      if (kind === "shared") outline(ctx, x, y, size, size, theme.ink, size >= 8 ? 2 : 1);
    }
  }

  function box(ctx, x, y, width, height, style) {
    ctx.fillStyle = style;
    ctx.fillRect(x, y, width, height);
  }

  function outline(ctx, x, y, width, height, color, weight) {
    ctx.strokeStyle = color;
    ctx.lineWidth = weight;
    ctx.strokeRect(x + weight / 2, y + weight / 2, width - weight, height - weight);
  }

  function blockAt(state, width, height, x, y) {
    const grid = blockGrid(state, width, height);
    const column = Math.floor((x - grid.left) / grid.size), row = Math.floor((y - grid.top) / grid.size);
    const cell = row * grid.columns + column;
    if (column < 0 || column >= grid.columns || row < 0 || cell >= grid.cells) return undefined;
    return grid.per > 1 ? labkit.pageOf(state, cell * grid.per, grid.per) : cell;
  }

  // -- the clock: steps from left to right, the same in timeline and meters -------------------------

  function clock(state, width) {
    const room = width - state.gutter - RIGHT, last = state.plan ? state.plan.step : state.step + (state.pending.length ? 1 : 0);
    const oldest = state.steps.length ? state.steps[0].step : 0;
    const most = Math.min(state.window, Math.max(60, Math.floor(room / 3.5)));
    const count = Math.max(60, Math.min(most, last - oldest + 1));
    const first = Math.max(oldest, last - count + 1), pitch = room / count;
    return { first, last, pitch, left: state.gutter, x: (step) => state.gutter + (step - first) * pitch };
  }

  function stepAt(state, width, x) {
    const time = clock(state, width), step = time.first + Math.floor((x - time.left) / time.pitch);
    return x >= time.left && step >= time.first && step <= time.last ? step : undefined;
  }

  function crosshair(ctx, state, theme, time, height) {
    for (const step of new Set([state.hover.step, state.selected.step])) {
      if (step >= time.first) box(ctx, time.x(step), 0, Math.max(1.5, time.pitch), height, theme.line);
    }
    const chosen = state.selected.step;
    if (chosen >= time.first) box(ctx, time.x(chosen), 0, Math.max(1.5, time.pitch), 2, theme.ink);
  }

  // -- timeline -----------------------------------------------------------------------------------

  // The lanes to show, by arrival. When they are too many, those that only wait give way first.
  function laneRows(state, width, height) {
    const { first } = clock(state, width), room = height - AXIS;
    const lanes = [...state.lanes.values()].filter((lane) => lane.ended < 0 || lane.ended >= first).concat(labkit.pendingLanes?.(state) ?? []);
    const most = Math.max(1, Math.floor(room / 6));
    let shown = lanes;
    if (lanes.length > most) {
      const busy = lanes.filter((lane) => lane.spans.some((span) => span.kind !== "w")).slice(-most);
      const idle = lanes.filter((lane) => !busy.includes(lane)).slice(0, most - busy.length);
      shown = lanes.filter((lane) => busy.includes(lane) || idle.includes(lane));
    }
    const pitch = Math.min(18, room / Math.max(1, shown.length));
    return { shown, hidden: lanes.length - shown.length, pitch };
  }

  function drawTimeline(ctx, state, theme, width, height) {
    const time = clock(state, width), rows = laneRows(state, width, height), floor = height - AXIS;
    ctx.font = theme.font;
    const every = [10, 20, 50, 100].find((gap) => gap * time.pitch >= 44) || 200;
    for (let step = Math.ceil(time.first / every) * every; time.x(step) < width - RIGHT; step += every) {
      const x = time.x(step);
      box(ctx, Math.round(x), 0, 1, floor, theme.line);
      if (x < width - 12) text(ctx, step, x, height - AXIS / 2 + 1, theme.muted, step ? "center" : "left");
    }
    text(ctx, "step", time.left - 8, height - AXIS / 2 + 1, theme.muted, "right");
    crosshair(ctx, state, theme, time, floor);
    const named = labkit.labelled(state, rows);
    rows.shown.forEach((lane, row) => {
      const focus = focusOf(state);
      ctx.globalAlpha = focus === undefined || focus === lane.request ? 1 : 0.22;
      const y = row * rows.pitch, middle = y + rows.pitch / 2;
      if (named.has(row)) {
        const mine = state.mine.has(lane.request);
        ctx.font = mine ? theme.bold : theme.font;
        text(ctx, labkit.rowLabel?.(ctx, state, lane) ?? lane.label, time.left - 8, Math.max(6, middle), mine ? theme.ink : theme.muted, "right");
      }
      const tall = rows.pitch - (rows.pitch > 8 ? 3 : 1);
      drawLane(ctx, theme, lane, time, y + 0.5, tall);
      const next = state.plan?.rows.find(({ request }) => request === lane.request);
      if (next) drawNext(ctx, theme, next, time.x(state.plan.step), y + 0.5, Math.max(7, time.pitch), tall);
    });
    ctx.globalAlpha = 1;
    ctx.font = theme.font;
    if (rows.hidden) { ctx.clearRect(0, floor - 15, time.left - 2, 15); text(ctx, `+${rows.hidden}`, time.left - 8, floor - 8, theme.muted, "right"); }
  }

  function drawLane(ctx, theme, lane, time, y, height) {
    const color = theme.palette[lane.color];
    for (const span of lane.spans) {
      if (span.last < time.first) continue;
      const first = Math.max(span.first, time.first), x = time.x(first);
      drawSpan(ctx, theme, span.kind, color, x, y, (span.last - first + 1) * time.pitch, height, shareOf(span));
    }
    if (lane.ended >= time.first) drawEnd(ctx, theme, time.x(lane.ended + 1), y, height);
  }

  // A small square where a request ends, as in the figures: its right side is the end of the step.
  function drawEnd(ctx, theme, x, y, height) {
    const size = Math.min(7, height), left = x - size, top = y + (height - size) / 2;
    box(ctx, left, top, size, size, theme.paper);
    outline(ctx, left, top, size, size, theme.ink, Math.min(1.25, size / 2));
  }

  // What a request will do in the next step: its shape, pale, in a dashed frame.
  function drawNext(ctx, theme, { color, kind, drafted }, x, y, width, height) {
    const alpha = ctx.globalAlpha;
    ctx.globalAlpha = alpha * 0.45;
    drawSpan(ctx, theme, kind, theme.palette[color], x, y, width, height, drafted ? 0 : undefined);
    ctx.globalAlpha = alpha;
    promise(ctx, x, y, width, height, theme.palette[color]);
  }

  // The shape says what: a block for prefill, hatched for a chunk, a bar for decode, hollow for idle, dots
  // for waiting, a cross for a preemption, stripes along a bar for drafts, as solid as the share that was `accepted`; the colour, whose.
  function drawSpan(ctx, theme, kind, color, x, y, width, height, accepted) {
    const middle = y + height / 2;
    if (kind === "p") box(ctx, x, y, Math.max(2, width - 0.5), height, color);
    else if (kind === "c") {
      box(ctx, x, y, Math.max(2, width - 0.5), height, hatch(ctx, theme, color));
      outline(ctx, x, y, Math.max(2, width - 0.5), height, color, 1);
    } else if (kind === "d") {
      box(ctx, x, y + height * 0.3, width, Math.max(1.5, height * 0.4), color);
      if (accepted !== undefined) drawDrafts(ctx, color, x, y, width, height, accepted);
    } else if (kind === "drafts") drawSpan(ctx, theme, "d", color, x, y, width, height, 0.5); // in a legend
    else if (kind === "i") {
      box(ctx, x, y + height * 0.3, width, 1, color);
      box(ctx, x, y + height * 0.7, width, 1, color);
    } else if (kind === "w") {
      for (let dot = x + 1; dot < x + width - 1; dot += 4) box(ctx, dot, middle - 0.75, 1.5, 1.5, theme.waiting);
    } else if (kind === "e") drawEnd(ctx, theme, x + width / 2 + Math.min(7, height) / 2, y, height); // in a legend
    else if (kind === "x") {
      const arm = Math.min(4, height / 2), center = x + width / 2;
      ctx.strokeStyle = theme.ink;
      ctx.lineWidth = 1.5;
      ctx.beginPath();
      ctx.moveTo(center - arm, middle - arm), ctx.lineTo(center + arm, middle + arm);
      ctx.moveTo(center - arm, middle + arm), ctx.lineTo(center + arm, middle - arm);
      ctx.stroke();
    }
  }

  // Stripes above and below the bar: pale, and solid as far outwards as drafts were accepted.
  function drawDrafts(ctx, color, x, y, width, height, accepted) {
    const alpha = ctx.globalAlpha;
    for (const [share, strength] of [[1, 0.3], [Math.min(1, accepted), 1]]) {
      const stripe = height * 0.2 * share;
      ctx.globalAlpha = alpha * strength;
      box(ctx, x, y + height * 0.24 - stripe, width, stripe, color);
      box(ctx, x, y + height * 0.76, width, stripe, color);
    }
    ctx.globalAlpha = alpha;
  }

  function laneAt(state, width, height, y) {
    const rows = laneRows(state, width, height);
    return y < height - AXIS ? rows.shown[Math.floor(y / rows.pitch)] : undefined;
  }

  return { GUTTER, RIGHT, read, createState, apply, lookBack, lookAhead, themeOf, context, blocksHeight, drawBlocks, drawBlock, blockGrid, laneRows,
           drawTimeline, drawSpan, drawEnd, promise, clock, crosshair, box, text, hatch, blockAt, stepAt, laneAt, blockKind, isCached, ownersAt,
           focusOf, colorOf, latest, shareOf, draftWords, shown, outline, ownersOf };
})();
