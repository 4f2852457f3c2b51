"""The C library's memory allocator, set up for tensors on the CPU."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
"""Parameters of glibc's `mallopt`, numbered as in malloc.h."""


def keep_freed_memory() -> None:
    """Let this process keep the memory that tensors free, for the tensors that come next.

    By default glibc takes each large block from the system and gives it back as soon as it is
    freed, and the system clears every page of the next one. A tensor of 32 MiB (the first layers of
    a ResNet on 128 images) then takes 15 ms to fill instead of 2, and a training step with ConvNorm
    a quarter longer (see benchmarks/README.md). The peak of resident memory stays the same; below
    the peak, nothing is given back before the process ends.

    This changes the whole process, so only commands call it, not functions that others import.
    Other C libraries are left alone, and so is an environment that sets up the allocator itself,
    with `MALLOC_...` or with `glibc.malloc...` in `GLIBC_TUNABLES`.
    """
    set_by_user = any(name.startswith("MALLOC_") for name in os.environ)
    set_by_user = set_by_user or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or set_by_user:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    # Large blocks come from the heap, too, and the heap never shrinks.
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
