# ruff: noqa: E501
"""A CUDA (or MPS) device without a GPU: CPU tensors that say they are on it. Real numbers and real control flow, so whole runs go through.

A function mode answers `.device`, `.is_cuda`, `.to(device)`, `device=` and so on from labels. A dispatch mode hands labels on from
inputs to outputs, refuses operations that mix devices (as torch does), refuses float64 on MPS, and counts where the host would wait
for the device. A label belongs to a storage, so views share it. What C++ does by itself is seen where it calls operators only: its
own buckets (DistributedDataParallel), cuDNN's choices, speed and memory are not.
"""

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = str(Path(__file__).parents[1])
CPU = torch.device("cpu")
WAITS = {  # operators for whose result, or its shape, the host waits
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "bincount", "_linalg_eigh", "_linalg_svd",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


ON_IT: dict[str, dict[int, StorageWeakRef]] = {"cuda": {}, "mps": {}}
"""By kind, for all of a process: tables that a cache holds outlive a test."""


class FakeDevice:
    """What was seen: `waits` and `copies` (from ordinary memory) by (what, where), `kernels` by operator."""

    def __init__(self, kind: str = "cuda") -> None:
        self.kind, self.device = kind, torch.device(kind, 0)
        self.on_it = ON_IT[kind]
        self.pinned: dict[int, StorageWeakRef] = {}
        self.waits, self.copies, self.kernels = Counter(), Counter(), Counter()
        self.making = [False]  # whether what C++ makes now is for the device

    def forget(self) -> None:
        for counter in (self.waits, self.copies, self.kernels):
            counter.clear()

    def has(self, tensor: Tensor, table: dict[int, StorageWeakRef] | None = None) -> bool:
        with torch._C.DisableTorchFunction():
            reference = (self.on_it if table is None else table).get(
                tensor.untyped_storage()._cdata
            )
        return reference is not None and not reference.expired()

    def put(
        self, tensor: Tensor, there: bool = True, table: dict[int, StorageWeakRef] | None = None
    ) -> Tensor:
        table = self.on_it if table is None else table
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
            if there:
                table[storage._cdata] = StorageWeakRef(
                    storage
                )  # keeps the address from being given out again
            else:
                table.pop(storage._cdata, None)
        if len(table) > 20_000:
            for key in [key for key, reference in table.items() if reference.expired()]:
                del table[key]
        return tensor


def _where() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and "/tests/" not in name:
            return f"{name[len(ROOT) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"


class _Operators(TorchDispatchMode):
    def __init__(self, fake: FakeDevice) -> None:
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        fake, kwargs, name = self.fake, kwargs or {}, str(func).split(".")[1]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [fake.has(tensor) for tensor in tensors]
        if any(there) and not all(there) and name not in ("copy_", "_to_copy", "set_"):
            if not (name in INDEXING and there[0]) and any(
                t.ndim for t, on in zip(tensors, there, strict=True) if not on
            ):
                shapes = [
                    (tuple(t.shape), fake.kind if on else "cpu")
                    for t, on in zip(tensors, there, strict=True)
                ]
                raise RuntimeError(f"tensors on two devices in {func}: {shapes} at {_where()}")
            if name in INDEXING:  # torch copies the positions there, and waits
                fake.copies["positions on the CPU", _where()] += 1
        if name == "copy_" and len(there) == 2 and there[0] != there[1]:
            (fake.copies if there[0] else fake.waits)[str(func), _where()] += 1
        if any(there):
            masked = name in INDEXING and any(
                t.dtype in (torch.bool, torch.uint8) for t in tensors[1:]
            )
            if name in WAITS or masked:
                fake.waits[name + " by a mask" * masked, _where()] += 1
            if not func.is_view:
                fake.kernels[name] += 1
        out = func(*args, **kwargs)
        if any(there) or (not tensors and fake.making[-1]):
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor) and name != "copy_" and not fake.has(leaf):
                    fake.put(leaf)
                    if fake.kind == "mps" and leaf.dtype in (torch.float64, torch.complex128):
                        raise TypeError(f"MPS has no float64: {func} at {_where()}")
        return out


class _Calls(TorchFunctionMode):
    def __init__(self, fake: FakeDevice) -> None:
        super().__init__()
        self.fake = fake

    def __torch_function__(self, func, types, args=(), kwargs=None):
        fake, kwargs, name = self.fake, dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "__get__":
            attribute = getattr(func, "__self__", None)
            if attribute is Tensor.device:
                return fake.device if fake.has(args[0]) else CPU
            if attribute in (Tensor.is_cuda, Tensor.is_mps, Tensor.is_cpu):
                kind = {Tensor.is_cuda: "cuda", Tensor.is_mps: "mps", Tensor.is_cpu: "cpu"}[
                    attribute
                ]
                return (fake.kind if fake.has(args[0]) else "cpu") == kind
            return func(*args, **kwargs)
        first = next(
            (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None
        )
        fake.making.append(first is not None and fake.has(first))
        try:
            return self._call(func, name, args, kwargs)
        finally:
            fake.making.pop()

    def _call(self, func, name, args, kwargs):
        fake = self.fake
        there = bool(args) and isinstance(args[0], Tensor) and fake.has(args[0])
        if name == "pin_memory":
            return fake.put(args[0].clone(), table=fake.pinned)
        if name in ("to", "cuda", "cpu") and isinstance(args[0], Tensor):
            return self._to(name, *args, **kwargs)
        if there and name in ("numpy", "__array__"):
            raise TypeError(f"can't convert a {fake.kind} tensor to numpy at {_where()}")
        if there and name == "tolist":
            fake.waits["tolist", _where()] += 1
        if there and name == "one_hot":  # there torch does not look at the labels
            classes = fake.put(torch.arange(args[1] if len(args) > 1 else kwargs["num_classes"]))
            with torch._C.DisableTorchFunction():
                return (args[0].unsqueeze(-1) == classes).long()
        if kwargs.get("device") is None:
            out = func(*args, **kwargs)
            return fake.put(out) if there and name == "__deepcopy__" else out
        target = torch.device(kwargs.pop("device"))
        out = func(*args, **kwargs, device=CPU if target.type == fake.kind else target)
        if isinstance(out, Tensor):
            fake.put(out, target.type == fake.kind)
            if target.type == fake.kind and name in ("tensor", "as_tensor"):
                fake.copies[name, _where()] += 1
        return out

    def _to(
        self,
        name,
        tensor,
        *rest,
        device=None,
        dtype=None,
        non_blocking=False,
        copy=False,
        memory_format=torch.preserve_format,
    ):
        fake = self.fake
        flags = []
        if name != "to":
            device = fake.device if name == "cuda" else CPU
        for value in rest:
            if isinstance(value, Tensor):
                device, dtype = fake.device if fake.has(value) else CPU, value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, bool):
                flags.append(value)
            elif value is not None:
                device = torch.device(value)
        non_blocking, copy = (*flags, *(non_blocking, copy)[len(flags) :])
        there = fake.has(tensor)
        goes_there = there if device is None else torch.device(device).type == fake.kind
        out = Tensor.to(
            tensor,
            dtype=dtype or tensor.dtype,
            copy=copy or there != goes_there,
            memory_format=memory_format,
        )
        if there != goes_there:
            fake.put(out, goes_there)
            if not goes_there:
                fake.waits["to the CPU", _where()] += 1
            elif not (non_blocking and fake.has(tensor, fake.pinned)):
                fake.copies["from ordinary memory", _where()] += 1
        return out


@contextmanager
def fake_device(monkeypatch, kind: str = "cuda", count: int = 1):
    """Meanwhile there are `count` devices of that kind; gives the `FakeDevice`."""
    fake = FakeDevice(kind)

    class Autocast(torch.amp.autocast_mode.autocast):
        def __init__(self, device_type: str, *args: object, **options: object) -> None:
            super().__init__("cpu" if device_type == kind else device_type, *args, **options)

    grouped = torch.optim.Optimizer._group_tensors_by_device_and_dtype

    def groups(lists, with_indices=False):
        return {
            (
                (
                    fake.device
                    if any(t is not None and fake.has(t) for t in group[0][0])
                    else device
                ),
                dtype,
            ): group
            for (device, dtype), group in grouped(lists, with_indices).items()
        }

    answers = {
        "is_available": True, "device_count": count, "is_initialized": True, "_lazy_init": None, "current_device": 0,
        "get_device_capability": (9, 0), "get_device_name": "fake", "set_device": None, "set_rng_state": None,
        "is_bf16_supported": True, "synchronize": None,
    }  # fmt: skip
    with monkeypatch.context() as patch:
        if kind == "cuda":
            for name, answer in answers.items():
                patch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
            patch.setattr(torch.cuda, "get_rng_state_all", lambda: [torch.get_rng_state()])
        else:
            patch.setattr(torch.backends.mps, "is_available", lambda: True)
        patch.setattr(torch, "autocast", Autocast)
        patch.setattr(
            torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(groups)
        )
        with _Calls(fake), _Operators(fake):
            yield fake
