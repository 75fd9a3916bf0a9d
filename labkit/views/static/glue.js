// Puts the parts together once all of them are on the page. `server`, `props`, `watch` and `element` are what
// gradio gives a component. Its value is told on arrival: one's own secret, the mark that others see, and the name
// that gradio gives this page.
const me = { visitor: "", mark: "", tab: "" };
const HERE = 20000, SOON = 3000; // ms between two announcements: as a rule, and while a connection comes back
const UNSURE = 60000; // ms after a gap
// Without its root, the page is part of another. Where it is, the browser knows better than a server behind proxies.
const home = window.gradio_config?.root === undefined ? null : location.origin + location.pathname.replace(/\/$/, "");

const ask = async (name, argument) => {
  const late = new Promise((resolve) => setTimeout(resolve, 10000));
  try {
    return JSON.parse(await Promise.race([server[name]({ visitor: me.visitor, ...argument }), late]));
  } catch (error) {
    return null; // the lab is away: the page says so and asks again
  }
};

function say(words) {
  document.querySelector("#lk-message p").textContent = words;
}

// Which of the panels beside the pictures is in front, where there is no room for all.
function switcher() {
  const page = document.querySelector("#lk-page"), tabs = [...document.querySelectorAll(".lk-switch [role=tab]")];
  let before = "";
  function turn(side) {
    page.dataset.side = side;
    for (const tab of tabs) {
      tab.setAttribute("aria-selected", String(tab.dataset.side === side));
      tab.tabIndex = tab.dataset.side === side ? 0 : -1;
    }
  }
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => { before = ""; turn(tab.dataset.side); });
    tab.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!move) return;
      const next = tabs[(i + move + tabs.length) % tabs.length];
      next.click();
      next.focus();
      event.preventDefault();
    });
  });
  turn("cards");
  // To the front with a panel; without a name, back to where it was before.
  return (side) => {
    if (side && side !== page.dataset.side) {
      before ||= page.dataset.side;
      turn(side);
    } else if (!side && before) {
      turn(before);
      before = "";
    }
  };
}

function start() {
  const roots = ["#lk-requests .lk-cards", "#lk-side .lk-side", "#lk-what .lk-submit", "#lk-message p", "#lk-switch .lk-switch", "#lk-projector .lk-join"];
  if (!roots.every((root) => document.querySelector(root))) return requestAnimationFrame(start);
  const [cardsRoot, sideRoot, submitRoot, , , joinRoot] = roots.map((root) => document.querySelector(root));
  const cards = labkit.cards(cardsRoot, ask, (item) => Boolean(me.mark) && item.owner === me.mark);
  const controls = labkit.controls(submitRoot, SCENARIOS, ask, say, cards.typed);
  const hostRoot = document.querySelector("#lk-host .lk-host"), host = hostRoot && labkit.host(hostRoot, ask, say);
  let version = -1;
  const lab = {
    question: () => ({ settings: version }),
    answer: (update, state) => {
      if (!update.lab) return;
      version = update.lab.version;
      if (update.lab.problem) say(update.lab.problem);
      controls.show(update.lab);
      const { settings, base } = update.lab;
      state.changed = new Map(Object.entries(settings).filter(([name, value]) => value !== base[name]));
      Object.assign(state, { played: update.lab.played, playedAfter: update.lab.played_after, playedFeed: state.feed, most: update.lab.most });
      labkit.tellFacts(state);
    },
  };
  const reveal = switcher();
  const panel = labkit.mount(element.querySelector(".lk"), ask, [cards, lab], (state, hooks) => {
    return { ...labkit.side(sideRoot, state, hooks), reveal };
  }, { stream: home === null ? "" : home + STREAM });

  function greet(visitor, mark) {
    Object.assign(me, { visitor, mark });
    try { sessionStorage.setItem("labkit", visitor); } catch { /* a browser that keeps nothing */ }
    cards.recognise();
    cards.rename();
    host?.claim();
    controls.arrived();
  }

  function welcome() {
    if (!props.value) return;
    const [visitor, mark, tab] = props.value.split(" ");
    me.tab = tab;
    greet(visitor, mark);
  }
  watch("value", welcome);
  welcome();
  attend(panel, greet);
  for (const event of ["click", "keydown"]) document.querySelector("#lk-page").addEventListener(event, panel.hurry);
  const header = document.querySelector(".lk-questions");
  const questions = header && labkit.questions(header, controls.play);
  labkit.address.followTabs();
  labkit.projector(joinRoot, hostRoot?.querySelector(".lk-project"), ask, panel);
  const tour = labkit.tour({ panel, cards, controls });
  controls.onReady(() => questions?.fromAddress());
  element.labkit = { ...panel, ...labkit, tour, visitor: () => me.visitor };
}

// Say that one is here, now and then, and more often after a gap: the lab may have given this page up meanwhile, or be
// another one. `greet(visitor, mark)` is called if it did not know the page.
function attend(panel, greet) {
  let timer = 0, unsure = 0, staying = false;

  async function announce() {
    clearTimeout(timer);
    timer = setTimeout(announce, performance.now() < unsure ? SOON : HERE);
    if (!me.tab || !element.isConnected) return;
    const answer = await ask("arrive", { tab: me.tab });
    if (!answer) unsure = performance.now() + UNSURE;
    if (!answer?.news && answer?.visitor === me.visitor) return;
    if (answer) greet(answer.visitor, answer.mark);
    if (answer && home !== null) stay();
  }

  function doubt() {
    unsure = performance.now() + UNSURE;
    announce();
  }

  // What gradio does on arrival, and not again: the lab knows by this connection when the page is closed.
  async function stay() {
    if (staying) return;
    staying = true;
    try {
      const reader = (await fetch(`${home}/gradio_api/heartbeat/${me.tab}`)).body.getReader();
      while (!(await reader.read()).done);
    } catch { /* the connection is lost again */ }
    staying = false;
    doubt();
  }

  panel.onReturn(doubt);
  window.addEventListener("online", doubt);
  window.addEventListener("pageshow", doubt);
  document.addEventListener("visibilitychange", () => document.hidden || doubt());
  timer = setTimeout(announce, HERE);
}
start();
