// The lab in a notebook. The page asks and the kernel answers; nothing is pushed. `LIVE`, `SIDE` and `WIDGET` are
// the markup of the parts.
const LATE = 1500; // ms without an answer after which the page says that the kernel is busy
const WATCH = 3000; // ms for which to look on after something happened outside the widget

// Carries questions to the kernel, one at a time and in order: a kernel that runs a cell answers late.
function courier(model, waiting) {
  const view = Math.random().toString(36).slice(2); // several views of one model get each other's answers
  const log = { sent: 0, answered: 0 };
  let turn = Promise.resolve(), pending = null;

  function receive({ id, answer }) {
    if (!pending || pending.id !== id) return;
    const { resolve, timer } = pending;
    pending = null;
    log.answered += 1;
    clearTimeout(timer);
    waiting(false);
    resolve(answer);
  }

  function send(name, question) {
    return new Promise((resolve) => {
      const id = `${view}-${log.sent += 1}`;
      pending = { id, resolve, timer: setTimeout(() => waiting(true), LATE) };
      model.send({ id, name, question });
    });
  }

  model.on("msg:custom", receive);
  return {
    log,
    ask(name, question) {
      const answer = turn.then(() => send(name, question));
      turn = answer;
      return answer;
    },
    stop: () => model.off("msg:custom", receive),
  };
}

// Whether the notebook is dark: as JupyterLab says it, as VS Code does, as Colab does, or as the browser wishes.
function isDark() {
  const { body, documentElement: html } = document, theme = html.getAttribute("theme");
  if (body.dataset.jpThemeLight) return body.dataset.jpThemeLight === "false";
  if (/\bvscode-/.test(body.className)) return /\bvscode-(dark|high-contrast)(?!-light)/.test(body.className);
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

// An element from the markup of one of our own files.
function made(markup) {
  return document.adoptNode(new DOMParser().parseFromString(markup, "text/html").body.firstElementChild);
}

function render({ model, el }) {
  const root = made(WIDGET), find = (selector) => root.querySelector(selector);
  find(".lkw-live").append(made(LIVE));
  find(".lkw-columns").append(made(SIDE));
  el.append(root);
  const section = find(".lk"), form = find(".lkw-form"), message = find(".lkw-message");
  const post = courier(model, (late) => root.classList.toggle("lkw-late", late)), ends = new AbortController();
  let watched = 0, running = false;

  // -- words that fit a notebook, where there is one person and no presets -------------------------

  find(".lk-clock").setAttribute("aria-label", "Clock of the engine");
  Object.assign(find(".lk-pause"), { title: "Runs until nothing is left to do, or stops before the next step (space)" });
  find(".lk-summary").textContent = "Waiting for the kernel …";
  find(".lk-picture .lk-empty").textContent = "Nothing has run yet. Inject a prompt: each request gets a row here, with "
    + "a block while its prompt is read, then a bar with one token in each step.";
  find(".lk-bar").append(Object.assign(document.createElement("p"), { className: "lkw-busy", role: "status",
    textContent: "The kernel is busy with a cell: it answers when that is done." }));
  section.tabIndex = 0; // a click on a picture gives it the keys

  // -- questions and answers ----------------------------------------------------------------------

  async function ask(name, question) {
    const answer = await post.ask(name, question);
    if (name === "pull" && !answer.pictures) { // this engine is gone: there will be no more updates
      message.textContent = answer.error;
      return new Promise(() => {});
    }
    if (name === "pull" || name === "look") return answer;
    message.textContent = answer.error || "";
    panel.hurry();
    return answer;
  }

  // How long until the next question; null ends the asking until a person does something.
  function pace(update) {
    const now = performance.now();
    if (update.pictures.steps?.length && !running) watched = now + WATCH; // somebody steps the engine in a cell
    running = update.busy;
    if (running) return update.wait;
    return now < watched ? 500 : null;
  }

  const words = { question: () => ({}), answer: (update) => { message.textContent = update.error || message.textContent; } };
  const cards = labkit.cards(find(".lk-cards"), ask);
  const panel = labkit.mount(section, ask, [cards, words], (state, hooks) => {
    return { ...labkit.side(find(".lk-side"), state, hooks), reveal() {} };
  }, { within: root, pace });

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const { prompt, max_tokens: most } = form.elements, button = find(".lk-play");
    if (button.disabled) return;
    button.disabled = true;
    const answer = await ask("inject", { prompt: prompt.value, max_tokens: most.value });
    button.disabled = false;
    if (!answer.error) prompt.select(); // ready to be typed over
  });
  form.addEventListener("keydown", (event) => { // JupyterLab's pages do not submit by themselves
    if (event.key !== "Enter" || event.isComposing || event.target.tagName !== "INPUT") return;
    event.preventDefault();
    form.requestSubmit();
  });

  // -- when to look -------------------------------------------------------------------------------

  // A cell may have stepped the engine: look when the pointer comes by, or a cell was run.
  const { signal } = ends;
  function outside(event) {
    if (event.type === "keydown" && event.key !== "Enter") return;
    if (root.contains(event.target) || !root.isConnected) return;
    watched = performance.now() + WATCH;
    setTimeout(panel.hurry, 300); // once the cell is on its way: its turn comes first
  }
  for (const type of ["pointerdown", "keydown"]) document.addEventListener(type, outside, { capture: true, signal });
  root.addEventListener("pointerenter", panel.hurry, { signal });
  const sight = new IntersectionObserver((entries) => {
    if (!entries.at(-1).isIntersecting) return;
    dress();
    panel.hurry();
  });
  sight.observe(root);

  // -- looks --------------------------------------------------------------------------------------

  // The words at the pointer stand outside of the notebook, which may be scrolled and cut off.
  const above = Object.assign(document.createElement("div"), { className: "lk lkw-above" });
  above.append(find(".lk-tip"));
  document.body.append(above);
  function dress() {
    for (const part of [root, above]) part.classList.toggle("dark", isDark());
    if (root.clientWidth) panel.show.restyle();
    else if (root.isConnected) setTimeout(dress, 100); // JupyterLab hides all while it changes its theme
  }
  const mirror = new MutationObserver(() => { if (root.classList.contains("dark") !== isDark()) dress(); });
  for (const part of [document.body, document.documentElement]) mirror.observe(part, { attributes: true });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", dress, { signal });

  root.labkit = { ...panel, log: post.log, isDark };
  return () => {
    ends.abort();
    for (const observer of [sight, mirror]) observer.disconnect();
    post.stop();
    above.remove();
    root.remove(); // ends the asking
  };
}

export default { render };
