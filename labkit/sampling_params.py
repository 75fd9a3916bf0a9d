"""Sampling parameters: how the tokens of a request are picked, and when it ends. No tensors here."""

from __future__ import annotations

import difflib
import functools
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

T = TypeVar("T")

MAX_LOGPROBS = 20
MAX_N = 64
TEMPERATURE = 0.0  # unless a request or its model says otherwise: in Python, on the page and in the API
MIN_TEMPERATURE = 1e-3  # below it, logits divided by it may leave the range of fp32
MAX_CHOICES = 1000
MAX_FORM = 65_536  # characters of a regular expression, a schema or a grammar, and of all choices together


def check_number(field_name: str, value: object, low: float, high: float, *, whole: bool = False) -> None:
    """Raise `ValueError`, which names the field and the limit, unless `low <= value <= high`."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or value != value:  # NaN
        wanted = "a whole number" if whole else "a number"
        raise ValueError(f"{field_name} must be {wanted}, not {value!r}")
    if not low <= value <= high:
        limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise ValueError(f"{field_name} must be {limits}, not {value!r}")


def check_flag(field_name: str, value: object) -> None:
    """Raise `ValueError`, which names the field, unless it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{field_name} must be True or False, not {value!r}")


def unknown(name: str, known: Collection[str]) -> str:
    """Return a sentence that says that there is no such field, and which one may be meant."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f". Did you mean {close[0]}?" if close else ""
    return f"{name} is not a setting; known are {', '.join(sorted(known))}{hint}"


def suggest_fields(cls: type[T]) -> type[T]:
    """Decorate a dataclass so that a misspelt argument is answered with the field that it is close to.

    Creating one then raises `TypeError` for a field that does not exist, as any dataclass does, in the words
    of `unknown`.
    """
    init, known = cls.__init__, {field.name for field in fields(cls)}  # type: ignore[arg-type, misc]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **values: Any) -> None:
        for name in values.keys() - known:
            raise TypeError(f"{cls.__name__}: {unknown(name, known)}")
        init(self, *args, **values)

    cls.__init__ = checked  # type: ignore[method-assign, assignment, misc]
    return cls


@dataclass(frozen=True)
class Structured:
    """The form that an answer must have. `Structured.of` makes one from what a caller gives.

    Args:
        kind: "choice", "regex", "json" or "grammar".
        value: the choices, or the text of the expression, of the schema (as JSON) or of the grammar.
    """

    kind: str
    value: str | tuple[str, ...]

    @classmethod
    def of(cls, given: object) -> Structured:
        """Return a form from one of these; the names are those of vLLM's `structured_outputs`.

        - {"choice": strings}: one of them;
        - {"regex": pattern}: a text that Python's `re.fullmatch` accepts;
        - {"json": schema}: JSON of a schema, which is a dictionary, its JSON, or a pydantic model;
        - {"grammar": text}: a text of a Lark grammar, as llguidance reads it;
        - "json": any JSON object;
        - a pydantic model: JSON of its schema.

        Raises:
            ValueError: for anything else; the message names the part and the limit.
        """
        if isinstance(given, Structured):
            return given
        if given == "json":
            return cls("json", '{"type": "object"}')
        if hasattr(given, "model_json_schema"):
            given = {"json": given}
        if not isinstance(given, Mapping) or len(given) != 1 or not set(given) <= _FORMS.keys():
            raise ValueError(
                f'structured must be "json", a pydantic model, or a dictionary with one of the keys '
                f"{', '.join(_FORMS)}, not {given!r}"
            )
        ((kind, value),) = given.items()
        value = _FORMS[kind](f"structured: {kind}", value)
        if (length := len(value) if isinstance(value, str) else sum(map(len, value))) > MAX_FORM:
            raise ValueError(f"structured: {kind} must have at most {MAX_FORM:,} characters, not {length:,}")
        return cls(kind, value)


def _choices(name: str, value: object) -> tuple[str, ...]:
    choices = _strings(name, value)
    if not 0 < len(choices) <= MAX_CHOICES:
        raise ValueError(f"{name} must have between 1 and {MAX_CHOICES} strings, not {len(choices)}")
    return choices


def _pattern(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a string that is not empty, not {value!r}")
    return value


def _schema(name: str, value: Any) -> str:
    if hasattr(value, "model_json_schema"):
        value = value.model_json_schema()
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON schema: {error}") from None
    if not isinstance(schema, Mapping | bool):
        raise ValueError(f"{name} must be a schema: a dictionary, its JSON, or a pydantic model, not {text}")
    return text


_FORMS = {"choice": _choices, "regex": _pattern, "json": _schema, "grammar": _pattern}


@suggest_fields
@dataclass(frozen=True)
class SamplingParams:
    """How to pick the next token, and when to stop.

    Args:
        max_tokens: the most tokens to generate; None goes on up to the model's limit (`Engine` puts the
            number in its place).
        min_tokens: the least tokens to generate: before so many have come, tokens that would end the answer
            are never picked, and stop strings are not looked for.
        temperature: the temperature; 0, the default everywhere, picks the likeliest token (greedy), and
            higher values flatten the distribution. What lies below `MIN_TEMPERATURE` is taken as 0.
        top_k: the number of likeliest tokens to keep; 0 or -1 keeps all.
        top_p: the probability that the likeliest tokens must reach together; only these are kept.
        min_p: the share of the likeliest token's probability below which tokens are dropped.
        repetition_penalty: a number that divides the logits of tokens in prompt or answer (and multiplies
            negative ones).
        presence_penalty: a number that is subtracted from the logits of tokens in the answer.
        frequency_penalty: a number that is subtracted for each time that a token occurs in the answer.
        stop: strings that end the answer; they are cut from the text, with what comes after them.
        include_stop_str_in_output: whether the text keeps the stop string that ended it.
        stop_token_ids: token ids that end the answer.
        ignore_eos: whether to go on after the end-of-sequence token.
        seed: the seed of the sampling noise; None, and -1 as in vLLM, take one from the engine's seed.
        n: the number of answers to generate for the prompt.
        logprobs: how many of the likeliest tokens to report with their log-probabilities, beside the chosen
            one; None reports none at all.
        prompt_logprobs: the same for the tokens of the prompt, each after those before it. Such a request
            computes its whole prompt, and takes nothing from the prefix cache.
        logit_bias: numbers to add to the logits of token ids, before anything else.
        skip_special_tokens: whether special tokens, such as the end of sequence, are left out of the text.
        structured: the form that the text must have: what `Structured.of` takes, a choice, a regular
            expression, a JSON schema or a grammar. It goes before `min_tokens`: an answer ends where its form
            lets nothing follow. What cuts it before, `max_tokens` or a stop string, may leave it incomplete.

    The logits are divided by the temperature first. Then top-k keeps exactly k tokens, top-p counts the
    probabilities of those, and min-p drops those that are too far from the likeliest. vLLM differs in two
    places: min-p goes first there, so that top-p counts what min-p has left, and top-k keeps all tokens that
    tie for the k-th place.

    Log-probabilities are the model's own, before bias, penalties, filters and the mask of a form (vLLM's
    default, `raw_logprobs`): a token that a form forces may have a low one.

    A token that ends the answer is part of its text, unless it is special and special tokens are left out.

    Raises:
        ValueError: for a value outside its limits; the message names the field and the limit.
        TypeError: for a field that does not exist; the message names the one that is closest.
    """

    max_tokens: int | None = 64
    temperature: float = TEMPERATURE
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None
    structured: Structured | Mapping[str, Any] | type | str | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            check_number("max_tokens", self.max_tokens, 1, math.inf, whole=True)
        check_number("min_tokens", self.min_tokens, 0, math.inf, whole=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), not {self.min_tokens}"
            )
        check_number("temperature", self.temperature, 0, 100)
        if 0 < self.temperature < MIN_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        if isinstance(self.top_k, int) and self.top_k == -1:  # another way to say that it is off
            object.__setattr__(self, "top_k", 0)
        check_number("top_k", self.top_k, 0, math.inf, whole=True)
        check_number("top_p", self.top_p, 1e-6, 1)
        check_number("min_p", self.min_p, 0, 1)
        check_number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        check_number("presence_penalty", self.presence_penalty, -2, 2)
        check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        check_number("n", self.n, 1, MAX_N, whole=True)
        if self.seed is not None:
            check_number("seed", self.seed, -(2**63), 2**63 - 1, whole=True)
            if self.seed == -1:
                object.__setattr__(self, "seed", None)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0, MAX_LOGPROBS, whole=True)
        if self.n > 1 and self.temperature == 0:
            raise ValueError("n > 1 needs temperature > 0: greedy answers would all be the same")
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            check_flag(name, getattr(self, name))
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise ValueError(f"logit_bias must map token ids to numbers, not {self.logit_bias!r}")
            bias = dict(self.logit_bias)
            _token_ids("logit_bias", list(bias))
            for token, value in bias.items():
                check_number(f"logit_bias[{token}]", value, -100, 100)
            object.__setattr__(self, "logit_bias", bias)
        if self.structured is not None:
            object.__setattr__(self, "structured", Structured.of(self.structured))


def _tuple(field_name: str, value: object) -> tuple:
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise ValueError(f"{field_name} must be a list, not {value!r}")
    return tuple(value)


def _strings(field_name: str, value: object) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else _tuple(field_name, value)
    if any(not isinstance(text, str) or not text for text in strings):
        raise ValueError(f"{field_name} must be one or more strings that are not empty, not {value!r}")
    return strings


def _token_ids(field_name: str, value: object) -> tuple[int, ...]:
    ids = _tuple(field_name, value)
    for token in ids:
        check_number(field_name, token, 0, math.inf, whole=True)
    return ids
