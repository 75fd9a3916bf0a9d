"""The page of the lab: a prompt box, a card for each request, and the live pictures, all on one engine.

Gradio draws the form. Cards and pictures are canvas and text in two `gr.HTML` components: the browser asks
`pull` what is new, ten times a second while the engine works, and gets both from one answer. The cards in it
are as of the latest step; the pictures may be a twentieth of a second older, because all browsers share a
frame for so long. Nobody's question waits for the engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from labkit.desk import Desk, params_of
from labkit.live import EngineStoppedError, LiveEngine
from labkit.views.canvas import WINDOW, Feed, asset

EXAMPLES = {
    "Why is the sky blue?": "Why is the sky blue? Explain it to a child.",
    "A list": "List ten animals that live in the sea, one per line.",
    "A story": "Tell me a short story about a lighthouse keeper who finds a letter in a bottle.",
    "Code": "Write a Python function that says whether a number is prime.",
}
EIGHT = (
    "What is the capital of France?",
    "Name three colours.",
    "Explain what a cache is, in two sentences.",
    "Write a short poem about rain on a tin roof.",
    "Give me a recipe for pancakes, with the amounts and each step.",
    "What is the difference between a list and a tuple in Python?",
    "Summarise in one sentence: a page table maps what a program believes about memory to where the data is, "
    "so that memory can be handed out in small pieces of equal size, and no program needs to know where its "
    "pieces lie.",
    "Tell me a story about a robot who learns to paint.",
)
SHARES = (0.25, 0.1, 0.6, 0.8, 1.0, 0.5, 0.4, 1.0)  # of max tokens: answers that end at different times

GLUE = """
const ask = async (name, argument) => {
  const late = new Promise((resolve) => setTimeout(resolve, 10000));
  try {
    return JSON.parse(await Promise.race([server[name]({ visitor: props.value || "", ...argument }), late]));
  } catch (error) {
    return null; // the lab is away: the page says so and asks again
  }
};
function start() {
  const root = document.querySelector("#lk-requests .lk-cards");
  if (!root) return requestAnimationFrame(start); // the other component is not there yet
  const cards = labkit.cards(root, ask);
  watch("value", cards.forget); // now it is known which cards are one's own
  const panel = labkit.mount(element.querySelector(".lk"), ask, cards);
  const form = document.querySelector("#lk-left");
  for (const deed of ["click", "keydown"]) form.addEventListener(deed, panel.hurry);
  element.labkit = { ...panel, ...labkit, visitor: () => props.value };
}
start();
"""
SHOW_MESSAGE = """
const line = element.querySelector("p");
watch("value", () => { line.textContent = props.value || ""; });
"""


class _Page(gr.Blocks):
    """Lets go of the engine when it is closed: an engine outlives many pages, in a notebook for instance."""

    let_go: Callable[[], None] | None = None

    def close(self, verbose: bool = True) -> None:
        if self.let_go:
            self.let_go()
        super().close(verbose)


def build(live: LiveEngine) -> gr.Blocks:
    """The page on a running engine. Launch it, or mount it into a FastAPI app.

    Its pictures stand still once it was closed: build another to show the engine again.
    """
    feed = Feed(live.engine.trace.meta)
    let_go = live.listen(feed.append, last=WINDOW)
    desk = Desk(live)
    has_chat = bool(getattr(live.engine.model.tokenizer, "chat_template", None))

    async def pull(question: dict[str, Any]) -> str:
        visitor, name, cards = question["visitor"], question["feed"], question["cards"]
        same = name == feed.name
        news = desk.cards(visitor, cards["since"], cards["open"]) if same else desk.cards(visitor, -1, {})
        answer = {
            "pictures": feed.snapshot(name, question["after"]),
            "cards": news | {"reset": not same or cards["since"] < 0},
            "live": desk.clock(),
            "busy": live.busy,
        }
        return json.dumps(answer, separators=(",", ":"))

    async def control(order: dict[str, Any]) -> str:
        desk.control(order["visitor"], order["action"], order["value"])
        return json.dumps(desk.clock())

    async def cancel(order: dict[str, Any]) -> str:
        desk.cancel(order["visitor"], order["request"])
        return "true"

    def inject(
        prompt: str,
        max_tokens: float | None,
        temperature: float | None,
        top_p: float | None,
        seed: str | None,
        raw: bool,
        request: gr.Request,
    ) -> str:
        params = (max_tokens, temperature, top_p, seed)
        return _say(lambda: desk.inject(request.session_hash or "", prompt, params_of(*params), raw=raw))

    def inject_eight(
        max_tokens: float | None,
        temperature: float | None,
        top_p: float | None,
        seed: str | None,
        raw: bool,
        request: gr.Request,
    ) -> str:
        def all_eight() -> None:
            params = params_of(max_tokens, temperature, top_p, seed)
            for prompt, share in zip(EIGHT, SHARES, strict=True):
                own = replace(params, max_tokens=max(1, int(params.max_tokens * share)))
                desk.inject(request.session_hash or "", prompt, own, raw=raw)

        return _say(all_eight)

    def leave(request: gr.Request) -> None:
        desk.leave(request.session_hash or "")

    styles = asset("canvas.css") + asset("page.css")
    bare: dict[str, Any] = {"apply_default_css": False, "padding": False}
    with _Page(title="labkit", analytics_enabled=False, fill_width=True) as demo:
        demo.let_go = let_go
        with gr.Row(elem_id="lk-page", equal_height=False):
            with gr.Column(elem_id="lk-left", min_width=300):
                gr.HTML(html_template=f"<style>{styles}</style>{HEADER}", js_on_load=None, **bare)
                with gr.Column(elem_id="lk-form"):
                    prompt = gr.Textbox(
                        label="Prompt",
                        placeholder="Ask something. Shift+Enter injects it.",
                        lines=3,
                        max_lines=6,
                        elem_id="lk-prompt",
                    )
                    with gr.Row(elem_id="lk-examples"):
                        chips = [gr.Button(name, size="sm", min_width=40) for name in EXAMPLES]
                    with gr.Row(elem_id="lk-numbers"):
                        max_tokens = gr.Number(64, label="Max tokens", min_width=100, elem_id="lk-max-tokens")
                        temperature = gr.Number(
                            0.7, label="Temperature", step=0.1, min_width=100, elem_id="lk-temperature"
                        )
                    with gr.Accordion("More", open=False, elem_id="lk-more"):
                        with gr.Row():
                            top_p = gr.Number(1.0, label="Top-p", step=0.05, min_width=100)
                            seed = gr.Textbox(label="Seed", placeholder="random", min_width=100)
                        raw = gr.Checkbox(
                            not has_chat, label="Raw text, without the chat template", interactive=has_chat
                        )
                    with gr.Row(elem_id="lk-buttons"):
                        one = gr.Button("Inject", variant="primary", min_width=80, elem_id="lk-inject")
                        eight = gr.Button("Inject 8", min_width=80, elem_id="lk-inject-8")
                message = gr.HTML(
                    html_template='<p role="alert"></p>',
                    js_on_load=SHOW_MESSAGE,
                    elem_id="lk-message",
                    **bare,
                )
                gr.HTML(html_template=asset("cards.html"), js_on_load=None, elem_id="lk-requests", **bare)
            with gr.Column(elem_id="lk-right", min_width=320):
                view = gr.HTML(
                    html_template=asset("canvas.html"),
                    js_on_load=asset("canvas.js") + asset("panel.js") + asset("cards.js") + GLUE,
                    server_functions=[pull, control, cancel],
                    elem_id="lk-live",
                    **bare,
                )
        quick: dict[str, Any] = {"outputs": message, "queue": False, "show_progress": "hidden"}
        numbers: Sequence[gr.Component] = [max_tokens, temperature, top_p, seed, raw]
        gr.on([one.click, prompt.submit], inject, [prompt, *numbers], api_name="inject", **quick)
        eight.click(inject_eight, numbers, api_name="inject_eight", **quick)
        for chip, example in zip(chips, EXAMPLES.values(), strict=True):
            chip.click(None, None, prompt, js=f"() => {json.dumps(example)}")
        demo.load(name_of, None, view, queue=False, show_progress="hidden")
        demo.unload(leave)
    return demo


def name_of(request: gr.Request) -> str:
    """By this name the browser asks which cards are its own."""
    return request.session_hash or ""


def _say(act: Callable[[], object]) -> str:
    """Do it; return nothing if it went well, else what was wrong in one sentence."""
    try:
        act()
    except (ValueError, EngineStoppedError) as error:
        return str(error)
    return ""


HEADER = '<header class="lk-title"><h1>labkit</h1><p class="lk-facts"></p></header>'
