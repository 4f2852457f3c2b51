"""Explain why torch cannot read a file as a checkpoint, and what would make it readable.

torch's own messages are not shown if they mention `weights_only`, because they advise reading the
file in a way that may run code from it.
"""

import re
import zipfile
from typing import BinaryIO

from torch.serialization import get_unsafe_globals_in_checkpoint

from base.text import first_line, one_line

HEAD_BYTES = 4096
"""The number of bytes that are read to recognize the kind of a file."""
SIGNATURES = {
    b"version https://git-lfs": "a git-lfs pointer; fetch the file itself with `git lfs pull`",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"BZh": "a bzip2 archive; unpack it",
    b"\xfd7zXZ": "an xz archive; unpack it",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"\x89HDF": "an HDF5 file, as Keras writes it; only files written by torch.save are read",
    b"\x93NUMPY": "a NumPy array; only files written by torch.save are read",
}
"""The first bytes of files that people mistake for checkpoints, and descriptions of the files."""
SAVE_WEIGHTS = "torch.save(model.state_dict(), 'weights.pth')"
MAX_NAMES = 3
"""The number of classes and files that a message names."""
NEWEST_PROTOCOL = 2
"""The newest pickle protocol that torch's safe reader takes, which torch.save writes by default."""


def explain(file: BinaryIO, error: Exception) -> str:
    """Explain why `torch.load` raised `error` for an open file, in one sentence about "it"."""
    file.seek(0)
    head = file.read(HEAD_BYTES)
    if not head:
        return "it is empty; copy or fetch it again"
    if not any(head) and _is_zero(file):
        return "it holds only zero bytes, as an interrupted copy does; fetch it again"
    for signature, what in SIGNATURES.items():
        if head.startswith(signature):
            return f"it is {what}"
    # The first member's header has the signature of a tar archive
    if head[257:262] == b"ustar":
        return "it is a tar archive; unpack it"
    # Safetensors begins with the length of its JSON header
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30:
        return (
            "it is a safetensors file; write it as"
            " torch.save(safetensors.torch.load_file('FILE'), 'weights.pth') and give that file"
        )
    text = _as_text(head)
    if text is not None:
        return _explain_text(text)
    if head.startswith(b"PK"):
        names = _names_in_zip(file)
        if not any(name.endswith("/data.pkl") for name in names):
            inside = ", ".join(one_line(name, 40) for name in names[:MAX_NAMES])
            return f"it is a zip archive of other files ({inside or 'none'}); unpack it"
        if any("/code/" in name or name.endswith("/constants.pkl") for name in names):
            return (
                "it is a TorchScript archive; write its weights alone, as torch.save("
                "torch.jit.load('FILE').state_dict(), 'weights.pth'), and give that file"
            )
    classes = _unsafe_classes(file, error)
    if classes:
        return _explain_classes(classes)
    protocol = _pickle_protocol(file, head)
    if protocol > NEWEST_PROTOCOL:
        return (
            f"it was written with pickle protocol {protocol}, and only {NEWEST_PROTOCOL} is read;"
            f" save it again without the argument pickle_protocol: {SAVE_WEIGHTS}"
        )
    reason = ""
    # Messages of other exceptions are about the internals of pickle
    is_torchs = isinstance(error, RuntimeError | MemoryError)
    if is_torchs and str(error) and "weights_only" not in str(error):
        reason = f" ({one_line(first_line(error), 200)})"
    return f"it is damaged, or torch.save did not write it{reason}; copy or fetch it again"


def _is_zero(file: BinaryIO) -> bool:
    file.seek(0)
    while chunk := file.read(1 << 20):
        if any(chunk):
            return False
    return True


def _as_text(head: bytes) -> str | None:
    """Return the first bytes of a file as text; None if they are not printable text."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        # The last character may have been cut in the middle
        if len(head) < HEAD_BYTES or error.start < HEAD_BYTES - 3:
            return None
        text = head[: error.start].decode()
    if all(character.isprintable() or character.isspace() for character in text):
        return text
    return None


def _explain_text(text: str) -> str:
    text = text.strip()
    if text.lower().startswith(("<!doctype html", "<html", "<head", "<script")):
        return "it is an HTML page, such as a download's login page; fetch the file itself"
    lines = text.splitlines() or [""]
    first = one_line(lines[0], 40)
    return (
        f"it is a text file that begins with {first!r}; only files written by torch.save are read"
    )


def _names_in_zip(file: BinaryIO) -> list[str]:
    file.seek(0)
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.namelist()
    except Exception:
        # A damaged archive can make the reader raise any exception
        return []


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
    if any(name.startswith("torch.nn.modules.") for name in classes):
        found += "; it seems to be a pickled model"
    return f"{found}; whoever wrote it can save its weights alone: {SAVE_WEIGHTS}"


def _pickle_protocol(file: BinaryIO, head: bytes) -> int:
    """Return the protocol of a pickle, or of the one in torch's zip archive; 0 without either."""
    if head.startswith(b"PK"):
        file.seek(0)
        try:
            with zipfile.ZipFile(file) as archive:
                name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                with archive.open(name) as pickled:
                    head = pickled.read(2)
        except Exception:
            # A damaged archive can make the reader raise any exception
            return 0
    # Since protocol 2 a pickle begins with the opcode PROTO and the number
    if len(head) > 1 and head[:1] == b"\x80":
        return head[1]
    return 0
