"""What a checkpoint says about sampling: the defaults of requests that do not say.

`generation_config.json` holds what the makers of a model recommend, such as a temperature of 0.7 and a top-k
of 20. vLLM's `generation_config="auto"` takes the same keys from it. What changes the tokens of `generate` in
`transformers` beyond them is named when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from labkit.sampling_params import SamplingParams

FILE = "generation_config.json"
TAKEN = {
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")},
    "max_new_tokens": "max_tokens",
}
# What else `generate` obeys in its choice of tokens, with the value at which that changes nothing; null and
# what is empty never do. `max_length` is left out: old files have the model's own limit there.
NOT_OBEYED: dict[str, object] = {
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "min_length", "min_new_tokens"), 0),
    **dict.fromkeys(("no_repeat_ngram_size", "penalty_alpha", "token_healing"), 0),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale", "num_beams", "typical_p"), 1),
    **dict.fromkeys(("bad_words_ids", "force_words_ids", "sequence_bias", "stop_strings"), None),
    **dict.fromkeys(("begin_suppress_tokens", "suppress_tokens", "top_h", "watermarking_config"), None),
    **dict.fromkeys(("exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id"), None),
}


def sampling_defaults(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of `SamplingParams` from what `generation_config.json` holds.

    `do_sample` is obeyed as in `transformers`: false is greedy whatever the temperature, and true without a
    temperature means 1.

    Raises:
        ValueError: for a value outside its limits; the message names the file, the field and the limit.
    """
    defaults = {ours: generation[name] for name, ours in TAKEN.items() if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        defaults["temperature"] = 0.0
    elif generation.get("do_sample"):
        defaults.setdefault("temperature", 1.0)
    try:
        SamplingParams(**defaults)
    except ValueError as error:
        raise ValueError(
            f'{FILE} of the model: {error}; generation_config="labkit" leaves it alone'
        ) from None
    return defaults


def not_obeyed(generation: Mapping[str, Any]) -> list[str]:
    """Return the keys of `generation_config.json` that `generate` obeys, and that have no effect here."""
    given = {name: generation.get(name) for name in NOT_OBEYED}
    return [name for name, value in given.items() if value not in (None, "", [], {}, NOT_OBEYED[name])]
