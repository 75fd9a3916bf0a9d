// The strips below the timeline: throughput, the pool, the queue. Same steps, same clock.
Object.assign(labkit, (() => {
  const { RIGHT, box, text, hatch } = labkit;

  // Generated tokens per second of work, over the last eight steps.
  function rates(steps) {
    return steps.map((_, i) => {
      const past = steps.slice(Math.max(0, i - 7), i + 1);
      const seconds = past.reduce((sum, step) => sum + step.seconds, 0);
      return seconds > 0 ? past.reduce((sum, step) => sum + step.sampled, 0) / seconds : 0;
    });
  }

  // What the strips show of some steps: values, the largest, and words for the step at a place.
  function stripsOf(steps, meta, theme) {
    const { num_blocks: blocks, block_size: size } = meta, rate = rates(steps);
    const most = (values) => values.reduce((highest, value) => Math.max(highest, value), 1);
    const empty = (step) => Math.min(step.used, step.wasted / size); // in pages
    const crowd = most(steps.map((step) => step.running + step.waiting));
    return [
      { name: "tokens/s", hint: "tokens generated per second of work", color: theme.ink,
        values: rate, most: most(rate), scale: short(most(rate)), words: (i) => short(rate[i]) },
      { name: "KV usage, hatched: wasted", hint: "the share of the pages that somebody holds", color: theme.usage,
        values: steps.map((s) => s.used - empty(s)), over: steps.map(empty), most: blocks, scale: "100%",
        words: (i) => percent(steps[i].used / blocks) },
      { name: "running, waiting", hint: "requests that have a seat, and requests in the queue", color: theme.ink,
        values: steps.map((s) => s.running), over: steps.map((s) => s.waiting), most: crowd, scale: crowd,
        words: (i) => `${steps[i].running}, ${steps[i].waiting}` },
      ...labkit.communicationStrips(steps, theme),
    ];
  }

  function drawMeters(ctx, state, theme, width, height) {
    const time = labkit.clock(state, width), { steps } = state, last = steps.length - 1, { running, waiting } = labkit.people(state);
    const strips = stripsOf(steps, state.meta, theme), now = strips.map(({ words }) => (last < 0 ? "0%" : words(last)));
    if (!running && !waiting) [now[0], now[3]] = ["idle", "–"];
    else if (last < 0) now[0] = "–";
    now[2] = `${running}, ${waiting}`; // without those who have just ended
    ctx.font = theme.font;
    labkit.crosshair(ctx, state, theme, time, height);
    drawStrips(ctx, theme, time, steps, strips, now, width, height);
  }

  // Draw strips below each other, each with its words for `now` at the right.
  function drawStrips(ctx, theme, time, steps, strips, now, width, height) {
    const pitch = height / strips.length;
    strips.forEach((strip, i) => drawStrip(ctx, theme, time, steps, strip, now[i], i * pitch + 17, pitch - 22, width));
  }

  function drawStrip(ctx, theme, time, steps, strip, now, y, height, width) {
    const floor = y + height;
    box(ctx, time.left, floor, width - time.left - RIGHT, 1, theme.line);
    text(ctx, strip.name, time.left, y - 8, theme.muted);
    ctx.font = theme.bold;
    text(ctx, now, width - RIGHT, y - 8, theme.ink, "right");
    ctx.font = theme.font;
    if (steps.length) text(ctx, strip.scale, time.left - 8, y + 3, theme.muted, "right");
    else text(ctx, strip.hint, (time.left + width) / 2, y + height / 2, theme.muted, "center");
    steps.forEach(({ step }, i) => {
      if (step < time.first) return;
      const x = time.x(step), tall = (height * strip.values[i]) / strip.most;
      ctx.globalAlpha = 0.3;
      box(ctx, x, floor - tall, time.pitch, tall, strip.color);
      ctx.globalAlpha = 1;
      box(ctx, x, floor - tall, time.pitch, 1.5, strip.color);
      if (strip.over) {
        const extra = (height * strip.over[i]) / strip.most;
        if (extra) box(ctx, x, floor - tall - extra, time.pitch, extra, hatch(ctx, theme, theme.waiting));
      }
    });
  }

  const percent = (share) => `${Math.round(share * 100)}%`;
  const short = (number) => (number >= 100 ? Math.round(number) : Number(number.toPrecision(2))).toLocaleString("en");

  return { drawMeters, drawStrips, stripsOf, rates, percent, short };
})());
