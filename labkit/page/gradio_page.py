"""The page of the lab: a prompt box, a card for each request, and the live pictures, all on one engine.

Gradio draws the form. Everything else is canvas and text in `gr.HTML` components. One broadcast tells all of
them what is new, up to twelve times a second while the engine works; on a page that is mounted into another
app, where there is no broadcast, they ask. The cards are as of the latest step; the pictures may be a
twentieth of a second older. Nobody ever waits for the engine.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from starlette.types import ASGIApp

from labkit.page.front import MAX_BODY, Front
from labkit.page.hosting import closed_reason
from labkit.page.joining import Served
from labkit.page.page_api import Api
from labkit.page.race.tab import build_race_tab
from labkit.page.replay_tab import build_replay_tab
from labkit.page.session import Lab
from labkit.page.snapshot import Snapshotter
from labkit.page.sse import PATH, Broadcast
from labkit.page.submissions import params_of
from labkit.page.visitors import mark
from labkit.sampling_params import TEMPERATURE
from labkit.serving.asgi import BodyLimit
from labkit.serving.async_engine import AsyncEngine, EngineStoppedError
from labkit.serving.connections import harden
from labkit.serving.guard import Guard
from labkit.views.assets import asset, script

FLUSH_SECONDS = 2  # to send what is written, once the page is closed; a client may read nothing
SESSIONS = 500  # that gradio keeps a state for: anybody can make up any number, and each costs memory
QUEUE_SIZE = 100  # events that wait in gradio's queue, where only figures of a race are drawn
QUEUE_SECONDS = 0.1  # between two looks of gradio at its queue; by default it looks 1,100 times a second
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
SHARES = (0.25, 0.1, 0.6, 0.8, 1.0, 0.5, 0.4, 1.0)  # of max tokens, so that answers end at different times
SCRIPTS = (
    *("live_feed.js", "regions.js", "token_flow.js", "lane_labels.js", "communication.js", "meters.js"),
    *("two_pools.js", "words.js", "side.js"),
    *("address.js", "controls.js", "host.js", "projector.js", "joins.js", "panel.js", "follow.js"),
    *("cards.js", "questions.js", "tour.js", "glue.js"),
)

SHOW_MESSAGE = """
const line = element.querySelector("p");
watch("value", () => { line.textContent = props.value || ""; });
"""
# The browser keeps its secret for as long as the tab is open: after a reload it is the same visitor.
REMEMBERED = "() => { try { return sessionStorage.getItem('labkit') || ''; } catch { return ''; } }"
# So is what stands in the form, which gradio would forget.
KEEP_TYPED = """(...typed) => {
  try { sessionStorage.setItem('labkit-form', JSON.stringify(typed)); } catch { /* it keeps nothing */ }
}"""
TYPED = """(...shown) => {
  try { return JSON.parse(sessionStorage.getItem('labkit-form')) ?? shown; } catch { return shown; }
}"""


class Page(gr.Blocks):
    """A page that lets go of the engine when it is closed, because an engine may outlive many pages."""

    lab: Lab
    broadcast: Broadcast
    guard: Guard  # before all else, once the page is served

    def served(self) -> Served:
        """Where this page is served, as far as it is served by itself."""
        listens = getattr(self, "server_name", None)  # gradio sets it when it launches
        return Served(listens or "", self.local_url or "", self.share_url or "")

    def close(self, verbose: bool = True) -> None:
        self.broadcast.close()
        self.lab.close()
        super().close(verbose)


def serve(
    engine: AsyncEngine | Lab,
    *,
    front: Callable[[ASGIApp], ASGIApp] = lambda app: app,
    allowed_hosts: Sequence[str] = (),
    proxy_headers: bool = False,
    **options: Any,
) -> Page:
    """Launch the page in the background, with one broadcast for all who watch.

    Args:
        engine: the engine to show, or a lab round one.
        front: a function that puts something in front of the page's app, such as another app beside it.
        allowed_hosts: further names by which browsers reach the page, through a proxy for instance.
        proxy_headers: whether a proxy on this machine is believed when it names the address of a client.
        options: arguments of `gr.Blocks.launch`.
    """
    page = build(engine)
    host = options.get("server_name") or os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    private = bool(options.get("auth") or options.get("auth_dependency"))  # gradio alone knows who may look

    @contextlib.asynccontextmanager
    async def opening(app: gr.routes.App) -> AsyncIterator[None]:
        """Put all in place before the port is open, so that a page that comes early finds it."""
        inner = app.middleware_stack if private else page.broadcast.before(app.middleware_stack)
        inner = front(BodyLimit(Front(inner, page.lab.visitors), MAX_BODY, together=4 * MAX_BODY))
        page.guard = app.middleware_stack = Guard(inner, host, allowed_hosts)
        yield

    settings: dict[str, Any] = {
        "ssr_mode": False,
        "footer_links": [],
        "enable_monitoring": False,
        "state_session_capacity": SESSIONS,
        "theme": gr.themes.Default(
            primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
    }  # one of the default theme's fonts would come from the net
    app_kwargs = {**options.pop("app_kwargs", {}), "lifespan": opening}
    page.launch(**(settings | options | {"prevent_thread_lock": True, "app_kwargs": app_kwargs}))
    page._queue.sleep_when_free = page._queue.progress_update_sleep_when_free = QUEUE_SECONDS
    if page.share_url:
        page.guard.names.add(urlsplit(page.share_url).hostname or "")
    page.server.config.timeout_graceful_shutdown = FLUSH_SECONDS
    harden(page.server.config, proxy_headers=proxy_headers)
    return page


def build(engine: AsyncEngine | Lab) -> Page:
    """The page on a running engine, or on a lab round one. Launch it, or mount it into a FastAPI app.

    Its pictures stand still once it is closed: build another page to show the engine again.
    """
    lab = engine if isinstance(engine, Lab) else Lab(engine)

    def arrive(known: str | None, request: gr.Request) -> str:
        tab = request.session_hash or ""
        visitor = lab.visitors.arrive(tab, known or "")
        return f"{visitor} {mark(visitor)} {tab}"

    def leave(request: gr.Request) -> None:
        lab.visitors.leave(request.session_hash or "")

    styles = "".join(map(asset, ("live_feed.css", "page.css", "projector.css")))
    snapshotter = Snapshotter(lab)
    with Page(title="labkit", analytics_enabled=False, fill_width=True) as demo:
        demo.lab, demo.broadcast = lab, Broadcast(snapshotter)
        _html(f"<style>{styles}</style>{asset('header.html')}")
        with gr.Tabs(elem_id="lk-tabs"):
            with gr.Tab("Live", id="live", elem_id="lk-live-tab"):
                view, form = _live_tab(lab, Api(lab, snapshotter, demo.served))
            with gr.Tab("Race", id="race", elem_id="lk-race-tab"):
                build_race_tab(lab.session.live.engine.model, keep=lab.keep, closed=closed_reason(lab))
            with gr.Tab("Replay", id="replay", elem_id="lk-replay-tab"):
                build_replay_tab(lab.traces)
        demo.load(arrive, view, view, js=REMEMBERED, queue=False, show_progress="hidden")
        demo.load(None, form, form, js=TYPED)
        gr.on([field.change for field in form], None, form, js=KEEP_TYPED)
        demo.unload(leave)
    demo.queue(max_size=QUEUE_SIZE)
    return demo


def _live_tab(lab: Lab, api: Api) -> tuple[gr.HTML, list[gr.Component]]:
    """The tab with the running engine.

    Returns:
        The component whose value is the visitor's secret and mark, and the fields of the form.
    """
    has_chat = bool(getattr(lab.session.live.engine.model.tokenizer, "chat_template", None))
    defaults = _defaults(lab)
    with gr.Column(elem_id="lk-page"):
        with gr.Column(elem_id="lk-left", min_width=300):
            _html(asset("host.html"), elem_id="lk-host")
            _html(asset("submissions.html"), elem_id="lk-what")
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
                        defaults.get("temperature", TEMPERATURE),
                        label="Temperature",
                        step=0.1,
                        min_width=100,
                        elem_id="lk-temperature",
                    )
                with gr.Accordion("More", open=False, elem_id="lk-more"):
                    with gr.Row():
                        top_p = gr.Number(defaults.get("top_p", 1.0), label="Top-p", step=0.05, min_width=100)
                        seed = gr.Textbox(label="Seed", placeholder="random", min_width=100)
                    raw = gr.Checkbox(
                        not has_chat, label="Raw text, without the chat template", interactive=has_chat
                    )
                with gr.Row(elem_id="lk-buttons"):
                    one = gr.Button("Inject", variant="primary", min_width=80, elem_id="lk-inject")
                    eight = gr.Button("Inject 8", min_width=80, elem_id="lk-inject-8")
        message = _html('<p role="alert"></p>', js=SHOW_MESSAGE, elem_id="lk-message")
        view = _html(
            asset("live_feed.html"),
            js=_script(lab),
            functions=api.functions,
            elem_id="lk-live",
        )
        _html(asset("switch.html"), elem_id="lk-switch")
        _html(asset("cards.html"), elem_id="lk-requests")
        _html(asset("side.html"), elem_id="lk-side")
        _html(asset("projector.html"), elem_id="lk-projector")
    numbers: list[gr.Component] = [max_tokens, temperature, top_p, seed, raw]
    quick: dict[str, Any] = {"outputs": message, "queue": False, "show_progress": "hidden"}
    inject, inject_eight = _injections(lab)
    gr.on([one.click, prompt.submit], inject, [prompt, *numbers], api_name="inject", **quick)
    eight.click(inject_eight, numbers, api_name="inject_eight", **quick)
    for chip, example in zip(chips, EXAMPLES.values(), strict=True):
        chip.click(None, None, prompt, js=f"() => {json.dumps(example)}")
    return view, [prompt, *numbers]


def _script(lab: Lab) -> str:
    """The page's JavaScript, the scenarios that it offers, and the address of the broadcast."""
    scenarios = [
        {"name": s.name, "title": s.title, "look": s.look, "settings": dict(s.settings)}
        for s in lab.scenarios.values()
    ]
    facts = f"const SCENARIOS = {json.dumps(scenarios)}, STREAM = {json.dumps(PATH)};\n"
    return facts + script(*SCRIPTS)


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


def _defaults(lab: Lab) -> dict[str, Any]:
    """How requests are sampled that do not say, as far as the model says it."""
    return lab.session.live.engine.sampling_defaults


def _injections(lab: Lab) -> tuple[Callable[..., str], Callable[..., str]]:
    """The functions of the form's two buttons. They return "" if all went well, else what was wrong."""

    def inject(
        prompt: str,
        max_tokens: float | None,
        temperature: float | None,
        top_p: float | None,
        seed: str | None,
        raw: bool,
        request: gr.Request,
    ) -> str:
        visitor = lab.visitors.of(request.session_hash, request.client.host if request.client else "")
        name, submissions = lab.visitors.name(visitor), lab.session.submissions

        def act() -> None:
            params = params_of(max_tokens, temperature, top_p, seed, _defaults(lab))
            submissions.inject(visitor, prompt, params, raw=raw, name=name)

        return _say(act)

    def inject_eight(
        max_tokens: float | None,
        temperature: float | None,
        top_p: float | None,
        seed: str | None,
        raw: bool,
        request: gr.Request,
    ) -> str:
        visitor = lab.visitors.of(request.session_hash, request.client.host if request.client else "")
        name, submissions = lab.visitors.name(visitor), lab.session.submissions

        def act() -> None:
            params = params_of(max_tokens, temperature, top_p, seed, _defaults(lab))
            lengths = [max(1, int(params.max_tokens * share)) for share in SHARES]
            requests = [
                (prompt, replace(params, max_tokens=length))
                for prompt, length in zip(EIGHT, lengths, strict=True)
            ]
            submissions.inject_all(visitor, requests, raw=raw, name=name)

        return _say(act)

    return inject, inject_eight


def _say(act: Callable[[], object]) -> str:
    """Do it, and return "" if all went well, else what was wrong in one sentence."""
    try:
        act()
    except (ValueError, EngineStoppedError) as error:
        return str(error)
    return ""
