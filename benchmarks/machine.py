"""The hardware and versions of a measurement, without the names of machines, users or folders."""

import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F

from base.distributed.launch import available_cpus
from base.precision import choose_precision
from base.run_folder.environment import environment

PEERS = ("torchvision", "torchattacks", "foolbox")

PRODUCT = 2048
"""Rows and columns of the matrices of `matrix_products`."""
PRODUCTS = 2
"""How many products a side of `matrix_products` computes in one call."""
PRODUCT_FLOPS = 2 * PRODUCTS * PRODUCT**3
"""Multiplications and additions in one call of a side of `matrix_products`."""


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, cores, threads in use, memory in GiB, GPU, whether bf16 is native, versions and
    commit, as plain values.
    """
    found = environment()
    return {
        "cpu": found["cpu"],
        "cores": available_cpus(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory(),
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "native_bf16": choose_precision("auto", device) == "bf16",
        "python": found["python"],
        "torch": torch.__version__,
        **{name: _version(name) for name in PEERS},
        "commit": found["commit"],
        "uncommitted_files": bool(found["uncommitted_files"]),
    }


def describe(values: dict[str, Any]) -> str:
    """Hardware and versions on one line."""
    processor = values["gpu"] or values["cpu"]
    threads = f"{values['threads']} threads on {values['cores']} cores, {values['memory_gib']} GiB"
    bf16 = "bf16" if values["native_bf16"] else "no bf16"
    versions = ", ".join(
        f"{name} {values[name] or 'missing'}" for name in ("python", "torch", *PEERS)
    )
    commit = (values["commit"] or "unknown")[:10]
    if values["uncommitted_files"]:
        commit += " with changes"
    return f"{processor}, {threads}, {bf16}; {versions}; commit {commit}"


def matrix_products(device: torch.device) -> dict[str, Callable[[], object]]:
    """Sides for `timing.compare` that multiply large square matrices in float32.

    The same product is computed in two ways, as torch hands them to different libraries: as a
    matrix product (MKL on the CPU) and as a 1x1 convolution (oneDNN). The faster one is the peak
    that a network can be compared with.
    """
    first, second = torch.rand(2, PRODUCT, PRODUCT, device=device)
    image = first.view(1, PRODUCT, 1, PRODUCT).to(memory_format=torch.channels_last)
    kernels = second.view(PRODUCT, PRODUCT, 1, 1)

    def multiply() -> None:
        for _ in range(PRODUCTS):
            torch.mm(first, second)

    def convolve() -> None:
        with torch.no_grad():
            for _ in range(PRODUCTS):
                F.conv2d(image, kernels)

    return {"matrix product": multiply, "1x1 convolution": convolve}


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        # Windows and some Unixes do not know these names.
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
