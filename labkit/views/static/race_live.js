// The race under way, drawn from its first step: a track for each setting, on a clock of steps. Grey is a race of the
// same requests that was recorded; what is measured here takes its place, step by step.
Object.assign(labkit, (() => {
  const TRACK = { axis: 18, memory: 28, lane: 10 }; // heights in a track
  const { el } = labkit;

  function liveRace(root) {
    const list = root.querySelector(".lkr-live-tracks"), note = root.querySelector(".lkr-live-note");
    let tracks = [], seen = false;

    // `answer` is what `RaceTrack.lanes` tells.
    function show(answer) {
      if (!answer.tracks.length) return;
      const names = answer.tracks.map(({ name }) => name).join();
      if (tracks.map(({ name }) => name).join() !== names || answer.title !== root.dataset.title) build(answer);
      answer.tracks.forEach(({ data }, i) => {
        tracks[i].data = data && labkit.unpack(data);
        if (data?.steps.step.length) seen = true;
      });
      const model = tracks.find(({ recorded }) => recorded)?.recorded.meta.model;
      note.textContent = "Drawn as it is measured, one setting after the other, on a clock of steps."
        + (model ? ` Grey: the same requests, as they were recorded on ${model}. Which request does what in which step is the same on every machine; seconds are not.` : "");
      requestAnimationFrame(paint);
    }

    function build(answer) {
      root.dataset.title = answer.title;
      tracks = answer.tracks.map(({ name, words, recorded }) => {
        const figure = el("figure", "lkr-track"), caption = el("figcaption"), canvas = el("canvas");
        const figures = el("p", "lkr-numbers");
        canvas.dataset.picture = "track";
        canvas.setAttribute("role", "img");
        caption.append(el("h3", "", name), el("p", "lkr-meaning", words), figures);
        figure.append(caption, canvas);
        return { name, figure, canvas, figures, recorded: recorded && labkit.unpack(recorded), data: null };
      });
      list.replaceChildren(...tracks.map(({ figure }) => figure));
    }

    function paint() {
      const known = tracks.flatMap(({ data, recorded }) => [data, recorded]).filter(Boolean);
      if (!known.length || !tracks[0].canvas.isConnected) return;
      const view = { from: 0, to: Math.max(20, ...known.map(({ count }) => count)) };
      const { meta, palette } = known[0], theme = labkit.themeOf(root, { meta, palette });
      for (const track of tracks) paintTrack(track, theme, view);
    }

    function paintTrack({ name, canvas, figures, data, recorded }, theme, view) {
      const rows = Math.max(data?.lanes.length ?? 0, recorded?.lanes.length ?? 0), { lane, memory, axis } = TRACK;
      canvas.style.height = `${rows * lane + memory + axis + 10}px`;
      const { ctx, width, height } = labkit.context(canvas);
      if (!width) return;
      const area = { left: labkit.GUTTER, top: 2, width: width - labkit.GUTTER - labkit.RIGHT, height: rows * lane, pitch: lane };
      const below = { ...area, top: area.top + area.height + 8, height: memory }, done = data?.count ?? 0;
      const cut = area.left + (done * area.width) / view.to;
      ctx.font = theme.font;
      labkit.drawAxis(ctx, theme, area, view, "steps", height - 8);
      const draw = (run, look, options) => {
        const clock = labkit.clockOf(run, "steps");
        labkit.drawLanes(ctx, run, look, clock, area, view, { rows: run.lanes, ...options });
        labkit.drawMemory(ctx, run, look, clock, below, view, options);
      };
      if (recorded) {
        ctx.save();
        ctx.beginPath();
        ctx.rect(cut, 0, width - cut, height);
        ctx.clip();
        draw(recorded, { ...theme, usage: theme.muted, palette: theme.palette.map(() => theme.muted) }, { now: -1, faint: 0.35 });
        ctx.restore();
      }
      if (data) draw(data, theme, {});
      const named = data?.lanes.length ? data.lanes : recorded?.lanes ?? [];
      ctx.font = theme.small;
      named.forEach(({ label }, row) => labkit.text(ctx, label, area.left - 8, area.top + (row + 0.5) * lane, theme.muted, "right"));
      if (done) labkit.box(ctx, cut - 0.75, 0, 1.5, height - axis, theme.ink);
      const words = done ? `step ${done}: ${labkit.count(sum(data.steps.sampled), "token")}` : "its turn comes";
      const before = recorded ? `; recorded: ${recorded.count} steps` : "";
      figures.textContent = words + before;
      canvas.setAttribute("aria-label", `${name}, ${figures.textContent}`);
    }

    const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

    // Returns whether any of it was seen.
    function end() {
      const was = seen;
      [tracks, seen] = [[], false];
      list.replaceChildren();
      return was;
    }

    return { show, end, paint };
  }

  return { TRACK, liveRace };
})());
