"""Bad values are refused; the message names the field and the limit."""

from __future__ import annotations

import dataclasses

import pytest

from labkit.config import EngineConfig, ModelConfig
from labkit.sampling_params import TEMPERATURE, SamplingParams

NAN = float("nan")


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(max_tokens=0), "max_tokens must be at least 1, not 0"),
        (dict(max_tokens=1.5), "max_tokens must be a whole number"),
        (dict(max_tokens=True), "max_tokens must be a whole number"),
        (dict(temperature=NAN), "temperature must be a number, not nan"),
        (dict(temperature=-1), "temperature must be between 0 and 100"),
        (dict(max_tokens=10**400, temperature=10**400), "temperature must be between 0 and 100"),
        (dict(ignore_eos="no"), "ignore_eos must be True or False, not 'no'"),
        (dict(stop=5), "stop must be a list, not 5"),
        (dict(stop_token_ids="12"), "stop_token_ids must be a list, not '12'"),
        (dict(logit_bias=[1]), "logit_bias must map token ids to numbers"),
        (dict(temperature="hot"), "temperature must be a number, not 'hot'"),
        (dict(top_k=-2), "top_k must be at least 0, not -2"),
        (dict(top_k=False), "top_k must be a whole number"),
        (dict(min_tokens=-1), "min_tokens must be at least 0"),
        (dict(min_tokens=None), "min_tokens must be a whole number"),
        (dict(min_tokens=65), r"min_tokens must be at most max_tokens \(64\), not 65"),
        (dict(include_stop_str_in_output=1), "include_stop_str_in_output must be True or False, not 1"),
        (dict(skip_special_tokens=None), "skip_special_tokens must be True or False, not None"),
        (dict(top_p=0), "top_p must be between"),
        (dict(top_p=1.1), "top_p must be between"),
        (dict(min_p=2), "min_p must be between 0 and 1"),
        (dict(repetition_penalty=0), "repetition_penalty must be between"),
        (dict(presence_penalty=3), "presence_penalty must be between -2 and 2"),
        (dict(frequency_penalty=NAN), "frequency_penalty must be a number"),
        (dict(stop=""), "stop must be one or more strings that are not empty"),
        (dict(stop=["a", 3]), "stop must be"),
        (dict(stop_token_ids=[-1]), "stop_token_ids must be at least 0"),
        (dict(seed=1.0), "seed must be a whole number"),
        (dict(n=0), "n must be between 1 and 64"),
        (dict(n=2), "n > 1 needs temperature > 0"),
        (dict(n=2, temperature=1e-8), "n > 1 needs temperature > 0"),
        (dict(logprobs=21), "logprobs must be between 0 and 20"),
        (dict(logit_bias={3: 101}), r"logit_bias\[3\] must be between -100 and 100"),
        (dict(logit_bias={"a": 1}), "logit_bias must be a whole number"),
    ],
)
def test_sampling_params_say_which_field_and_which_limit(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values)


def test_stop_may_be_one_string_or_several() -> None:
    assert SamplingParams(stop="x").stop == ("x",)
    assert SamplingParams(stop=["x", "yz"]).stop == ("x", "yz")


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-8, 1e-6, 1e-4, 9e-4])
def test_a_temperature_that_fp32_cannot_divide_by_is_greedy(temperature: float) -> None:
    """Clients of many kinds send such a number where they mean greedy."""
    assert SamplingParams(temperature=temperature) == SamplingParams(temperature=0)
    assert SamplingParams(temperature=1e-3).temperature == 1e-3


def test_a_seed_of_minus_one_is_no_seed() -> None:
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(seed=0).seed == 0 and SamplingParams(seed=-2).seed == -2


def test_what_is_off_may_be_said_as_vllm_says_it() -> None:
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
    assert SamplingParams(max_tokens=None, min_tokens=1000).max_tokens is None


@pytest.mark.parametrize("made", [SamplingParams, ModelConfig, EngineConfig])
def test_a_misspelt_field_is_answered_with_the_right_one(made: type) -> None:
    known = {field.name for field in dataclasses.fields(made)}
    for name in known - {"n"}:  # a name of one letter can be anything
        for misspelt in {name + "s", name.replace("_", ""), name[:2] + "x" + name[2:]} - known:
            with pytest.raises(
                TypeError, match=rf"^{made.__name__}: {misspelt} is not a .*Did you mean \w+\?$"
            ):
                made(**{misspelt: 1})
    with pytest.raises(TypeError, match=r"Did you mean max_tokens\?$"):
        SamplingParams(max_new_tokens=5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^EngineConfig: sky is not a setting; known are [a-z_0-9, ]+$"):
        EngineConfig(sky="blue")  # type: ignore[call-arg]


def test_fields_keep_their_places_and_what_can_be_replaced() -> None:
    assert SamplingParams(7, temperature=0.5).max_tokens == 7
    assert dataclasses.replace(SamplingParams(7), seed=3) == SamplingParams(7, seed=3)
    with pytest.raises(TypeError, match="Did you mean seed"):
        dataclasses.replace(SamplingParams(7), sed=3)  # type: ignore[call-arg]


def test_one_temperature_is_the_default_in_python_and_in_the_api() -> None:
    from labkit.serving.schema import ChatBody, CompletionBody

    chat = ChatBody(model="m", messages=[{"role": "user", "content": "hello"}])
    plain = CompletionBody(model="m", prompt="hello")
    asked = [body.sampling_params(64, {}).temperature for body in (chat, plain)]
    assert [SamplingParams().temperature, *asked] == [TEMPERATURE] * 3 == [0.0] * 3
