// A run as one file: the replay, and a run that lies in the page itself where else a lab would answer.
(() => {
  const root = document.querySelector(".lkr"), say = (words) => { root.querySelector(".lkr-headline").textContent = words; };
  const run = JSON.parse(document.getElementById("lk-run").textContent);

  async function unpacked(text) {
    const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  }

  // Tables come without the blocks that the frame before has, too.
  function whole(frames) {
    let known = new Map();
    for (const frame of frames) {
      frame.tables = frame.tables.map(([request, computed, same, rest]) => (
        [request, computed, [...(known.get(request) ?? []).slice(0, same), ...rest]]));
      known = new Map(frame.tables.map(([request, , blocks]) => [request, blocks]));
    }
    return frames;
  }

  const answers = {
    traces: () => [run.title],
    open: async () => ({ opened: "run", data: await unpacked(run.data) }),
    frames: async ({ first }) => {
      const [start, frames] = run.frames.findLast(([place]) => place <= first);
      return { frames: whole(await unpacked(frames)).slice(first - start) };
    },
  };

  // Light or dark as the reader's system is; the replay follows the page.
  const dark = matchMedia("(prefers-color-scheme: dark)"), dress = () => document.body.classList.toggle("dark", dark.matches);
  dark.addEventListener("change", dress);
  dress();
  if (!window.DecompressionStream) return say("This browser is too old for this page: it needs one of 2023 or later.");
  root.replay = labkit.replay(root, async (name, question) => answers[name](question));

  // The keys work wherever the reader has not chosen something else.
  document.addEventListener("keydown", (event) => {
    if (event.target === document.body && !root.dispatchEvent(new KeyboardEvent("keydown", event))) event.preventDefault();
  });
})();
