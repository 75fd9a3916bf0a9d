// The address follows what is shown, so that it can be copied: a question, a preset with its settings, a tab, and
// whether it is the projector view.
Object.assign(labkit, (() => {
  const TABS = ["live", "race", "replay"];

  // Show `query` in the address, in place of what was there: an object, or a whole address.
  function show(query) {
    const url = new URL(typeof query === "string" ? query : location.pathname, location.origin);
    if (typeof query !== "string") for (const [key, value] of Object.entries(query)) if (value) url.searchParams.set(key, value);
    if (document.body.classList.contains("lk-projecting")) url.searchParams.set("view", "projector");
    history.replaceState(history.state, "", url);
  }

  // Tabs go into the address when somebody opens them, and come out of it on arrival.
  function followTabs() {
    for (const tab of TABS) {
      document.querySelector(`#lk-${tab}-tab-button`)?.addEventListener("click", (event) => {
        if (event.isTrusted) show(tab === "live" ? {} : { tab });
      });
    }
    const wanted = new URLSearchParams(location.search).get("tab");
    if (TABS.includes(wanted)) document.querySelector(`#lk-${wanted}-tab-button`)?.click();
  }

  const reloaded = () => performance.getEntriesByType("navigation")[0]?.type === "reload";

  // A button that copies a text, and says so for a moment.
  function copyButton(words, text) {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", className: "lk-copy", textContent: words });
    button.addEventListener("click", async (event) => {
      event.stopPropagation();
      button.textContent = await copy(text()) ? "Copied" : "Press Ctrl+C";
      setTimeout(() => { button.textContent = words; }, 1500);
    });
    return button;
  }

  // Where a page may not write to the clipboard, the text is selected for the visitor to copy.
  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      const area = document.createElement("textarea");
      Object.assign(area, { value: text, className: "lk-to-copy" });
      document.body.append(area);
      area.select();
      area.addEventListener("blur", () => area.remove());
      return false;
    }
  }

  return { address: { show, followTabs, reloaded }, copyButton };
})());
