"""All settings of the engine, checked when they are set. No tensors here."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from labkit.sampling_params import check_flag, check_number, suggest_fields

SCHEDULERS = ("continuous", "static", "naive", "uncached")
KV_POLICIES = ("paged", "reserved")
QUANTIZATIONS = ("int8",)
DRAFTERS = ("ngram", "draft")
GENERATION_CONFIGS = ("auto", "labkit")
ATTENTION_BACKENDS = ("auto", "sdpa", "triton")
KV_CACHE_DTYPES = ("auto", "int8")
T4_DTYPES = ("auto", "float16", "fp16", "half")


class Loaded(Protocol):
    """What a configuration needs of a loaded model, such as `labkit.models.load.LoadedModel`."""

    @property
    def name(self) -> str: ...

    @property
    def module(self) -> Any: ...


@suggest_fields
@dataclass(frozen=True)
class ModelConfig:
    """Which model to load, and how. The arguments of `load_model` are the same.

    Args:
        model: a short name ("smollm2-135m", "tiny-random"), a Hub id, a folder that `save_pretrained` wrote,
            or a model that is loaded already (many engines can share one copy of the weights).
        dtype: the dtype of weights, activations and KV cache; "auto" is fp32 on a CPU.
        device: "auto" is cuda if there is one, else the CPU.
        quantization: None, or "int8" for 8-bit weights and activations: faster on a CPU, smaller on a GPU.
        fused_projections: whether queries, keys and values are one product, and likewise gate and up.
        packed_weights: whether weights are laid out for this CPU once, when they are loaded.
        cpu_kernels: whether a CPU uses kernels of our own between the products, which a C++ compiler makes
            once; it has no effect on a GPU, in fp16, on a model that `transformers` runs, or where there is
            no compiler.

    Raises:
        ValueError: for a value that cannot work; the message names the field and the limit.
    """

    model: str | os.PathLike[str] | Loaded = "smollm2-135m"
    dtype: str = "auto"
    device: str = "auto"
    quantization: Literal["int8"] | None = None
    fused_projections: bool = True
    packed_weights: bool = True
    cpu_kernels: bool = True

    def __post_init__(self) -> None:
        _check_choice("quantization", self.quantization, (None, *QUANTIZATIONS))
        for name in ("fused_projections", "packed_weights", "cpu_kernels"):
            check_flag(name, getattr(self, name))


@suggest_fields
@dataclass(frozen=True)
class EngineConfig(ModelConfig):
    """How to build an engine: a model, as in `ModelConfig`, and what runs it.

    Args:
        model, dtype, device, quantization, fused_projections, packed_weights, cpu_kernels: what `ModelConfig`
            says.
        block_size: the number of tokens in a block of the KV cache.
        num_blocks: the number of blocks in the pool; None sizes it from the memory that is free.
        kv_cache_dtype: the dtype of the KV cache: None or "auto" is that of the model; "int8" is 8 bits with
            a scale for each token and head, in 0.27 of the bytes of fp32 and nearly as exact (vLLM calls it
            "int8_per_token_head").
        max_model_len: the longest prompt and answer together, in tokens; None takes the model's own limit,
            but no more than the pool holds.
        max_num_seqs: the number of seats: how many requests run at once.
        max_num_batched_tokens: the token budget of a step.
        max_step_seconds: the time that a step should take at most, by what earlier steps took: the token
            budget is lowered until it does, as far as running answers get their tokens and prompts a block;
            None leaves the budget alone.
        scheduler: "continuous" (requests join and leave at every step), "static" (a batch waits until its
            last member is done), "naive" (one request at a time) or "uncached" (the same without a KV cache).
        kv_policy: "paged" takes blocks as tokens come, "reserved" takes all that a request may need up front.
        enable_prefix_caching: whether blocks whose tokens are known are kept, so that later requests with
            the same start can share them (a static batch does without).
        kv_offloading_size: how many GiB of evicted blocks are kept in host memory, for prompts with the same
            start; the least recently used make room. None keeps none.
        kv_offloading_dir: a folder in which they lie on disk instead, in a file that goes with the engine.
        enable_chunked_prefill: whether a step mixes prompts, cut to the token budget, with decode; without
            it, a step computes either whole prompts or one token of each answer.
        speculative: None, or the drafter whose tokens a step then checks: "ngram" (what followed the last few
            tokens when they occurred before) or "draft" (a smaller model).
        draft_model: that model, named or loaded as `model` is; None is the model itself in int8.
        num_speculative_tokens: the most drafts that a request has in a step.
        speculative_gate: whether to draft only where that pays, judged by what steps cost on this machine and
            how often drafts were accepted.
        jump_ahead: whether tokens that the form of a structured answer forces are computed together, in one
            step, as the tokenizer writes them; without it, each is sampled like any other.
        num_threads: the number of PyTorch's threads on a CPU, in the whole process; None leaves PyTorch's own
            choice (the physical cores, or OMP_NUM_THREADS).
        adaptive_threads: whether a CPU uses fewer threads while other processes keep its cores busy, since
            threads that wait for each other lose more than the share that was taken.
        attention_backend: "sdpa" is PyTorch's own attention over gathered blocks, "triton" a kernel that
            reads blocks in place (it needs a CUDA GPU); "auto" is the fastest that there is.
        cuda_graphs: whether decode steps are captured as CUDA graphs; it has no effect without a CUDA GPU,
            or on a model that `transformers` runs.
        as_t4: whether a newer GPU uses only what a T4 has: fp16, and no kernels that need sm_80.
        max_trace_steps: how many steps the trace keeps the records of; None keeps all.
        audit: whether every rule is checked at every step, which is slow; a scheduler or pool of your own is
            always checked.
        tensor_parallel_size: the number of processes that share one model, each with a part of every layer
            (on GPUs, each with one of its own). It has no effect on a model that is loaded already.
        seed: the seed of requests that have none of their own.
        generation_config: whose defaults hold for requests that do not say how to sample: "auto" takes those
            of the model's `generation_config.json`, where it has any, as vLLM does; "labkit" leaves the file
            alone. A `SamplingParams` that you give says all of it, and the file nothing.

    Raises:
        ValueError: for a value that cannot work; the message names the field and the limit.
        TypeError: for a field that does not exist; the message names the one that is closest.
    """

    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_dtype: Literal["auto", "int8"] | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_step_seconds: float | None = None
    scheduler: Literal["continuous", "static", "naive", "uncached"] = "continuous"
    kv_policy: Literal["paged", "reserved"] = "paged"
    enable_prefix_caching: bool = True
    kv_offloading_size: float | None = None
    kv_offloading_dir: str | os.PathLike[str] | None = None
    enable_chunked_prefill: bool = True
    speculative: Literal["ngram", "draft"] | None = None
    draft_model: str | os.PathLike[str] | Loaded | None = None
    num_speculative_tokens: int = 8
    speculative_gate: bool = True
    jump_ahead: bool = True
    num_threads: int | None = None
    adaptive_threads: bool = True
    attention_backend: Literal["auto", "sdpa", "triton"] = "auto"
    cuda_graphs: bool = True
    as_t4: bool = False
    max_trace_steps: int | None = None
    audit: bool = False
    tensor_parallel_size: int = 1
    seed: int = 0
    generation_config: Literal["auto", "labkit"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = ("block_size", "max_num_seqs", "max_num_batched_tokens", "num_speculative_tokens")
        for name in (*whole, "tensor_parallel_size"):
            check_number(name, getattr(self, name), 1, math.inf, whole=True)
        lowest = {"num_blocks": 1, "max_model_len": 2, "max_trace_steps": 1, "num_threads": 1}
        for name, low in lowest.items():
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low, math.inf, whole=True)
        if self.max_step_seconds is not None:
            check_number("max_step_seconds", self.max_step_seconds, 0.001, 3600)
            if self.scheduler != "continuous" or not self.enable_chunked_prefill:
                raise ValueError("max_step_seconds needs scheduler 'continuous' and enable_chunked_prefill")
        flags = ("enable_prefix_caching", "enable_chunked_prefill", "speculative_gate", "adaptive_threads")
        for name in (*flags, "jump_ahead", "cuda_graphs", "as_t4", "audit"):
            check_flag(name, getattr(self, name))
        check_number("seed", self.seed, -(2**63), 2**63 - 1, whole=True)
        _check_choice("scheduler", self.scheduler, SCHEDULERS)
        _check_choice("generation_config", self.generation_config, GENERATION_CONFIGS)
        _check_choice("kv_cache_dtype", self.kv_cache_dtype, (None, *KV_CACHE_DTYPES))
        _check_choice("kv_policy", self.kv_policy, KV_POLICIES)
        _check_choice("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        _check_choice("speculative", self.speculative, (None, *DRAFTERS))
        if self.speculative and self.scheduler not in ("continuous", "naive"):
            raise ValueError(f"speculative needs scheduler continuous or naive, not {self.scheduler!r}")
        if self.draft_model is not None and self.speculative != "draft":
            raise ValueError(f"draft_model needs speculative 'draft', not {self.speculative!r}")
        if self.as_t4 and self.dtype not in T4_DTYPES:
            raise ValueError(f"as_t4 computes in float16: dtype must be auto or float16, not {self.dtype!r}")
        if self.tensor_parallel_size > 1 and (self.attention_backend != "auto" or self.as_t4):
            raise ValueError("tensor_parallel_size needs attention_backend 'auto' and no as_t4")
        self._check_offloading()
        check_seats(self.max_num_seqs, self.max_num_batched_tokens)

    def _check_offloading(self) -> None:
        if self.kv_offloading_size is None:
            if self.kv_offloading_dir is not None:
                raise ValueError("kv_offloading_dir needs kv_offloading_size: how much the folder may hold")
            return
        check_number("kv_offloading_size", self.kv_offloading_size, 0, 2**20)
        if not self.enable_prefix_caching or self.scheduler not in ("continuous", "naive"):
            raise ValueError(
                "kv_offloading_size needs enable_prefix_caching and scheduler continuous or naive, "
                f"not {self.scheduler!r}"
            )
        if self.tensor_parallel_size > 1:
            raise ValueError("kv_offloading_size needs tensor_parallel_size 1: pages must lie in one process")


def _check_choice(name: str, value: object, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        words = (
            " or ".join(map(repr, choices)) if None in choices else f"one of {', '.join(map(str, choices))}"
        )
        raise ValueError(f"{name} must be {words}, not {value!r}")


def check_seats(max_num_seqs: int, max_num_batched_tokens: int) -> None:
    """Raise `ValueError` unless the token budget of a step has room for a token of every seat."""
    if max_num_seqs > max_num_batched_tokens:
        raise ValueError(
            f"max_num_seqs ({max_num_seqs}) must not exceed max_num_batched_tokens "
            f"({max_num_batched_tokens}): every running request needs one token in each step"
        )
