"""What the tests of race and replay share: a small page with one tab, and a person who looks at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from labkit.views.assets import asset
from tests.visiting import HOSTILE, Person, free_port
from tests.visiting_fixtures import browser

__all__ = ["HOSTILE", "Looker", "browser", "served"]


@contextmanager
def served(build: Callable[[], object]) -> Iterator[str]:
    """A page with what `build` adds; gives its address."""
    with gr.Blocks(analytics_enabled=False, fill_width=True) as demo:
        gr.HTML(html_template=f"<style>{asset('live_feed.css')}</style>", js_on_load=None)
        build()
    port = free_port()
    demo.launch(
        server_port=port, prevent_thread_lock=True, quiet=True, ssr_mode=False, footer_links=[], share=False
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        demo.close(verbose=False)


class Looker(Person):
    """A person with the page open. `handle` is the property under which the tab's own state is found."""

    def __init__(self, browser: Any, address: str, handle: str, **options: Any) -> None:
        options = {"viewport": {"width": 1280, "height": 900}, **options}
        super().__init__(browser.new_context(**options))
        self._find = f"const it = [...document.querySelectorAll('*')].find((e) => e.{handle})?.{handle};"
        self.page.goto(address)
        self.until("it")

    def until(self, condition: str, argument: Any = None) -> None:
        """Wait until a JavaScript condition over `it` (what the tab keeps) and `arg` holds."""
        self.page.wait_for_function(
            f"(arg) => {{ {self._find} return {condition}; }}", arg=argument, polling=50
        )

    def look(self, expression: str, argument: Any = None) -> Any:
        return self.page.evaluate(f"(arg) => {{ {self._find} return {expression}; }}", argument)

    def no_markup(self) -> None:
        """What somebody typed has become neither elements nor a script that ran."""
        assert self.page.locator("img[src=x], .lkr b").count() == 0
        assert self.look("window.hacked") is None
