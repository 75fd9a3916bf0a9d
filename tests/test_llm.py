"""The blocking front: prompts in, answers out, in order; an interrupt leaves it usable."""

from __future__ import annotations

import copy
import re
import sys
import warnings
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

import labkit
from labkit import LLM, SamplingParams
from labkit.trace.trace import Trace
from tests.conftest import greedy, loaded


def test_generate_takes_one_prompt_or_many(capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM(loaded("llama"), num_blocks=60)
    params = SamplingParams(max_tokens=5)
    assert [o.token_ids for o in llm.generate([3, 4], params)] == [greedy("llama", [3, 4], 5)]
    assert "tokens/s" in capsys.readouterr().err
    many = llm.generate([[3, 4], [5]], [params, SamplingParams(max_tokens=2)], progress=False)
    assert [o.token_ids for o in many] == [greedy("llama", [3, 4], 5), greedy("llama", [5], 2)]
    assert capsys.readouterr().err == ""
    assert len(llm.generate([3], SamplingParams(n=3, temperature=1.0), progress=False)) == 3
    assert llm.generate([], progress=False) == []
    assert not llm.engine.outputs
    metrics = many[0].metrics
    assert (
        metrics.arrival_time <= metrics.first_scheduled_time < metrics.token_times[0] <= metrics.finish_time
    )
    assert len(metrics.token_times) == 5


def test_generate_refuses_before_it_runs_anything() -> None:
    llm = LLM(loaded("llama"), num_blocks=60)
    with pytest.raises(ValueError, match="prompt is empty"):
        llm.generate([[1], []])
    with pytest.raises(ValueError, match="params must be one or one per prompt: 1 for 2 prompts"):
        llm.generate([[1], [2]], [SamplingParams()])
    with pytest.raises(ValueError, match="blocksize is not a setting; known are "):
        LLM(loaded("llama"), blocksize=3)
    with pytest.raises(ValueError, match=r"Did you mean block_size\?$"):
        LLM(loaded("llama"), blocksize=3)
    with pytest.raises(ValueError, match=r"^use_gpu is not a setting; known are [a-z_0-9, ]+$"):
        LLM(loaded("llama"), use_gpu=True)
    with pytest.raises(ValueError, match="params and sampling_params are two names of one thing"):
        llm.generate([1], SamplingParams(), sampling_params=SamplingParams())
    with pytest.raises(ValueError, match="prompts must be text, token ids, or a list of either, not None"):
        llm.generate(None)
    with pytest.raises(ValueError, match="params must be SamplingParams, not dict"):
        llm.generate([[1]], {})
    assert len(llm.engine.trace) == 0
    assert not llm.engine.outputs


def test_an_interrupt_leaves_the_engine_usable() -> None:
    llm = LLM(loaded("llama"), num_blocks=40, block_size=4, audit=True)
    forward = llm.engine.runner._forward

    def interrupted(*args):
        if len(llm.engine.trace) == 4:
            raise KeyboardInterrupt
        return forward(*args)

    llm.engine.runner._forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2], [3, 4]], progress=False)
    assert not llm.engine.outputs
    assert llm.engine.pool.num_free == 40
    llm.engine.runner._forward = forward
    (output,) = llm.generate([1, 2], SamplingParams(max_tokens=9), progress=False)
    assert output.token_ids == greedy("llama", [1, 2], 9)
    assert Trace.from_lines(llm.engine.trace.lines()) == llm.engine.trace


def test_prompts_as_vllm_writes_them() -> None:
    llm = LLM(loaded("llama"), num_blocks=60)
    params = SamplingParams(max_tokens=5)
    expected = greedy("llama", [1, 2, 3], 5)
    ids = {"prompt_token_ids": [1, 2, 3]}
    (alone,) = llm.generate(ids, sampling_params=params, use_tqdm=False)
    assert (alone.token_ids, alone.prompt) == (expected, None)
    named, *others = llm.generate([ids | {"prompt": "its text"}, ids, [1, 2, 3]], params, use_tqdm=False)
    assert named.prompt == "its text"
    assert [o.token_ids for o in (named, *others)] == [expected] * 3
    text = {"prompt": "ab"}
    for prompt in ("ab", text, ["ab"], [text], text | {"prompt_token_ids": None}):
        (output,) = llm.generate(prompt, params, progress=False)
        assert output.prompt == "ab"
        assert output.prompt_token_ids == llm.get_tokenizer().encode("ab")


@pytest.mark.parametrize(
    "prompt, message",
    [
        ({}, "prompt must have the key prompt or prompt_token_ids, and no others, not []"),
        ({"prompt": "x", "multi_modal_data": {}}, "and no others, not ['prompt', 'multi_modal_data']"),
        ({"prompt": [1, 2]}, "prompt must be text, not list"),
        ({"prompt_token_ids": "x"}, "prompt_token_ids must be a list of token ids, not text"),
        ({"prompt_token_ids": []}, "prompt is empty"),
        ({"prompt_token_ids": [-1]}, "prompt: a token id must be between"),
    ],
)
def test_dictionaries_that_are_no_prompt(prompt: dict, message: str) -> None:
    llm = LLM(loaded("llama"), num_blocks=60)
    for prompts in (prompt, [prompt], [[1], prompt]):
        with pytest.raises(ValueError, match=re.escape(message)):
            llm.generate(prompts, progress=False)
    assert not llm.engine.has_unfinished


def test_chat_applies_the_template() -> None:
    llm = LLM("tiny-random", num_blocks=60)
    tokenizer = llm.get_tokenizer()
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    params = SamplingParams(max_tokens=6)
    (output,) = llm.chat(talk, sampling_params=params, use_tqdm=False)
    assert output.prompt == text
    assert output.prompt_token_ids == tokenizer.encode(text, add_special_tokens=False)
    (same,) = llm.generate({"prompt_token_ids": output.prompt_token_ids}, params, progress=False)
    assert output.token_ids == same.token_ids
    many = llm.chat([talk, "Why?", [{"role": "user", "content": "Why?"}]], [params] * 3, progress=False)
    assert many[0].token_ids == output.token_ids
    assert many[1].prompt == many[2].prompt == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert llm.chat("Why?", params, progress=False)[0].prompt == many[1].prompt
    assert llm.chat([], progress=False) == []
    for messages in (None, [[]], [None], [{"role": "user"}], [talk, ["Why?"]]):
        with pytest.raises(ValueError, match=r"^messages"):
            llm.chat(messages)
    assert not llm.engine.has_unfinished


def test_chat_without_a_template_and_with_one_that_refuses() -> None:
    model = LLM("tiny-random", num_blocks=60).engine.model
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    plain = LLM(replace(model, tokenizer=_with_template(model.tokenizer, None)), num_blocks=60)
    assert plain.chat(talk, progress=False)[0].prompt == "Be brief.\n\nWhy?"
    strict = _with_template(model.tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="messages: the chat template says: roles must alternate"):
        LLM(replace(model, tokenizer=strict), num_blocks=60).chat(talk)


def test_an_answer_that_ends_at_once_hints_at_chat_once() -> None:
    """As an instruct model does with a bare question, because nobody has told it whose turn it is."""
    llm = LLM("tiny-random", num_blocks=60)
    tokenizer = llm.get_tokenizer()
    params = SamplingParams(max_tokens=4, logit_bias={tokenizer.eos_token_id: 100})
    plain = replace(llm.engine.model, tokenizer=_with_template(tokenizer, None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm.generate([1, 2, 3], params, progress=False)  # token ids: who writes them knows
        llm.generate("What is it?", SamplingParams(max_tokens=4), progress=False)  # it has something to say
        llm.chat("What is it?", params, progress=False)
        LLM(plain, num_blocks=60).generate("What is it?", params, progress=False)  # it has no template
    with pytest.warns(UserWarning, match="tiny-random ended its answer at once.* use `chat`") as told:
        (output,) = llm.generate("What is it?", params, progress=False)
        llm.generate("What is it?", params, progress=False)
    assert len(told) == 1
    assert told[0].filename == __file__
    assert (output.text, output.finish_reason) == ("", "stop")


def _with_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> PreTrainedTokenizerBase:
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = template
    return copied


def test_the_package_shows_its_names_and_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = dir(labkit)
    assert set(labkit.__all__) | {"__version__"} <= set(shown)
    assert not {"Any", "TYPE_CHECKING", "import_module", "Path"} & set(shown)
    assert ("views" in shown) == ("labkit.views" in sys.modules)

    def nothing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", nothing)
    source = Path(labkit.__file__).parents[1] / "pyproject.toml"
    assert f'version = "{labkit.__version__}"' in source.read_text(encoding="utf-8").splitlines()
    monkeypatch.setattr(metadata, "version", lambda name: f"{name} 9.9")
    assert labkit.__version__ == "labkit 9.9"


def test_an_llm_says_what_it_runs() -> None:
    assert repr(LLM(loaded("llama"), num_blocks=60)) == "LLM('llama', torch.float32 on cpu)"


def test_a_conversation_ends_where_one_says() -> None:
    llm = LLM("tiny-random", num_blocks=64)
    talk = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    prompts = {}
    for name, options in {
        "open": {"continue_final_message": True},
        "ended": {"add_generation_prompt": False},
    }.items():
        (output,) = llm.chat(talk, SamplingParams(max_tokens=1), progress=False, **options)
        prompts[name] = output.prompt
    assert prompts["open"].endswith("two") and prompts["ended"].startswith(prompts["open"])
    with pytest.raises(ValueError, match="chat_template_kwargs: the model's chat template has no variable"):
        llm.chat(talk, chat_template_kwargs={"enable_thinking": False})
