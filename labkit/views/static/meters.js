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

  function drawMeters(ctx, state, theme, width, height) {
    const time = labkit.clock(state, width), steps = state.steps, now = labkit.latest(state), rate = rates(steps);
    const blocks = state.meta.num_blocks, top = Math.max(1, ...rate), { running, waiting } = labkit.people(state);
    const idle = !running && !waiting;
    const empty = (step) => Math.min(step.used, step.wasted / state.meta.block_size); // in pages
    const crowd = Math.max(1, ...steps.map((step) => step.running + step.waiting));
    const strips = [
      { name: "tokens/s", hint: "tokens generated per second of work", color: theme.ink,
        values: rate, most: top, scale: short(top), now: idle ? "idle" : now ? short(rate[rate.length - 1]) : "–" },
      { name: "KV usage, hatched: wasted", hint: "the share of the pages that somebody holds", color: theme.usage,
        values: steps.map((s) => s.used - empty(s)), over: steps.map(empty), most: blocks, scale: "100%",
        now: percent(now ? now.used / blocks : 0) },
      { name: "running, waiting", hint: "requests that have a seat, and requests in the queue", color: theme.ink,
        values: steps.map((s) => s.running), over: steps.map((s) => s.waiting), most: crowd, scale: crowd,
        now: `${running}, ${waiting}` },
    ];
    const pitch = height / strips.length;
    ctx.font = theme.font;
    labkit.crosshair(ctx, state, theme, time, height);
    strips.forEach((strip, i) => drawStrip(ctx, theme, time, steps, strip, i * pitch + 17, pitch - 22, width));
  }

  function drawStrip(ctx, theme, time, steps, strip, y, height, width) {
    const floor = y + height;
    box(ctx, time.left, floor, width - time.left - RIGHT, 1, theme.line);
    text(ctx, strip.name, time.left, y - 8, theme.muted);
    ctx.font = theme.bold;
    text(ctx, strip.now, width - RIGHT, y - 8, theme.ink, "right");
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

  return { drawMeters, rates, percent, short };
})());
