"""Pixels of decoded files, in every mode."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from base.errors import DataError
from data_loader.decoding import decode_image

WIDTH, HEIGHT = 5, 3
MODES = (
    "1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV",
    "I", "F", "I;16", "I;16L", "I;16B", "I;16N",
)  # fmt: skip
SUFFIXES = ("png", "tif", "pgm")
PIXELS = {
    "1": (b"\xff", (255, 255, 255)),
    "L": (bytes([90]), (90, 90, 90)),
    "LA": (bytes([90, 7]), (90, 90, 90)),
    "RGB": (bytes([10, 200, 30]), (10, 200, 30)),
    "RGBA": (bytes([10, 200, 30, 7]), (10, 200, 30)),
    "RGBX": (bytes([10, 200, 30, 7]), (10, 200, 30)),
    "CMYK": (bytes([245, 55, 225, 0]), (10, 200, 30)),
    # By JFIF's formula: Y + 1.402 (Cr - 128), ...
    "YCbCr": (bytes([100, 140, 120]), (89, 102, 121)),
    "I;16": (np.uint16(20_000).tobytes(), (78, 78, 78)),
    "I;16L": (np.array(50_000, "<u2").tobytes(), (195, 195, 195)),
    "I;16B": (np.array(65_535, ">u2").tobytes(), (255, 255, 255)),
    "I": (np.int32(20_000).tobytes(), (78, 78, 78)),
    "F": (np.float32(0.5).tobytes(), None),
    # L* 50.2 is a luminance of 0.186, which sRGB writes as 0.468
    "LAB": (bytes([128, 0, 0]), (119, 119, 119)),
}
"""Mode -> the bytes of one pixel, and what it is in RGB; None where the file must be refused."""


def image_of(mode):
    if mode in ("P", "PA"):
        image = Image.new(mode, (WIDTH, HEIGHT), 1 if mode == "P" else (1, 7))
        image.putpalette([0, 0, 0, 10, 200, 30])
        return image, (10, 200, 30)
    if mode not in PIXELS:
        return Image.new(mode, (WIDTH, HEIGHT)), (0, 0, 0)
    pixel, expected = PIXELS[mode]
    if mode == "1":
        return Image.new("1", (WIDTH, HEIGHT), 1), expected
    return Image.frombytes(mode, (WIDTH, HEIGHT), pixel * (WIDTH * HEIGHT)), expected


def test_every_mode_has_the_right_pixels_or_is_an_error(tmp_path):
    shape, seen = (3, HEIGHT, WIDTH), set()
    for mode in MODES:
        for suffix in SUFFIXES:
            path = tmp_path / f"{mode.replace(';', '')}.{suffix}"
            image, expected = image_of(mode)
            try:
                image.save(path)
            except (OSError, KeyError):
                continue
            seen.add(mode)
            refused = expected is None or (mode == "I" and suffix == "tif")
            if refused:
                with pytest.raises(
                    DataError, match=rf"{path}: cannot be decoded as an image \("
                ) as caught:
                    decode_image(str(path), shape, resize=False)
                assert "\n" not in str(caught.value)
                continue
            color = torch.tensor(expected, dtype=torch.uint8).reshape(3, 1, 1).expand(shape)
            found = decode_image(str(path), shape, resize=False)
            tolerance = 1 if mode in ("YCbCr", "LAB") else 0
            difference = (found.int() - color.int()).abs().max()
            assert found.dtype == torch.uint8
            assert difference <= tolerance, (
                f"{mode} in .{suffix}: {found[:, 0, 0].tolist()}, expected {expected}"
            )
    assert seen >= set(MODES) - {"La", "RGBa", "HSV", "I;16N"}, "PIL writes no files of these four"


def test_16_bits_are_divided_by_257_and_rounded(tmp_path):
    values = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    for suffix in SUFFIXES:
        path = tmp_path / f"ramp.{suffix}"
        Image.fromarray(values).save(path)
        pixels = decode_image(str(path), (3, 256, 256), resize=False)
        expected = np.floor(values / 257 + 0.5).astype(np.uint8)
        assert np.array_equal(pixels[0].numpy(), expected)
        assert torch.equal(pixels[0], pixels[2])


def test_16_bits_are_scaled_before_they_are_resized(tmp_path):
    Image.fromarray(np.full((40, 24), 30_000, np.uint16)).save(tmp_path / "large.png")
    pixels = decode_image(str(tmp_path / "large.png"), (3, 8, 8), resize=True)
    assert pixels.unique().tolist() == [117]


def test_12_bits_of_a_tiff_go_up_to_4095(tmp_path):
    values = (0, 4095, 2048, 100)
    packed = int("".join(f"{value:012b}" for value in values), 2).to_bytes(6, "big")
    tags = [
        (256, 4),
        (257, 1),
        (258, 12),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 1),
        (279, 6),
    ]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    header = b"II*\0" + struct.pack("<I", 8 + len(packed))
    path = tmp_path / "twelve.tif"
    path.write_bytes(header + packed + struct.pack("<H", len(tags)) + entries + bytes(4))
    assert decode_image(str(path), (3, 1, 4), resize=False)[1].tolist() == [[0, 255, 128, 6]]


def test_transparent_colors_of_a_palette_are_shown_without_a_warning(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2], [2, 1, 0]], dtype=np.uint8), mode="P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "palette.png", transparency=b"\x00\x80\xff")
    pixels = decode_image(str(tmp_path / "palette.png"), (3, 2, 3), resize=False)
    assert pixels[0].tolist() == [[10, 40, 70], [70, 40, 10]]


def test_alpha_is_dropped_and_exif_orientation_is_not_applied(tmp_path):
    colors = np.random.default_rng(0).integers(0, 256, (4, 6, 4), dtype=np.uint8)
    colors[..., 3] = np.arange(24).reshape(4, 6) % 2 * 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(colors).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        assert image.getexif()[0x0112] == 6
    found = decode_image(str(tmp_path / "turned.png"), (3, 4, 6), resize=False)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), colors[..., :3])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "LAB"])
def test_one_channel_is_the_luma_of_rgb(tmp_path, mode):
    image, (red, green, blue) = image_of(mode)
    path = tmp_path / "image.tif"
    image.save(path)
    gray = decode_image(str(path), (1, HEIGHT, WIDTH), resize=False)
    assert gray.shape == (1, HEIGHT, WIDTH)
    assert abs(int(gray[0, 0, 0]) - (0.299 * red + 0.587 * green + 0.114 * blue)) <= 1
