"""The page of the lab: a prompt box, a card for each request, and the live pictures, all on one engine.

Gradio draws the form. All else is canvas and text in `gr.HTML` components: the browser asks `pull` what is
new, ten times a second while the engine works, and gets pictures and cards from one answer. The cards in it
are as of the latest step; the pictures may be a twentieth of a second older, because all browsers share a
frame for so long. Nobody's question waits for the engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from labkit.desk import params_of
from labkit.laboratory import Lab
from labkit.live import EngineStoppedError, LiveEngine
from labkit.page_api import Api
from labkit.presets import PRESETS
from labkit.race_tab import build_race_tab
from labkit.replay_tab import build_replay_tab
from labkit.views.canvas import asset

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
SCRIPTS = ("canvas.js", "meters.js", "words.js", "side.js", "controls.js", "panel.js", "cards.js", "glue.js")

SHOW_MESSAGE = """
const line = element.querySelector("p");
watch("value", () => { line.textContent = props.value || ""; });
"""
HEADER = '<header class="lk-title"><h1>labkit</h1><p class="lk-facts"></p></header>'
# The browser keeps its secret for as long as the tab is open: after a reload it is the same visitor.
REMEMBERED = "() => { try { return sessionStorage.getItem('labkit') || ''; } catch { return ''; } }"


class _Page(gr.Blocks):
    """Lets go of the engine when it is closed: an engine outlives many pages, in a notebook for instance."""

    let_go: Callable[[], None] | None = None

    def close(self, verbose: bool = True) -> None:
        if self.let_go:
            self.let_go()
        super().close(verbose)


def build(engine: LiveEngine | Lab) -> gr.Blocks:
    """The page on a running engine, or on a lab round one. Launch it, or mount it into a FastAPI app.

    Its pictures stand still once it was closed: build another to show the engine again.
    """
    lab = engine if isinstance(engine, Lab) else Lab(engine)

    def arrive(known: str | None, request: gr.Request) -> str:
        return lab.visitors.arrive(request.session_hash or "", known or "")

    def leave(request: gr.Request) -> None:
        lab.visitors.leave(request.session_hash or "")

    styles = asset("canvas.css") + asset("page.css")
    with _Page(title="labkit", analytics_enabled=False, fill_width=True) as demo:
        demo.let_go = lab.close
        _html(f"<style>{styles}</style>{HEADER}")
        with gr.Tabs(elem_id="lk-tabs"):
            with gr.Tab("Live", id="live", elem_id="lk-live-tab"):
                view = _live_tab(lab)
            with gr.Tab("Race", id="race", elem_id="lk-race-tab"):
                build_race_tab(lab.bench.live.engine.model, keep=lab.keep)
            with gr.Tab("Replay", id="replay", elem_id="lk-replay-tab"):
                build_replay_tab(lab.traces)
        demo.load(arrive, view, view, js=REMEMBERED, queue=False, show_progress="hidden")
        demo.unload(leave)
    return demo


def _live_tab(lab: Lab) -> gr.HTML:
    """The tab with the running engine; returns the component whose value is the visitor's secret."""
    has_chat = bool(getattr(lab.bench.live.engine.model.tokenizer, "chat_template", None))
    with gr.Column(elem_id="lk-page"):
        with gr.Column(elem_id="lk-left", min_width=300):
            _html(asset("what.html"), elem_id="lk-what")
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
        message = _html('<p role="alert"></p>', js=SHOW_MESSAGE, elem_id="lk-message")
        view = _html(
            asset("canvas.html"),
            js=_script(),
            functions=Api(lab).functions,
            elem_id="lk-live",
        )
        _html(asset("switch.html"), elem_id="lk-switch")
        _html(asset("cards.html"), elem_id="lk-requests")
        _html(asset("side.html"), elem_id="lk-side")
    numbers: list[gr.Component] = [max_tokens, temperature, top_p, seed, raw]
    quick: dict[str, Any] = {"outputs": message, "queue": False, "show_progress": "hidden"}
    inject, inject_eight = _injections(lab)
    gr.on([one.click, prompt.submit], inject, [prompt, *numbers], api_name="inject", **quick)
    eight.click(inject_eight, numbers, api_name="inject_eight", **quick)
    for chip, example in zip(chips, EXAMPLES.values(), strict=True):
        chip.click(None, None, prompt, js=f"() => {json.dumps(example)}")
    return view


def _script() -> str:
    """The page's JavaScript, and the presets that it offers."""
    presets = [
        {"name": p.name, "title": p.title, "look": p.look, "settings": dict(p.settings)} for p in PRESETS
    ]
    return f"const PRESETS = {json.dumps(presets)};\n" + "".join(map(asset, SCRIPTS))


def _html(
    template: str, *, js: str | None = None, functions: Sequence[Callable[..., Any]] = (), elem_id: str = ""
) -> gr.HTML:
    return gr.HTML(
        html_template=template,
        js_on_load=js,
        server_functions=list(functions) or None,
        elem_id=elem_id or None,
        apply_default_css=False,
        padding=False,
    )


def _injections(lab: Lab) -> tuple[Callable[..., str], Callable[..., str]]:
    """What the form's two buttons do: they return nothing if it went well, else what was wrong."""

    def inject(
        prompt: str,
        max_tokens: float | None,
        temperature: float | None,
        top_p: float | None,
        seed: str | None,
        raw: bool,
        request: gr.Request,
    ) -> str:
        visitor = lab.visitors.of(request.session_hash)
        name, desk = lab.visitors.name(visitor), lab.bench.desk

        def act() -> None:
            params = params_of(max_tokens, temperature, top_p, seed)
            desk.inject(visitor, prompt, params, raw=raw, name=name)

        return _say(act)

    def inject_eight(
        max_tokens: float | None,
        temperature: float | None,
        top_p: float | None,
        seed: str | None,
        raw: bool,
        request: gr.Request,
    ) -> str:
        visitor = lab.visitors.of(request.session_hash)
        name, desk = lab.visitors.name(visitor), lab.bench.desk

        def act() -> None:
            params = params_of(max_tokens, temperature, top_p, seed)
            desk.check_room(visitor, len(EIGHT))
            for prompt, share in zip(EIGHT, SHARES, strict=True):
                own = replace(params, max_tokens=max(1, int(params.max_tokens * share)))
                desk.inject(visitor, prompt, own, raw=raw, name=name)

        return _say(act)

    return inject, inject_eight


def _say(act: Callable[[], object]) -> str:
    """Do it; return nothing if it went well, else what was wrong in one sentence."""
    try:
        act()
    except (ValueError, EngineStoppedError) as error:
        return str(error)
    return ""
