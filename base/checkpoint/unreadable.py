"""What a file is that torch cannot read as a checkpoint, and what would make it readable.

torch's own messages are never passed on where they speak of `weights_only`: their advice is to read
the file in the way that may run code of it.
"""

import re
import zipfile
from typing import BinaryIO

from torch.serialization import get_unsafe_globals_in_checkpoint

from base.text import first_line, one_line

HEAD = 4096
"""Bytes that are looked at to tell what a file is."""
BEGINNINGS = {
    b"version https://git-lfs": "a git-lfs pointer; fetch the file itself by `git lfs pull`",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"BZh": "a bzip2 archive; unpack it",
    b"\xfd7zXZ": "an xz archive; unpack it",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"\x89HDF": "an HDF5 file, as Keras writes it; only files of torch.save are read",
    b"\x93NUMPY": "a NumPy array; only files of torch.save are read",
}
"""How files that people mistake for checkpoints begin, and what to say of them."""
ALONE = "torch.save(model.state_dict(), 'weights.pth')"
SHOWN = 3
"""Classes and files that a message names."""
NEWEST_PROTOCOL = 2
"""The version of pickle that torch's safe reader takes: the one that torch.save writes unless it is
told otherwise."""


def explain(file: BinaryIO, error: Exception) -> str:
    """One sentence about an open file that `torch.load` has refused with `error`; it begins with
    "it"."""
    file.seek(0)
    head = file.read(HEAD)
    if not head:
        return "it is empty; copy or fetch it again"
    if not any(head) and _is_zero(file):
        return "it holds nothing but zero bytes, as an interrupted copy leaves it; fetch it again"
    for beginning, what in BEGINNINGS.items():
        if head.startswith(beginning):
            return f"it is {what}"
    if head[257:262] == b"ustar":
        return "it is a tar archive; unpack it"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30:
        return (
            "it is a safetensors file; write it as"
            " torch.save(safetensors.torch.load_file('FILE'), 'weights.pth') and give that file"
        )
    text = _as_text(head)
    if text is not None:
        return _of_text(text)
    if head.startswith(b"PK"):
        names = _names_in_zip(file)
        if not any(name.endswith("/data.pkl") for name in names):
            inside = ", ".join(one_line(name, 40) for name in names[:SHOWN])
            return f"it is a zip archive of other files ({inside or 'none'}); unpack it"
        if any("/code/" in name or name.endswith("/constants.pkl") for name in names):
            return (
                "it is a TorchScript archive; write its weights alone, as torch.save("
                "torch.jit.load('FILE').state_dict(), 'weights.pth'), and give that file"
            )
    classes = _unsafe_classes(file, error)
    if classes:
        return _of_classes(classes)
    protocol = _pickle_protocol(file, head)
    if protocol > NEWEST_PROTOCOL:
        return (
            f"it was written with pickle protocol {protocol}, and only {NEWEST_PROTOCOL} is read;"
            f" save it again without the argument pickle_protocol: {ALONE}"
        )
    reason = ""
    if (
        isinstance(error, RuntimeError | MemoryError)
        and "weights_only" not in str(error)
        and str(error)
    ):
        reason = f" ({one_line(first_line(error), 200)})"
    return f"it is damaged, or torch.save has not written it{reason}; copy or fetch it again"


def _is_zero(file: BinaryIO) -> bool:
    file.seek(0)
    while chunk := file.read(1 << 20):
        if any(chunk):
            return False
    return True


def _as_text(head: bytes) -> str | None:
    """The beginning of a text file; None where it is none."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        # the last character may have been cut in the middle
        if len(head) < HEAD or error.start < HEAD - 3:
            return None
        text = head[: error.start].decode()
    is_text = all(character.isprintable() or character.isspace() for character in text)
    return text if is_text else None


def _of_text(text: str) -> str:
    begins = text.strip().lower()
    if begins.startswith(("<!doctype html", "<html", "<head", "<script")):
        return "it is an HTML page, such as a download's login page; fetch the file itself"
    first = one_line(text.strip().splitlines()[0], 40) if begins else ""
    return f"it is a text file that begins with {first!r}; only files of torch.save are read"


def _names_in_zip(file: BinaryIO) -> list[str]:
    file.seek(0)
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.namelist()
    except Exception:  # a damaged archive may make the reader raise anything
        return []


def _unsafe_classes(file: BinaryIO, error: Exception) -> list[str]:
    """Names of what the file would have to import; nothing of it is imported to know them."""
    file.seek(0)
    try:
        names = get_unsafe_globals_in_checkpoint(file)
    except Exception:  # not torch's zip format, or damaged
        names = re.findall(r"GLOBAL (\S+)", str(error))[:1]
        file.seek(0)
        names = names if _ends_in_file(file, names) else []
    # half a name is a sign of damage
    return sorted({one_line(name, 80) for name in names if re.fullmatch(r"\w+(\.\w+)+", name)})


def _ends_in_file(file: BinaryIO, names: list[str]) -> bool:
    """Whether a pickle that names these classes holds the names with their ends: it was not cut in
    them."""
    contents = file.read()
    return all(f"{name.rpartition('.')[2]}\n".encode() in contents for name in names)


def _of_classes(classes: list[str]) -> str:
    shown = ", ".join(classes[:SHOWN])
    if len(classes) > SHOWN:
        shown += f" and {len(classes) - SHOWN} more"
    found = (
        f"it holds objects of {shown}; only tensors and plain values are read, as all else may run"
        " code, and nothing of it was run"
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
    return f"{found}; whoever wrote it can save its weights alone: {ALONE}"


def _pickle_protocol(file: BinaryIO, head: bytes) -> int:
    """The protocol of a pickle, or of the one in torch's zip; 0 where there is none."""
    if head.startswith(b"PK"):
        file.seek(0)
        try:
            with zipfile.ZipFile(file) as archive:
                name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                with archive.open(name) as pickled:
                    head = pickled.read(2)
        except Exception:  # likewise
            return 0
    return head[1] if len(head) > 1 and head[:1] == b"\x80" else 0
