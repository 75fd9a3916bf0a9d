"""Texts that every tokenizer must bring back as they were."""

from __future__ import annotations

CHAT = [{"role": "user", "content": "What is the capital of France?"}]
ODD_TEXTS = [
    "",
    " ",
    "  two  spaces  ",
    "tabs\tand\nnew\r\nlines\n\n\n",
    "digits 0 12 345 6,789.01 2026-11-24",
    "naïve café — “quotes” … 中文 日本語 한국어 العربية עברית",
    "emoji 🙂 👩‍👩‍👧 🏳️‍🌈 and e\u0301",
    "def f(x):\n    return {x: x**2}  # 50%\n",
    "a\u00a0b\u200bc\ufeffd",
    "The cat and the dog, don't they?",
]
