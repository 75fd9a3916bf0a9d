"""How finding, fetching and loading a model tell the user what takes time."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]


def tell(say: Say | None, text: str) -> None:
    """Pass on a line of text; `say` is None where the caller asked for silence."""
    if say is not None:
        say(text)
