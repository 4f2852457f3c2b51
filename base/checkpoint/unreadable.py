"""Explain why torch cannot read a file as a checkpoint, and what would make it readable.

torch's own messages are not shown: they are about its internals, or advise reading the file in a
way that may run code from it.
"""

import re
from typing import BinaryIO

from torch.serialization import get_unsafe_globals_in_checkpoint

from base.text import one_line

SIGNATURES = (
    (0, b"version https://git-lfs", "a git-lfs pointer; fetch the file itself with `git lfs pull`"),
    # Behind the length of its JSON header
    (
        8,
        b'{"',
        "a safetensors file; write it as torch.save(safetensors.torch.load_file('FILE'),"
        " 'weights.pth') and give that file",
    ),
)
"""Other files in which weights are shared: bytes, the place where they begin, and a description."""
SAVE_WEIGHTS = "torch.save(model.state_dict(), 'weights.pth')"
MAX_NAMES = 3
"""The number of classes that a message names."""


def explain(file: BinaryIO, error: Exception) -> str:
    """Explain why `torch.load` raised `error` for an open file, in one sentence about "it"."""
    file.seek(0)
    head = file.read(256)
    if not head:
        return "it is empty"
    for start, signature, what in SIGNATURES:
        if head.startswith(signature, start):
            return f"it is {what}"
    # The name of an archive's first file stands at its start
    if head.startswith(b"PK") and b".npy" in head:
        return "it is an archive of NumPy arrays"
    classes = _unsafe_classes(file, error)
    if classes:
        return _explain_classes(classes)
    memory = ""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        memory = ", or it needs more memory than there is"
    return (
        f"it is damaged, or torch.save did not write it with its defaults{memory};"
        f" fetch it again, or save its weights: {SAVE_WEIGHTS}"
    )


def _unsafe_classes(file: BinaryIO, error: Exception) -> list[str]:
    """Return the names of classes that reading the file would import, without importing them."""
    file.seek(0)
    try:
        names = get_unsafe_globals_in_checkpoint(file)
    except Exception:
        # The file is damaged, or a bare pickle, whose first class torch's error names
        names = re.findall(r"GLOBAL (\S+)", str(error))[:1]
        file.seek(0)
        if not _holds_whole_names(file, names):
            names = []
    # Half a name is a sign of damage
    return sorted({one_line(name, 80) for name in names if re.fullmatch(r"\w+(\.\w+)+", name)})


def _holds_whole_names(file: BinaryIO, names: list[str]) -> bool:
    """Return whether a pickle holds these names to their ends, and was not cut within one."""
    contents = file.read()
    # Pickle ends the name of a class with a line break
    return all(f"{name.rpartition('.')[2]}\n".encode() in contents for name in names)


def _explain_classes(classes: list[str]) -> str:
    names = ", ".join(classes[:MAX_NAMES])
    if len(classes) > MAX_NAMES:
        names += f" and {len(classes) - MAX_NAMES} more"
    found = (
        f"it holds objects of {names}; only tensors and plain values are read, because anything"
        " else could run code, and none of it was run"
    )
    if classes == ["argparse.Namespace"]:
        return (
            f"{found}; a Namespace holds values only: write the weights alone in Python, `with"
            " torch.serialization.safe_globals([argparse.Namespace]):"
            " contents = torch.load('FILE', weights_only=True)`, then"
            " torch.save(contents['state_dict'], 'weights.pth') or whichever key holds them,"
            " and give that file"
        )
    return f"{found}; whoever wrote it can save its weights alone: {SAVE_WEIGHTS}"
