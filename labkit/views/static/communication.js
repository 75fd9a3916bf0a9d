// What the processes of one model send to each other: a strip under the batch, and words. Nothing, if they send nothing.
Object.assign(labkit, (() => {
  const sentIn = (step) => (step.sent_in_layers ?? 0) + (step.sent_elsewhere ?? 0);
  const sends = (steps) => steps.some(sentIn);
  const shareOf = ({ sending, seconds }) => (seconds > 0 ? Math.min(1, sending / seconds) : 0);

  // The share of each step's seconds that went into sending, and into waiting for the others.
  function communicationStrips(steps, theme) {
    if (!sends(steps)) return [];
    const values = steps.map((step) => (sentIn(step) ? shareOf(step) : 0));
    return [{ name: "communication", hint: "the share of a step in which processes send to each other", color: theme.ink,
              values, most: 1, scale: "100%", words: (i) => labkit.percent(values[i]) }];
  }

  // "" for a step in which nothing was sent.
  function sentWords(step) {
    if (!sentIn(step)) return "";
    const took = step.sending ? `, ${(step.sending * 1000).toPrecision(3)} ms (${labkit.percent(shareOf(step))} of the step)` : "";
    return `each process sent ${size(step.sent_in_layers)} in layers, ${size(step.sent_elsewhere)} elsewhere${took}`;
  }

  // Bytes, as `style.size` has them.
  function size(bytes) {
    const units = ["bytes", "kB", "MB", "GB", "TB"];
    let place = 0;
    for (; bytes >= 999.5 && place < units.length - 1; place++) bytes /= 1000;
    return `${bytes >= 999.5 ? Math.round(bytes).toLocaleString("en") : Number(bytes.toPrecision(3))} ${units[place]}`;
  }

  return { sends, communicationStrips, sentWords, size };
})());
