// A run that is over, on a clock of steps or of seconds: race and replay both draw it. The data come from
// `replay_data.py`, which refers to a request by the place of its lane.
Object.assign(labkit, (() => {
  // Make packed data ready for drawing: each step's number becomes its place in the trace.
  function unpack(sent) {
    const { meta, palette, headline, steps, lanes } = labkit.read("ReplayData", sent);
    const place = new Map(steps.step.map((step, i) => [step, i]));
    const data = { meta, palette, headline, steps, place, count: steps.step.length, timed: Boolean(steps.begin),
                   drafting: Boolean(steps.drafted) };
    data.lanes = lanes.map((lane, id) => {
      const spans = lane.spans.map((span) => (
        { ...span, from: placeOf(data, span.first, 1), to: placeOf(data, span.last, -1) }));
      const ends = lane.ends.map(({ step, reason }) => ({ at: placeOf(data, step, -1), reason }));
      return { id, ...lane, spans, ends };
    });
    return data;
  }

  // A step's place in the trace. A step that the trace does not hold gets the place of the next or previous one.
  function placeOf(data, step, toward) {
    if (data.place.has(step)) return data.place.get(step);
    const steps = data.steps.step;
    let low = 0, high = data.count;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle + 1;
      else high = middle;
    }
    return Math.max(0, Math.min(data.count - 1, toward > 0 ? low : low - 1));
  }

  // The steps as the meters take them, by their places. Where the trace has no clock, each counts as a second.
  function meterSteps(data) {
    const { step, sampled, owned, filled, running, waiting, begin, end, sent_in_layers, sent_elsewhere, sending } = data.steps;
    const size = data.meta.block_size;
    return step.map((_, i) => ({
      step: i, seconds: data.timed ? end[i] - begin[i] : 1, sampled: sampled[i], used: owned[i],
      wasted: owned[i] * size - filled[i], running: running[i], waiting: waiting[i],
      sent_in_layers: sent_in_layers?.[i], sent_elsewhere: sent_elsewhere?.[i], sending: data.timed ? sending?.[i] : 0,
    }));
  }

  // When each step begins and ends, in steps or in seconds.
  function clockOf(data, unit) {
    if (unit === "seconds" && data.timed) {
      const { begin, end } = data.steps;
      return { unit, begin: (i) => begin[i], end: (i) => end[i], length: data.count ? end[data.count - 1] : 0 };
    }
    return { unit: "steps", begin: (i) => i, end: (i) => i + 1, length: data.count };
  }

  // The last step that has begun at a moment of the clock; -1 before the first.
  function stepAtTime(data, clock, time) {
    let low = 0, high = data.count;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (clock.begin(middle) <= time) low = middle + 1;
      else high = middle;
    }
    return low - 1;
  }

  // Draw in `area`, in pixels, the part of the clock that `view` names. What is later than `now` is `faint`.
  function drawLanes(ctx, data, theme, clock, area, view, { now = Infinity, focus, rows, faint = 0.18 } = {}) {
    const scale = area.width / (view.to - view.from), x = (time) => area.left + (time - view.from) * scale;
    const cut = Math.max(area.left, Math.min(area.left + area.width, x(now)));
    const parts = [[area.left, cut, 1], [cut, area.left + area.width, faint]];
    for (const [from, to, alpha] of parts) {
      if (to <= from) continue;
      ctx.save();
      ctx.beginPath();
      ctx.rect(from, area.top - 2, to - from, area.height + 4);
      ctx.clip();
      rows.forEach((lane, row) => {
        ctx.globalAlpha = alpha * (focus === undefined || focus === lane.id ? 1 : 0.22);
        drawLane(ctx, data, theme, lane, clock, x, area.top + row * area.pitch, area.pitch, view);
      });
      ctx.restore();
    }
  }

  function drawLane(ctx, data, theme, lane, clock, x, y, pitch, view) {
    const height = Math.max(1, pitch - (pitch > 8 ? 3 : pitch > 3 ? 1 : 0)), color = theme.palette[lane.color];
    for (const span of lane.spans) {
      const { kind, from, to } = span;
      const begin = clock.begin(from), end = clock.end(to);
      if (end < view.from || begin > view.to) continue;
      const left = x(Math.max(begin, view.from)), right = x(Math.min(end, view.to));
      labkit.drawSpan(ctx, theme, kind, color, left, y, Math.max(1, right - left), height, labkit.shareOf(span));
    }
    for (const { at } of lane.ends) labkit.drawEnd(ctx, theme, x(clock.end(at)), y, height);
  }

  // Draw memory during each step: solid where tokens lie, hatched where blocks are owned but empty. The area is
  // as high as `top` of the pool.
  function drawMemory(ctx, data, theme, clock, area, view, { now = Infinity, top = 1, faint = 0.18 } = {}) {
    const { owned, filled } = data.steps, { num_blocks: blocks, block_size: size } = data.meta;
    const scale = area.width / (view.to - view.from), floor = area.top + area.height;
    const first = Math.max(0, stepAtTime(data, clock, view.from)), bars = new Map();
    for (let i = first; i < data.count && clock.begin(i) < view.to; i++) {
      const from = Math.max(area.left, area.left + (clock.begin(i) - view.from) * scale);
      const to = Math.min(area.left + area.width, area.left + (clock.end(i) - view.from) * scale);
      const column = Math.floor(from); // of pixels: drawn once, and shows the last of its steps
      bars.set(column, { i, from, to: Math.max(to, from + 1) });
    }
    for (const { i, from, to } of bars.values()) {
      ctx.globalAlpha = clock.begin(i) > now ? faint : 1;
      const tall = area.height / top, solid = (tall * filled[i]) / (blocks * size), all = (tall * owned[i]) / blocks;
      labkit.box(ctx, from, floor - all, to - from, all - solid, labkit.hatch(ctx, theme, theme.muted));
      labkit.box(ctx, from, floor - solid, to - from, solid, theme.usage);
      labkit.box(ctx, from, floor - all, to - from, 1.5, theme.usage);
    }
    ctx.globalAlpha = 1;
    labkit.box(ctx, area.left, floor, area.width, 1, theme.line);
  }

  // Draw marks along the clock, at round numbers.
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

  // The lanes that have something in view. If there is no room for all, those that did work come first.
  function lanesIn(data, clock, view, most) {
    const seen = (span) => clock.end(span.to) > view.from && clock.begin(span.from) < view.to;
    const lanes = data.lanes.filter((lane) => lane.spans.some(seen));
    if (lanes.length <= most) return { rows: lanes, hidden: 0 };
    const busy = lanes.filter((lane) => lane.spans.some((span) => span.kind !== "w" && seen(span))).slice(-most);
    const chosen = new Set([...busy, ...lanes.filter((lane) => !busy.includes(lane)).slice(0, most - busy.length)]);
    return { rows: lanes.filter((lane) => chosen.has(lane)), hidden: lanes.length - chosen.size };
  }

  const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

  const el = (name, className, words) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (words !== undefined) made.textContent = words; // always as text, never as HTML
    return made;
  };

  return { unpack, meterSteps, clockOf, stepAtTime, drawLanes, drawMemory, drawAxis, lanesIn, el, count };
})());
