"""One image file to pixels: uint8 `(3, H, W)`, RGB."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from base.errors import DataError


def decode_image(path: str, shape: tuple[int, int, int], resize: bool) -> Tensor:
    """One file as uint8 `(3, H, W)`, converted to RGB.

    With `resize`, the shorter side becomes H (bilinear with antialiasing, as PIL does it) and the centre H x H is cut out, the
    usual evaluation transform; otherwise the file must be H x W.

    Raises:
        DataError: the file cannot be decoded, or has another size.
    """
    _, height, width = shape
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except Exception as error:  # PIL's decoders raise nearly everything on broken files
        raise DataError(f"{path}: cannot be decoded as an image ({_reason(error, path)})") from None
    if resize and image.size != (width, height):
        image = _resize_and_crop(image, height)
    if image.size != (width, height):
        raise DataError(
            f"{path}: is {image.width}x{image.height} pixels, the first training image is {width}x{height}: "
            "set data_loader.args.image_size to bring all images to one size"
        )
    return torch.from_numpy(np.array(image).transpose(2, 0, 1))


def image_size(path: str) -> tuple[int, int]:
    """`(height, width)` of an image file, from its header.

    Raises:
        DataError: it is no image.
    """
    try:
        with Image.open(path) as file:
            return file.height, file.width
    except Exception as error:
        raise DataError(f"{path}: cannot be decoded as an image ({_reason(error, path)})") from None


def _resize_and_crop(image: Image.Image, side: int) -> Image.Image:
    width, height = image.size
    shorter = min(width, height)
    image = image.resize((int(side * width / shorter), int(side * height / shorter)), Image.Resampling.BILINEAR)
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def _reason(error: Exception, path: str) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].replace(f" {path!r}", "")
