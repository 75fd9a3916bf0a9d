// The panels beside the prompt: scenarios to play (the page calls them presets), the engine's knobs, and what becomes
// of running requests when the engine restarts. `ask(name, argument)` reaches the lab.
Object.assign(labkit, (() => {
  const { part } = labkit;
  const KNOBS = [
    ["scheduler", "Scheduler", "Continuous: requests join and leave at every step. Static: a batch runs until its " +
      "longest answer is done. Naive: one request at a time.", ["continuous", "static", "naive"]],
    ["kv_policy", "KV policy", "Paged: a request takes pages as its tokens come. Reserved: it takes all that it " +
      "could ever need before it starts.", ["paged", "reserved"]],
    ["speculative", "Speculation", "n-gram: guess what comes next from how the text went before, check several guesses " +
      "in one step, and keep those that are right. The answers are the same. It guesses where that pays.", ["off", "ngram"]],
    ["block_size", "Page size", "Tokens to a page. Large pages waste more of their last one.", "tokens"],
    ["num_blocks", "Pages", "In the KV cache. Few enough, and requests must wait or are preempted.", "pages"],
    ["max_num_seqs", "Seats", "How many requests run at once.", "requests"],
    ["max_num_batched_tokens", "Token budget", "How many tokens one step computes at most.", "tokens a step"],
    ["max_step_seconds", "Step time", "How many seconds a step should take at most. The token budget follows: it shrinks " +
      "where a step would take longer.", ["off", "0.02", "0.05", "0.1", "0.2", "0.5"]],
    ["enable_prefix_caching", "Prefix cache", "Keep pages whose tokens are known, for prompts that begin the same way.", true],
    ["enable_chunked_prefill", "Chunked prefill", "Read a long prompt in pieces beside the others' decode. Without it, " +
      "a step reads whole prompts or decodes.", true],
  ];

  const NAMES = { ngram: "n-gram" };
  const toText = (value) => (value === null ? "off" : String(value)),
    fromText = (text) => (text === "off" ? null : Number(text) || text);

  // The scenario and the knobs that the address asks for.
  function fromAddress(search) {
    const query = new URLSearchParams(search), settings = {};
    for (const [name, , , kind] of KNOBS) {
      if (!query.has(name)) continue;
      const text = query.get(name).slice(0, 40);
      if (kind === true) settings[name] = !["0", "false", "off", "no"].includes(text.toLowerCase());
      else settings[name] = Array.isArray(kind) ? fromText(text) : Number(text);
    }
    return { scenario: query.get("preset") || "", settings };
  }

  // `typed()` says how many cards of what people typed are on the page, and whether any request is under way.
  function controls(root, scenarios, ask, say, typed) {
    const left = document.querySelector("#lk-left"), tabs = [...root.querySelectorAll(".lk-what [role=tab]")];
    const list = root.querySelector(".lk-scenarios"), knobs = root.querySelector(".lk-knobs");
    const all = root.querySelector(".lk-all"), undo = root.querySelector(".lk-undo"), reset = root.querySelector(".lk-reset");
    const question = root.querySelector(".lk-question"), apply = root.querySelector(".lk-apply"), putBack = document.querySelector(".lk-put-back");
    const inputs = new Map(), wanted = fromAddress(location.search);
    let status = null, chosen = "", again = null, fresh = true, ready = () => {}, asked = false;

    // -- which panel ------------------------------------------------------------------------------

    function turn(what) {
      left.dataset.what = what;
      for (const tab of tabs) {
        const on = tab.dataset.what === what;
        tab.setAttribute("aria-selected", String(on));
        tab.tabIndex = on ? 0 : -1;
      }
      for (const panel of root.querySelectorAll("[data-panel]")) panel.hidden = panel.dataset.panel !== what;
    }
    tabs.forEach((tab, i) => {
      tab.addEventListener("click", () => turn(tab.dataset.what));
      tab.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!step) return;
        const next = tabs[(i + step + tabs.length) % tabs.length];
        turn(next.dataset.what);
        next.focus();
        event.preventDefault();
      });
    });

    // -- asking the lab ---------------------------------------------------------------------------

    // Who clicks before the lab has welcomed them does not click in vain.
    let arrived = () => {};
    const here = new Promise((resolve) => { arrived = resolve; });

    // Do it. If requests are under way, ask first what is to become of them.
    async function act(name, argument, running = "ask") {
      question.hidden = true;
      await here;
      const answer = await ask(name, { ...argument, running });
      if (!answer) return say("No answer from the lab. Try again.");
      say(answer.error || answer.note || "");
      if (answer.error) return;
      if (name === "play" && !answer.ask) collapse(argument.scenario);
      if (answer.ask) {
        again = (choice) => act(name, argument, choice);
        pose(`${labkit.count(answer.ask, "request")} ${answer.ask === 1 ? "is" : "are"} under way, perhaps of other people ` +
          `too. ${restarts(argument)}. What shall become of them?`, ["finish", "cancel", "leave"]);
      }
    }

    // What `change` or `play` does to the engine.
    function restarts({ scenario, settings, anew }) {
      const own = anew ? missing(scenarios.find(({ name }) => name === scenario).settings) : {};
      const words = labkit.settingsWords({ ...status?.changes[scenario], ...own, ...settings });
      return `This restarts the engine${words && ` with ${words}`}`;
    }

    const CHOICES = {
      go: ["Restart and play", () => again("ask")],
      finish: ["Let them finish first", () => again("finish")],
      cancel: ["Cancel them", () => again("cancel")],
      leave: ["Change nothing", () => {}],
      now: ["Cancel them now", () => again("cancel")],
      keep: ["Do not restart", () => ask("change", { settings: {}, running: "keep" })],
    };

    function pose(words, choices) {
      const buttons = choices.map((choice) => {
        const button = part("button", "lk-choice", CHOICES[choice][0]);
        button.type = "button";
        button.dataset.choice = choice;
        button.addEventListener("click", () => {
          question.hidden = true;
          CHOICES[choice][1]();
        });
        return button;
      });
      question.replaceChildren(part("p", "", words), ...buttons);
      question.hidden = false;
      question.scrollIntoView({ block: "nearest" });
      if (!choices.includes("keep")) buttons[0].focus();
    }

    // -- scenarios --------------------------------------------------------------------------------

    function linkTo(scenario) {
      const query = new URLSearchParams({ preset: scenario.name });
      for (const [name, value] of Object.entries(status?.settings || {})) {
        const normal = name in scenario.settings ? scenario.settings[name] : status.base[name];
        if (status.played === scenario.name && value !== normal) query.set(name, toText(value));
      }
      return `${location.origin}${location.pathname}?${query}`;
    }

    function choose(name) {
      chosen = name;
      for (const item of list.children) {
        const on = item.dataset.scenario === name;
        item.classList.toggle("lk-on", on);
        item.querySelector(".lk-scenario").setAttribute("aria-expanded", String(on));
        item.querySelector(".lk-scenario-more").hidden = !on;
      }
    }

    // Once it plays, the others make room for the answers.
    function collapse(name) {
      choose(name);
      list.classList.add("lk-collapsed");
      all.hidden = false;
      if (status && !asked) labkit.address.show(linkTo(scenarios.find((scenario) => scenario.name === name)));
    }
    all.addEventListener("click", () => {
      list.classList.remove("lk-collapsed");
      all.hidden = true;
      choose("");
      list.querySelector("button").focus();
    });

    function start(name, anew = false) {
      const argument = { scenario: name, anew, settings: wanted.scenario === name ? wanted.settings : {} };
      wanted.scenario = ""; // the link has been followed; from now on the knobs decide
      const { cards, running } = typed();
      if (!cards || running || !status?.knobs) return act("play", argument); // the lab asks about those that run
      again = (choice) => act("play", argument, choice);
      pose(`${restarts(argument)}: the pictures and ${labkit.count(cards, "card")} go.`, ["go", "leave"]);
    }

    // From elsewhere on the page.
    function play(name) {
      asked = true; // by a question, which the address names
      turn("scenarios");
      choose(name);
      start(name, true);
    }

    for (const scenario of scenarios) {
      const item = part("li", ""), open = part("button", "lk-scenario", scenario.title), more = part("div", "lk-scenario-more");
      item.dataset.scenario = scenario.name;
      open.type = "button";
      open.addEventListener("click", () => choose(chosen === scenario.name ? "" : scenario.name));
      const button = part("button", "lk-play", "Play"), link = part("a", "lk-link", "Link to this");
      button.type = "button";
      button.addEventListener("click", () => {
        asked = false;
        start(scenario.name);
      });
      const row = part("div", "lk-scenario-row");
      row.append(button, link, labkit.copyButton("Copy link", () => link.href));
      more.append(part("p", "lk-look", scenario.look), part("p", "lk-changes"), row);
      item.append(open, more);
      list.append(item);
    }
    choose("");

    // -- knobs ------------------------------------------------------------------------------------

    for (const [name, title, hint, kind] of KNOBS) {
      const label = part("label", "lk-knob"), words = part("span", "lk-knob-name", title);
      const input = document.createElement(Array.isArray(kind) ? "select" : "input");
      if (Array.isArray(kind)) for (const choice of kind) input.add(new Option(NAMES[choice] || choice, choice));
      else input.type = kind === true ? "checkbox" : "number";
      if (typeof kind === "string") Object.assign(input, { min: 1, step: 1, inputMode: "numeric" });
      input.name = name;
      label.dataset.hint = hint;
      label.append(words, input);
      if (typeof kind === "string") label.append(part("span", "lk-unit", kind));
      inputs.set(name, { input, kind });
      knobs.append(label);
      input.addEventListener("input", offer);
    }

    // Which buttons there is a use for.
    function offer() {
      const some = Object.keys(changed()).length > 0, moved = Object.keys(fromStart()).length > 0;
      apply.disabled = !some || !status?.knobs;
      undo.hidden = !some;
      reset.hidden = !moved || !status?.knobs;
    }

    // Those of some settings that the engine does not have: of those that the lab started with, and of those that people
    // chose before a preset changed them.
    const missing = (settings = {}) => Object.fromEntries(Object.entries(settings).filter(([name, value]) => status.settings[name] !== value));
    const fromStart = () => missing(status?.base), back = () => missing(status?.chosen);

    function changed() {
      const settings = {};
      for (const [name, { input, kind }] of inputs) {
        const value = kind === true ? input.checked : typeof kind === "string" ? Number(input.value) : fromText(input.value);
        if (status && value !== status.settings[name]) settings[name] = value;
      }
      return settings;
    }

    function fill(settings) {
      for (const [name, { input, kind }] of inputs) {
        if (!(name in settings)) continue;
        const value = toText(settings[name]);
        if (Array.isArray(kind) && ![...input.options].some((option) => option.value === value)) {
          if (settings !== status.settings) continue;
          input.add(new Option(value, value));
        }
        if (kind === true) input.checked = settings[name];
        else input.value = value;
      }
      offer();
    }

    root.querySelector(".lk-knob-form").addEventListener("submit", (event) => {
      event.preventDefault();
      act("change", { settings: changed() });
    });
    undo.addEventListener("click", () => fill(status.settings));
    reset.addEventListener("click", () => act("change", { settings: fromStart() }));
    putBack.addEventListener("click", () => act("change", { settings: back() }));

    // -- what the lab says ------------------------------------------------------------------------

    function show(told) {
      status = told;
      fill(status.settings);
      for (const { input } of inputs.values()) input.disabled = !status.knobs;
      root.querySelector(".lk-locked").hidden = status.knobs;
      for (const scenario of scenarios) {
        const item = list.querySelector(`[data-scenario="${scenario.name}"]`), played = status.played === scenario.name && status.played_after !== null;
        const words = labkit.settingsWords(status.changes[scenario.name]);
        item.querySelector(".lk-link").href = linkTo(scenario);
        item.querySelector(".lk-play").textContent = played ? "Play again" : "Play";
        item.querySelector(".lk-changes").textContent = played ? "It plays by itself: there is nothing to press."
          : words && status.knobs ? `It restarts the engine with ${words}.` : "";
        item.classList.toggle("lk-played", played);
      }
      const moved = back();
      putBack.hidden = !Object.keys(moved).length || !status.knobs;
      putBack.title = `The preset changed the settings. This restarts the engine with ${labkit.settingsWords(moved)}, as before`;
      if (status.pending) {
        again = (choice) => act("change", { settings: status.pending }, choice);
        pose("The engine restarts with other settings as soon as what runs has finished.", ["now", "keep"]);
      } else if (question.querySelector('[data-choice="keep"]')) question.hidden = true;
      if (fresh) {
        fresh = false;
        followLink();
        ready();
      }
    }

    function followLink() {
      const known = scenarios.some((scenario) => scenario.name === wanted.scenario);
      if (known) {
        turn("scenarios");
        choose(wanted.scenario);
      } else if (Object.keys(wanted.settings).length) {
        turn("knobs");
        fill(wanted.settings);
      }
      if (wanted.scenario && !known) say(`The link asks for a preset that is not known here: ${wanted.scenario.slice(0, 40)}.`);
      if (!known) wanted.scenario = "";
    }

    turn("prompt");
    return { show, turn, choose, play, arrived, onReady: (act) => { ready = act; } };
  }

  return { controls, fromAddress };
})());
