"""Adversarial images of an evaluation, kept on disk while it runs and written to an `.npz` file at
its end."""

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

# The number of images that are read back at a time.
CHUNK = 256


class AdversarialImages:
    """The images that an evaluation has found, in a file of rows (position, pixels). Memory holds
    one batch of them.

    Args:
        rows: the file. It is created, or continued if there are `known` images.
        images: a batch of images of the shape and type of those that will be appended.
        known: int64 `(n,)`, the positions of the images that an interrupted evaluation has verdicts
            on.

    Attributes:
        complete: whether the file held all `known` images. If it did not, it is empty now.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, rows: Path, images: Tensor, known: Tensor) -> None:
        self.rows = rows
        pixels = images[:0].cpu().numpy()
        self._row = np.dtype([("position", "<i8"), ("pixels", pixels.dtype, pixels.shape[1:])])
        with writing(rows):
            kept = np.empty(0, self._row)
            if len(known) > 0 and rows.exists():
                # An interruption may have left rows whose verdicts were not written any more.
                kept = self._read()[: len(known)]
            self.complete = np.array_equal(np.sort(kept["position"]), known.sort().values.numpy())
            size = 0
            if self.complete:
                size = len(known) * self._row.itemsize
            with rows.open("ab") as file:
                file.truncate(size)

    def _read(self) -> np.ndarray:
        count = self.rows.stat().st_size // self._row.itemsize
        # An empty file cannot be mapped
        if count == 0:
            return np.empty(0, self._row)
        return np.memmap(self.rows, self._row, mode="r", shape=(count,))

    def append(self, positions: Tensor, images: Tensor) -> None:
        """Append images `(n, C, H, W)` and their positions `(n,)`; they are on disk when the call
        returns.

        Raises:
            ConfigError: the disk is full.
        """
        rows = np.empty(len(images), self._row)
        rows["position"] = positions.numpy()
        rows["pixels"] = images.cpu().numpy()
        with writing(self.rows), self.rows.open("ab") as file:
            file.write(rows.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def save(self, path: Path, verdicts: Verdicts, more: Mapping[str, np.ndarray]) -> None:
        """Write the images of all processes, in the order of `verdicts`, to `path`, with the
        verdicts and `more` arrays. Every process has to call this; the first writes.

        Raises:
            ConfigError: the file cannot be written; an older one stays as it was.
        """
        chunks = self._chunks(verdicts.position)
        if not is_primary():
            # Iterating sends this process's images to the first one.
            for _ in chunks:
                pass
            return
        pixels = self._row["pixels"]
        header = {
            "descr": npy.dtype_to_descr(pixels.base),
            "fortran_order": False,
            "shape": (len(verdicts), *pixels.shape),
        }
        # The target of a symbolic link is replaced, not the link.
        target = Path(os.path.realpath(path))
        with writing(path), replacing(target) as file, ZipFile(file, "w") as archive:
            for name, values in {**verdicts.arrays(), **more}.items():
                with archive.open(f"{name}.npy", "w") as member:
                    npy.write_array(member, values, allow_pickle=False)
            # `np.savez` would take all images at once. Their size is not known in advance, so the
            # archive has to allow for more than 4 GiB.
            with archive.open("images.npy", "w", force_zip64=True) as member:
                npy.write_array_header_1_0(member, header)
                for chunk in chunks:
                    member.write(chunk.tobytes())

    def _chunks(self, positions: Tensor) -> Iterator[np.ndarray]:
        """Yield the pixels of all processes' images at ascending `positions` `(N,)`, `CHUNK` images
        at a time. Every process has to iterate."""
        own = self._read()
        for chunk in positions.split(CHUNK):
            chosen = np.flatnonzero(np.isin(own["position"], chunk.numpy()))
            rows = np.concatenate(all_gather_object(own[chosen]))
            yield rows["pixels"][rows["position"].argsort()]
