"""What stands in the place of a tokenizer where a model's folder has none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from labkit.models.errors import ModelError


class NoTokenizer:
    """Refuses text. The model itself runs on token ids, and those are its answers."""

    eos_token_id = None
    chat_template = None

    def encode(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise `ModelError`."""
        raise ModelError("the model's folder has no tokenizer: its prompts must be token ids, not text")

    def get_vocab(self) -> NoReturn:
        """Raise `ModelError`."""
        raise ModelError("the model's folder has no tokenizer, and so no vocabulary to compare")

    def decode(self, token_ids: int | Sequence[int], **kwargs: Any) -> str:
        """Return the ids themselves, in brackets, where pictures show tokens."""
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return "".join(f"<{token}>" for token in ids)
