// The projector view, for a room: the pictures fill the screen in large type, rows carry the visitors' names, and
// beside them stands how to join. `?view=projector` opens it, and so does a button of the host's.
Object.assign(labkit, (() => {
  const WIDTH = 800, HEIGHT = 500; // the view is laid out in so many CSS pixels, and enlarged to fill the screen
  const GUTTER = 124; // left of the batch, for names
  const SVG = "http://www.w3.org/2000/svg", MARGIN = 4; // modules round a QR code, which cameras need

  // A row's name: its visitor's and its own, cut to what fits left of the batch.
  function rowLabel(ctx, state, { request, label }) {
    const name = state.gutter === GUTTER && [...(state.names.get(request) ?? "")];
    if (!name?.length) return label;
    const room = GUTTER - 12, words = () => `${name.join("")}${cut ? "\u2026" : ""} ${label}`;
    let cut = false;
    for (; name.length > 1 && ctx.measureText(words()).width > room; name.pop()) cut = true;
    return words();
  }

  // The dark modules of a code as an SVG, whose text twin is the address.
  function picture({ address, size, path }) {
    const make = (tag, attributes) => {
      const made = document.createElementNS(SVG, tag);
      for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
      return made;
    };
    const whole = size + 2 * MARGIN, at = -MARGIN;
    const svg = make("svg", { viewBox: `${at} ${at} ${whole} ${whole}`, role: "img", "aria-label": `QR code of ${address}` });
    svg.append(make("rect", { x: at, y: at, width: whole, height: whole, fill: "#fff" }), make("path", { d: path, fill: "#000" }));
    return svg;
  }

  // `root` is the panel that says how to join, and `opener` the host's button.
  function projector(root, opener, ask, { state, show }) {
    const body = document.body, isOn = () => body.classList.contains("lk-projecting");

    function size() {
      const zoom = Math.max(0.8, Math.min(window.innerWidth / WIDTH, window.innerHeight / HEIGHT));
      body.style.setProperty("--lk-zoom", zoom.toFixed(3));
      if (isOn()) show.restyle();
    }

    function turn(on) {
      if (on === isOn()) return;
      body.classList.toggle("lk-projecting", on);
      root.hidden = !on;
      state.gutter = on ? GUTTER : labkit.GUTTER;
      size();
      show.restyle();
      const here = new URL(location.href);
      here.searchParams.delete("view");
      labkit.address.show(here.href);
      if (on) {
        document.querySelector("#lk-live-tab-button")?.click();
        join();
      } else if (opener?.offsetParent) opener.focus();
    }

    async function join() {
      const answer = await ask("join", { shown: location.origin + location.pathname });
      if (!answer || answer.error) return;
      const { address } = answer, [, scheme, rest] = address.match(/^(https?:\/\/)(.*)$/) ?? ["", "", ""];
      root.querySelector(".lk-join-none").hidden = Boolean(address);
      root.querySelector(".lk-join-address").replaceChildren(labkit.part("span", "", scheme), labkit.part("b", "", rest));
      root.querySelector(".lk-join-code").replaceChildren(...(address ? [picture(answer)] : []));
    }

    opener?.addEventListener("click", () => turn(true));
    root.querySelector("a").addEventListener("click", (event) => {
      event.preventDefault();
      turn(false);
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !event.target.closest?.("select, [role=dialog]")) turn(false);
    });
    for (const tab of ["race", "replay"]) {
      document.querySelector(`#lk-${tab}-tab-button`)?.addEventListener("click", () => turn(false));
    }
    window.addEventListener("resize", size);
    if (new URLSearchParams(location.search).get("view") === "projector") turn(true);
  }

  return { projector, rowLabel };
})());
