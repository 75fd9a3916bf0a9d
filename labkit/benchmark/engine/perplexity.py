"""How much worse a model predicts a text in another precision: perplexity, and the likeliest token.

Perplexity is the exponential of the mean surprise at the text's own next token. Both models see the text
itself (teacher forcing), in pieces, so that one error does not lead to the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from labkit.models.load import LoadedModel
from labkit.models.teacher_forcing import teacher_forced

PIECE = 512  # tokens; the model does not see what comes before a piece
TARGET = 0.02  # how far above fp32's a perplexity may be, as a share
KV_TARGET = 0.003  # the same where only the KV cache is in 8 bits


@dataclass
class Perplexity:
    """A precision on the text.

    `ratio` is its perplexity over that of fp32, and `top1_agreement` the share of places at which the
    likeliest next token is the same as in fp32.
    """

    precision: str
    positions: int
    perplexity: float
    ratio: float
    top1_agreement: float
    target: float = TARGET

    @property
    def within(self) -> bool:
        """Whether the perplexity is within the target."""
        return self.ratio <= 1 + self.target


def pieces(token_ids: Sequence[int], size: int = PIECE) -> list[Sequence[int]]:
    """All of a text, in pieces. A last piece of a single token predicts nothing and is left out."""
    found = [token_ids[i : i + size] for i in range(0, len(token_ids), size)]
    return [piece for piece in found if len(piece) > 1]


@torch.inference_mode()
def surprise(
    loaded: LoadedModel, piece: Sequence[int], kv_cache_dtype: str | None = None
) -> tuple[Tensor, Tensor]:
    """At each place but the last, the surprise at the next token (in nats) and the likeliest token."""
    logits = teacher_forced(loaded.module, piece, kv_cache_dtype=kv_cache_dtype)[:-1]
    targets = torch.tensor(piece[1:], device=logits.device)
    return F.cross_entropy(logits, targets, reduction="none").cpu(), logits.argmax(-1).cpu()


def compare_text(
    full: LoadedModel,
    others: Iterable[tuple[str, LoadedModel]],
    token_ids: Sequence[int],
    *,
    size: int = PIECE,
    int8_kv: bool = False,
) -> list[Perplexity]:
    """Compare precisions with the fp32 model, which comes first in what is returned.

    With `int8_kv`, the same model with its KV cache in 8 bits comes second.
    """
    parts = pieces(token_ids, size)

    def over_text(name: str, loaded: LoadedModel, kv_dtype: str | None = None) -> tuple[Tensor, Tensor]:
        bar = tqdm(parts, desc=f"{name} reads", leave=False)
        found = [surprise(loaded, part, kv_dtype) for part in bar]
        nats, likeliest = zip(*found, strict=True)
        return torch.cat(nats), torch.cat(likeliest)

    nats, true = over_text("float32", full)
    base = math.exp(nats.double().mean())
    rows = [Perplexity("float32", len(nats), base, 1.0, 1.0)]

    def add(name: str, found: tuple[Tensor, Tensor], target: float) -> None:
        value, same = math.exp(found[0].double().mean()), float((found[1] == true).double().mean())
        rows.append(Perplexity(name, len(found[0]), value, value / base, same, target))

    if int8_kv:
        add("int8 KV", over_text("int8 KV", full, "int8"), KV_TARGET)
    for name, loaded in others:
        add(name, over_text(name, loaded), TARGET)
    return rows


def table(rows: Sequence[Perplexity]) -> str:
    """A table with a line for each precision, and the target."""
    lines = [f"{'':10}{'perplexity':>12}{'over fp32':>11}{'same likeliest':>16}"]
    for row in rows:
        verdict = "" if row is rows[0] else ("  within the target" if row.within else "  OUTSIDE the target")
        lines.append(
            f"{row.precision:10}{row.perplexity:12.3f}{row.ratio - 1:+11.2%}{row.top1_agreement:16.2%}"
            f"{verdict}"
        )
    lines.append(
        f"over {rows[0].positions:,} places of the text; to reach: at most {TARGET:.0%} above fp32, and "
        f"{KV_TARGET:.1%} where only the KV cache is in 8 bits"
    )
    return "\n".join(lines)
