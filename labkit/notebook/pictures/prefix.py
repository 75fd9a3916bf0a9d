"""Notebook 06: the prefix tree."""

from __future__ import annotations

from labkit.core.block_pool import BlockPool
from labkit.notebook.pictures.svg import MARGIN, Drawing, Sheet

_SIZE = 4
_SYSTEM = "You are a kind helper . Answer in one"
_TEXTS = {
    "A": f"{_SYSTEM} word : is tea green or black ?",
    "B": f"{_SYSTEM} word : is ice cold or warm ?",
    "C": f"{_SYSTEM} line : who wrote Hamlet , and why ?",
}
_WIDTH, _HEIGHT, _GAP = 154.0, 44.0, 20.0


def prefix_tree() -> Drawing:
    """Draw the prefix tree of a real block pool after three requests; a word is a token here."""
    words = list(dict.fromkeys(word for text in _TEXTS.values() for word in text.split()))
    pool, found = BlockPool(num_blocks=16, block_size=_SIZE), {}
    for request, text in _TEXTS.items():
        tokens = [words.index(word) for word in text.split()]
        shared = pool.match(tokens)
        found[request] = len(shared) * _SIZE
        pool.share(request, shared)
        pool.allocate(request, pool.blocks_for(len(tokens)) - len(shared))
        pool.publish(request, tokens, len(tokens))
    sheet = Sheet("The prefix tree: the page before it and its tokens lead to a page", 272)
    twin: list[str] = []

    def draw(node: int, depth: int, top: float, before: float | None) -> float:
        """Draw the pages below a node, from `top` down, and return the end; the page above is at `before`."""
        for block in [block for block, (above, _) in pool.key_of.items() if above == node]:
            text = " ".join(words[token] for token in pool.key_of[block][1])
            owners = [name for name, table in pool.tables.items() if block in table]
            held = f"page {block}, held by {', '.join(owners)}"
            x, middle = MARGIN + depth * (_WIDTH + 20), top + _HEIGHT / 2
            if before is not None:
                sheet.line((x - 20, before), (x - 10, before), (x - 10, middle), (x, middle))
            sheet.box(x, top, _WIDTH, _HEIGHT, color=2 if len(owners) > 1 else 1)
            sheet.text(x + 8, top + 18, text)
            sheet.text(x + 8, top + 36, held, size=11)
            twin.append(f"{'    ' * depth}{text}  ({held})")
            top = max(top + _HEIGHT + _GAP, draw(pool.node_of[block], depth + 1, top, middle))
        return top

    end = draw(0, 0, 56, None)
    for i, (request, text) in enumerate(_TEXTS.items()):
        told = f"{request}: {len(text.split())} tokens, {found[request]} of them found"
        sheet.text(MARGIN + i * 226, end + 8, told)
        twin.append(told)
    return sheet.drawing("a page stands below the page before it; four words are its tokens", *twin)
