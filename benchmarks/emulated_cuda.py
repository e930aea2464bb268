"""A CUDA device without a GPU: its tensors say `cuda:0`, their data lie on the CPU, and what a GPU is asked is logged.

    with emulated_cuda() as log:
        model.to("cuda")(images.to("cuda"))
    log.count(Kind.LAUNCH), log.count(Kind.SYNC), log.top(Kind.LAUNCH)

Tensors are of CUDA's device and dispatch keys in C++ as well, so autograd and autocast do what they do on a GPU, and an
operation on tensors of both devices raises. No compiler is needed: PyTorch brings a device guard that does nothing, and
the object that is asked whether there is CUDA gets other answers while the block runs. Tried with PyTorch 2.13 for CPUs
on Linux.

Counted, each with file and line of the caller; in the backward pass those of the forward operation:

- launches: one for every ATen operation that computes something. Views, empty tensors and tensors without elements are
  free. An operation that is several kernels on a GPU (a sort, the backward pass of a norm) counts once, and so do fused
  attention and a Triton kernel. An operation on a list of tensors (fused AdamW, clipping) counts as often as PyTorch
  launches for it: each launch takes up to 320 chunks of 65,536 numbers, and up to 110, 64, 48, 36 or 30 tensors where
  1 to 5 lists are worked on.
- host synchronisations: the host waits for the device (`item`, `tolist`, `cpu`, `nonzero`, a boolean index), or for a
  copy to it that was not asked to be asynchronous, as that of an index on the CPU.
- copies: transfers in either direction. Those from memory that is not pinned, for which a driver may wait, have another
  name.

The limits: nothing says how fast a GPU would be, or whether a kernel computes the right thing there. A Triton kernel
does not run, and leaves its outputs as they are: zero, in emulation. The gradient that a backward function returns may
be on the CPU without an error, until it meets another. Compiled models and CUDA graphs cannot run.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._foreach_utils import _foreach_supported_types
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parents[1]
TORCH = Path(torch.__file__).parent
NUM_CALLERS = 5
CHUNK, BLOCKS, TENSORS_AT_ONCE = 65536, 320, (110, 64, 48, 36, 30)  # of ATen/native/cuda/MultiTensorApply.cuh


class Kind(Enum):
    LAUNCH = "launches"
    SYNC = "host synchronisations"
    COPY = "copies"


class Event(NamedTuple):
    """Something a GPU is asked.

    Attributes:
        name: of the operation
        callers: file:line of the frames outside PyTorch, the innermost first
        phase: of the log when it happened; in the backward pass, when the forward operation happened
        times: how often
    """

    kind: Kind
    name: str
    callers: tuple[str, ...]
    phase: str
    times: int


class Log:
    """Everything a device was asked, in order.

    Attributes:
        phase: name under which events are noted from now on
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.phase = ""
        self._forward: dict[int, tuple[tuple[str, ...], str]] = {}  # callers and phase of each node of the graph
        self._last_node = -1

    def add(self, kind: Kind, name: str, times: int = 1) -> None:
        self.events.append(Event(kind, name, *self._origin(), times))

    def remember_forward(self) -> None:
        """Note who makes the node of the graph that autograd has numbered last."""
        if torch._C._current_autograd_node() is None:
            self._forward[torch.autograd._get_sequence_nr() - 1] = (callers()[0], self.phase)

    def _origin(self) -> tuple[tuple[str, ...], str]:
        frames, is_backward = callers()
        if not is_backward:
            return frames, self.phase
        node = torch._C._current_autograd_node()
        if node is not None:  # else the gradients of two branches are added, behind the node
            self._last_node = node._sequence_nr()
        forward, phase = self._forward.get(self._last_node, (("gradients",), self.phase))
        return (*frames, *forward)[:NUM_CALLERS], phase

    def count(self, kind: Kind, phase: str | None = None) -> int:
        return sum(e.times for e in self.events if e.kind is kind and phase in (None, e.phase))

    def top(self, kind: Kind, by: Callable[[Event], str] = lambda e: e.callers[0]) -> list[tuple[str, int]]:
        """Where most of it comes from, the most first."""
        counts: collections.Counter[str] = collections.Counter()
        for event in self.events:
            if event.kind is kind:
                counts[by(event)] += event.times
        return counts.most_common()

    def clear(self) -> None:
        self.events.clear()


def callers() -> tuple[tuple[str, ...], bool]:
    """File and line of the innermost frames outside PyTorch and Python's library; True if autograd is at work.

    In the backward pass only what autograd has called is seen.
    """
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < NUM_CALLERS:
        code = frame.f_code
        if code.co_name == "_engine_run_backward":
            return tuple(found), True
        if not is_library(code.co_filename):
            found.append(f"{short(code.co_filename)}:{frame.f_lineno}")
        frame = frame.f_back
    return tuple(found), False


@functools.cache
def is_library(file: str) -> bool:
    """True for PyTorch, Python's own library and this module."""
    python = file.startswith((sys.base_prefix, "<frozen")) and "site-packages" not in file
    return python or file == __file__ or file.startswith(str(TORCH))


@functools.cache
def short(file: str) -> str:
    """Path within this repository, or within site-packages."""
    return file.rpartition("site-packages/")[2].removeprefix(f"{ROOT}/")


class EmulatedTensor(torch.Tensor):
    """A tensor that says cuda:0; `data_on_cpu` holds its numbers."""

    @staticmethod
    def __new__(cls, data: Tensor) -> EmulatedTensor:
        place = {}
        if data.layout == torch.strided:  # a sparse one has no strides
            place = dict(strides=data.stride(), storage_offset=data.storage_offset())
        wrapped = torch.Tensor._make_wrapper_subclass(cls, data.shape, **place, dtype=data.dtype, device=CUDA)
        wrapped.data_on_cpu = data
        return wrapped

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if _device is None:
            raise RuntimeError("A tensor of an emulated device is used outside `emulated_cuda()`.")
        return _device.run(func, args, kwargs or {})

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.data_on_cpu.untyped_storage()  # those who save tensors ask which of them share memory

    def tolist(self) -> list:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> np.ndarray:
        if force:
            return self.cpu().numpy()
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")

    def __repr__(self) -> str:
        return f"EmulatedTensor({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict) -> EmulatedTensor:
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True
        return memo.setdefault(id(self), copied)


_device: Device | None = None


class Device(TorchDispatchMode):
    """Runs operations on the CPU's data, and logs them."""

    FREE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "alias", "lift_fresh",
            "_unsafe_view", "_reshape_alias", "resize_", "set_", "_local_scalar_dense")  # fmt: skip
    WAITS = ("_local_scalar_dense", "nonzero", "_unique", "_unique2", "unique_dim", "unique_consecutive",
             "masked_select", "bincount", "equal", "is_nonzero")  # fmt: skip
    INDEXING = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")

    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log = log
        self.pinned: dict[int, torch.UntypedStorage] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would import TorchDynamo

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> Any:
        """Run an operation whose tensors, or whose result, may be on the device."""
        if torch.is_inference_mode_enabled() and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE):
            with self:  # autograd, which would have taken it apart, is not there
                return func._op_dk(COMPOSITE, *args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        emulated = [x for x in tensors if isinstance(x, EmulatedTensor)]
        target = kwargs.get("device")
        target = target and torch.device(target)
        if not emulated and (target is None or target.type != "cuda"):
            return func(*args, **kwargs)
        self.log.remember_forward()
        name = func.overloadpacket.__name__
        if name == "_to_copy" and target is not None:
            if not emulated:
                return self.upload(args[0], kwargs)
            if target.type == "cpu":
                return self.download(args[0], kwargs)
        plain = [x for x in tensors if not isinstance(x, EmulatedTensor)]
        if name == "copy_" and plain:
            return self.copy_across(*args, **kwargs)
        self.check_devices(func, name, args, plain, emulated)
        if name in self.WAITS or (name == "repeat_interleave" and "output_size" not in kwargs):
            self.log.add(Kind.SYNC, name)
            if name == "_local_scalar_dense":
                self.log.add(Kind.COPY, "to the host: item")
        output = self.computed(func, name, args, kwargs)
        self.count_launches(func, name, args, output)
        if target is not None and target.type == "cpu":
            return output
        own = {id(x.data_on_cpu): x for x in emulated}
        # As everywhere in PyTorch: a view of an ordinary tensor is an ordinary one, even if it is made for inference.
        ordinary = func.is_view and not any(x.is_inference() for x in emulated)

        def wrapped(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            with torch.inference_mode(False) if ordinary else nullcontext():
                return own[id(x)] if id(x) in own else EmulatedTensor(x)

        return tree_map(wrapped, output)

    def computed(self, func: torch._ops.OpOverload, name: str, args: tuple, kwargs: dict) -> Any:
        """The operation on the CPU's data."""
        args, kwargs = tree_map(to_cpu, (args, kwargs))
        if name in ON_CUDA_ONLY:
            return ON_CUDA_ONLY[name](*args, **kwargs)
        output = func(*args, **kwargs)
        if name.startswith(("empty", "new_empty")):
            output.zero_()  # what no kernel writes must be finite
        return output

    def check_devices(
        self, func: torch._ops.OpOverload, name: str, args: tuple, plain: list[Tensor], emulated: list[Tensor]
    ) -> None:
        """Raise where a GPU would not take the CPU's tensors; count indices, which it takes, but waits for."""
        if name in self.INDEXING:
            for index in tree_leaves(args[1]):
                if isinstance(index, Tensor) and not isinstance(index, EmulatedTensor):
                    self.log.add(Kind.COPY, "to the device: an index on the CPU")
                    self.log.add(Kind.SYNC, "an index on the CPU")
                elif isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                    self.log.add(Kind.SYNC, "a boolean index")
            plain = [x for x in (args[0], *args[2:3]) if isinstance(x, Tensor) and not isinstance(x, EmulatedTensor)]
        written = [
            a
            for a, s in zip(args, func._schema.arguments, strict=False)
            if s.alias_info is not None and s.alias_info.is_write
        ]
        wrong = [x for x in plain if emulated and (x.ndim > 0 or any(x is w for w in written))]
        if wrong:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} got {[tuple(x.shape) for x in wrong]} on "
                f"cpu and {[tuple(x.shape) for x in emulated][:3]} on cuda:0."
            )

    def upload(self, source: Tensor, options: dict) -> EmulatedTensor:
        dtype, form = options.get("dtype") or source.dtype, options.get("memory_format") or torch.preserve_format
        self.count_upload(source, options.get("non_blocking", False))
        return EmulatedTensor(source.to(dtype, copy=True, memory_format=form))

    def count_upload(self, source: Tensor, non_blocking: bool) -> None:
        pinned = source.untyped_storage()._cdata in self.pinned
        self.log.add(Kind.COPY, f"to the device{'' if pinned else ', not pinned'}")
        if not non_blocking:
            self.log.add(Kind.SYNC, "to the device, blocking")

    def download(self, source: EmulatedTensor, options: dict) -> Tensor:
        dtype = options.get("dtype") or source.dtype
        if dtype != source.dtype or not source.data_on_cpu.is_contiguous():
            self.log.add(Kind.LAUNCH, "copy before a transfer")
        self.count_download(options.get("non_blocking", False))
        form = options.get("memory_format") or torch.preserve_format
        return source.data_on_cpu.to(dtype, copy=True, memory_format=form)

    def count_download(self, non_blocking: bool = False) -> None:
        self.log.add(Kind.COPY, "to the host")
        if not non_blocking:
            self.log.add(Kind.SYNC, "to the host")

    def copy_across(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if isinstance(target, EmulatedTensor):
            self.count_upload(source, non_blocking)
        else:
            self.count_download(non_blocking)
        to_cpu(target).copy_(to_cpu(source))
        return target

    def count_launches(self, func: torch._ops.OpOverload, name: str, args: tuple, output: Any) -> None:
        tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        if func.is_view or name in self.FREE or (tensors and not any(x.numel() for x in tensors)):
            return
        times = 1
        if name.startswith(("_foreach", "_fused")):
            lists = [x for x in args if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor)]
            counters = name.startswith("_fused_adam")  # of steps, one number per tensor, which travel beside the lists
            times = launches_for_lists([x.numel() for x in lists[0]], len(lists) - counters)
        self.log.add(Kind.LAUNCH, name, times)

    def pin(self, tensor: Tensor, *_) -> Tensor:
        copied = tensor.clone()
        storage = copied.untyped_storage()
        self.pinned[storage._cdata] = storage
        return copied

    def is_pinned(self, tensor: Tensor, *_) -> bool:
        return not isinstance(tensor, EmulatedTensor) and tensor.untyped_storage()._cdata in self.pinned

    def launch_triton(self, kernel: Any, *args, grid=None, warmup=False, **kwargs) -> None:
        """Stand in for the launch of a Triton kernel, which writes nothing here."""
        name = getattr(getattr(kernel, "fn", kernel), "__name__", "triton kernel")
        for tensor in (*args, *kwargs.values()):
            if isinstance(tensor, Tensor) and not isinstance(tensor, EmulatedTensor):
                raise ValueError(f"Pointer argument of {name} is on the CPU (cpu tensor?): {tuple(tensor.shape)}")
        self.log.add(Kind.LAUNCH, name)


def to_cpu(x: Any) -> Any:
    if isinstance(x, EmulatedTensor):
        return x.data_on_cpu
    return CPU if isinstance(x, torch.device) and x.type == "cuda" else x


def launches_for_lists(sizes: list[int], num_lists: int) -> int:
    """Kernels that PyTorch launches for one operation on lists of tensors with these numbers of elements."""
    most = TENSORS_AT_ONCE[min(num_lists, len(TENSORS_AT_ONCE)) - 1]
    launches = tensors = blocks = 0
    for size in filter(None, sizes):
        tensors += 1
        chunks = -(-size // CHUNK)
        for chunk in range(chunks):
            blocks += 1
            is_last = chunk == chunks - 1
            if blocks == BLOCKS or (tensors == most and is_last):
                launches, blocks, tensors = launches + 1, 0, 0 if is_last else 1
    return launches + (blocks > 0)


def softmax(function: Callable, x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return function(x.float() if half_to_float else x, dim, False)


def softmax_backward(function: Callable, gradient: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return function(gradient, output, dim, gradient.dtype).to(dtype)


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None) -> tuple[Tensor, float]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q.float() @ k.float().mT * scale
    return (scores if bias is None else scores + bias).softmax(-1), scale


def attention(q, k, v, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None) -> tuple[Tensor, ...]:
    weights, _ = attention_weights(q, k, bias, scale)
    nothing = torch.zeros((), dtype=torch.long)
    return (weights @ v.float()).to(q.dtype), weights.new_zeros(*q.shape[:-1]), nothing, nothing.clone()


def attention_backward(
    gradient, q, k, v, bias, out, logsumexp, seed, offset, dropout_p, wanted, is_causal=False, *, scale=None
) -> tuple[Tensor | None, ...]:
    weights, scale = attention_weights(q, k, bias, scale)
    gradient = gradient.float()
    of_weights = gradient @ v.float().mT
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
    of_bias = of_scores.sum_to_size(bias.shape).to(bias.dtype) if wanted[3] else None
    of_q, of_k, of_v = of_scores @ k.float() * scale, of_scores.mT @ q.float() * scale, weights.mT @ gradient
    return of_q.to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype), of_bias


ON_CUDA_ONLY: dict[str, Callable] = {
    "_softmax": lambda *a: softmax(aten._softmax, *a),
    "_log_softmax": lambda *a: softmax(aten._log_softmax, *a),
    "_softmax_backward_data": lambda *a: softmax_backward(aten._softmax_backward_data, *a),
    "_log_softmax_backward_data": lambda *a: softmax_backward(aten._log_softmax_backward_data, *a),
    "_scaled_dot_product_efficient_attention": attention,
    "_scaled_dot_product_efficient_attention_backward": attention_backward,
}
"""Operations, or options of them, that PyTorch has no CPU version of."""

_scaled_dot_product_attention = F.scaled_dot_product_attention


def fused_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options) -> Tensor:
    """`scaled_dot_product_attention` as a GPU does it: one kernel, after the mask has been made what that kernel takes.

    PyTorch chooses the kernel in C++ by what it was built for, which is no GPU here.
    """
    if not isinstance(q, EmulatedTensor):
        return _scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **options)
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        q, k, v = (x.to(dtype) for x in (q, k, v))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    if q.dtype == torch.float64:  # no kernel takes it
        return _scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **options)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, torch.scalar_tensor(-torch.inf, dtype=q.dtype, device=q.device))
    if not (q.dtype == k.dtype == v.dtype and (attn_mask is None or attn_mask.dtype == q.dtype)):
        raise RuntimeError(f"Expected query, key, value and mask of one dtype, got {q.dtype}, {k.dtype}, {v.dtype}.")
    if attn_mask is not None:
        attn_mask = aligned(attn_mask).expand(*q.shape[:-1], k.shape[-2])
    needs_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, attn_mask))
    return aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, needs_gradient, dropout_p, is_causal, scale=scale
    )[0]


def aligned(mask: Tensor) -> Tensor:
    """The mask with rows that start at multiples of 16 numbers, which may take a copy."""
    if all(stride % 16 == 0 for stride, size in zip(mask.stride()[:-1], mask.shape[:-1], strict=True) if size > 1):
        return mask
    return F.pad(mask, (0, -mask.shape[-1] % 16))[..., : mask.shape[-1]]


class Stream:
    """A stream or an event of the device: everything is done by the time it is asked."""

    def __init__(self, *_, **__) -> None: ...

    def wait_stream(self, stream: Stream) -> None: ...
    def wait_event(self, event: Stream) -> None: ...
    def record(self, stream: Stream | None = None) -> None: ...
    def wait(self, stream: Stream | None = None) -> None: ...

    def record_event(self, event: Stream | None = None) -> Stream:
        return event or Stream()

    def query(self) -> bool:
        return True

    def synchronize(self, *_) -> None:
        if _device is not None:
            _device.log.add(Kind.SYNC, "synchronize")

    def elapsed_time(self, end: Stream) -> float:
        return 0.0


def record_stream(tensor: Tensor, stream: Stream) -> None:
    if not tensor.is_cuda:
        raise RuntimeError("Expected all tensors to be on the same device, but record_stream got one on cpu.")


GIB = 2**30
OF_TORCH_CUDA = dict(
    is_available=lambda: True, is_initialized=lambda: True, init=lambda: None, _lazy_init=lambda: None,
    device_count=lambda: 1, current_device=lambda: 0, set_device=lambda device: None,
    _exchange_device=lambda index: 0, _maybe_exchange_device=lambda index: 0,
    is_bf16_supported=lambda including_emulation=True: True, is_current_stream_capturing=lambda: False,
    manual_seed=lambda seed: None, manual_seed_all=lambda seed: None, empty_cache=lambda: None,
    max_memory_allocated=lambda device=None: GIB, memory_allocated=lambda device=None: GIB,
    max_memory_reserved=lambda device=None: GIB, memory_reserved=lambda device=None: GIB,
    reset_peak_memory_stats=lambda device=None: None, mem_get_info=lambda device=None: (70 * GIB, 80 * GIB),
    get_device_name=lambda device=None: "emulated", get_device_capability=lambda device=None: (9, 0),
    get_device_properties=lambda device=None: SimpleNamespace(
        name="emulated", major=9, minor=0, total_memory=80 * GIB, multi_processor_count=132,
    ),
    Stream=Stream, Event=Stream, current_stream=lambda device=None: Stream(),
    default_stream=lambda device=None: Stream(), stream=lambda stream: nullcontext(),
    synchronize=lambda device=None: Stream().synchronize(),
)  # fmt: skip


def why_not_emulated() -> str | None:
    """The reason why no device can be emulated here, if there is one."""
    if sys.platform != "linux":
        return "A device is emulated on Linux only."
    if torch.cuda.is_available():
        return "There is a GPU. To emulate one in its place, hide it: set CUDA_VISIBLE_DEVICES to nothing."
    return None


@contextmanager
def emulated_cuda() -> Iterator[Log]:
    """Make `torch.cuda` available inside the block; tensors of the device are of no use outside it.

    Raises:
        RuntimeError: a real GPU is here, or an emulated one already; or this PyTorch does not play along.
    """
    global _device
    if obstacle := why_not_emulated():
        raise RuntimeError(obstacle)
    ensure_device_guard()
    device = Device(Log())
    with ExitStack() as stack:
        for name, value in OF_TORCH_CUDA.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        patch = lambda *what: stack.enter_context(mock.patch.object(*what))  # noqa: E731
        patch(torch.Tensor, "pin_memory", lambda tensor, *a, **k: device.pin(tensor))
        patch(torch.Tensor, "is_pinned", lambda tensor, *a, **k: device.is_pinned(tensor))
        patch(torch.Tensor, "record_stream", record_stream)
        patch(F, "scaled_dot_product_attention", fused_attention)
        for launcher in triton_launchers():
            patch(launcher, "run", lambda kernel, *a, **k: device.launch_triton(kernel, *a, **k))
        _foreach_supported_types.append(EmulatedTensor)
        stack.callback(_foreach_supported_types.remove, EmulatedTensor)
        swapping = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter that moves stays the same object
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swapping)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") copies a tensor of the CPU
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(claiming_cuda())
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # backward where the log can follow it
        _device = device
        try:
            with device:
                yield device.log
        finally:
            _device = None


DEVICE_TYPE_CUDA = 1
YES = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1)
ZERO = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
ZEROS = (ctypes.c_void_p * 64)(*64 * [ctypes.cast(ZERO, ctypes.c_void_p).value])  # methods of an object
NO_DEVICE = ctypes.c_void_p(ctypes.addressof(ZEROS))  # which starts with the address of its methods


def ensure_device_guard() -> None:
    """Let PyTorch's C++ take tensors of the device type "cuda".

    A build for CUDA brings a guard that does nothing, for machines without a GPU. A build for CPUs has it as well, but
    sets it only in place of another that counts no device. So one is put there that answers 0 to everything.
    """
    library = ctypes.CDLL(str(TORCH / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * 32).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    if registry[DEVICE_TYPE_CUDA] is None:
        registry[DEVICE_TYPE_CUDA] = ctypes.addressof(NO_DEVICE)
    torch._C._ensureCUDADeviceGuardSet()


@contextmanager
def claiming_cuda() -> Iterator[None]:
    """Let PyTorch's C++ say that it has CUDA, which autograd asks before it adds gradients of that device.

    A build for CPUs asks an object whose methods say no. Inside the block it has other methods: `hasCUDA` says yes.
    """
    library = ctypes.CDLL(str(TORCH / "lib" / "libtorch_cpu.so"))
    library._ZN2at6detail12getCUDAHooksEv.restype = ctypes.c_void_p
    methods = ctypes.c_void_p.from_address(library._ZN2at6detail12getCUDAHooksEv())
    before, names, size = methods.value, methods_of_cuda_hooks(), ctypes.sizeof(ctypes.c_void_p)
    table = (ctypes.c_void_p * (2 + len(names))).from_buffer_copy(
        ctypes.string_at(before - 2 * size, (2 + len(names)) * size)  # two words about the class stand before it
    )
    for name in ("isBuilt", "isAvailable", "hasPrimaryContext", "hasCUDA"):
        table[2 + names.index(name)] = ctypes.cast(YES, ctypes.c_void_p).value
    methods.value = ctypes.addressof(table) + 2 * size
    try:
        if torch.accelerator.current_accelerator() != torch.device("cuda"):
            raise RuntimeError(f"PyTorch {torch.__version__} does not say that it has CUDA.")
        yield
    finally:
        methods.value = before


def methods_of_cuda_hooks() -> list[str]:
    """Virtual methods in the order of the compiler's table; a destructor takes two places."""
    names = ["destructor"]
    for header in ("AcceleratorHooksInterface.h", "CUDAHooksInterface.h"):
        source = (TORCH / "include" / "ATen" / "detail" / header).read_text()
        source = re.sub(r"//.*|#ifdef USE_ROCM[^#]*#endif", "", source)
        names += re.findall(r"virtual [^(~]*?(~?\w+)\(", source)
    return names


def triton_launchers() -> list[type]:
    """Classes whose `run` launches a Triton kernel, the outermost first."""
    try:
        from triton.runtime.autotuner import Autotuner, Heuristics
        from triton.runtime.jit import JITFunction
    except ImportError:
        return []
    return [JITFunction, Autotuner, Heuristics]
