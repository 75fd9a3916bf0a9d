// A race on one clock: a track for each setting, and a card with its result. `ask(name, argument)` reaches the lab.
// The page that starts a race is given a secret, which proves that it did.
Object.assign(labkit, (() => {
  const { axis: AXIS, memory: MEMORY, lane: LANE } = labkit.TRACK, { el } = labkit;

  function race(root, ask) {
    const find = (selector) => root.querySelector(selector);
    const scrub = find(".lkr-scrub"), state = labkit.createState();
    let shown = 0, tracks = [], now = Infinity, playing = 0, theme = null, unit = "steps", status = null;
    let owner = "", timer = 0, asking = false;
    const live = labkit.liveRace(root);

    // -- the race under way -----------------------------------------------------------------------

    async function pull() {
      if (asking) return;
      asking = true;
      clearTimeout(timer);
      try {
        if (owner || (root.clientWidth && !document.hidden)) {
          const answer = await ask("status", { owner });
          if (answer) await follow(answer);
          else say(".lkr-failure", status ? "The lab does not answer; trying again." : "");
        }
      } finally {
        asking = false;
        timer = setTimeout(pull, status?.running ? 250 : 1000);
      }
    }

    // A race was started by this page.
    function started(secret) {
      owner = secret;
      pull();
    }

    async function follow(answer) {
      status = answer;
      const { progress } = status;
      find(".lkr-running").hidden = !status.running;
      find(".lkr-stop").hidden = !status.mine;
      say(".lkr-failure", status.failure);
      if (status.running) {
        const which = progress && `${progress.setting} (${progress.number + 1} of ${progress.settings}), step `
          + `${progress.step}, ${progress.answered} of ${progress.requests} requests answered`;
        const whose = status.mine ? "" : "Somebody's race is being run. ";
        const left = status.left == null ? "" : `, about ${Math.max(1, Math.round(status.left))} s left`;
        find(".lkr-words").textContent = `${whose}${status.title}: ${which || "warming up"}${left}`;
        find(".lkr-progress").value = progress ? progress.share : 0;
        const drawn = root.clientWidth ? await ask("lanes", {}) : null;
        if (drawn) live.show(drawn);
      }
      find(".lkr-live").hidden = !status.running;
      if (status.race && status.race !== shown) {
        const packed = await ask("race", { race: status.race });
        if (packed?.results) show(packed, live.end());
      }
      if (!status.running) live.end();
      find(".lkr-shown").hidden = !shown || status.running;
      find(".lkr-empty").hidden = Boolean(shown) || status.running;
    }

    function say(selector, words) {
      const line = find(selector);
      line.hidden = !words;
      if (line.textContent !== words) line.textContent = words;
    }

    // -- what came of it --------------------------------------------------------------------------

    // `watched`: it was drawn while it ran, so that nobody waits to see it played.
    function show(packed, watched) {
      shown = packed.race;
      tracks = packed.results.map((result) => ({ ...result, data: labkit.unpack(result.data) }));
      Object.assign(state, { meta: tracks[0].data.meta, palette: tracks[0].data.palette });
      find(".lkr-shown").hidden = status.running;
      const known = document.querySelector("#lkr-look p")?.textContent === packed.look;
      find(".lkr-title").textContent = known ? packed.title : `${packed.title}. ${packed.look}`;
      const check = find(".lkr-check");
      check.textContent = `${packed.check.same ? "\u2713" : "\u2717"} ${packed.check.sentence}`;
      find(".lkr-verdict").replaceChildren(...packed.verdict.map(([seen, why]) => {
        const line = el("p");
        line.append(el("strong", "", seen), ` Why: ${why}`);
        return line;
      }));
      check.dataset.check = packed.check.same ? "same" : packed.check.fault ? "fault" : "differs";
      find(".lkr-shown .lkr-tracks").replaceChildren(...tracks.map(trackOf));
      find(".lkr-cards").replaceChildren(...tracks.map(cardOf));
      root.classList.toggle("lkr-drafting", tracks.some(({ data }) => data.drafting));
      theme = null;
      requestAnimationFrame(again); // the legend, too
      const figures = document.querySelector("#lkr-draw");
      if (figures?.offsetParent) figures.click(); // they are open: this race's take the place of what is there
      if (watched || matchMedia("(prefers-reduced-motion: reduce)").matches) go(length());
      else play(true);
    }

    function trackOf(track) {
      const figure = el("figure", "lkr-track"), caption = el("figcaption");
      track.canvas = el("canvas");
      track.canvas.dataset.picture = "track";
      track.canvas.setAttribute("role", "img");
      track.canvas.setAttribute("aria-label", `${track.name}: ${track.numbers.slice(0, 3).map((n) => n[1]).join(", ")}`);
      track.canvas.style.height = `${track.data.lanes.length * LANE + MEMORY + AXIS + 10}px`;
      track.figures = el("p", "lkr-numbers");
      caption.append(el("h3", "", track.name), el("p", "lkr-meaning", track.words), track.figures);
      figure.append(caption, track.canvas);
      const move = (event) => {
        const { left, width } = areaOf(track.canvas.clientWidth, 0);
        play(false);
        go(((event.offsetX - left) * length()) / width);
      };
      track.canvas.onpointerdown = (event) => { track.canvas.setPointerCapture(event.pointerId); move(event); };
      track.canvas.onpointermove = (event) => { if (event.buttons) move(event); };
      return figure;
    }

    function cardOf(track) {
      const card = el("article", "lkr-card"), list = el("dl");
      card.append(el("h3", "", track.name), list);
      for (const [name, text, best, hint] of track.numbers) {
        const row = el("div"), value = el("dd", "", text);
        row.title = hint;
        if (best) value.append(" ", el("span", "lkr-best", "best"));
        row.append(el("dt", "", name), value);
        list.append(row);
      }
      return card;
    }

    // -- the clock --------------------------------------------------------------------------------

    const clocks = () => tracks.map((track) => labkit.clockOf(track.data, unit));
    const length = () => Math.max(1e-6, ...clocks().map((clock) => clock.length));

    function go(time) {
      now = Math.max(0, Math.min(length(), time));
      scrub.value = Math.round((1000 * now) / length());
      const words = unit === "seconds" ? `${now.toFixed(2)} s` : `step ${Math.floor(now)}`;
      find(".lkr-where").textContent = words;
      scrub.setAttribute("aria-valuetext", words);
      requestAnimationFrame(paint);
    }

    function play(on) {
      playing += 1; // what played before stops
      const turn = playing, button = find(".lkr-play");
      button.textContent = on ? "Pause" : "Play again";
      button.setAttribute("aria-pressed", String(on));
      if (!on) return;
      if (now >= length()) now = 0;
      let before = performance.now();
      const tick = (moment) => {
        if (turn !== playing || !root.isConnected) return;
        const seconds = Math.max(0, Math.min(0.25, (moment - before) / 1000)); // a page that was hidden goes on
        before = moment;
        go(now + (seconds * length()) / Number(find(".lkr-speed").value));
        if (now >= length()) play(false);
        else requestAnimationFrame(tick);
      };
      requestAnimationFrame(tick);
    }

    // -- pictures ---------------------------------------------------------------------------------

    const areaOf = (width, height) => ({ left: labkit.GUTTER, top: 2, width: width - labkit.GUTTER - labkit.RIGHT, height });

    function paint() {
      if (!tracks.length || !tracks[0].canvas.clientWidth) return;
      theme ||= labkit.themeOf(root, state);
      const view = { from: 0, to: length() };
      const top = Math.max(0.01, ...tracks.map(({ data }) => Math.max(0, ...data.steps.owned) / data.meta.num_blocks));
      tracks.forEach((track, i) => paintTrack(track, clocks()[i], view, top));
      root.dataset.now = String(now);
    }

    function paintTrack(track, clock, view, top) {
      const { data, canvas } = track, { ctx, width, height } = labkit.context(canvas);
      const rows = data.lanes, area = areaOf(width, rows.length * LANE);
      area.pitch = LANE;
      ctx.font = theme.font;
      const memory = { ...area, top: area.top + area.height + 8, height: MEMORY };
      labkit.drawAxis(ctx, theme, area, view, clock.unit, height - 8);
      labkit.drawLanes(ctx, data, theme, clock, area, view, { rows, now });
      ctx.font = theme.small; // rows are as high as a name of this size
      rows.forEach((lane, row) => {
        labkit.text(ctx, lane.label, area.left - 8, area.top + (row + 0.5) * LANE, theme.muted, "right");
      });
      ctx.font = theme.font;
      labkit.drawMemory(ctx, data, theme, clock, memory, view, { now, top });
      labkit.text(ctx, `${Math.round(100 * top)}%`, area.left - 8, memory.top + 3, theme.muted, "right");
      labkit.text(ctx, "0", area.left - 8, memory.top + MEMORY - 2, theme.muted, "right");
      const x = area.left + (Math.min(now, view.to) * area.width) / view.to;
      labkit.box(ctx, x - 0.75, 0, 1.5, height - AXIS, theme.ink);
      const at = labkit.stepAtTime(data, clock, now), { sampled, running, waiting } = data.steps;
      const done = now >= clock.length, began = Math.max(0, done ? data.count : at);
      let tokens = 0;
      for (let i = 0; i < began; i++) tokens += sampled[i];
      const end = clock.unit === "seconds" ? `${clock.length.toFixed(2)} s` : `${clock.length} steps`;
      track.figures.textContent = done ? `done after ${end}, ${tokens} tokens`
        : `${tokens} of ${track.generated} tokens; ${at < 0 ? 0 : running[at]} running, ${at < 0 ? 0 : waiting[at]} waiting`;
    }

    // -- hands ------------------------------------------------------------------------------------

    find(".lkr-play").onclick = () => play(find(".lkr-play").getAttribute("aria-pressed") !== "true");
    scrub.oninput = () => { play(false); go((scrub.value * length()) / 1000); };
    find(".lkr-unit").onchange = ({ target }) => {
      const share = Math.min(1, now / length());
      unit = target.value;
      go(share * length());
    };
    find(".lkr-stop").onclick = () => ask("stop", { owner });
    root.addEventListener("keydown", (event) => {
      const { tagName } = event.target;
      if (!tracks.length || tagName === "SELECT" || tagName === "BUTTON") return;
      if (event.key === " ") { event.preventDefault(); find(".lkr-play").click(); }
    });

    function swatches() {
      for (const canvas of root.querySelectorAll("canvas[data-swatch]")) {
        if (!canvas.clientWidth) continue;
        const { ctx, width, height } = labkit.context(canvas);
        labkit.drawSpan(ctx, theme, canvas.dataset.swatch, theme.muted, 0, 0, width, height);
      }
    }
    const again = () => { if (tracks.length && root.clientWidth) { theme = labkit.themeOf(root, state); swatches(); paint(); } };
    new ResizeObserver(again).observe(find(".lkr-shown .lkr-tracks"));
    const dark = () => document.body.classList.contains("dark");
    let was = dark();
    new MutationObserver(() => { if (dark() !== was) { was = dark(); again(); } })
      .observe(document.body, { attributes: true, attributeFilter: ["class"] });
    pull();
    return { tracks: () => tracks, now: () => now, length, go, play, started, status: () => status, shown: () => shown };
  }

  return { race };
})());
