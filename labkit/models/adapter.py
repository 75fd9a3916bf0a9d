"""Any other decoder: a model of `transformers`, run as it is, on the paged cache.

The model keeps its own embeddings, norms, projections and positions. `transformers` lets us replace two
things without touching the model's code:

- its `Cache`, the object to which each attention layer hands new keys and values, by calling `update`. Ours
  writes them into the blocks of the paged cache;
- its attention function, which a model looks up in a registry, under the name that its configuration holds.
  Ours finds the `Cache` of the current step and attends to the blocks written there.

The model then sees one sequence of T tokens, which is the flattened batch, and only our attention knows where
one request ends and the next begins.

Many models do more than a paged cache can hold (ALiBi, states, latent keys), and some bypass one of the two
replacements without an error. So there is no list of models that work: `adapt` watches what a model does and
compares its logits with those of the untouched model. What cannot be run exactly is refused, with the reason.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, Cache, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from labkit.core.attention import AttentionMetadata, Span, attend, build_metadata
from labkit.core.kv_cache import KVShape, PagedKVCache
from labkit.kernels.gathered_sdpa import SDPA, additive
from labkit.kernels.int8_kv import read_rows
from labkit.models.architecture import FLOATS
from labkit.models.checkpoint import FROM_FILES, read_tensors
from labkit.models.errors import ModelError, first_line, is_out_of_memory
from labkit.models.progress import Say, tell

# Two names for our attention function in the registry. For "paged" no mask function is registered, and so
# transformers makes no masks, which we do not need; for "probe" one is, and we look at what is asked of it.
_PAGED = "labkit_paged"
_PROBE = "labkit_probe"
_OWN = {"softcap", "s_aux"}  # arguments of attention that only the model's own formula understands
_HARMLESS = {  # arguments without effect on the result; a model that passes any other is refused
    *("dropout", "is_causal", "sliding_window", "position_ids", "cache_position", "use_cache"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
}
# How far logits may be off, in standard deviations of a row's logits; wrong attention is off by about 1.
_TOLERANCE = {torch.float32: 2e-4, torch.float16: 0.05, torch.bfloat16: 0.15}
# Settings that explain why a model fails, which by itself it says in the words of some product of matrices.
_CAUSES = {
    "kv_lora_rank": "it has multi-head latent attention: its keys and values are not all of one size",
    "attention_chunk_size": "it attends within chunks, which is neither causal nor a sliding window",
}
_STATE = "it keeps a state besides keys and values, which has no place in pages"

# The cache of the step that runs now, where the attention function finds it: transformers passes it no cache.
_step: ContextVar[_StepCache] = ContextVar("step")


class AdaptedModel(nn.Module):
    """A model of `transformers` that is called as our own `Transformer` is. Made by `adapt`.

    Attributes:
        config: the configuration of the model.
        max_model_len: how many positions the model was made for.
        windows: the sliding windows that occur among the layers, each once (None: a layer without one).
        kv_shape: what one token takes in the KV cache.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.config = model.config
        self.dtype, self.device = model.dtype, model.device
        self.vocab_size = model.config.vocab_size
        self.max_model_len = _max_model_len(model.config)
        decoder = model.get_decoder()
        if decoder is model:
            raise ModelError("transformers does not say which part of it is the decoder")
        arguments = inspect.signature(decoder.forward).parameters
        if "position_ids" not in arguments:
            raise ModelError("it takes no position_ids, and would count through the whole batch")
        self._takes_cache_position = "cache_position" in arguments
        self.decoder = _copy(decoder, _PROBE)
        # The whole model with its decoder replaced by one that returns the hidden states it is given: what is
        # left is the output layer, with all scaling and capping of logits.
        self.head = _copy(model, _PAGED, {id(decoder): _PassThrough()})
        recorder = _Recorder(self)
        self._run(recorder, *_prompt(0, 8, self))
        self._windows, kv_heads, head_dim = recorder.result()
        self.windows = tuple(set(self._windows))
        self.kv_shape = KVShape(len(self._windows), kv_heads, head_dim, self.dtype, self.device)
        _set_attention(self.decoder, _PAGED)

    def forward(
        self, token_ids: Tensor, positions: Tensor, cache: PagedKVCache, metadata: AttentionMetadata
    ) -> Tensor:
        """Hidden states (T, hidden_size) of tokens (T,) at positions (T,); writes the cache on the way."""
        return self._run(_StepCache(cache, metadata, self._windows), token_ids, positions)

    @torch.inference_mode()
    def _run(self, step_cache: _StepCache, token_ids: Tensor, positions: Tensor) -> Tensor:
        inputs: dict[str, Any] = dict(input_ids=token_ids[None], position_ids=positions[None])
        if self._takes_cache_position:  # some models scale their queries by it
            inputs["cache_position"] = positions
        token = _step.set(step_cache)
        try:
            return self.decoder(**inputs, past_key_values=step_cache, use_cache=True)[0][0]
        finally:
            _step.reset(token)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (S, vocab_size) of hidden states (S, hidden_size)."""
        # A soft cap makes a finite number of an infinite one, but not of a NaN, and logits say what is sound.
        hidden = hidden.masked_fill(~hidden.isfinite().all(dim=-1, keepdim=True), torch.nan)
        return self.head(inputs_embeds=hidden[None], use_cache=False).logits[0]


def adapt(model: PreTrainedModel) -> AdaptedModel:
    """Make a causal language model of `transformers` run on the paged cache.

    Weights are shared, not copied. The model itself is left as it is, with its own attention.

    Raises:
        ModelError: if it cannot be run exactly; the message names the architecture and says why.
    """
    if model.training:
        raise ModelError(f"{type(model).__name__} is in training mode: call eval() on it first")
    try:
        if model.config.is_encoder_decoder:
            raise ModelError("it is an encoder-decoder")
        if model.config.get_text_config() is not model.config:
            raise ModelError("it takes more than text; the text model in it may work alone")
        adapted = AdaptedModel(model)
        _check_logits(model, adapted)
    except Exception as error:  # a model that was not made for this can fail in any way
        why = str(error)
        cause = next((name for name in _CAUSES if getattr(model.config, name, None)), None)
        # An AttributeError of a cache (`obj`): the model asked it for more than keys and values.
        if model._is_stateful or isinstance(getattr(error, "obj", None), Cache):
            why = _STATE
        elif cause:
            why = f"{_CAUSES[cause]} ({cause} in its config.json)"
        elif not isinstance(error, ModelError):
            why = f"it fails with {type(error).__name__}: {why}".split("\n")[0]
        raise ModelError(f"{type(model).__name__} cannot run on the paged KV cache: {why}") from error
    return adapted


def load(folder: Path, *, dtype: torch.dtype, device: torch.device, say: Say | None = None) -> AdaptedModel:
    """Load the safetensors of a folder that `save_pretrained` wrote, and adapt the model.

    What `transformers` leaves aside of a folder is not used here either, and is told to `say`.

    Raises:
        ModelError: if `transformers` cannot load it, tensors do not fit, or `adapt` refuses the model.
        MemoryError, RuntimeError: if memory does not suffice.
    """
    for name, tensor in read_tensors(folder):  # transformers would take numbers for weights without a word
        if name.endswith("weight") and tensor.dtype not in FLOATS:
            what = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(f"tensor {name!r} in {folder} is quantised ({what}), and such are not read")
    # transformers makes up what is missing or misshapen, at random. Have it reported, and refuse it below.
    report = dict(output_loading_info=True, ignore_mismatched_sizes=True)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, **FROM_FILES, **report
        )
        wrong = sorted(str(name) for key in ("missing_keys", "mismatched_keys") for name in found[key])
    except Exception as error:
        if is_out_of_memory(error):
            raise
        why = first_line(error)
        raise ModelError(f"transformers cannot load {folder} as a causal language model: {why}") from error
    if wrong:
        raise ModelError(f"{len(wrong)} tensors in {folder} are missing or misshapen, such as {wrong[0]}")
    if unused := sorted(found["unexpected_keys"]):
        what = f"{len(unused)} tensors in {folder} belong to no part of the model, such as {unused[0]}"
        tell(say, f"{what}: they are left aside, as transformers does.")
    return adapt(model.to(device).eval())


class _NoLayers(list):
    """The layers of a `Cache`: there are none. A model that asks for one wants more than keys and values."""

    def __getitem__(self, index: Any) -> Any:
        raise ModelError(_STATE)


class _StepCache(Cache):
    """The paged cache and the metadata of a step, as the `Cache` of one forward pass.

    A layer first calls `update`, then the attention function, which calls `attend` here.
    """

    def __init__(
        self, cache: PagedKVCache, metadata: AttentionMetadata, windows: Sequence[int | None]
    ) -> None:
        super().__init__(layers=_NoLayers())
        self.cache, self.metadata, self.windows = cache, metadata, windows
        self.layer = -1  # the layer that was last written

    def has_previous_state(self, *args: Any) -> bool:
        return False

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Write keys and values (1, kv_heads, T, head_dim), and return them, as a model expects."""
        keys, values = key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)
        self.cache.write(layer_idx, keys, values, self.metadata.slots)
        self.layer = layer_idx
        return key_states, value_states

    def attend(self, module: nn.Module, q: Tensor, mask: Any, scale: float, extra: dict[str, Any]) -> Tensor:
        """Attention (T, heads, head_dim) of queries (T, heads, head_dim) in the layer last written."""
        window = self.windows[self.layer]
        if not extra:
            return attend(q, self.cache, self.layer, self.metadata, scale=scale, window=window)
        # Soft caps and sinks: call the formula in the model's own code, over gathered blocks.
        formula = sys.modules[type(module).__module__].eager_attention_forward
        out = torch.zeros_like(q)
        for group in self.metadata.groups:
            queries, mask = q[group.first : group.last], group.masks[window]
            rows = group.pieces.shape[1]
            n = len(queries) // rows
            if mask is None:
                mask = additive(torch.ones(n, n, dtype=torch.bool, device=q.device).tril(), q.dtype)
            # Every key head has the same mask.
            bias = mask.clamp(min=torch.finfo(q.dtype).min).view(rows, -1, n, mask.shape[-1])[:, :1]
            found = read_rows(self.cache.layers[self.layer], group.pieces, q.dtype)
            k, v = (x[:, :, : bias.shape[-1]] for x in found)
            batch = queries.view(rows, n, *q.shape[1:]).transpose(1, 2)
            result, _ = formula(module, batch, k, v, bias, scaling=scale, **extra)
            out[group.first : group.last] = result.reshape(queries.shape)
        return out


class _Recorder(_StepCache):
    """Takes the place of `_StepCache` in one pass, to see what a model does, and refuses what cannot work."""

    def __init__(self, model: AdaptedModel) -> None:
        Cache.__init__(self, layers=_NoLayers())
        self.model, self.layer = model, -1
        self.masks: list[tuple[Tensor, Callable[..., Tensor]]] = []
        self.shapes: dict[int, tuple[int, int, int]] = {}  # kv_heads, key and value size of layers written
        self.windows: dict[int, int | None] = {}  # the window of layers read

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.shapes[layer_idx] = (key_states.shape[1], key_states.shape[3], value_states.shape[3])
        self.layer = layer_idx
        return key_states, value_states

    def make_mask(self, mask_function: Callable[..., Tensor], kv_length: int, **kwargs: Any) -> Tensor:
        """What `transformers` calls for a mask: return a plain one, by which `_window` finds the function."""
        mask = torch.ones(1, 1, kv_length, kv_length, dtype=torch.bool, device=self.model.device).tril()
        self.masks.append((mask, mask_function))
        return mask

    def attend(self, module: nn.Module, q: Tensor, mask: Any, scale: float, extra: dict[str, Any]) -> Tensor:
        if self.layer in self.windows or getattr(module, "layer_idx", self.layer) != self.layer:
            raise ModelError("it has attention to other keys and values than those of its own layer")
        if unknown := sorted(set(extra) - _OWN):
            raise ModelError(f"its attention takes more than pages hold: {', '.join(unknown)}")
        self.windows[self.layer] = self._window(mask, len(q))
        return q.new_zeros(*q.shape[:2], self.shapes[self.layer][2])

    def _window(self, mask: Tensor | None, n: int) -> int | None:
        """Return the sliding window that a mask means, at the model's full length."""
        config, length = self.model.config, self.model.max_model_len
        meaning = next((function for made, function in self.masks if made is mask), None)
        if meaning is None:  # no mask, or one that the model makes by itself, as older ones do
            plain = torch.ones(n, n, dtype=torch.bool, device=self.model.device).tril()
            seen = plain if mask is None else mask[0, :, :, :n]
            seen = seen if seen.dtype == torch.bool else seen == 0
            kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
            if kinds or getattr(config, "sliding_window", None) or not (seen == plain).all():
                raise ModelError("it makes attention masks of its own")
            return None
        at = torch.arange(length, device=self.model.device)
        window = int(meaning(at[0], at[0], at[-1], at).sum())
        for query in at[[0, 1, length // 3, length // 2, min(window, length - 1), -2, -1]]:
            if not (meaning(at[0], at[0], query, at) == (at <= query) & (at > query - window)).all():
                raise ModelError("its attention is neither causal nor causal within a sliding window")
        return None if window == length else window

    def result(self) -> tuple[list[int | None], int, int]:
        """Return the window of each layer, and the KV heads and head_dim that all layers share."""
        if self.shapes.keys() != self.windows.keys():
            raise ModelError("its attention does not go through the AttentionInterface of transformers")
        if not self.shapes or sorted(self.shapes) != list(range(len(self.shapes))):
            raise ModelError("it does not keep the keys and values of all its layers in a cache")
        kv_heads, head_dim, value_dim = self.shapes[0]
        if len(set(self.shapes.values())) > 1 or head_dim != value_dim:
            raise ModelError("its keys and values are not all of one size")
        return [self.windows[layer] for layer in sorted(self.windows)], kv_heads, head_dim


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """What `transformers` calls for attention: (1, heads, T, head_dim) to (1, T, heads, head_dim)."""
    q, scale = query[0].transpose(0, 1), kwargs.pop("scaling", None) or query.shape[-1] ** -0.5
    extra = {name: x for name, x in kwargs.items() if x is not None and name not in _HARMLESS}
    return _step.get().attend(module, q, attention_mask, scale, extra)[None], None


for _name in (_PAGED, _PROBE):
    AttentionInterface.register(_name, _attention)
AttentionMaskInterface.register(_PROBE, lambda **kwargs: _step.get().make_mask(**kwargs))


class _PassThrough(nn.Module):
    """Takes a decoder's place and returns the hidden states that come in as embeddings."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> _Output:
        return _Output((inputs_embeds,))


class _Output(tuple):
    """The output of a decoder: hidden states, and None for anything else that is asked for."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None


def _copy(model: PreTrainedModel, attention: str, instead: dict[int, nn.Module] | None = None) -> Any:
    """Copy a model and give it another attention function. Tensors that a checkpoint holds are shared.

    Modules, configurations and tables of positions are copied, so that the model itself stays as it is.

    Args:
        attention: the name of the attention function in the registry.
        instead: modules to put in the place of others, by the `id` of those.
    """
    shared = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    twin = copy.deepcopy(model, {**shared, **(instead or {})})
    _set_attention(twin, attention)
    return twin


def _set_attention(model: nn.Module, name: str) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config._attn_implementation = name


def _max_model_len(config: PreTrainedConfig) -> int:
    """Return how many positions a model was made for, or where its rotary frequencies begin to change."""
    limits = [getattr(config, "max_position_embeddings", None)]
    if limits[0] is None:
        raise ModelError("its configuration has no max_position_embeddings")
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *rope.values()):  # one for all layers, or one for each type of layer
        if isinstance(kind, dict) and kind.get("rope_type") == "longrope":
            limits.append(kind["original_max_position_embeddings"])
    return min(limits)


def _prompt(seed: int, n: int, model: AdaptedModel) -> tuple[Tensor, Tensor]:
    """Return arbitrary token ids (n,), and their positions."""
    positions = torch.arange(n, device=model.device)
    return (seed + 7919 * (positions + 1)) % model.config.vocab_size, positions


def _check_logits(model: PreTrainedModel, adapted: AdaptedModel) -> None:
    """Compare two prompts, run through blocks in chunks and in one batch, with the untouched model.

    Raises:
        ModelError: if logits differ by more than rounding.
    """
    alone = _copy(model, "eager")  # the formula in the model's code; others have been seen to drop soft caps
    long, short = (_prompt(seed, n, adapted) for seed, n in ((3, 21), (5, 8)))
    tables, cache, found = ([7, 1, 5, 2, 9, 4], [0, 8]), adapted.kv_shape.new_cache(10, 4), ([], [])
    for step in ([(0, 0, 9)], [(0, 9, 11), (1, 0, 7)], [(0, 20, 1), (1, 7, 1)]):  # prompt, start, tokens
        spans = [Span(start, n, tables[i]) for i, start, n in step]
        metadata = build_metadata(spans, cache, SDPA, windows=adapted.windows)
        parts = [torch.stack((long, short)[i])[:, start : start + n] for i, start, n in step]
        logits = adapted.logits(adapted(*torch.cat(parts, dim=1), cache, metadata))
        for (i, _, _), rows in zip(step, logits.split([span.num_queries for span in spans]), strict=True):
            found[i].append(rows.float())
    for (prompt, _), rows in zip((long, short), found, strict=True):
        with torch.inference_mode():
            wanted = alone(input_ids=prompt[None], use_cache=False).logits[0].float()
        off = (torch.cat(rows) - wanted).std(dim=-1) / wanted.std(dim=-1)
        # In fp32 every row counts. In half precision, rounding may choose another expert in a row or two.
        worst = float(off.max() if adapted.dtype == torch.float32 else off.median())
        if not worst <= _TOLERANCE[adapted.dtype]:
            raise ModelError(f"its logits come out otherwise than without pages (by {worst:.2g} deviations)")
