// Puts the parts together once all of them are on the page. `server`, `props`, `watch` and `element` are what
// gradio gives a component. Its value is told on arrival: one's own secret, and the mark that others see.
const [secret, mark] = [0, 1].map((place) => () => (props.value || "").split(" ")[place] || "");

const ask = async (name, argument) => {
  const late = new Promise((resolve) => setTimeout(resolve, 10000));
  try {
    return JSON.parse(await Promise.race([server[name]({ visitor: secret(), ...argument }), late]));
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
  const roots = ["#lk-requests .lk-cards", "#lk-side .lk-side", "#lk-what .lk-submit", "#lk-message p", "#lk-switch .lk-switch"];
  if (!roots.every((root) => document.querySelector(root))) return requestAnimationFrame(start);
  const [cardsRoot, sideRoot, submitRoot] = roots.map((root) => document.querySelector(root));
  const cards = labkit.cards(cardsRoot, ask, (item) => Boolean(mark()) && item.owner === mark());
  const controls = labkit.controls(submitRoot, SCENARIOS, ask, say);
  let version = -1;
  const lab = {
    question: () => ({ settings: version }),
    answer: (update) => {
      if (!update.lab) return;
      version = update.lab.version;
      if (update.lab.problem) say(update.lab.problem);
      controls.show(update.lab);
    },
  };
  const reveal = switcher(), home = window.gradio_config?.root; // without it, the page is part of another
  const panel = labkit.mount(element.querySelector(".lk"), ask, [cards, lab], (state, hooks) => {
    return { ...labkit.side(sideRoot, state, hooks), reveal };
  }, { stream: home === undefined ? "" : home + STREAM });
  function greet() {
    if (!props.value) return;
    try { sessionStorage.setItem("labkit", secret()); } catch { /* a browser that keeps nothing */ }
    cards.recognise();
    cards.rename();
  }
  watch("value", greet);
  greet();
  for (const event of ["click", "keydown"]) document.querySelector("#lk-page").addEventListener(event, panel.hurry);
  const header = document.querySelector(".lk-questions");
  if (header) labkit.questions(header, controls.play);
  element.labkit = { ...panel, ...labkit, visitor: secret };
}
start();
