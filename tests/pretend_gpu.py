"""A GPU that is not there: while a PretendGpu is entered, torch finds a CUDA device.

Its tensors are computed on the CPU. They refuse what tensors on a GPU refuse: to meet tensors of the CPU (but for
numbers without dimensions, and indices of the CPU), its generators or NumPy. What makes the host wait for the device,
and the memory held there, are counted. Not imitated are the GPU's speed, rounding and streams, and operators that it
lacks; tests/test_gpu.py needs a real one for these.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
aten = torch.ops.aten
MOVES = {aten.copy_, aten._to_copy}  # between any two devices
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
WAITS = {  # for values or sizes that the host has to know
    aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten._linalg_eigh, aten.linalg_inv_ex, aten.linalg_cholesky_ex, aten._linalg_svd,
    aten._linalg_solve_ex, aten.multinomial,
}  # fmt: skip
# what `inner` owes would not be resolved below __torch_dispatch__
LAZY = {aten._conj: aten.conj_physical, aten._neg_view: aten.neg}
FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "hann_window",
    "linspace", "logspace", "normal", "ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like",
    "randperm", "scalar_tensor", "tensor", "tril_indices", "zeros", "zeros_like",
)  # fmt: skip


class OnGpu(torch.Tensor):
    """A tensor on the pretended device, whose values are those of `inner`.

    To torch's own code it is on the CPU, because without CUDA it can differentiate nothing on another device; to ours
    it is not.
    """

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @staticmethod
    def __new__(cls, inner: torch.Tensor, gpu: PretendGpu) -> OnGpu:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
        )

    def __init__(self, inner: torch.Tensor, gpu: PretendGpu):
        self.inner, self.gpu, self.memory = inner, gpu, gpu.memory_of(inner)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        gpu = next(a for a in tree_flatten((args, kwargs))[0] if isinstance(a, OnGpu)).gpu
        if func in (torch.Tensor.__setitem__, torch.Tensor.copy_) and isinstance(args[-1], torch.Tensor):
            args = (*args[:-1], args[-1].to(args[0].device))
        with torch._C.DisableTorchFunctionSubclass(), _Within(gpu):
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        gpu = next(a for a in tree_flatten((args, kwargs))[0] if isinstance(a, OnGpu)).gpu
        return gpu.run(func, args, kwargs or {})

    def __deepcopy__(self, memo):
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True
        return memo.setdefault(id(self), copied)

    def __reduce_ex__(self, protocol):
        return self.inner.__reduce_ex__(protocol)

    def __tensor_flatten__(self):  # with it, a module that is moved swaps its parameters for those on the device
        return ["inner"], self.gpu

    @staticmethod
    def __tensor_unflatten__(inner, gpu, size, stride):
        return OnGpu(inner["inner"], gpu)

    def __repr__(self):
        return f"OnGpu({self.inner})"

    def untyped_storage(self):
        """That of the values."""
        return self.inner.untyped_storage()


class _Within(TorchDispatchMode):
    """In a function of torch that was given tensors on the device: what it makes for itself is there too."""

    def __init__(self, gpu: PretendGpu):
        super().__init__()
        self.gpu = gpu

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to import what compiles takes seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tree_flatten((args, kwargs))[0]
        tensors = [a for a in given if isinstance(a, torch.Tensor)]
        if any(isinstance(a, OnGpu) for a in tensors):
            return self.gpu.run(func, args, kwargs or {})
        made = func(*args, **(kwargs or {}))
        return made if tensors or not isinstance(made, torch.Tensor) else OnGpu(made, self.gpu)


class _Copy(torch.autograd.Function):
    """A copy on the other device, whose gradient is copied back."""

    @staticmethod
    def forward(ctx, here: torch.Tensor, gpu: PretendGpu) -> torch.Tensor:
        ctx.gpu = gpu
        return gpu.copied(here)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return ctx.gpu.copied(gradient), None


class _Memory:
    """A piece of the device's memory, freed with the last tensor that uses it."""

    def __init__(self, gpu: PretendGpu, size: int):
        self.gpu, self.size = gpu, size
        gpu.count(size)

    def __del__(self):
        self.gpu.count(-self.size)


class PretendGpu(contextlib.ExitStack):
    """A context in which torch finds one CUDA device, in all threads.

    Args:
        total: bytes of memory; more raises torch.OutOfMemoryError.
        told: bytes that it says it has, if not `total`, as if another process had taken the others just now.
        fault: called with the name of every operator before it runs there; may raise what a GPU would, or wait.

    Attributes:
        waits: how often the host waited for the device, by the name of the operator ("upload" and "download" for
            copies).
        used, peak: bytes of memory held now, and at most.
    """

    def __init__(self, total: int = 80 * 2**30, told: int | None = None, fault: Callable[[str], None] | None = None):
        super().__init__()
        self.total, self.told, self.fault = total, told, fault
        self.waits, self.used, self.peak = Counter(), 0, 0
        self.lock, self.pieces = threading.RLock(), weakref.WeakValueDictionary()

    def __enter__(self) -> PretendGpu:
        if torch.cuda.is_available():
            raise RuntimeError("there is a real GPU")
        cuda = dict(
            is_available=lambda: True,
            device_count=lambda: 1,
            current_device=lambda: 0,
            set_device=lambda device: None,
            is_bf16_supported=lambda *_: True,
            get_device_capability=lambda device=None: (9, 0),
            get_device_name=lambda device=None: "pretended",
            empty_cache=lambda: self.asked("empty_cache"),
            synchronize=lambda device=None: self.wait("synchronize"),
            mem_get_info=self.mem_get_info,
            memory_allocated=lambda device=None: self.used,
            memory_reserved=lambda device=None: self.used,
            max_memory_allocated=lambda device=None: self.peak,
        )
        for name, pretended in cuda.items():
            self.enter_context(mock.patch.object(torch.cuda, name, pretended))
        stream = SimpleNamespace(is_capturing=lambda: False)  # which optimisers ask where torch was built for CUDA
        accelerator = dict(
            is_available=lambda: True,
            current_device_index=lambda: 0,
            set_device_index=lambda device: None,
            current_stream=lambda device=None: stream,
        )
        for name, pretended in accelerator.items():
            self.enter_context(mock.patch.object(torch.accelerator, name, pretended))
        for name in FACTORIES:
            self.enter_context(mock.patch.object(torch, name, self.factory(getattr(torch, name))))
        for name, pretended in self.methods().items():
            self.enter_context(mock.patch.object(torch.Tensor, name, pretended))
        autocast = torch.autocast

        def as_on_cpu(device_type, *args, **kwargs):
            return autocast("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

        self.enter_context(mock.patch.object(torch, "autocast", as_on_cpu))
        return self

    def run(self, func, args, kwargs):
        """The result on the device of an operator that was given tensors there."""
        _check_devices(func, args, kwargs)
        waits = func.overloadpacket in WAITS or _counts_true(func, args)
        (self.wait if waits else self.asked)(func.overloadpacket.__name__)
        theirs: dict[int, torch.Tensor] = {}

        def values(a):
            if not isinstance(a, torch.Tensor):
                return a
            inner = a.inner if isinstance(a, OnGpu) else a
            theirs[id(inner)] = a
            return inner

        def on_gpu(made):
            if id(made) in theirs:
                return theirs[id(made)]
            return OnGpu(made, self) if isinstance(made, torch.Tensor) else made

        args, kwargs = tree_map(values, (args, kwargs))
        out = LAZY.get(func.overloadpacket, func)(*args, **kwargs)
        return tree_map(on_gpu, out)

    def asked(self, name: str) -> None:
        """Let it fail, if it should."""
        if self.fault:
            self.fault(name)

    def wait(self, name: str) -> None:
        """The host waits for the device; it is counted."""
        self.asked(name)
        self.waits[name] += 1

    def mem_get_info(self, device=None) -> tuple[int, int]:
        """Bytes of memory, free and total."""
        self.asked("mem_get_info")
        total = self.total if self.told is None else self.told
        return total - self.used, total

    def memory_of(self, values: torch.Tensor) -> _Memory:
        """What `values` take; views share it."""
        storage = values.untyped_storage()
        size = storage.nbytes()
        with self.lock:
            piece = self.pieces.get(storage._cdata)
            if piece is None:
                if self.used + size > self.total:
                    raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes (pretended)")
                piece = self.pieces[storage._cdata] = _Memory(self, size)
            return piece

    def count(self, size: int) -> None:
        """So much more memory is held."""
        with self.lock:
            self.used += size
            self.peak = max(self.peak, self.used)

    def copied(self, here: torch.Tensor) -> torch.Tensor:
        """A copy on the other device."""
        if isinstance(here, OnGpu):
            self.wait("download")
            return here.inner.clone()
        self.wait("upload")
        return OnGpu(here.detach().resolve_conj().resolve_neg().clone(), self)

    def factory(self, original: Callable) -> Callable:
        """A function that makes tensors, which also makes them here."""

        def make(*args, device=None, **kwargs):
            source = args[0] if args and isinstance(args[0], torch.Tensor) else None
            where = torch.device(device) if device is not None else CPU if source is None else source.device
            if device is not None and where.type == "cuda" and kwargs.get("generator") is not None:
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
            made = original(*args, **kwargs)
            if where.type == "cuda" and not isinstance(made, OnGpu):
                (self.wait if original.__name__ in ("tensor", "as_tensor") else self.asked)(original.__name__)
                return OnGpu(made.clone() if made is source else made, self)
            return made.to(where)

        return make

    def methods(self) -> dict[str, Callable]:
        """Methods of tensors that move them or leave torch."""
        tensor, convert = torch.Tensor, torch.Tensor.to
        methods = {name: getattr(tensor, name) for name in ("numpy", "tolist", "__array__")}

        def move(here: torch.Tensor, *args, **kwargs) -> torch.Tensor:
            if args and isinstance(args[0], torch.Tensor):
                args = (args[0].device, args[0].dtype, *args[1:])
            device = kwargs.pop("device", None)
            if args and (args[0] is None or isinstance(args[0], str | torch.device)):
                device, args = args[0], args[1:]
            device = here.device if device is None else torch.device(device)
            with torch._C.DisableTorchFunctionSubclass():
                out = convert(here, CPU, *args, **kwargs)
            if here.device.type == device.type:
                return out
            if device.type == "cpu" and kwargs.get("non_blocking"):
                raise AssertionError("a copy that does not block was asked of the GPU: its values are not there yet")
            return _Copy.apply(out, self)

        def leaves(name: str) -> Callable:
            def leave(here: torch.Tensor, *args, **kwargs):
                if isinstance(here, OnGpu):
                    raise TypeError(
                        "can't convert cuda:0 device type tensor to numpy. "
                        "Use Tensor.cpu() to copy the tensor to host memory first."
                    )
                return methods[name](here, *args, **kwargs)

            return leave

        return {
            "to": move,
            "cpu": lambda here, *_: move(here, CPU),
            "cuda": lambda here, *_, **how: move(here, CUDA, **how),
            "tolist": lambda here: methods["tolist"](move(here, CPU)),
            "numpy": leaves("numpy"),
            "__array__": leaves("__array__"),
            "pin_memory": lambda here, *_: here,
            "is_pinned": lambda here, *_: False,
        }


def _check_devices(func, args, kwargs) -> None:
    """Raise RuntimeError, as torch does, if an operator on the GPU cannot take a tensor or a generator of the CPU."""
    packet = func.overloadpacket
    if packet in MOVES:
        return
    given = tree_flatten((args, kwargs))[0]
    if any(isinstance(a, torch.Generator) for a in given):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if packet in INDEXING:
        if not isinstance(args[0], OnGpu) and any(isinstance(index, OnGpu) for index in args[1]):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        given = [args[0], *tree_flatten(args[2:])[0]]
    changed = args[0] if func._schema.is_mutable and args else None
    fills = (aten.where, aten.masked_fill, aten.masked_fill_, aten.fill_)
    numbers = packet in INDEXING or torch.Tag.pointwise in func.tags or packet in fills
    for tensor in given:
        if not isinstance(tensor, torch.Tensor) or isinstance(tensor, OnGpu):
            continue
        if tensor.ndim or tensor is changed or not numbers:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! ({func})"
            )


def _counts_true(func, args) -> bool:
    """Whether an indexing operator is given a mask, whose true values must be counted."""
    return func.overloadpacket in INDEXING and any(
        isinstance(i, torch.Tensor) and (i.dtype == torch.bool or not isinstance(i, OnGpu)) for i in args[1]
    )
