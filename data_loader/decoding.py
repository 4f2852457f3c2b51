"""One image file to pixels: uint8 `(3, H, W)`, RGB, or `(1, H, W)`, gray."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from base.errors import DataError

BITS_PER_SAMPLE = 258
"""The number of TIFF's tag."""


def decode_image(path: str, shape: tuple[int, int, int], resize: bool) -> Tensor:
    """One file as uint8 `shape`, converted to RGB, or with one channel to gray (ITU-R 601 luma).

    With `resize`, the shorter side becomes H (bilinear with antialiasing, as PIL does it) and the
    center H x H is cut out, the usual evaluation transform; otherwise the file must be H x W.

    Grayscale of 16 bits is divided by 257 and rounded, so that 65,535 becomes 255; color of 16
    bits keeps its high byte, as PIL reads it. Floats and integers of 32 bits are refused: nothing
    says which range they have. An alpha channel is dropped, so transparent pixels show the color
    that is stored for them. The EXIF orientation is not applied, but for TIFF, where PIL applies it
    itself. Of several frames the first is taken. Alpha, orientation and frames are as in
    torchvision's `ImageFolder`.

    Raises:
        DataError: the file cannot be decoded, its pixels have no known range, or it has another
            size.
    """
    channels, height, width = shape
    try:
        with Image.open(path) as file:
            image = _with_channels(file, channels)
    except Exception as error:  # PIL's decoders raise nearly everything on broken files
        raise _undecodable(path, error) from None
    if resize and image.size != (width, height):
        image = _resize_and_crop(image, height)
    if image.size != (width, height):
        raise DataError(
            f"{path}: is {image.width}x{image.height} pixels, the first training image is {width}x{height}: "
            "set data_loader.args.image_size to bring all images to one size"
        )
    return torch.from_numpy(np.array(image).reshape(height, width, channels).transpose(2, 0, 1))


def image_size(path: str) -> tuple[int, int]:
    """`(height, width)` of an image file, from its header.

    Raises:
        DataError: it is not an image.
    """
    try:
        with Image.open(path) as file:
            return file.height, file.width
    except Exception as error:
        raise _undecodable(path, error) from None


def _with_channels(image: Image.Image, channels: int) -> Image.Image:
    # PIL's own conversion of these modes would cut values at 255 instead of scaling them.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64)
        largest = 2 ** _bits(image) - 1
        image = Image.fromarray(((255 * values + largest // 2) // largest).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = {"I": "integers", "F": "floats"}[image.mode]
        raise ValueError(
            f"its pixels are 32-bit {kind}, whose range is unknown: save it with 8 or 16 bits"
        )
    # PIL would print a warning about the transparent colors of a palette, which RGB does not have
    image.info.pop("transparency", None)
    image = image.convert("RGB")
    return image.convert("L") if channels == 1 else image


def _bits(image: Image.Image) -> int:
    """Bits of a gray pixel that are used: PIL reads TIFF's 12 bits as 16, and scales all others."""
    tags = getattr(image, "tag_v2", {})
    return tags.get(BITS_PER_SAMPLE, (16,))[0]


def _resize_and_crop(image: Image.Image, side: int) -> Image.Image:
    width, height = image.size
    shorter = min(width, height)
    image = image.resize(
        (int(side * width / shorter), int(side * height / shorter)), Image.Resampling.BILINEAR
    )
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def _undecodable(path: str, error: Exception) -> DataError:
    if isinstance(error, OSError) and Path(path).is_symlink() and not Path(path).exists():
        return DataError(
            f"{path}: is a link to {str(Path(path).readlink())!r}, which leads nowhere"
        )
    reason = (str(error).splitlines() or [type(error).__name__])[0].replace(f" {path!r}", "")
    return DataError(f"{path}: cannot be decoded as an image ({reason})")
