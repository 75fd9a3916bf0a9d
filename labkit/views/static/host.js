// The host's panel. Whoever opens the page by the host's link has it; `ask(name, argument)` reaches the lab.
Object.assign(labkit, (() => {
  const EVERY = 3000; // ms between two looks at who is here

  // The key leaves the address at once, which a projector shows, and stays in this tab.
  function keyOf(address) {
    const given = address.searchParams.get("host");
    try {
      if (!given) return sessionStorage.getItem("labkit-host");
      sessionStorage.setItem("labkit-host", given);
      address.searchParams.delete("host");
      history.replaceState(history.state, "", address);
    } catch { /* a browser that keeps nothing */ }
    return given;
  }

  function host(root, ask, say) {
    const key = keyOf(new URL(location.href));
    const here = root.querySelector(".lk-host-here"), count = root.querySelector(".lk-host-count");
    let timer = 0;

    // Show the panel if the link is right. The lab must know this page by then, so this is tried again.
    async function claim() {
      if (!key || timer) return;
      const answer = await ask("claim", { key });
      if (timer) return;
      if (answer?.host) act("look");
      else timer = setTimeout(() => { timer = 0; claim(); }, EVERY);
    }

    async function act(action, name = "") {
      clearTimeout(timer);
      timer = setTimeout(() => act("look"), EVERY);
      const answer = await ask("host", { action, name });
      if (!answer) return;
      root.hidden = false;
      if (answer.error) {
        say(answer.error);
        await ask("claim", { key }); // the page was given up meanwhile
        return;
      }
      for (const button of root.querySelectorAll("[data-lock]")) {
        button.setAttribute("aria-pressed", String(answer.locked.includes(button.dataset.lock)));
      }
      count.textContent = `${labkit.count(answer.here.length, "visitor")} here`;
      here.replaceChildren(...answer.here.map(([who, requests]) => {
        return labkit.part("li", "", requests ? `${who}: ${labkit.count(requests, "request")}` : who);
      }));
      if (answer.file) save(answer.file);
    }

    function save(hex) {
      const bytes = Uint8Array.from(hex.match(/../g), (pair) => parseInt(pair, 16));
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([bytes], { type: "application/zip" }));
      link.download = "labkit.session.zip";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    }

    root.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      const { lock, act: action } = button.dataset;
      if (lock) act(button.getAttribute("aria-pressed") === "true" ? "unlock" : "lock", lock);
      else if (action) act(action);
    });
    return { claim };
  }

  return { host };
})());
