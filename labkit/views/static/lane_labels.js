// Which rows of the batch have their name beside them: as many as fit, so that no two names touch.
Object.assign(labkit, (() => {
  const APART = 11; // pixels from the middle of a name to the middle of the next

  // `rows` are those of `laneRows`. The row in focus comes first, then one's own, then the others from above.
  function labelled(state, rows) {
    const focus = labkit.focusOf(state), middle = (row) => Math.max(6, (row + 0.5) * rows.pitch);
    const rank = ({ request }) => (request === focus ? 0 : state.mine.has(request) ? 1 : 2);
    const order = rows.shown.map((lane, row) => [rank(lane), row]).sort(([one, a], [other, b]) => one - other || a - b);
    const found = new Set();
    for (const [, row] of order) {
      if ([...found].every((other) => Math.abs(middle(other) - middle(row)) >= APART)) found.add(row);
    }
    return found;
  }

  return { labelled };
})());
