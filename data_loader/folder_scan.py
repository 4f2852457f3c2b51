"""Which image files lie in folders of classes: each file once, however often links lead to it."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from base.errors import DataError

KEY = "data_loader.args.data_dir"

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""torchvision's. To import them from there takes seconds, as torchvision imports torch's
compiler."""

FOREIGN = ("__MACOSX", "@eaDir", "lost+found")
"""Folders that operating systems put beside files; they count as hidden."""

MOST_TYPES = 5
"""Types of skipped files that are listed by name."""


@dataclass(frozen=True)
class Place:
    """Where a file was found first: its part of the data set, its class, and its path."""

    part: str
    label: str
    path: str


class FolderScan:
    """Finds the images of a data set, part by part.

    Hidden files and folders, files of other types than torchvision's, and files beside the class
    folders are skipped and counted. A file that is reached twice within one class, through links,
    is taken once; a file in two classes, or in two parts, is refused.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[int, int] | str, Place] = {}
        self._skipped: Counter[str] = Counter()
        self._types: Counter[str] = Counter()

    def scan(
        self, folder: Path, expected: str
    ) -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray]:
        """Class names, the paths of their images, and int64 labels.

        Class names are sorted, images by class, then by folder, then by name.

        Args:
            folder: holds a folder for every class.
            expected: what messages say should be there.

        Raises:
            DataError: there is no class, a class without images, a link to nothing, a folder that
                may not be read, or a file in two places.
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
        """One line that counts what was left out; None where nothing was."""
        parts = [f"{count} {what}" for what, count in self._skipped.items()]
        if self._types:
            # suffixes come from file names, which may hold anything
            most = [f"{count} {suffix!r}" for suffix, count in self._types.most_common(MOST_TYPES)]
            more = ", ..." if len(self._types) > MOST_TYPES else ""
            parts.insert(0, f"{self._types.total()} of other types ({', '.join(most)}{more})")
        return f"skipped files and folders: {', '.join(parts)}" if parts else None

    def _count_beside_classes(self, folder: Path) -> None:
        for entry in _entries(str(folder)):
            if is_hidden(entry.name):
                self._skipped["hidden"] += 1
            elif leads_to(entry) != "folder":
                self._skipped["beside the class folders"] += 1

    def _images(self, part: Path, label: str) -> list[str]:
        """The images of one class at any depth, sorted by folder, then by name."""
        found: list[tuple[str, str]] = []
        waiting, visited = [str(part / label)], set()
        while waiting:
            folder = waiting.pop()
            status = os.stat(folder)  # noqa: PTH116 - in a loop over many folders
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
            waiting += reversed(below)
        return [os.path.join(folder, name) for folder, name in sorted(found)]  # noqa: PTH118

    def _is_new_image(self, entry: os.DirEntry, place: Place) -> bool:
        kind = leads_to(entry)
        if not entry.name.lower().endswith(IMAGE_TYPES):
            check_link(Path(entry.path))
            self._types[Path(entry.name).suffix.lower()] += 1
            return False
        if kind == "nothing":
            # the error comes where it is decoded: a subset may not need it
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
    """The names of the class folders in `folder`, sorted.

    Raises:
        DataError: one of them is a link to nothing.
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
    """Whether a name is of a file or folder that is not meant to be seen."""
    return name.startswith(".") or name in FOREIGN


def leads_to(entry: os.DirEntry) -> str:
    """What is at an entry, or at the end of its links: `folder`, `file`, `nothing` or `else`."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:  # links in a circle
        return "nothing"
    return "nothing" if entry.is_symlink() else "else"


def check_link(path: Path) -> None:
    """Do nothing, unless `path` is a link whose target is missing.

    Raises:
        DataError: it is.
    """
    if path.is_symlink() and not path.exists():
        raise DataError(
            f"{KEY}: {str(path)!r} is a link to {str(path.readlink())!r}, which leads nowhere"
        )


def _entries(folder: str) -> Iterator[os.DirEntry]:
    """The entries of a folder, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            return iter(sorted(entries, key=lambda entry: entry.name))
    except OSError as error:
        raise DataError(f"{KEY}: {folder!r} cannot be read: {error.strerror}") from None


def _identity(entry: os.DirEntry) -> tuple[int, int] | str:
    """What all names of one file have in common."""
    status = entry.stat()
    if status.st_ino == 0:
        # some file systems number nothing
        return os.path.realpath(entry.path)
    return status.st_dev, status.st_ino
