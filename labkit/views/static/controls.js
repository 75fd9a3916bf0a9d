// The panels beside the prompt: scenes to play, the engine's knobs, and what becomes of running requests when
// the engine restarts. `ask(name, argument)` reaches the lab.
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
    ["enable_prefix_caching", "Prefix cache", "Keep pages whose tokens are known, for prompts that begin the same way.", true],
    ["enable_chunked_prefill", "Chunked prefill", "Read a long prompt in pieces beside the others' decode. Without it, " +
      "a step reads whole prompts or decodes.", true],
  ];

  const NAMES = { ngram: "n-gram" };
  const toText = (value) => (value === null ? "off" : String(value)), fromText = (text) => (text === "off" ? null : text);

  // The scene and the knobs that the address asks for.
  function fromAddress(search) {
    const query = new URLSearchParams(search), settings = {};
    for (const [name, , , kind] of KNOBS) {
      if (!query.has(name)) continue;
      const text = query.get(name).slice(0, 40);
      if (kind === true) settings[name] = !["0", "false", "off", "no"].includes(text.toLowerCase());
      else settings[name] = Array.isArray(kind) ? fromText(text) : Number(text);
    }
    return { preset: query.get("preset") || "", settings };
  }

  function controls(root, presets, ask, say) {
    const left = document.querySelector("#lk-left"), tabs = [...root.querySelectorAll(".lk-what [role=tab]")];
    const scenes = root.querySelector(".lk-scenes"), knobs = root.querySelector(".lk-knobs");
    const question = root.querySelector(".lk-question"), apply = root.querySelector(".lk-apply");
    const inputs = new Map(), wanted = fromAddress(location.search);
    let status = null, chosen = "", again = null, fresh = true;

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

    // Do it; where requests are under way, find out first what is to become of them.
    async function act(deed, argument, running = "ask") {
      question.hidden = true;
      const answer = await ask(deed, { ...argument, running });
      if (!answer) return say("No answer from the lab. Try again.");
      say(answer.error || "");
      if (answer.error) return;
      if (answer.ask) {
        again = (choice) => act(deed, argument, choice);
        pose(`${labkit.count(answer.ask, "request")} ${answer.ask === 1 ? "is" : "are"} under way, perhaps of other people ` +
          "too. This restarts the engine. What shall become of them?", ["finish", "cancel", "leave"]);
      }
    }

    const CHOICES = {
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
      if (!choices.includes("keep")) buttons[0].focus();
    }

    // -- scenes -----------------------------------------------------------------------------------

    function linkTo(preset) {
      const query = new URLSearchParams({ preset: preset.name });
      for (const [name, value] of Object.entries(status?.settings || {})) {
        const normal = name in preset.settings ? preset.settings[name] : status.base[name];
        if (status.played === preset.name && value !== normal) query.set(name, toText(value));
      }
      return `${location.origin}${location.pathname}?${query}`;
    }

    function choose(name) {
      chosen = name;
      for (const item of scenes.children) {
        const on = item.dataset.preset === name;
        item.classList.toggle("lk-on", on);
        item.querySelector(".lk-scene").setAttribute("aria-expanded", String(on));
        item.querySelector(".lk-scene-more").hidden = !on;
      }
    }

    function start(name) {
      const settings = wanted.preset === name ? wanted.settings : {};
      act("play", { preset: name, settings });
      wanted.preset = ""; // the link has been followed; from now on the knobs decide
    }

    // From elsewhere on the page.
    function play(name) {
      turn("scenes");
      choose(name);
      start(name);
    }

    for (const preset of presets) {
      const item = part("li", ""), open = part("button", "lk-scene", preset.title), more = part("div", "lk-scene-more");
      item.dataset.preset = preset.name;
      open.type = "button";
      open.addEventListener("click", () => choose(chosen === preset.name ? "" : preset.name));
      const button = part("button", "lk-play", "Play"), link = part("a", "lk-link", "Link to this");
      button.type = "button";
      button.addEventListener("click", () => start(preset.name));
      const row = part("div", "lk-scene-row");
      row.append(button, link);
      more.append(part("p", "lk-look", preset.look), row);
      item.append(open, more);
      scenes.append(item);
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
      input.addEventListener("input", () => { apply.disabled = !Object.keys(changed()).length || !status?.knobs; });
    }

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
      apply.disabled = !Object.keys(changed()).length || !status.knobs;
    }

    root.querySelector(".lk-knob-form").addEventListener("submit", (event) => {
      event.preventDefault();
      act("change", { settings: changed() });
    });
    root.querySelector(".lk-reset").addEventListener("click", () => fill(status.settings));

    // -- news -------------------------------------------------------------------------------------

    function show(news) {
      status = news;
      fill(news.settings);
      for (const { input } of inputs.values()) input.disabled = !news.knobs;
      root.querySelector(".lk-locked").hidden = news.knobs;
      for (const preset of presets) {
        scenes.querySelector(`[data-preset="${preset.name}"] .lk-link`).href = linkTo(preset);
      }
      if (news.pending) {
        again = (choice) => act("change", { settings: news.pending }, choice);
        pose("The engine restarts with other settings as soon as what runs has finished.", ["now", "keep"]);
      } else if (question.querySelector('[data-choice="keep"]')) question.hidden = true;
      if (fresh) followLink();
      fresh = false;
    }

    function followLink() {
      const known = presets.some((preset) => preset.name === wanted.preset);
      if (known) {
        turn("scenes");
        choose(wanted.preset);
      } else if (Object.keys(wanted.settings).length) {
        turn("knobs");
        fill(wanted.settings);
      }
      if (wanted.preset && !known) say(`The link asks for a preset that is not known here: ${wanted.preset.slice(0, 40)}.`);
      if (!known) wanted.preset = "";
    }

    turn("prompt");
    return { show, turn, choose, play };
  }

  return { controls, fromAddress };
})());
