"""What a user's own code may change of the whole process, restored after it has run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def surroundings_kept() -> Iterator[list[str]]:
    """Restore the working directory and torch's defaults after the context.

    Paths of a config and of a command line are relative to the working directory, and all parts of
    the project count on float32, the CPU and gradients where they ask for nothing else. The list
    that the context gives then holds the names of what was changed.
    """
    folder = _working_directory()
    defaults = _torch_defaults()
    changed: list[str] = []
    try:
        yield changed
    finally:
        if folder is not None and _working_directory() != folder:
            os.chdir(folder)
            changed.append("the working directory")
        for name, value in _torch_defaults().items():
            if value != defaults[name]:
                _restore(name, defaults[name])
                changed.append(f"torch's {name}")


def _working_directory() -> Path | None:
    # The folder may have been removed.
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None


def _torch_defaults() -> dict[str, Any]:
    # At the top of the file it would make every config import torch.
    import torch

    try:
        device = torch.get_default_device()
    except (RuntimeError, AssertionError):
        # This machine does not have it.
        device = None
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": device,
        "grad mode": torch.is_grad_enabled(),
    }


def _restore(name: str, value: Any) -> None:
    import torch

    if name == "default dtype":
        torch.set_default_dtype(value)
    elif name == "grad mode":
        torch.set_grad_enabled(value)
    else:
        # None takes the default device away. The CPU as one would slow every call of torch.
        torch.set_default_device(None if value == torch.device("cpu") else value)
