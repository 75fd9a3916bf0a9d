"""What a checkpoint says about sampling holds for requests that do not say, and for no others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from labkit import LLM, Engine, EngineConfig, SamplingParams
from labkit.models.generation_config import FILE, NOT_OBEYED, TAKEN, not_obeyed, sampling_defaults
from labkit.models.load import load_model
from labkit.page.gradio_page import build
from labkit.page.submissions import params_of
from tests.serving.api_server import MODEL, Served, post, served

pytest_plugins = ["tests.models.fixtures"]

QWEN = {  # that of Qwen2.5-0.5B-Instruct
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [0],
    "pad_token_id": 151643,
    "repetition_penalty": 1.1,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "transformers_version": "4.37.0",
}
QWENS = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1}
PROMPT = [5, 77, 130, 9, 42, 42, 17]
SIZES = {"num_blocks": 64, "block_size": 4, "max_model_len": 100}


@pytest.fixture
def qwen(folder: Path) -> Path:
    (folder / FILE).write_text(json.dumps(QWEN))
    return folder


@pytest.mark.parametrize(
    ("generation", "defaults"),
    [
        ({}, {}),
        (QWEN, QWENS),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}),
        ({"temperature": 0.6}, {"temperature": 0.6}),
        ({"max_new_tokens": 7, "min_p": 0.1, "top_k": None}, {"max_tokens": 7, "min_p": 0.1}),
        ({"max_length": 4096, "pad_token_id": 0, "no_repeat_ngram_size": 3}, {}),
    ],
)
def test_what_is_taken(generation: dict[str, Any], defaults: dict[str, Any]) -> None:
    assert sampling_defaults(generation) == defaults


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": "high"}, {"max_new_tokens": 0}])
def test_what_cannot_be_is_refused_with_the_way_out(wrong: dict[str, Any], folder: Path) -> None:
    (folder / FILE).write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=rf'{FILE} of the model: .*generation_config="labkit" leaves'):
        Engine(EngineConfig(model=folder, **SIZES), say=None)
    engine = Engine(EngineConfig(model=folder, generation_config="labkit", **SIZES), say=None)
    assert engine.sampling_defaults == {}


def test_python_takes_them_where_no_params_are_given(qwen: Path) -> None:
    llm, plain = (LLM(str(qwen), generation_config=whose, **SIZES) for whose in ("auto", "labkit"))
    usual = llm.get_default_sampling_params()
    assert usual == SamplingParams(**QWENS)
    assert plain.get_default_sampling_params() == SamplingParams()
    said = {**QWENS, "seed": 3, "max_tokens": 20}
    for one in (llm, plain):  # what is said is said in full
        assert one.generate(PROMPT, SamplingParams(**said), progress=False)[0].token_ids == (
            plain.generate(PROMPT, SamplingParams(**said), progress=False)[0].token_ids
        )
    greedy = [one.generate(PROMPT, SamplingParams(), progress=False)[0].token_ids for one in (llm, plain)]
    assert greedy[0] == greedy[1]
    request = llm.engine.make_request(PROMPT)
    assert request.params == SamplingParams(**QWENS)
    assert llm.engine.make_request(PROMPT, SamplingParams(top_k=3)).params == SamplingParams(top_k=3)


def test_penalised_greedy_tokens_are_those_of_generate_with_the_file(qwen: Path) -> None:
    (qwen / FILE).write_text(json.dumps({"repetition_penalty": 1.3, "max_new_tokens": 25}))
    found = LLM(str(qwen), **SIZES).generate(PROMPT, progress=False)[0].token_ids
    model = AutoModelForCausalLM.from_pretrained(qwen)
    with torch.inference_mode():
        expected = model.generate(torch.tensor([PROMPT]), pad_token_id=0)[0, len(PROMPT) :].tolist()
    assert found == expected and len(found) == 25
    plain = LLM(str(qwen), generation_config="labkit", **SIZES)
    assert plain.generate(PROMPT, progress=False)[0].token_ids != found


@pytest.fixture
def site() -> Iterator[Served]:
    with served() as site:
        site.live.engine.sampling_defaults = QWENS
        yield site


def sent(site: Served, path: str, **fields: Any) -> SamplingParams:
    """What the engine is asked for."""
    seen: list[SamplingParams] = []
    site.handler.on_request = lambda request_id, prompt, params: seen.append(params)
    ask = {"prompt": PROMPT} if path == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
    answer: httpx.Response = post(site, {"model": MODEL} | ask | fields, path)
    assert answer.status_code == 200, answer.text
    return seen[0]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_fields_that_a_call_leaves_out(site: Served, path: str) -> None:
    said = sent(site, path, max_tokens=2)
    assert {name: getattr(said, name) for name in QWENS} == QWENS
    said = sent(site, path, max_tokens=2, temperature=0, top_p=None, top_k=0, repetition_penalty=1)
    assert (said.temperature, said.top_p, said.top_k, said.repetition_penalty) == (0, 0.8, 0, 1)
    site.live.engine.sampling_defaults = {"max_tokens": 3}
    said = sent(site, path)
    assert (said.max_tokens, said.temperature) == (3, 1.0)
    assert sent(site, path, max_tokens=5).max_tokens == 5
    site.live.engine.sampling_defaults = {"max_tokens": 10**6}
    assert sent(site, path, ignore_eos=False).max_tokens == 200  # the longest there is here


def test_the_page_asks_for_the_rest_as_the_model_says() -> None:
    params = params_of(64, 0.5, 1.0, None, QWENS)
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.5, 1, 20, 1.1)


def test_the_form_of_the_page_begins_with_them(site: Served) -> None:
    site.live.engine.sampling_defaults = {"temperature": 0.3, "top_p": 0.9}
    fields = [component["props"] for component in build(site.live).get_config_file()["components"]]
    values = {field.get("label"): field.get("value") for field in fields}
    assert (values["Temperature"], values["Top-p"]) == (0.3, 0.9)


def test_what_is_not_obeyed_is_named_once(folder: Path, saved: Callable[[str], Path]) -> None:
    lines: list[str] = []
    settings = {"suppress_tokens": [3], "no_repeat_ngram_size": 2, "num_beams": 1, "guidance_scale": 1.0}
    (folder / FILE).write_text(
        json.dumps(QWEN | settings | {"bad_words_ids": [], "forced_eos_token_id": None})
    )
    load_model(folder, say=lines.append)
    said = [line for line in lines if "Not obeyed" in line]
    assert said == [f"Not obeyed of its {FILE}: no_repeat_ngram_size, suppress_tokens."]
    lines.clear()
    load_model(saved("llama"), say=lines.append)
    assert not any("Not obeyed" in line for line in lines)


def test_every_key_is_one_of_transformers() -> None:
    known = GenerationConfig().to_dict()
    assert set(TAKEN) | set(NOT_OBEYED) <= set(known)
    assert not_obeyed({name: value for name, value in known.items() if name not in TAKEN}) == []
