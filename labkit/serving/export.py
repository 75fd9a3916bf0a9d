"""The same model under vLLM or SGLang: `python -m labkit.export [engine options]` prints the command lines.

Every setting of `EngineConfig` becomes a flag, needs no flag, or is named as a setting without a twin: none
is dropped in silence. The flags are those of `vllm serve` (vLLM 0.33) and of `sglang.launch_server`
(SGLang 0.5.23). Neither program is needed here, and neither is started.

`python -m labkit.export --html run.jsonl` writes a trace as one web page instead.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

from labkit.config import EngineConfig
from labkit.serving import cli
from labkit.speculative.ngram import NgramDrafter
from labkit.trace.trace import Trace
from labkit.views.run_page import export_html

if TYPE_CHECKING:
    from labkit.models.load import LoadedModel

_SEED = "for requests without a seed of their own; it gives other numbers than here"
_DEFAULTS = "how to sample where a request does not say: not as the model's file says"
_SHARED = "devices that share the model, each with a part of every layer"
# The other engines' names of types; a name that is missing here is the same everywhere.
_DTYPES = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}


@dataclass
class Command:
    """The command line of another engine.

    Attributes:
        engine: the engine's name, and the version whose flags these are.
        program: the words with which the command line begins.
        flags: for each flag, the settings that it comes from, its words, and what it means.
        same: the settings that need no flag, each with what the other engine does.
        without_twin: the settings that the other engine does not have, each with the reason.
    """

    engine: str
    program: tuple[str, ...]
    flags: list[tuple[tuple[str, ...], tuple[str, ...], str]] = field(default_factory=list)
    same: dict[str, str] = field(default_factory=dict)
    without_twin: dict[str, str] = field(default_factory=dict)

    def flag(self, settings: str, why: str, *words: object) -> None:
        """Add the words of a flag; `settings` names those of ours that it comes from, with spaces between."""
        self.flags.append((tuple(settings.split()), tuple(map(str, words)), why))

    @property
    def argv(self) -> list[str]:
        """The command line, word by word."""
        return [*self.program, *(word for _, words, _ in self.flags for word in words)]

    @property
    def settings(self) -> set[str]:
        """The settings that have been dealt with."""
        flagged = {setting for settings, _, _ in self.flags for setting in settings}
        return flagged | self.same.keys() | self.without_twin.keys()

    def __str__(self) -> str:
        """The command line for a shell, after comments that say what each flag is and what is left out."""
        width = max(len(words[0]) for _, words, _ in self.flags)
        lines = [f"# {self.engine}"]
        lines += [f"#   {words[0]:<{width}}  {why}" for _, words, why in self.flags]
        for title, settings in (("without a flag", self.same), ("no twin", self.without_twin)):
            names: dict[str, list[str]] = {}  # the settings for each explanation
            for name, why in settings.items():
                names.setdefault(why, []).append(name)
            lines += [f"# {title}:", *(f"#   {', '.join(those)}: {why}" for why, those in names.items())]
        groups = [self.program, *(words for _, words, _ in self.flags)]
        return "\n".join(lines) + "\n" + " \\\n  ".join(shlex.join(group) for group in groups)


def commands(config: EngineConfig) -> dict[str, Command]:
    """The command lines that serve the same model with the same settings, as far as possible.

    Returns:
        One command for each of "vllm" and "sglang".

    Raises:
        ValueError: for a model without files, such as "tiny-random", or one that is loaded already.
    """
    path, name = _path(config.model, "model")
    out = {
        "vllm": Command("vLLM 0.33", ("vllm", "serve", path)),
        "sglang": Command("SGLang 0.5.23", ("python", "-m", "sglang.launch_server", "--model-path", path)),
    }
    own: dict[str, Callable[[EngineConfig, Command], None]] = {"vllm": _vllm, "sglang": _sglang}
    for engine, command in out.items():
        command.flag("model", "the name that clients say, as here", "--served-model-name", name)
        command.flag("", "where it listens, as here", "--host", "127.0.0.1")
        command.flag("", "and at which port", "--port", 8000)
        own[engine](config, command)
        _no_twin(config, command)
        for entry in fields(config):
            if entry.name in command.settings:
                continue
            if getattr(config, entry.name) == entry.default:
                command.same[entry.name] = "off here, or left to the engine"
            else:
                command.without_twin[entry.name] = "no flag is known for it"
    return out


def _path(model: str | os.PathLike[str] | LoadedModel, what: str) -> tuple[str, str]:
    """The path that the other engine loads, and the name that our clients know."""
    from labkit.models.hub import HUB_IDS, TINY  # here, because it takes seconds

    if not isinstance(model, str | os.PathLike):
        raise ValueError(f"{what}: {model.name!r} is loaded already; name its Hub id or its folder")
    model = os.fspath(model)
    if model == TINY:
        raise ValueError(f"{what}: {TINY!r} is made in memory and has no files for another engine")
    folder = os.path.expanduser(model)
    if os.path.isdir(folder):
        return folder, os.path.basename(os.path.realpath(folder))
    return HUB_IDS.get(model, model), model


def _seats(config: EngineConfig) -> tuple[int, str]:
    if config.scheduler in ("naive", "uncached"):
        return 1, f"one request at a time, as scheduler={config.scheduler!r} has it"
    return config.max_num_seqs, "seats: requests that run at once"


def _dtype(config: EngineConfig) -> tuple[str, str]:
    if config.as_t4:
        return "float16", "what a T4 computes in"
    if config.dtype == "auto":
        return "auto", "that of the checkpoint, in 16 bits; labkit takes float32 on a CPU"
    return _DTYPES.get(config.dtype, config.dtype), "of weights, activations and KV cache"


# -- one engine at a time --------------------------------------------------------------------------


def _vllm(config: EngineConfig, out: Command) -> None:
    dtype, why = _dtype(config)
    out.flag("dtype", why, "--dtype", dtype)
    if config.device == "auto":
        out.same["device"] = "the one that the installed vLLM was built for"
    else:
        out.without_twin["device"] = "the installed vLLM has one; CUDA_VISIBLE_DEVICES says which GPU"
    odd = "" if config.block_size % 16 == 0 else "; its CUDA kernels want a multiple of 16"
    out.flag("block_size", f"tokens in a block{odd}", "--block-size", config.block_size)
    if config.num_blocks is None:
        out.same["num_blocks"] = "what memory holds (--gpu-memory-utilization)"
    else:
        out.flag("num_blocks", "blocks of the KV cache", "--num-gpu-blocks-override", config.num_blocks)
    if config.kv_cache_dtype != "int8":
        out.same["kv_cache_dtype"] = "that of the model"
    elif config.device == "cpu":
        out.without_twin["kv_cache_dtype"] = "'int8': its kernels for a CPU do not have it"
    else:
        why = "8 bits with a scale per token and head; in its Triton kernel, not on a CPU"
        out.flag("kv_cache_dtype", why, "--kv-cache-dtype", "int8_per_token_head")
    if config.max_model_len is not None:
        out.flag("max_model_len", "longest prompt + answer", "--max-model-len", config.max_model_len)
    elif config.num_blocks is not None:
        out.flag("max_model_len", "the model's own limit, or what the pool holds", "--max-model-len", "auto")
    else:
        out.same["max_model_len"] = "the model's own limit"
    seats, why = _seats(config)
    out.flag("max_num_seqs", why, "--max-num-seqs", seats)
    budget = config.max_num_batched_tokens
    out.flag("max_num_batched_tokens", "token budget of a step", "--max-num-batched-tokens", budget)
    if config.enable_chunked_prefill:
        out.flag("enable_chunked_prefill", "prompts in pieces beside decode", "--enable-chunked-prefill")
    else:
        why = "whole prompts; the budget must then be no less than --max-model-len"
        out.flag("enable_chunked_prefill", why, "--no-enable-chunked-prefill")
    cache = "--enable-prefix-caching" if config.enable_prefix_caching else "--no-enable-prefix-caching"
    out.flag("enable_prefix_caching", "whether blocks are kept for later prompts with the same start", cache)
    if config.kv_offloading_size is not None:
        why = "GiB of host memory for blocks, which it copies when they are full"
        out.flag("kv_offloading_size", why, "--kv-offloading-size", config.kv_offloading_size)
    if config.kv_offloading_dir is not None:
        out.without_twin["kv_offloading_dir"] = "a disk is a secondary tier, in its --kv-transfer-config"
    why = "requests may bring a priority, lower first, as here"
    out.flag("", why, "--scheduling-policy", "priority")
    if config.attention_backend == "triton":
        out.flag("attention_backend", "a Triton kernel", "--attention-backend", "TRITON_ATTN")
    elif config.attention_backend == "sdpa":
        out.without_twin["attention_backend"] = "PyTorch's own attention is not among its kernels for text"
    out.flag("tensor_parallel_size", _SHARED, "--tensor-parallel-size", config.tensor_parallel_size)
    if not config.cuda_graphs:
        out.flag("cuda_graphs", "no CUDA graphs, and no torch.compile either", "--enforce-eager")
    out.flag("seed", _SEED, "--seed", config.seed)
    if config.generation_config != "auto":
        out.flag("generation_config", _DEFAULTS, "--generation-config", "vllm")
    if drafter := _drafter(config, out):
        how: dict[str, object] = {"method": "draft_model", "model": drafter}
        if drafter == "ngram":
            sizes = signature(NgramDrafter).parameters
            how = {"method": "ngram", "prompt_lookup_max": sizes["longest"].default}
            how["prompt_lookup_min"] = sizes["shortest"].default
        how["num_speculative_tokens"] = config.num_speculative_tokens
        settings = "speculative draft_model num_speculative_tokens"
        out.flag(settings, "what drafts, and how many tokens", "--speculative-config", json.dumps(how))


def _sglang(config: EngineConfig, out: Command) -> None:
    dtype, why = _dtype(config)
    out.flag("dtype", why, "--dtype", dtype)
    device, _, number = config.device.partition(":")
    if device == "auto":
        out.same["device"] = "found by itself"
    else:
        out.flag("device", "what it runs on", "--device", device)
        if number:
            out.flag("device", "which of them", "--base-gpu-id", number)
    out.flag("block_size", "tokens in a block, which SGLang calls a page", "--page-size", config.block_size)
    if config.num_blocks is None:
        out.same["num_blocks"] = "what memory holds (--mem-fraction-static)"
    else:
        tokens = config.num_blocks * config.block_size
        out.flag("num_blocks", "tokens of the KV cache: blocks x block size", "--max-total-tokens", tokens)
    if config.kv_cache_dtype == "int8":
        out.without_twin["kv_cache_dtype"] = "'int8': its eight bits are fp8, without a scale for each token"
    else:
        out.same["kv_cache_dtype"] = "that of the model"
    if config.max_model_len is not None:
        out.flag("max_model_len", "longest prompt + answer", "--context-length", config.max_model_len)
    else:
        out.same["max_model_len"] = "the model's own limit, or what the pool holds"
    seats, why = _seats(config)
    out.flag("max_num_seqs", why, "--max-running-requests", seats)
    drafter = _drafter(config, out)
    whole = not config.enable_chunked_prefill
    budget = "--max-prefill-tokens" if whole else "--chunked-prefill-size"
    why = "prompt tokens of a step; decode is not counted there"
    out.flag("max_num_batched_tokens", why, budget, config.max_num_batched_tokens)
    if whole:
        out.flag("enable_chunked_prefill", "whole prompts", "--chunked-prefill-size", -1)
    elif drafter == "ngram":
        out.without_twin["enable_chunked_prefill"] = "in pieces, but not beside decode while n-grams draft"
    else:
        out.flag("enable_chunked_prefill", "prompts in pieces beside decode", "--enable-mixed-chunk")
    if config.enable_prefix_caching:
        out.same["enable_prefix_caching"] = "a radix tree, as here"
    else:
        out.flag("enable_prefix_caching", "no prefix cache", "--disable-radix-cache")
    if config.kv_offloading_size is not None:
        out.flag("kv_offloading_size", "evicted blocks are kept", "--enable-hierarchical-cache")
        size = math.ceil(config.kv_offloading_size * 2**30 / 1e9)
        out.flag("kv_offloading_size", "in whole GB of host memory", "--hicache-size", size)
    if config.kv_offloading_dir is not None:
        why = "--hicache-storage-backend file, with a folder that its environment names, is a tier beside it"
        out.without_twin["kv_offloading_dir"] = why
    out.flag("", "requests may bring a priority, as here", "--enable-priority-scheduling")
    out.flag("", "lower first", "--schedule-low-priority-values-first")
    out.flag("", "and that of requests that bring none", "--default-priority-value", 0)
    if config.attention_backend != "auto":
        backend = {"triton": "triton", "sdpa": "torch_native"}[config.attention_backend]
        out.flag("attention_backend", "the kernel", "--attention-backend", backend)
    out.flag("tensor_parallel_size", _SHARED, "--tp-size", config.tensor_parallel_size)
    if not config.cuda_graphs:
        out.flag("cuda_graphs", "no CUDA graphs of decode steps", "--disable-decode-cuda-graph")
        out.flag("cuda_graphs", "nor of prompts", "--disable-prefill-cuda-graph")
    out.flag("seed", _SEED, "--random-seed", config.seed)
    if config.generation_config != "auto":
        out.flag("generation_config", _DEFAULTS, "--sampling-defaults", "openai")
    if not drafter:
        return
    if drafter == "ngram":
        out.flag("speculative", "what drafts (needs CUDA)", "--speculative-algorithm", "NGRAM")
    else:
        out.flag("speculative", "a smaller model drafts", "--speculative-algorithm", "STANDALONE")
        out.flag("draft_model", "that model", "--speculative-draft-model-path", drafter)
        steps = config.num_speculative_tokens
        out.flag("num_speculative_tokens", "drafts in a row", "--speculative-num-steps", steps)
        out.flag("num_speculative_tokens", "one for each place", "--speculative-eagle-topk", 1)
    checked = config.num_speculative_tokens + 1
    why = "tokens checked at once: the drafts, and the one that they follow"
    out.flag("num_speculative_tokens", why, "--speculative-num-draft-tokens", checked)


def _drafter(config: EngineConfig, out: Command) -> str | None:
    """What drafts: "ngram", or the path of a model; None for nothing. Settings without a twin are named."""
    if config.speculative is None:
        return None
    if config.speculative_gate:
        out.without_twin["speculative_gate"] = "it drafts whether that pays or not"
    if config.speculative == "ngram":
        return "ngram"
    if config.draft_model is None:
        out.without_twin["speculative"] = "the model itself in 8 bits drafts: name a draft_model"
        out.without_twin["num_speculative_tokens"] = "nothing drafts there"
        return None
    return _path(config.draft_model, "draft_model")[0]


def _no_twin(config: EngineConfig, out: Command) -> None:
    """Name the settings that neither engine has."""
    without, same = out.without_twin, out.same
    if config.scheduler == "continuous":
        same["scheduler"] = "requests join and leave at every step"
    elif config.scheduler == "static":
        without["scheduler"] = "'static': it batches continuously, always"
    elif config.scheduler == "uncached":
        without["scheduler"] = "'uncached': it keeps its KV cache, always"
    else:
        same["scheduler"] = "'naive': one seat"
    if config.kv_policy == "paged":
        same["kv_policy"] = "blocks as tokens come"
    else:
        without["kv_policy"] = f"{config.kv_policy!r}: blocks are taken as tokens come, always"
    if config.quantization is None:
        same["quantization"] = "none, unless the checkpoint's own config asks for it"
    else:
        why = "not made while loading; a checkpoint that was quantised before says so itself"
        without["quantization"] = f"{config.quantization!r}: {why}"
    if config.fused_projections:
        same["fused_projections"] = "always fused"
    else:
        without["fused_projections"] = "always fused"
    if config.packed_weights:
        same["packed_weights"] = "its kernels lay weights out themselves"
    else:
        without["packed_weights"] = "its kernels lay weights out themselves"
    (same if config.cpu_kernels else without)["cpu_kernels"] = "it has kernels of its own, always"
    if config.num_threads is not None:
        without["num_threads"] = f"set OMP_NUM_THREADS={config.num_threads} for it"
    if config.adaptive_threads:
        without["adaptive_threads"] = "its threads keep their number, whatever else runs"
    where = without if config.jump_ahead else same
    where["jump_ahead"] = "what the form of an answer forces is computed token by token"
    if config.max_step_seconds is not None:
        without["max_step_seconds"] = "its token budget stays; choose one that keeps steps short enough"
    if config.as_t4:
        without["as_t4"] = "float16 is asked for; kernels for newer GPUs are used all the same"
    without["max_trace_steps"] = "it keeps no record of its steps; /metrics has the counts"
    if config.audit:
        without["audit"] = "its rules are checked by its own tests"


# -- the program ----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both command lines, or write a trace as a page. Returns the exit status."""
    parser = cli.Parser(
        prog="labkit.export",
        description="Command lines that serve the same model with vLLM and SGLang; or a run as one web page.",
    )
    parser.add_argument(
        "--html", metavar="TRACE", help="write this trace (JSON Lines) as one web page beside it, and no more"
    )
    cli.add_engine(parser, num_blocks=None)
    options = parser.parse_args(arguments)
    try:
        if options.html is not None:
            text = _write_page(Path(options.html))
        else:
            text = "\n\n".join(map(str, commands(cli.engine_config(options)).values()))
    except (ValueError, OSError) as error:
        about = "" if options.html is None else "--html: "
        print(f"labkit.export: {about}{' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(text)
    return 0


def _write_page(source: Path) -> str:
    """Write the trace in a file as a page beside it; return what to say of it."""
    target = source.parent / f"{source.stem}.html"
    if target == source:
        raise ValueError(f"{source} would be overwritten: give the trace another ending than .html")
    trace = Trace.load(source)
    export_html(trace, target)
    size = f"{target.stat().st_size / 1000:.0f} KB"
    return f"{target}: {len(trace)} steps, {size}. {trace.note}".rstrip()
