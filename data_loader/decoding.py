"""Decode one image file to pixels: uint8 `(3, H, W)` for RGB, or `(1, H, W)` for gray."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from base.errors import DataError
from base.text import first_line

# The number of the tag in TIFF files
BITS_PER_SAMPLE = 258


def decode_image(path: str, shape: tuple[int, int, int], resize: bool) -> Tensor:
    """Decode a file to RGB, or to gray for one channel (ITU-R 601 luma).

    16-bit gray is divided by 257 and rounded, so that 65,535 becomes 255. 16-bit color keeps its
    high byte, as PIL reads it. 32-bit floats and integers are refused, because their range is
    unknown. An alpha channel is dropped, so transparent pixels show their stored color. The EXIF
    orientation is ignored, except in TIFF, where PIL applies it. Only the first of several frames
    is read. Alpha, orientation and frames are treated as in torchvision's `ImageFolder`.

    Args:
        path: the file.
        shape: `(C, H, W)`, with 1 or 3 channels.
        resize: True resizes the shorter side to H (bilinear with antialiasing) and crops the center
            H x H, the usual evaluation transform. False expects a file of H x W.

    Returns:
        uint8 of `shape`.

    Raises:
        DataError: the file cannot be decoded, its pixels have no known range, or it has another
            size.
    """
    channels, height, width = shape
    try:
        with Image.open(path) as file:
            image = _with_channels(file, channels)
    # PIL's decoders raise nearly every exception on broken files
    except Exception as error:
        raise _undecodable(path, error) from None
    if resize and image.size != (width, height):
        image = _resize_and_crop(image, height)
    if image.size != (width, height):
        raise DataError(
            f"{path}: is {image.width}x{image.height} pixels, the first training image is"
            f" {width}x{height}: set data_loader.args.image_size to bring all images to one size"
        )
    return torch.from_numpy(np.array(image).reshape(height, width, channels).transpose(2, 0, 1))


def image_size(path: str) -> tuple[int, int]:
    """Read `(height, width)` of an image file from its header.

    Raises:
        DataError: the file is not an image.
    """
    try:
        with Image.open(path) as file:
            return file.height, file.width
    except Exception as error:
        raise _undecodable(path, error) from None


def _with_channels(image: Image.Image, channels: int) -> Image.Image:
    # PIL's own conversion of these modes would clip values at 255 instead of scaling them.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64)
        largest = 2 ** _bits(image) - 1
        image = Image.fromarray(((255 * values + largest // 2) // largest).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = {"I": "integers", "F": "floats"}[image.mode]
        raise ValueError(
            f"its pixels are 32-bit {kind}, whose range is unknown: save it with 8 or 16 bits"
        )
    # PIL would warn about the transparent colors of a palette, which RGB drops.
    image.info.pop("transparency", None)
    # Gray is made from RGB, so that a color file has the same luma in every mode.
    image = image.convert("RGB")
    if channels == 1:
        return image.convert("L")
    return image


def _bits(image: Image.Image) -> int:
    """Return how many of the 16 or more bits of a gray pixel are used."""
    # PIL scales every depth to 16 bits, except for the 12 bits of a TIFF.
    tags = getattr(image, "tag_v2", {})
    return tags.get(BITS_PER_SAMPLE, (16,))[0]


def _resize_and_crop(image: Image.Image, side: int) -> Image.Image:
    width, height = image.size
    shorter = min(width, height)
    # Truncated and rounded as in torchvision's Resize and CenterCrop
    size = (int(side * width / shorter), int(side * height / shorter))
    image = image.resize(size, Image.Resampling.BILINEAR)
    left = round((image.width - side) / 2)
    top = round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def _undecodable(path: str, error: Exception) -> DataError:
    if isinstance(error, OSError) and Path(path).is_symlink() and not Path(path).exists():
        target = str(Path(path).readlink())
        return DataError(f"{path}: is a broken link to {target!r}")
    # The message below starts with the path.
    reason = first_line(error).replace(f" {path!r}", "")
    return DataError(f"{path}: cannot be decoded as an image ({reason})")
