"""Adversarial images of an evaluation, kept on the disk while it runs and put into an `.npz` file
at its end."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from zipfile import ZipFile

import numpy as np
from numpy.lib import format as npy
from torch import Tensor

from base.atomic import replacing
from base.distributed import all_gather_object, is_primary
from base.output import writing
from evaluation.verdicts import Verdicts

AT_A_TIME = 256
"""Images that are read back at a time."""


class AdversarialImages:
    """The images that an evaluation has found, in a file of rows (position, pixels). Memory holds
    one batch of them.

    Args:
        rows: the file. It is created, or continued where there are `known` images.
        images: a batch of the images to come, for their shape and type.
        known: positions `(n,)` of the images that an interrupted evaluation has verdicts on.

    Attributes:
        complete: whether the file held all `known` images. Where it did not, it is empty now.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, rows: Path, images: Tensor, known: Tensor) -> None:
        self.rows = rows
        pixels = images[:0].cpu().numpy()
        self._row = np.dtype([("position", "<i8"), ("pixels", pixels.dtype, pixels.shape[1:])])
        with writing(rows):
            there = self._read() if len(known) and rows.exists() else np.empty(0, self._row)
            kept = there[: len(known)]
            self.complete = np.array_equal(np.sort(kept["position"]), known.sort().values.numpy())
            size = len(known) * self._row.itemsize if self.complete else 0
            with rows.open("ab") as file:
                file.truncate(size)

    def _read(self) -> np.ndarray:
        count = self.rows.stat().st_size // self._row.itemsize
        if count == 0:
            return np.empty(0, self._row)
        return np.memmap(self.rows, self._row, mode="r", shape=(count,))

    def append(self, positions: Tensor, images: Tensor) -> None:
        """Keep some images `(n, C, H, W)` and their positions `(n,)`; they are on the disk when the
        call ends.

        Raises:
            ConfigError: the disk is full.
        """
        rows = np.empty(len(images), self._row)
        rows["position"], rows["pixels"] = positions.numpy(), images.cpu().numpy()
        with writing(self.rows), self.rows.open("ab") as file:
            file.write(rows.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def save(self, path: Path, verdicts: Verdicts, more: Mapping[str, np.ndarray]) -> None:
        """Write the images of all processes, in the order of `verdicts`, to `path`, with the
        verdicts and `more` arrays; the first process writes.

        Raises:
            ConfigError: it cannot be written; the old file, where there is one, stays.
        """
        chunks = self._chunks(verdicts.position)
        if not is_primary():
            # they send, and the first process writes
            for _ in chunks:
                pass
            return
        pixels = self._row["pixels"]
        header = {
            "descr": npy.dtype_to_descr(pixels.base),
            "fortran_order": False,
            "shape": (len(verdicts), *pixels.shape),
        }
        place = Path(os.path.realpath(path))
        with writing(path), replacing(place) as file, ZipFile(file, "w") as archive:
            for name, values in {**verdicts.arrays(), **more}.items():
                with archive.open(f"{name}.npy", "w") as member:
                    npy.write_array(member, values, allow_pickle=False)
            with archive.open("images.npy", "w", force_zip64=True) as member:
                npy.write_array_header_1_0(member, header)
                for chunk in chunks:
                    member.write(chunk.tobytes())

    def _chunks(self, positions: Tensor) -> Iterator[np.ndarray]:
        """The pixels of all processes' images at ascending `positions` `(N,)`, `AT_A_TIME` of them
        at a time. Every process has to iterate."""
        own = self._read()
        known = own["position"]
        for chunk in positions.split(AT_A_TIME):
            mine = np.flatnonzero(np.isin(known, chunk.numpy()))
            parts = all_gather_object(own[mine])
            rows = np.concatenate(parts)
            yield rows["pixels"][rows["position"].argsort()]
