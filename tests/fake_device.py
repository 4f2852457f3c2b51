"""A CUDA or MPS device without a GPU: CPU tensors that say that they are on it.

The numbers are real, so whole runs go through. What a tensor claims is a label of its storage,
which its views share. Two of torch's modes keep the labels:

- `_Calls` sees calls from Python. It answers `.device`, `.is_cuda`, `.to(device)`, `device=` and
  the like from the labels.
- `_Operators` sees every operator below them. It hands labels on from inputs to results, refuses
  operators on tensors of two devices, as torch does, refuses float64 on MPS, and counts where the
  host would wait for the device.

C++ is seen where it calls operators. DistributedDataParallel's buckets, cuDNN's and cuFFT's
choices, NCCL, time and memory are not seen; docs/gpus.md says what to try first on a card.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = str(Path(__file__).parents[1])
CPU = torch.device("cpu")

WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "_unique2",
    "bincount",
    "_linalg_eigh",
    "_linalg_svd",
}
"""Operators for whose result, or for its shape, the host waits."""

INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}

COPIES = {"copy_", "_to_copy", "set_"}
"""Operators that may take tensors of two devices."""

NO_KERNEL = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty"}
"""Operators that are not views, but start no kernel either."""

ON_DEVICE: dict[str, dict[int, StorageWeakRef]] = {"cuda": {}, "mps": {}}
"""The storages on each kind of device, by address. They belong to the process, not to a test,
because the product caches tables of constants."""

FORGET_AT = 20_000
"""The number of labels at which those of dead storages are dropped."""


class FakeDevice:
    """The labels of one device, and what was seen since `forget`.

    Attributes:
        kind: `cuda` or `mps`.
        waits: how often the host waited, by (operator, line of the product).
        copies: how often the device copied from memory that is not pinned, by the same.
        kernels: how often each operator ran on the device, views aside.
    """

    def __init__(self, kind: str = "cuda") -> None:
        self.kind = kind
        self.device = torch.device(kind, 0)
        self.waits: Counter = Counter()
        self.copies: Counter = Counter()
        self.kernels: Counter = Counter()
        self.pinned: dict[int, StorageWeakRef] = {}
        self.on_device = ON_DEVICE[kind]
        # Whether the tensors that C++ makes now, inside a call, are the device's
        self.making = [False]

    def forget(self) -> None:
        """Count from zero."""
        for counter in (self.waits, self.copies, self.kernels):
            counter.clear()

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the device."""
        return _labeled(self.on_device, tensor)

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a tensor of the CPU is in pinned memory."""
        return _labeled(self.pinned, tensor)

    def put(self, tensor: Tensor) -> Tensor:
        """Label a tensor as the device's."""
        _label(self.on_device, tensor)
        return tensor

    def is_copied_at_once(self, tensor: Tensor) -> bool:
        """Whether torch copies a tensor of the CPU straight from pinned memory: those with gaps go
        by way of other memory."""
        return self.is_pinned(tensor) and torch.ops.aten.is_non_overlapping_and_dense(tensor)

    def pin(self, tensor: Tensor) -> Tensor:
        """Label a tensor as pinned."""
        _label(self.pinned, tensor)
        return tensor

    def pinned_copy(self, tensor: Tensor) -> Tensor:
        """Return a tensor in pinned memory, which is the same one if it lies there."""
        if self.is_pinned(tensor):
            return tensor
        # torch keeps all strides, also those of a part of a tensor, which `clone` does not
        strided = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        return self.pin(strided.copy_(tensor))

    def take(self, tensor: Tensor) -> Tensor:
        """Label a tensor as the CPU's."""
        with torch._C.DisableTorchFunction():
            self.on_device.pop(tensor.untyped_storage()._cdata, None)
        return tensor


def _labeled(table: dict[int, StorageWeakRef], tensor: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        reference = table.get(tensor.untyped_storage()._cdata)
    return reference is not None and not reference.expired()


def _label(table: dict[int, StorageWeakRef], tensor: Tensor) -> None:
    with torch._C.DisableTorchFunction():
        storage = tensor.untyped_storage()
        # A weak reference keeps the address from being given to another storage
        table[storage._cdata] = StorageWeakRef(storage)
    if len(table) > FORGET_AT:
        for key in [key for key, reference in table.items() if reference.expired()]:
            del table[key]


def _tensors(values: Iterable[object]) -> Iterator[Tensor]:
    """Yield the tensors among arguments or results, also those in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _where() -> str:
    """Return the line of the product that is running, such as `attacks/pgd.py:120`."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and "/tests/" not in name:
            return f"{name[len(ROOT) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside of the product"


class _Operators(TorchDispatchMode):
    def __init__(self, fake: FakeDevice) -> None:
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        fake = self.fake
        kwargs = kwargs or {}
        name = str(func).split(".")[1]
        tensors = list(_tensors((*args, *kwargs.values())))
        on = [fake.has(tensor) for tensor in tensors]
        if any(on):
            self._check_devices(func, name, tensors, on)
            self._count(func, name, tensors, on)
        out = func(*args, **kwargs)
        if name == "copy_":
            return out
        if any(on) or (not tensors and fake.making[-1]):
            for result in _tensors([out]):
                if not fake.has(result):
                    fake.put(result)
                    self._check_type(func, result)
        return out

    def _check_devices(self, func, name, tensors, on):
        if all(on) or name in COPIES:
            return
        fake = self.fake
        strangers = [tensor for tensor, own in zip(tensors, on, strict=True) if not own]
        if name in INDEXING and on[0] and any(tensor.ndim for tensor in strangers):
            # torch copies positions to the device, and waits for the copy
            fake.copies["positions on the CPU", _where()] += 1
            return
        places = [
            (tuple(tensor.shape), fake.kind if own else "cpu")
            for tensor, own in zip(tensors, on, strict=True)
        ]
        raise RuntimeError(f"tensors on two devices in {func}: {places} at {_where()}")

    def _count(self, func, name, tensors, on):
        fake = self.fake
        if name == "copy_" and len(on) == 2 and on[0] != on[1]:
            counter = fake.copies if on[0] else fake.waits
            counter[str(func), _where()] += 1
        if name in WAITS:
            fake.waits[name, _where()] += 1
        elif name in INDEXING and any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:]):
            fake.waits[f"{name} by a mask", _where()] += 1
        if not func.is_view and name not in NO_KERNEL:
            fake.kernels[name] += 1

    def _check_type(self, func, tensor):
        if self.fake.kind == "mps" and tensor.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"MPS has no float64: {func} at {_where()}")


class _Calls(TorchFunctionMode):
    def __init__(self, fake: FakeDevice) -> None:
        super().__init__()
        self.fake = fake

    def __torch_function__(self, func, types, args=(), kwargs=None):
        fake = self.fake
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args)
        first = next(_tensors((*args, *kwargs.values())), None)
        fake.making.append(first is not None and fake.has(first))
        try:
            return self._call(func, name, args, kwargs)
        finally:
            fake.making.pop()

    def _attribute(self, func, args):
        fake = self.fake
        attribute = getattr(func, "__self__", None)
        if attribute is Tensor.device:
            return fake.device if fake.has(args[0]) else CPU
        kinds = {Tensor.is_cuda: "cuda", Tensor.is_mps: "mps", Tensor.is_cpu: "cpu"}
        if attribute in kinds:
            kind = fake.kind if fake.has(args[0]) else "cpu"
            return kind == kinds[attribute]
        return func(*args)

    def _call(self, func, name, args, kwargs):
        fake = self.fake
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        if tensor is not None:
            if name in ("to", "cuda", "cpu"):
                return self._to(name, *args, **kwargs)
            if fake.has(tensor):
                if name in ("numpy", "__array__"):
                    raise TypeError(f"can't convert a {fake.kind} tensor to numpy at {_where()}")
                if name == "tolist":
                    fake.waits["tolist", _where()] += 1
                if name == "one_hot":
                    return self._one_hot(*args, **kwargs)
                if name == "__deepcopy__":
                    return fake.put(func(*args, **kwargs))
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        return self._made(func, name, args, kwargs)

    def _made(self, func, name, args, kwargs):
        """Make a tensor on the device that `device=` names."""
        fake = self.fake
        target = torch.device(kwargs.pop("device"))
        on_device = target.type == fake.kind
        pin = not on_device and kwargs.pop("pin_memory", False)
        out = func(*args, **kwargs, device=CPU if on_device else target)
        if not isinstance(out, Tensor):
            return out
        if on_device and name in ("tensor", "as_tensor"):
            fake.copies[name, _where()] += 1
        if pin:
            fake.pin(out)
        return fake.put(out) if on_device else fake.take(out)

    def _one_hot(self, labels, num_classes):
        # On a device torch does not look at the labels
        classes = self.fake.put(torch.arange(num_classes))
        with torch._C.DisableTorchFunction():
            return (labels.unsqueeze(-1) == classes).long()

    def _to(self, name, tensor, *rest, non_blocking=False, copy=False, **options):
        fake = self.fake
        device = options.pop("device", None)
        dtype = options.pop("dtype", None)
        if name != "to":
            device = fake.device if name == "cuda" else CPU
        flags = []
        for value in rest:
            if isinstance(value, Tensor):
                device = fake.device if fake.has(value) else CPU
                dtype = value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, bool):
                flags.append(value)
            elif value is not None:
                device = torch.device(value)
        # By position they are non_blocking and copy, in this order
        non_blocking, copy = (*flags, *(non_blocking, copy)[len(flags) :])
        before = fake.has(tensor)
        after = before
        if device is not None:
            after = torch.device(device).type == fake.kind
        moves = before != after
        out = Tensor.to(tensor, dtype=dtype or tensor.dtype, copy=copy or moves, **options)
        if not moves:
            return out
        if not after:
            fake.waits["to the CPU", _where()] += 1
            return fake.take(out)
        if not (non_blocking and fake.is_copied_at_once(tensor)):
            fake.copies["from ordinary memory", _where()] += 1
        return fake.put(out)


@contextmanager
def fake_device(monkeypatch, kind: str = "cuda", count: int = 1) -> Iterator[FakeDevice]:
    """Let this machine have `count` devices of a kind inside the context."""
    fake = FakeDevice(kind)

    class Autocast(torch.amp.autocast_mode.autocast):
        def __init__(self, device_type: str, *args: object, **options: object) -> None:
            super().__init__("cpu" if device_type == kind else device_type, *args, **options)

    grouped = torch.optim.Optimizer._group_tensors_by_device_and_dtype

    def grouped_by_label(lists, with_indices=False):
        groups = {}
        for (device, dtype), group in grouped(lists, with_indices).items():
            if any(tensor is not None and fake.has(tensor) for tensor in group[0][0]):
                device = fake.device
            groups[device, dtype] = group
        return groups

    answers = {
        "is_available": True,
        "device_count": count,
        "is_initialized": True,
        "_lazy_init": None,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_name": "fake",
        "get_device_properties": SimpleNamespace(
            name="fake", major=9, minor=0, total_memory=8 << 30
        ),
        "get_arch_list": ["sm_90"],
        "set_device": None,
        "set_rng_state": None,
        "is_bf16_supported": True,
        "synchronize": None,
        "mem_get_info": (1 << 30, 8 << 30),
    }
    with monkeypatch.context() as patch:
        if kind == "cuda":
            for name, answer in answers.items():
                patch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
            patch.setattr(torch.cuda, "get_rng_state_all", lambda: [torch.get_rng_state()])
        else:
            patch.setattr(torch.backends.mps, "is_available", lambda: True)
        patch.setattr(torch, "autocast", Autocast)
        # Not in `_Calls`: torch's modes are those of one thread, and other threads pin, too
        patch.setattr(Tensor, "pin_memory", lambda tensor: fake.pinned_copy(tensor))
        patch.setattr(Tensor, "is_pinned", lambda tensor: fake.is_pinned(tensor))
        patch.setattr(
            torch.optim.Optimizer,
            "_group_tensors_by_device_and_dtype",
            staticmethod(grouped_by_label),
        )
        with _Calls(fake), _Operators(fake):
            yield fake
