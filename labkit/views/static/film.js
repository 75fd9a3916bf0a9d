// A run that is over, on a clock of steps or of seconds: what race and replay have in common. Films come from
// `film.py`; requests are referred to by their place among the lanes.
Object.assign(labkit, (() => {
  // Ready for drawing: spans as objects, and a place for each step's number.
  function openFilm({ meta, palette, headline, steps, lanes }) {
    const place = new Map(steps.step.map((step, i) => [step, i]));
    const film = { meta, palette, headline, steps, place, count: steps.step.length, timed: Boolean(steps.begin),
                   drafting: Boolean(steps.drafted) };
    film.lanes = lanes.map((lane, id) => {
      const spans = lane.spans.map(([kind, from, to, tokens, drafted, accepted]) => (
        { kind, from: placeOf(film, from, 1), to: placeOf(film, to, -1), tokens, drafted, accepted }));
      const ends = lane.ends.map(([step, reason]) => ({ at: placeOf(film, step, -1), reason }));
      return { id, ...lane, spans, ends };
    });
    return film;
  }

  // A step's place in the trace; where the trace has a hole, that of the next one or of the one before.
  function placeOf(film, step, toward) {
    if (film.place.has(step)) return film.place.get(step);
    const steps = film.steps.step;
    let low = 0, high = film.count;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle + 1;
      else high = middle;
    }
    return Math.max(0, Math.min(film.count - 1, toward > 0 ? low : low - 1));
  }

  // When a step begins and ends, in steps or in seconds.
  function clockOf(film, unit) {
    if (unit === "seconds" && film.timed) {
      const { begin, end } = film.steps;
      return { unit, begin: (i) => begin[i], end: (i) => end[i], length: film.count ? end[film.count - 1] : 0 };
    }
    return { unit: "steps", begin: (i) => i, end: (i) => i + 1, length: film.count };
  }

  // The last step that has begun at a moment of the clock; -1 before the first.
  function stepAtTime(film, clock, time) {
    let low = 0, high = film.count;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (clock.begin(middle) <= time) low = middle + 1;
      else high = middle;
    }
    return low - 1;
  }

  // `area` is where to draw, in pixels; `view` which part of the clock it shows. What is later than `now` is faint.
  function drawFilm(ctx, film, theme, clock, area, view, { now = Infinity, focus, rows } = {}) {
    const scale = area.width / (view.to - view.from), x = (time) => area.left + (time - view.from) * scale;
    const cut = Math.max(area.left, Math.min(area.left + area.width, x(now)));
    const parts = [[area.left, cut, 1], [cut, area.left + area.width, 0.18]];
    for (const [from, to, alpha] of parts) {
      if (to <= from) continue;
      ctx.save();
      ctx.beginPath();
      ctx.rect(from, area.top - 2, to - from, area.height + 4);
      ctx.clip();
      rows.forEach((lane, row) => {
        ctx.globalAlpha = alpha * (focus === undefined || focus === lane.id ? 1 : 0.22);
        drawFilmLane(ctx, film, theme, lane, clock, x, area.top + row * area.pitch, area.pitch, view);
      });
      ctx.restore();
    }
  }

  function drawFilmLane(ctx, film, theme, lane, clock, x, y, pitch, view) {
    const height = Math.max(1, pitch - (pitch > 8 ? 3 : pitch > 3 ? 1 : 0)), color = theme.palette[lane.color];
    for (const span of lane.spans) {
      const { kind, from, to } = span;
      const begin = clock.begin(from), end = clock.end(to);
      if (end < view.from || begin > view.to) continue;
      const left = x(Math.max(begin, view.from)), right = x(Math.min(end, view.to));
      labkit.drawSpan(ctx, theme, kind, color, left, y, Math.max(1, right - left), height, labkit.shareOf(span));
    }
    for (const { at } of lane.ends) labkit.box(ctx, x(clock.end(at)) - 1, y, 2, height, theme.ink);
  }

  // Memory during each step: solid where tokens lie, hatched where pages are owned but empty. The area is as high
  // as `top` of the pool.
  function drawMemory(ctx, film, theme, clock, area, view, { now = Infinity, top = 1 } = {}) {
    const { owned, filled } = film.steps, { num_blocks: blocks, block_size: size } = film.meta;
    const scale = area.width / (view.to - view.from), floor = area.top + area.height;
    const first = Math.max(0, stepAtTime(film, clock, view.from)), bars = new Map();
    for (let i = first; i < film.count && clock.begin(i) < view.to; i++) {
      const from = Math.max(area.left, area.left + (clock.begin(i) - view.from) * scale);
      const to = Math.min(area.left + area.width, area.left + (clock.end(i) - view.from) * scale);
      const column = Math.floor(from); // of pixels: drawn once, for the last of its steps
      bars.set(column, { i, from, to: Math.max(to, from + 1) });
    }
    for (const { i, from, to } of bars.values()) {
      ctx.globalAlpha = clock.begin(i) > now ? 0.18 : 1;
      const tall = area.height / top, solid = (tall * filled[i]) / (blocks * size), all = (tall * owned[i]) / blocks;
      labkit.box(ctx, from, floor - all, to - from, all - solid, labkit.hatch(ctx, theme, theme.muted));
      labkit.box(ctx, from, floor - solid, to - from, solid, theme.usage);
      labkit.box(ctx, from, floor - all, to - from, 1.5, theme.usage);
    }
    ctx.globalAlpha = 1;
    labkit.box(ctx, area.left, floor, area.width, 1, theme.line);
  }

  // Marks along the clock, at round numbers.
  function drawAxis(ctx, theme, area, view, unit, y) {
    const wanted = ((view.to - view.from) * 64) / area.width;
    const power = 10 ** Math.floor(Math.log10(wanted));
    let gap = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= wanted);
    if (unit === "steps") gap = Math.max(1, Math.round(gap));
    const digits = Math.max(0, -Math.floor(Math.log10(gap)));
    for (let mark = Math.ceil(view.from / gap) * gap; mark <= view.to; mark += gap) {
      const x = area.left + ((mark - view.from) * area.width) / (view.to - view.from);
      labkit.box(ctx, Math.round(x), area.top, 1, y - area.top - 9, theme.line);
      const words = unit === "seconds" ? `${mark.toFixed(digits)} s` : String(Math.round(mark));
      const align = x > area.left + area.width - 16 ? "right" : mark > view.from ? "center" : "left";
      labkit.text(ctx, words, x, y, theme.muted, align);
    }
  }

  // The lanes of which something is in view: those that did work first, where there is no room for all.
  function lanesIn(film, clock, view, most) {
    const seen = (span) => clock.end(span.to) > view.from && clock.begin(span.from) < view.to;
    const lanes = film.lanes.filter((lane) => lane.spans.some(seen));
    if (lanes.length <= most) return { rows: lanes, hidden: 0 };
    const busy = lanes.filter((lane) => lane.spans.some((span) => span.kind !== "w" && seen(span))).slice(-most);
    const chosen = new Set([...busy, ...lanes.filter((lane) => !busy.includes(lane)).slice(0, most - busy.length)]);
    return { rows: lanes.filter((lane) => chosen.has(lane)), hidden: lanes.length - chosen.size };
  }

  const el = (name, className, words) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (words !== undefined) made.textContent = words; // text, whatever it is
    return made;
  };

  return { openFilm, clockOf, stepAtTime, drawFilm, drawMemory, drawAxis, lanesIn, el };
})());
