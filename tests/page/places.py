"""Where things are on the page, for tests that read it and click on it."""

from __future__ import annotations

from tests.visiting import Visitor


def step_words(me: Visitor) -> list[str]:
    return [" ".join(line.split()) for line in me.page.locator(".lk-step-list > li").all_inner_texts()]


def knob(me: Visitor, name: str, value: object) -> None:
    me.page.click(".lk-what >> text=Engine")
    field = me.page.locator(f'.lk-knobs [name="{name}"]')
    if isinstance(value, bool):
        field.set_checked(value)
    elif isinstance(value, str):
        field.select_option(value)
    else:
        field.fill(str(value))


# The middle of a step in the first row of the timeline, in the window's coordinates.
CELL = """(() => {
  const canvas = lab.show.canvases.timeline, { x, y, width } = canvas.getBoundingClientRect();
  const time = lab.clock(lab.state, width);
  return [x + time.x(STEP) + time.pitch / 2, y + 5];
})()"""
SQUARE = """(() => {
  const canvas = lab.show.canvases.pages, { x, y, width, height } = canvas.getBoundingClientRect();
  for (let row = 4; row < height; row += 4)
    for (let column = 0; column < width; column += 4)
      if (lab.blockAt(lab.state, width, height, column, row) === it) return [x + column + 3, y + row + 3];
})()"""
