"""Find the image files in folders of classes: each file once, even if several links lead to it.

`datasets.read_image_folder` reads the parts of a data set with one `FolderScan`.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from base.errors import DataError

KEY = "data_loader.args.data_dir"

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Those of torchvision, whose import takes seconds because it loads torch's compiler."""

FOREIGN = ("__MACOSX", "@eaDir", "lost+found")
"""Folders that operating systems create. They count as hidden."""

MOST_TYPES = 5
"""How many types of skipped files a message lists."""


@dataclass(frozen=True)
class Place:
    """Where a file was first found: the part of the data set, the class, the path."""

    part: str
    label: str
    path: str


class FolderScan:
    """Finds the images of a data set, part by part.

    Hidden files and folders, files of other types than `IMAGE_TYPES`, and files beside the class
    folders are skipped and counted. A file that is reached twice within one class, through links,
    counts once. A file in two classes or in two parts is an error.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[int, int] | str, Place] = {}
        self._skipped: Counter[str] = Counter()
        self._types: Counter[str] = Counter()

    def scan(
        self, folder: Path, expected: str
    ) -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray]:
        """Find the images of one part.

        Args:
            folder: holds a folder for every class.
            expected: the layout that messages ask for.

        Returns:
            Class names, sorted; the paths of images, sorted by class, then by folder, then by name;
            and their int64 labels.

        Raises:
            DataError: there is no class, a class has no images, a link is broken, a folder cannot
                be read, or a file is in two places.
        """
        classes = tuple(class_folders(folder))
        if not classes:
            raise DataError(f"{KEY}: {str(folder)!r} has no class folders; {expected}")
        self._count_beside_classes(folder)
        paths: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            found = self._images(folder, name)
            if not found:
                types = " ".join(IMAGE_TYPES)
                raise DataError(
                    f"{KEY}: {str(folder / name)!r} has no images; expected files of type {types}"
                )
            paths += found
            labels += [label] * len(found)
        return classes, tuple(paths), np.array(labels, dtype=np.int64)

    def skipped(self) -> str | None:
        """Count the skipped files in one line; None if there are none."""
        parts = [f"{count} {what}" for what, count in self._skipped.items()]
        if self._types:
            # `repr` escapes control characters, which a file's suffix may hold
            most = [f"{count} {suffix!r}" for suffix, count in self._types.most_common(MOST_TYPES)]
            if len(self._types) > MOST_TYPES:
                most.append("...")
            parts.insert(0, f"{self._types.total()} of other types ({', '.join(most)})")
        if not parts:
            return None
        return f"skipped files and folders: {', '.join(parts)}"

    def _count_beside_classes(self, folder: Path) -> None:
        for entry in _entries(str(folder)):
            if is_hidden(entry.name):
                self._skipped["hidden"] += 1
            elif leads_to(entry) != "folder":
                self._skipped["beside the class folders"] += 1

    def _images(self, part: Path, label: str) -> list[str]:
        """Find the images of one class at any depth, sorted by folder, then by name."""
        found: list[tuple[str, str]] = []
        waiting = [str(part / label)]
        visited = set()
        while waiting:
            folder = waiting.pop()
            status = os.stat(folder)  # noqa: PTH116 - in a loop over many folders
            # A link may lead to a folder above, which would be searched forever
            if (status.st_dev, status.st_ino) in visited:
                self._skipped["repeated through links"] += 1
                continue
            visited.add((status.st_dev, status.st_ino))
            below = []
            for entry in _entries(folder):
                if is_hidden(entry.name):
                    self._skipped["hidden"] += 1
                elif leads_to(entry) == "folder":
                    below.append(entry.path)
                elif self._is_new_image(entry, Place(str(part), label, entry.path)):
                    found.append((folder, entry.name))
            # The last one is searched next, so the first one goes to the end
            waiting += reversed(below)
        return [os.path.join(folder, name) for folder, name in sorted(found)]  # noqa: PTH118

    def _is_new_image(self, entry: os.DirEntry, place: Place) -> bool:
        kind = leads_to(entry)
        if not entry.name.lower().endswith(IMAGE_TYPES):
            check_link(Path(entry.path))
            self._types[Path(entry.name).suffix.lower()] += 1
            return False
        if kind == "nothing":
            # A subset may not need the file, so the error is raised when it is decoded.
            return True
        if kind != "file":
            self._skipped["neither file nor folder"] += 1
            return False
        known = self._places.setdefault(_identity(entry), place)
        if known is place:
            return True
        if (known.part, known.label) != (place.part, place.label):
            raise DataError(
                f"{KEY}: {known.path!r} and {place.path!r} are one file: an image belongs to one "
                "class, and to one of training, validation and test set"
            )
        self._skipped["repeated through links"] += 1
        return False


def class_folders(folder: Path) -> list[str]:
    """Return the names of the class folders in `folder`, sorted.

    Raises:
        DataError: one of them is a broken link.
    """
    names = []
    for entry in _entries(str(folder)):
        if is_hidden(entry.name):
            continue
        if leads_to(entry) == "folder":
            names.append(entry.name)
        check_link(Path(entry.path))
    return names


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden."""
    return name.startswith(".") or name in FOREIGN


def leads_to(entry: os.DirEntry) -> str:
    """Return what an entry or the target of its links is: `folder`, `file`, `nothing` or `else`."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    # Links that lead to each other
    except OSError:
        return "nothing"
    if entry.is_symlink():
        return "nothing"
    # A device, a socket or a pipe
    return "else"


def check_link(path: Path) -> None:
    """Check that `path` is not a broken link.

    Raises:
        DataError: it is a link whose target does not exist.
    """
    if path.is_symlink() and not path.exists():
        target = str(path.readlink())
        raise DataError(f"{KEY}: {str(path)!r} is a broken link to {target!r}")


def _entries(folder: str) -> Iterator[os.DirEntry]:
    """Return the entries of a folder, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            return iter(sorted(entries, key=lambda entry: entry.name))
    except OSError as error:
        raise DataError(f"{KEY}: {folder!r} cannot be read: {error.strerror}") from None


def _identity(entry: os.DirEntry) -> tuple[int, int] | str:
    """Return a value that is equal for all names of one file."""
    status = entry.stat()
    # Some file systems do not number their files
    if status.st_ino == 0:
        return os.path.realpath(entry.path)
    return status.st_dev, status.st_ino
