"""A GPU that is not there: the engine runs on it with fake tensors, which have sizes and no values.

Everything that the engine does on a GPU happens, apart from the computing: tensors are placed, kernels are
chosen, memory is counted, graphs are captured and launched. So it can be counted what a step launches, and
seen what would fail there: a tensor on another device, a wait within a capture, a 64-bit number by accident.

What is read back from a fake tensor is made up: true, 1, or 0.0, so that everything is sound and equal.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig

from labkit.analysis.devices import Gpu
from labkit.analysis.shapes import config_of
from labkit.benchmark.gpu.counts import Counts, Launch
from labkit.models.devices import resolve_dtype
from labkit.models.load import LoadedModel, build_transformer
from labkit.models.tiny import tiny_tokenizer

CUDA = torch.device("cuda", 0)
# Operators that read or write only a part of their first tensor: as much as comes out, or goes in.
_PARTIAL = {"index", "index_select", "embedding", "gather", "index_copy_", "index_put_"}
_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "detach_"}
_NO_KERNEL |= {
    "lift_fresh",
    "_unsafe_view",
    "_reshape_alias",
    "resize_",
    "set_",
    "_scaled_dot_product_fused_attention_overrideable",
}


class FakeGpuError(RuntimeError):
    """Something was done that a GPU, or a CUDA graph, does not allow."""


class FakeGpu(contextlib.AbstractContextManager["FakeGpu"]):
    """A context in which `cuda` is a GPU of this kind. Only one can be used at a time, by one thread.

    Args:
        gpu: The kind, with its capability and the number of its processors.
        on_launch: A function that gets each launch of a Triton kernel; none is run.
        graph_bytes: What each captured graph takes beside its tensors.
    """

    def __init__(
        self, gpu: Gpu, on_launch: Callable[[Launch], None] | None = None, *, graph_bytes: int = 2**20
    ) -> None:
        self.gpu, self._on_launch = gpu, on_launch or (lambda launch: None)
        self._graph_bytes = graph_bytes
        self.counts = Counts()
        self.allocated = self.peak = 0
        self.capturing: Counts | None = None
        self.graphs: weakref.WeakSet[_Graph] = weakref.WeakSet()
        self._sizes: dict[int, int] = {}
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> FakeGpu:
        _forget()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.fake)  # while `torch.cuda` still says that there is no GPU to set up
            for target, name, replacement in self._replacements():
                stack.enter_context(mock.patch.object(target, name, replacement))
            stack.enter_context(torch.inference_mode())
            stack.enter_context(_Dispatch(self))
            stack.enter_context(_Functions(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        _forget()

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counts]:
        """Give counts that begin at zero, and hold what is done within this context."""
        before, self.counts = self.counts, Counts()
        try:
            yield self.counts
        finally:
            self.counts = before

    # -- memory -----------------------------------------------------------------------------------

    def hold(self, tensor: Tensor) -> None:
        """Count the memory of a tensor that an operator returned, until it is dropped."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = size = storage.nbytes()
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(storage, self._drop, key)
        if self.allocated > self.gpu.memory:
            raise torch.OutOfMemoryError(f"the fake {self.gpu.name} is out of memory")

    def _drop(self, key: int) -> None:
        self.allocated -= self._sizes.pop(key)

    # -- what torch.cuda says ---------------------------------------------------------------------

    def _replacements(self) -> Iterator[tuple[Any, str, Any]]:
        gpu, cuda = self.gpu, torch.cuda
        properties = SimpleNamespace(
            name=f"fake {gpu.name}",
            multi_processor_count=gpu.processors,
            total_memory=int(gpu.memory),
            major=gpu.capability[0],
            minor=gpu.capability[1],
        )
        said: dict[str, Any] = {
            "is_available": True,
            "device_count": 1,
            "current_device": 0,
            "get_device_name": properties.name,
            "get_device_capability": gpu.capability,
            "get_device_properties": properties,
            "is_bf16_supported": gpu.capability >= (8, 0),
            "graph_pool_handle": (0, 0),
            "current_stream": None,
            "empty_cache": None,
        }
        for name, value in said.items():
            yield cuda, name, lambda *args, value=value, **kwargs: value
        yield cuda, "synchronize", lambda device=None: self.wait("synchronize")
        yield cuda, "memory_allocated", lambda device=None: self.allocated
        yield cuda, "memory_reserved", lambda device=None: self.allocated
        yield cuda, "max_memory_allocated", lambda device=None: self.peak
        yield cuda, "reset_peak_memory_stats", lambda device=None: setattr(self, "peak", self.allocated)
        yield cuda, "mem_get_info", self._mem_get_info
        for name in ("device", "device_of", "stream"):
            yield cuda, name, contextlib.nullcontext
        yield FakeTensor, "tolist", lambda x: self.read(x)
        yield cuda, "CUDAGraph", type("CUDAGraph", (_Graph,), {"gpu": self})
        yield cuda, "graph", self._capture
        yield torch.backends.cuda, "is_flash_attention_available", lambda: gpu.capability >= (8, 0)
        yield from self._launches()

    def _mem_get_info(self, device: Any = None) -> tuple[int, int]:
        total = int(self.gpu.memory)
        return max(0, total - self.allocated - len(self.graphs) * self._graph_bytes), total

    @contextlib.contextmanager
    def _capture(self, graph: _Graph, **options: Any) -> Iterator[None]:
        if self.capturing is not None:
            raise FakeGpuError("a capture within a capture")
        outside = self.counts
        self.capturing = self.counts = graph.counts
        try:
            yield
        finally:
            self.capturing, self.counts = None, outside
            self.graphs.add(graph)

    def read(self, x: Tensor) -> Any:
        """Make up what a tensor holds."""
        if x.is_cuda:
            self.wait("reading a tensor")
        return _made_up(x)

    def wait(self, what: str) -> None:
        """Note that the CPU waits for the GPU, or refuse it within a capture."""
        if self.capturing is not None:
            raise FakeGpuError(f"{what} waits for the GPU, which a graph cannot hold")
        self.counts.waits += 1

    def upload(self, what: str) -> None:
        """Note that numbers are copied to the GPU, or refuse it within a capture."""
        if self.capturing is not None:
            raise FakeGpuError(f"{what} copies numbers from the CPU, which a graph would freeze")
        self.counts.uploads += 1

    # -- kernels in Triton ------------------------------------------------------------------------

    def _launches(self) -> Iterator[tuple[Any, str, Any]]:
        try:
            from triton.runtime.interpreter import InterpretedFunction
            from triton.runtime.jit import JITFunction
        except ImportError:
            return
        for kind in (JITFunction, InterpretedFunction):
            yield (
                kind,
                "__getitem__",
                lambda kernel, grid: lambda *args, **kw: self._launch(kernel, grid, args, kw),
            )

    def _launch(self, kernel: Any, grid: Any, args: tuple, options: dict[str, Any]) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | options
        launch = Launch(kernel, grid(arguments) if callable(grid) else tuple(grid), arguments)
        for name, value in arguments.items():
            if isinstance(value, Tensor) and value.device != CUDA:
                raise FakeGpuError(f"{launch.name} got {name} on {value.device}")
            if type(value) is int and not -(2**31) <= value < 2**31:
                raise FakeGpuError(f"{launch.name} got {name} = {value}, more than 32 bits")
        self.counts.kernels[launch.name] += 1
        self._on_launch(launch)


def _forget() -> None:
    """Empty the caches of the kernels' modules: what they found out about a GPU is true of that one."""
    for name, module in list(sys.modules.items()):
        if name.startswith("labkit.kernels."):
            for value in vars(module).values():
                getattr(value, "cache_clear", lambda: None)()


class _Graph:
    gpu: FakeGpu

    def __init__(self, *args: Any, **options: Any) -> None:
        self.counts = Counts()

    def replay(self) -> None:
        counts = self.gpu.counts
        counts.replays += 1
        counts.captured.update(self.counts.kernels)
        counts.traffic.update(self.counts.traffic)


class _Dispatch(TorchDispatchMode):
    """Sees each operator as it reaches a device."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        gpu, name = self.gpu, func._schema.name.removeprefix("aten::")
        if _on_meta(
            args, kwargs or {}
        ):  # a model is built there, and `nn.Module` cannot exchange fake tensors
            with _disable_current_modes():
                return func(*args, **(kwargs or {}))
        if name == "_local_scalar_dense":
            return gpu.read(args[0])
        mask = name == "index" and any(x.dtype == torch.bool for x in _tensors(args[1]))
        if mask or name in ("nonzero", "masked_select"):
            gpu.wait(name)
            raise FakeGpuError(f"{name}: the size of the result depends on values")
        if func.namespace == "prim":  # a question about a tensor
            return func(*args, **(kwargs or {}))
        if name == "_fused_rms_norm":  # a PyTorch without CUDA would take it apart
            out = torch.empty_like(args[0])
            gpu.counts.kernels[name] += 1
            gpu.counts.traffic[name] += 2 * out.nbytes
            return out, out
        if _is_made_of_others(func):  # in inference mode it comes here as a whole
            with self:
                return func.decompose(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        before, after = _tensors((args, kwargs)), _tensors(out)
        for x in after:
            if isinstance(x, FakeTensor):
                x.constant = None  # a value that it knows would be computed on the GPU itself
        wide = [x for x in before if x.dim()]  # a number on the CPU can go along with any tensor
        if not any(x.is_cuda for x in (*before, *after)) or name == "_has_compatible_shallow_copy_type":
            return out
        for x in after:
            if x.is_cuda:
                gpu.hold(x)
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], out) if name == "_to_copy" else (args[1], args[0])
            if not source.is_cuda:
                gpu.upload(name)
                return out
            if not target.is_cuda:
                gpu.wait(name)
                return out
        elif len({x.device for x in (*wide, *after)}) > 1:
            raise FakeGpuError(f"{name} mixes devices: {[str(x.device) for x in (*before, *after)]}")
        if name.startswith("torch_attn::") and any(x.dtype == torch.int64 for x in before):
            raise FakeGpuError(f"{name} got int64, and wants int32")
        if any(x.dtype == torch.float64 for x in after):
            gpu.counts.doubles[name] += 1
        if _has_kernel(func):
            gpu.counts.kernels[name] += 1
            gpu.counts.traffic[name] += _traffic(name, before, after)
        return out


@functools.cache
def _has_kernel(operator: Any) -> bool:
    """Whether an operator launches a kernel: views, and tensors without values, do not."""
    is_view = any(r.alias_info and not r.alias_info.is_write for r in operator._schema.returns)
    return not is_view and operator._schema.name.removeprefix("aten::") not in _NO_KERNEL


@functools.cache
def _is_made_of_others(operator: Any) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return operator.has_kernel_for_dispatch_key(key)


def _on_meta(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether an operator makes, or takes, tensors without memory."""
    if some := _tensors((args, kwargs)):
        return all(x.is_meta and not isinstance(x, FakeTensor) for x in some)
    return kwargs.get("device") == torch.device("meta")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _traffic(name: str, before: list[Tensor], after: list[Tensor]) -> int:
    """Return the bytes that an operator reads and writes."""
    if name in ("index_copy_", "index_put_"):
        return 2 * before[-1].nbytes
    outs = sum(x.nbytes for x in after)
    if name in _PARTIAL:
        return 2 * outs + sum(x.nbytes for x in before if not x.is_floating_point())
    return outs + sum(x.untyped_storage().nbytes() if 0 in x.stride() else x.nbytes for x in before)


class _Functions(TorchFunctionMode):
    """Stands in where PyTorch would look for a GPU before it comes to an operator."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.__float__, Tensor.__int__):
            return (float if func is Tensor.__float__ else int)(args[0].tolist())
        if func is Tensor.nonzero:
            return torch.ops.aten.nonzero.default(*args)
        if func is Tensor.contiguous and args[0].is_cuda:
            return (
                args[0] if args[0].is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
            )
        if func is Tensor.__invert__:
            return torch.bitwise_not(*args)
        if func is Tensor.copy_:
            return _copy(*args)
        if func is Tensor.__getitem__ and args[0].is_cuda:
            view, where = _index(*args)
            return torch.ops.aten.index.Tensor(view, where) if where else view
        if func is Tensor.__setitem__ and args[0].is_cuda:
            (view, where), value = _index(*args[:2]), args[2]
            if where:
                value = value if isinstance(value, Tensor) else torch.full((), value, dtype=view.dtype)
                torch.ops.aten.index_put_.default(view, where, value)
            else:
                _copy(view, value) if isinstance(value, Tensor) else view.fill_(value)
            return None
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Choose as PyTorch does on this GPU; it decides by what it was built for."""
        half = q.dtype in (torch.float16, torch.bfloat16)
        aten, causal, scale = torch.ops.aten, options.get("is_causal", False), options.get("scale")
        if self.gpu.gpu.capability >= (8, 0) and half and attn_mask is None:
            return aten._scaled_dot_product_flash_attention(q, k, v, is_causal=causal, scale=scale)[0]
        if q.dtype == torch.bfloat16 and self.gpu.gpu.capability < (8, 0):
            return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, 0.0, causal, scale=scale)[0]
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
        return aten._scaled_dot_product_efficient_attention(
            q, k, v, attn_mask, False, is_causal=causal, scale=scale
        )[0]


# A PyTorch without CUDA refuses `x[...]` and `copy_` before it comes to the operators, which do the same.


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return torch.ops.aten.copy_.default(target, source, non_blocking)


def _index(x: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """Return the view that an index takes, and what is then to be looked up in each of its dimensions."""
    parts = index if isinstance(index, tuple) else (index,)
    where: list[Tensor | None] = []
    for i, part in enumerate(parts):
        if part is ...:
            left = sum(other is not None for other in parts[i + 1 :])
            where += [None] * (x.dim() - len(where) - left)
        elif part is None:
            x = x.unsqueeze(len(where))
            where.append(None)
        elif isinstance(part, int):
            x = x.select(len(where), part)
        elif isinstance(part, slice):
            x = torch.ops.aten.slice.Tensor(x, len(where), part.start, part.stop, part.step or 1)
            where.append(None)
        else:
            where.append(part if isinstance(part, Tensor) else torch.tensor(part, device=x.device))
    return x, where if any(part is not None for part in where) else []


def _made_up(x: Tensor) -> Any:
    if not x.dim():
        return 0.0 if x.is_floating_point() else True if x.dtype == torch.bool else 1
    return [_made_up(row) for row in x.unbind(0)]


def fake_model(
    shape: str | PreTrainedConfig, *, dtype: str = "auto", quantization: str | None = None
) -> LoadedModel:
    """Make a model of a shape (see `labkit.analysis.shapes`) or architecture on the fake GPU."""
    config, to = config_of(shape) if isinstance(shape, str) else shape, resolve_dtype(dtype, CUDA)
    with _disable_current_modes(), torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    weights = ((name, torch.empty(x.shape, dtype=to, device=CUDA)) for name, x in empty.named_parameters())
    module = build_transformer(config, weights, dtype=to, device=CUDA, quantization=quantization)
    return LoadedModel(
        f"{config.model_type} (fake)", module, tiny_tokenizer(), config, frozenset(), quantization
    )
