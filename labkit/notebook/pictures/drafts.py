"""Notebook 10: a step that checks drafts, and the noise with which a token is drawn."""

from __future__ import annotations

import torch

from labkit.config import EngineConfig
from labkit.core.sampler import gumbel_noise, mix
from labkit.engine import Engine
from labkit.notebook.pictures.runs import tiny
from labkit.notebook.pictures.svg import MARGIN, Drawing, Sheet
from labkit.sampling_params import SamplingParams

_PROMPT = "the sea and the sun"
_WRONG = 7  # a token that the model never chooses here


def draft_and_verify() -> Drawing:
    """Draw a real step that checks four drafts, of which the third is wrong."""
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    true = _answer(params)
    drafts = [true[1], true[2], _WRONG, true[4]]
    engine = _engine(params)
    engine.step()
    (request,) = engine.scheduler.running
    request.drafts = tuple(drafts)
    record = engine.step()
    made = record.sampled[0]
    say = tiny().tokenizer.decode
    sheet = Sheet("Draft and verify: one step checks four guesses", 316)
    width, left = 108.0, 138.0
    read = [true[0], *drafts]
    shown = [say([token]).strip() for token in read]
    chosen = [say([token]).strip() for token in made]
    chosen += ["void"] * (len(read) - len(chosen))
    sheet.text(MARGIN, 78, "the step reads", bold=True)
    sheet.text(MARGIN, 168, "it chooses", bold=True)
    sheet.text(MARGIN, 186, "what follows", size=12, color="faint")
    sheet.text(MARGIN, 256, "the answer", bold=True)
    twin = []
    for i, (token, choice) in enumerate(zip(shown, chosen, strict=True)):
        x, kept = left + i * (width + 4), i < len(made)
        middle = x + width / 2
        head = f"draft {i}" if i else "last token"
        verdict = ("right" if kept else "wrong" if i == len(made) else "too late") if i else ""
        sheet.text(middle, 58, head, size=12, color="faint", anchor="middle")
        sheet.box(x, 64, width, 32, token, color=(2 if kept else 5) if i else "empty", size=12)
        sheet.arrow((middle, 98), (middle, 148))
        if verdict:
            sheet.text(middle + 8, 122, verdict, size=12)
        sheet.box(x, 152, width, 32, choice, color=0 if kept else "empty", size=12)
        if kept:
            sheet.arrow((middle, 186), (middle, 232))
            sheet.box(x, 236, width, 32, choice, color=0, size=12)
        if i:  # is this draft what was chosen before it?
            ends = (x - 12, 150), (x + 8, 98)
            sheet.line(*ends, color=2 if kept else 5, width=2, dashed=not kept)
        twin.append(f"  {head:10} {token:12} {verdict:9} the model chooses next: {choice}")
    told = f"{len(drafts)} drafts, {record.total_accepted} right: {len(made)} tokens in one step. "
    told += "The last is the model's own."
    sheet.text(MARGIN, 298, told, size=12, color="faint")
    return sheet.drawing(
        "the step reads the last token and the drafts, and chooses what follows each of them:", *twin, told
    )


def _engine(params: SamplingParams) -> Engine:
    engine = Engine(EngineConfig(model=tiny(), num_blocks=32, block_size=4))
    engine.add_request(_PROMPT, params)
    return engine


def _answer(params: SamplingParams) -> list[int]:
    engine = _engine(params)
    engine.run()
    return engine.outputs["0"].token_ids


def noise(seed: int = 1, places: int = 3) -> Drawing:
    """Draw how noise that depends on seed, place and token picks a token in each of some places.

    Args:
        seed: the seed of the request.
        places: number of places in the answer.
    """
    words, p = ("tea", "milk", "water", "juice"), torch.tensor([0.5, 0.25, 0.15, 0.1])
    sheet = Sheet("Noise that picks a token: each has a clock, and the first to ring wins", 276)
    width, left, twin = 216.0, float(MARGIN), []
    for place in range(places):
        scores = p.log() + gumbel_noise([mix(seed, place)], torch.arange(len(words)))[0]
        rings, winner = (-scores).exp().tolist(), int(scores.argmax())
        sheet.text(left, 66, f"place {place}: {words[winner]}", bold=True)
        twin.append(f"place {place}: {words[winner]}")
        for i, word in enumerate(words):
            y = 82 + i * 40.0
            sheet.text(left, y + 12, word, size=12, bold=i == winner)
            sheet.text(left, y + 27, f"p {float(p[i]):.0%}", size=11, color="faint")
            length = 80 * rings[i] / max(rings)
            sheet.box(left + 46, y + 6, length, 14, color=2 if i == winner else "empty")
            sheet.text(left + 52 + length, y + 17, f"{rings[i]:.1f}", size=12)
            twin.append(f"  {word:6} p {float(p[i]):.0%}: rings after {rings[i]:.1f}")
        left += width + 12
    told = "A time is exp(-(log p + noise)); the noise depends on seed, place and token alone."
    sheet.text(MARGIN, 260, told, size=12, color="faint")
    return sheet.drawing(told, *twin)
