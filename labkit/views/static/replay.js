// A scrubber over a trace: blocks, batch, queue and block tables at any step. `ask(name, argument)` reaches the lab.
Object.assign(labkit, (() => {
  const AHEAD = 32, KEPT = 600; // frames fetched at once, and remembered
  const AXIS = 18;
  const { el } = labkit;
  const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
  const WHAT = { p: "prefill", c: "chunk", d: "decode", i: "idle" };

  function replay(root, ask) {
    const find = (selector) => root.querySelector(selector);
    const canvases = Object.fromEntries([...root.querySelectorAll("canvas[data-picture]")]
      .map((canvas) => [canvas.dataset.picture, canvas]));
    const scrub = find(".lkr-scrub"), source = find(".lkr-source");
    const state = labkit.createState(), frames = new Map(), uploads = [];
    let opened = "", data = null, at = 0, playing = null, wanted = null, drawn = -1, focus, theme = null, steps = [], strips = [], opening = 0;

    // -- which trace ------------------------------------------------------------------------------

    async function list() {
      const names = await ask("traces", {});
      if (!names) return;
      const options = [...names.map((name) => ({ key: `s:${name}`, name })), ...uploads];
      const same = options.length === source.options.length
        && options.every(({ key, name }, i) => source.options[i].value === key && source.options[i].text === name);
      if (same) return;
      const chosen = source.value;
      source.replaceChildren(...options.map(({ key, name }) => Object.assign(el("option", "", name), { value: key })));
      if (options.some(({ key }) => key === chosen)) source.value = chosen;
      if (!data && options.length) open(source.value);
    }

    async function open(key, step) {
      const turn = ++opening;
      play(false);
      find(".lkr-headline").textContent = "Reading the trace …";
      const answer = await ask("open", { key });
      if (turn !== opening) return; // something else was asked for meanwhile
      if (!answer || answer.error) {
        find(".lkr-headline").textContent = answer ? answer.error : "The lab does not answer: try again.";
        return;
      }
      opened = answer.opened;
      data = labkit.unpack(answer.data);
      frames.clear();
      Object.assign(state, { meta: data.meta, palette: data.palette, hover: {},
                             lanes: new Map(data.lanes.map((lane) => [lane.id, lane])) });
      theme = null;
      find(".lkr-headline").textContent = data.headline.filter(Boolean).join(". ");
      find(".lk-squares").textContent = labkit.squareWords(data);
      scrub.max = Math.max(0, data.count - 1);
      drawn = -1;
      root.classList.toggle("lkr-nothing", !data.count);
      root.classList.toggle("lkr-drafting", data.drafting);
      steps = labkit.meterSteps(data);
      root.classList.toggle("lk-sending", labkit.sends(steps));
      requestAnimationFrame(again); // the legend, too
      go(step === undefined ? 0 : (data.place.get(step) ?? data.count - 1));
    }

    // -- which step -------------------------------------------------------------------------------

    function go(place) {
      if (!data || !data.count) return paint();
      at = Math.max(0, Math.min(data.count - 1, place));
      scrub.value = at;
      scrub.setAttribute("aria-valuetext", `step ${data.steps.step[at]}`);
      find(".lkr-where").textContent = `step ${data.steps.step[at]} of ${data.steps.step[data.count - 1]}`;
      fetchFrames();
      requestAnimationFrame(paint);
    }

    // Ask one question at a time: for the frames of the step on show and of those after it.
    async function fetchFrames() {
      let from = at;
      while (frames.has(from) && from < at + AHEAD) from += 1;
      const needed = from === at || (playing && from < Math.min(data.count, at + AHEAD / 2));
      if (wanted !== null || !needed || from >= data.count) return;
      wanted = from;
      const asked = opened, answer = await ask("frames", { opened, first: from, count: playing ? AHEAD : 8 });
      wanted = null;
      if (asked !== opened) return fetchFrames();
      if (!answer) return void setTimeout(fetchFrames, 1000);
      if (answer.gone) return open(source.value, data.steps.step[at]);
      labkit.read(["ReplayFrame"], answer.frames).forEach((frame, i) => frames.set(from + i, frame));
      for (const key of frames.keys()) if (frames.size > KEPT) frames.delete(key);
      requestAnimationFrame(paint);
      fetchFrames();
    }

    function play(on) {
      clearTimeout(playing);
      playing = null;
      find(".lkr-play").textContent = on ? "Pause" : "Play";
      find(".lkr-play").setAttribute("aria-pressed", String(on));
      if (!on || !data) return;
      if (at >= data.count - 1) go(0);
      const tick = () => {
        playing = setTimeout(tick, 1000 / Number(find(".lkr-speed").value));
        if (!root.isConnected) return play(false);
        if (!frames.has(at + 1) && at + 1 < data.count) return fetchFrames(); // not there yet
        if (at + 1 < data.count) go(at + 1);
        else play(false);
      };
      playing = setTimeout(tick, 1000 / Number(find(".lkr-speed").value));
    }

    // -- pictures ---------------------------------------------------------------------------------

    function paint() {
      if (!data || !canvases.strip.clientWidth) return;
      if (!theme) dress();
      const frame = frames.get(at);
      paintStrip();
      paintLanes();
      paintMeters();
      if (!frame) return;
      labkit.lookBack(state, frame);
      const canvas = canvases.pages;
      const height = labkit.blocksHeight(state, canvas.clientWidth, 190);
      if (canvas.style.height !== `${height}px`) canvas.style.height = `${height}px`;
      const { ctx, width } = labkit.context(canvas);
      labkit.drawBlocks(ctx, state, theme, width, height);
      if (drawn !== at) words(frame);
      drawn = at;
      root.dataset.drawn = `${frame.step}`;
    }

    function paintStrip() {
      const { ctx, width, height } = labkit.context(canvases.strip), clock = labkit.clockOf(data, "steps");
      const area = stripArea(width, height), view = { from: 0, to: Math.max(1, data.count) };
      ctx.font = theme.font;
      labkit.text(ctx, "100%", area.left - 8, area.top + 4, theme.muted, "right");
      labkit.text(ctx, "0", area.left - 8, area.top + area.height - 4, theme.muted, "right");
      labkit.drawMemory(ctx, data, theme, clock, area, view);
      const x = area.left + ((at + 0.5) * area.width) / view.to;
      labkit.box(ctx, x - 1, 0, 2, height, theme.ink);
    }

    const stripArea = (width, height) => ({ left: labkit.GUTTER, top: 2, width: width - labkit.GUTTER - labkit.RIGHT,
                                            height: height - 6 });

    // The steps around the one on show, as many as fit.
    function windowOf(width) {
      const room = width - labkit.GUTTER - labkit.RIGHT, fits = Math.max(30, Math.floor(room / 5));
      const many = Math.min(fits, Math.max(30, data.count));
      const from = Math.max(0, Math.min(data.count - many, at - Math.floor(many / 2)));
      return { from, to: from + many };
    }

    function lanesNow(width, height) {
      const view = windowOf(width), clock = labkit.clockOf(data, "steps");
      const { rows, hidden } = labkit.lanesIn(data, clock, view, Math.floor((height - AXIS) / 6));
      const area = { left: labkit.GUTTER, top: 1, width: width - labkit.GUTTER - labkit.RIGHT, height: height - AXIS };
      area.pitch = Math.min(18, area.height / Math.max(1, rows.length));
      return { view, clock, rows, hidden, area };
    }

    function paintLanes() {
      const { ctx, width, height } = labkit.context(canvases.lanes);
      const { view, clock, rows, hidden, area } = lanesNow(width, height);
      ctx.font = theme.font;
      const zero = data.steps.step[0] || 0;
      labkit.drawAxis(ctx, theme, area, { from: view.from + zero, to: view.to + zero }, "steps", height - 8);
      const pitch = area.width / (view.to - view.from), x = area.left + (at - view.from) * pitch;
      ctx.globalAlpha = 0.14;
      labkit.box(ctx, x, 0, Math.max(2, pitch), area.height, theme.ink);
      ctx.globalAlpha = 1;
      labkit.drawLanes(ctx, data, theme, clock, area, view, { rows, focus });
      const every = Math.ceil(11 / area.pitch);
      rows.forEach((lane, row) => {
        if (row % every) return;
        labkit.text(ctx, lane.label, area.left - 8, area.top + (row + 0.5) * area.pitch, theme.muted, "right");
      });
      labkit.box(ctx, x, area.height, Math.max(2, pitch), 3, theme.ink);
      if (hidden) labkit.text(ctx, `${hidden} more`, area.left - 8, height - 8, theme.muted, "right"); // below their names
    }

    // Below the batch, and in the same columns.
    function paintMeters() {
      const { ctx, width, height } = labkit.context(canvases.meters), view = windowOf(width);
      const pitch = (width - labkit.GUTTER - labkit.RIGHT) / (view.to - view.from), left = labkit.GUTTER;
      const time = { first: 0, pitch, left, x: (place) => left + place * pitch };
      const part = (values) => values?.slice(view.from, view.to);
      const inView = strips.map((strip) => ({ ...strip, values: part(strip.values), over: part(strip.over) }));
      const steps = inView[0].values.map((_, step) => ({ step }));
      ctx.globalAlpha = 0.14;
      labkit.box(ctx, time.x(at - view.from), 0, Math.max(2, pitch), height, theme.ink);
      ctx.globalAlpha = 1;
      ctx.font = theme.font;
      labkit.drawStrips(ctx, theme, time, steps, inView, strips.map(({ words }) => words(at)), width, height);
    }

    // -- words ------------------------------------------------------------------------------------

    const nameOf = (number) => data.lanes[number]?.name ?? "?";

    function who(number) {
      const name = el("button", "lkr-who", nameOf(number));
      name.type = "button";
      name.style.setProperty("--lkr-whose", theme.palette[data.lanes[number]?.color ?? 0]);
      const look = (on) => { focus = state.hover.request = on ? number : undefined; paint(); };
      name.onpointerenter = name.onfocus = () => look(true);
      name.onpointerleave = name.onblur = () => look(false);
      return name;
    }

    function words(frame) {
      const { owned, filled, running, waiting, sampled, computed, drafted, accepted } = data.steps;
      const { num_blocks: blocks, block_size: size } = data.meta;
      const empty = owned[at] ? Math.round(100 * (1 - filled[at] / (owned[at] * size))) : 0;
      find(".lkr-now").textContent = `Step ${frame.step}: ${running[at]} running, ${waiting[at]} waiting; `
        + `${owned[at]} of ${count(blocks, "page")} owned, ${empty}% of their slots empty; `
        + `${count(computed[at], "token")} computed, ${sampled[at]} generated`
        + `${drafted?.[at] ? `: ${labkit.draftWords(drafted[at], accepted[at])}` : ""}`
        + `${["", labkit.sentWords(steps[at])].filter((part, i) => !i || part).join("; ")}.`;
      canvases.meters.setAttribute("aria-label", strips.map(({ name, words }) => `${name}: ${words(at)}`).join("; "));
      const doing = new Map(frame.batch.map((row) => [row.lane, row]));
      const told = frame.events.map(({ lane, words }) => line(lane, words));
      find(".lkr-events").replaceChildren(...(told.length ? told : [el("p", "lkr-none", "Nobody came or went.")]));
      const queue = frame.queue.map(({ lane, words: why }, i) => line(lane, why || `number ${i + 1} in the queue`));
      if (frame.queued > queue.length) queue.push(el("p", "lkr-none", `and ${frame.queued - queue.length} more`));
      find(".lkr-queue").replaceChildren(...(queue.length ? queue : [el("p", "lkr-none", "Nobody waits.")]));
      const tables = frame.tables.slice(0, 64).map((table) => tableOf(table, doing.get(table.request)));
      find(".lkr-tables").replaceChildren(...(tables.length ? tables : [el("p", "lkr-none", "All pages are free.")]));
    }

    function line(lane, words) {
      const made = el("p", "lkr-line");
      if (lane >= 0) made.append(who(lane));
      made.append(el("span", "", words));
      return made;
    }

    function tableOf({ request, computed, blocks }, row) {
      const made = el("div", "lkr-table"), pages = el("span", "lkr-pages");
      const drafts = row?.drafted ? `: ${labkit.draftWords(row.drafted, row.accepted)}` : "";
      const did = row ? `${WHAT[row.kind]}, ${count(row.tokens, "token")}${drafts}` : "no token in this step";
      made.append(who(request), el("span", "lkr-did", `${did}; ${computed} in the cache`), pages);
      for (const block of blocks.slice(0, 96)) pages.append(el("span", "lkr-page", block));
      if (blocks.length > 96) pages.append(el("span", "lkr-none", `and ${blocks.length - 96} more`));
      return made;
    }

    // -- hands ------------------------------------------------------------------------------------

    const deeds = { first: () => go(0), back: () => go(at - 1), forward: () => go(at + 1),
                    last: () => go(data ? data.count - 1 : 0), play: () => play(playing === null) };
    for (const [name, deed] of Object.entries(deeds)) {
      find(`.lkr-${name}`).onclick = () => { if (name !== "play") play(false); deed(); };
    }
    scrub.oninput = () => { play(false); go(Number(scrub.value)); };
    source.onchange = () => open(source.value);
    find(".lkr-reload").onclick = () => open(source.value, data?.steps.step[at]);
    root.addEventListener("keydown", (event) => {
      const keys = { ArrowLeft: "back", ArrowRight: "forward", Home: "first", End: "last", " ": "play" };
      const deed = keys[event.key], { tagName, type } = event.target;
      const own = tagName === "SELECT" || (tagName === "BUTTON" && event.key === " ");
      if (!deed || own || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault(); // the page would scroll, or a slider move twice
      if (deed !== "play") play(false);
      deeds[deed]();
    });
    const seek = (canvas, step) => {
      const move = (event) => { if (data?.count) { play(false); go(step(event.offsetX, canvas.clientWidth)); } };
      canvas.onpointerdown = (event) => { canvas.setPointerCapture(event.pointerId); move(event); };
      canvas.onpointermove = (event) => { if (event.buttons) move(event); };
    };
    seek(canvases.strip, (x, width) => {
      const area = stripArea(width, 1);
      return Math.floor(((x - area.left) * data.count) / area.width);
    });
    let held = null; // the window, which stays where it is while the pointer drags
    for (const canvas of [canvases.lanes, canvases.meters]) {
      canvas.addEventListener("pointerdown", () => { held = windowOf(canvas.clientWidth); }, true);
      seek(canvas, (x, width) => {
        const room = width - labkit.GUTTER - labkit.RIGHT;
        return Math.floor(held.from + ((x - labkit.GUTTER) * (held.to - held.from)) / room);
      });
    }
    for (const button of root.querySelectorAll("[data-save]")) {
      button.onclick = async () => {
        button.disabled = true;
        const kind = button.dataset.save, answer = await ask("save", { opened, kind });
        button.disabled = false;
        if (!answer || answer.error) {
          find(".lkr-headline").textContent = answer ? answer.error : "The lab does not answer: try again.";
          return;
        }
        const link = el("a");
        link.href = URL.createObjectURL(new Blob([answer.text], { type: answer.type }));
        link.download = answer.name;
        link.click();
        setTimeout(() => URL.revokeObjectURL(link.href), 10000);
      };
    }

    // -- looks ------------------------------------------------------------------------------------

    function swatches() {
      for (const canvas of root.querySelectorAll("canvas[data-swatch]")) {
        if (!canvas.clientWidth) continue;
        const { ctx, width, height } = labkit.context(canvas);
        labkit.drawSpan(ctx, theme, canvas.dataset.swatch, theme.muted, 0, 0, width, height);
      }
    }
    function dress() {
      theme = labkit.themeOf(root, state);
      strips = labkit.stripsOf(steps, data.meta, theme);
      if (!data.timed) strips[0].name = "tokens a step";
    }
    const again = () => { if (data) { dress(); drawn = -1; swatches(); paint(); } };
    new ResizeObserver(again).observe(canvases.strip);
    const dark = () => document.body.classList.contains("dark");
    let was = dark();
    new MutationObserver(() => { if (dark() !== was) { was = dark(); again(); } })
      .observe(document.body, { attributes: true, attributeFilter: ["class"] });
    (function listen() {
      if (canvases.strip.clientWidth && !document.hidden) list().then(() => { if (data) swatches(); });
      setTimeout(listen, data ? 3000 : 700);
    })();

    return {
      open,
      add: (key, name) => { uploads.push({ key, name }); list().then(() => { source.value = key; open(key); }); },
      where: () => (data && data.count ? data.steps.step[at] : -1), data: () => data, frame: () => frames.get(at), state,
    };
  }

  return { replay };
})());
