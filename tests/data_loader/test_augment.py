import numpy as np
import pytest
import torch
import torch.nn.functional as F

from base.distributed import Shard
from data_loader import augment


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    return torch.randint(1, 256, (50, 3, 9, 7), generator=generator(9), dtype=torch.uint8)


def test_crop_is_a_window_of_the_padded_image(images):
    cropped = augment.random_crop(images, 2, generator())
    tops, lefts = torch.randint(0, 5, (2, 50), generator=generator()).tolist()
    for image, result, top, left in zip(images, cropped, tops, lefts, strict=True):
        assert torch.equal(result, F.pad(image, (2, 2, 2, 2))[:, top : top + 9, left : left + 7])
    assert set(tops) == set(lefts) == set(range(5))


def test_crop_of_floats_and_without_padding(images):
    whole = augment.random_crop(images, 2, generator())
    assert torch.equal(
        augment.random_crop(augment.to_float(images), 2, generator()), augment.to_float(whole)
    )
    assert torch.equal(augment.random_crop(images, 0, generator()), images)


@pytest.mark.parametrize(
    ("padding", "height", "width"), [(2, 9, 7), (4, 5, 5), (3, 2, 1), (11, 3, 6)]
)
def test_crop_of_mirrored_images_is_a_window_of_numpys_padding(padding, height, width):
    images = torch.randint(
        0, 256, (40, 2, height, width), generator=generator(3), dtype=torch.uint8
    )
    cropped = augment.random_crop(images, padding, generator(5), mode="reflect")
    tops, lefts = torch.randint(0, 2 * padding + 1, (2, 40), generator=generator(5)).tolist()
    around = [(0, 0), (0, 0), (padding, padding), (padding, padding)]
    padded = torch.from_numpy(np.pad(images.numpy(), around, mode="reflect"))
    for image, result, top, left in zip(padded, cropped, tops, lefts, strict=True):
        assert torch.equal(result, image[:, top : top + height, left : left + width])
    floats = augment.to_float(images)
    assert torch.equal(
        augment.random_crop(floats, padding, generator(5), mode="reflect"),
        augment.to_float(cropped),
    )


def test_flip_mirrors_about_half(images):
    flipped = augment.random_flip(images, generator())
    mirrored = (torch.rand(50, generator=generator()) < 0.5).tolist()
    for image, result, flip in zip(images, flipped, mirrored, strict=True):
        assert torch.equal(result, torch.flip(image, [2]) if flip else image)
    assert 10 < sum(mirrored) < 40


@pytest.mark.parametrize("size", [1, 4, 5, 40])
def test_cutout_overwrites_one_clipped_square(images, size):
    fill = (0.0, 0.5, 1.0)
    pixels = augment.to_float(images)
    cut = augment.cutout(pixels, size, fill, generator())
    draws = generator()
    rows = torch.randint(0, 9, (50, 1), generator=draws).flatten().tolist()
    columns = torch.randint(0, 7, (50, 1), generator=draws).flatten().tolist()
    for image, result, row, column in zip(pixels, cut, rows, columns, strict=True):
        expected = image.clone()
        top, left = row - size // 2, column - size // 2
        area = (
            slice(None),
            slice(max(top, 0), max(top + size, 0)),
            slice(max(left, 0), max(left + size, 0)),
        )
        expected[area] = torch.tensor(fill)[:, None, None]
        assert torch.equal(result, expected)


@pytest.mark.parametrize("size", [1, 4, 7])
def test_cutout_inside_overwrites_a_whole_square_at_every_place(size):
    images = torch.rand(400, 3, 9, 7, generator=generator(2)) + 0.1
    cut = augment.cutout(images, size, (0.0, 0.0, 0.0), generator(), inside=True)
    places = set()
    for image, result in zip(images, cut, strict=True):
        black = (result == 0).all(dim=0)
        rows, columns = black.any(dim=1).nonzero().flatten(), black.any(dim=0).nonzero().flatten()
        top, left = int(rows[0]), int(columns[0])
        places.add((top, left))
        expected = image.clone()
        expected[:, top : top + size, left : left + size] = 0
        assert torch.equal(result, expected)
        assert (len(rows), len(columns)) == (size, size)
    assert len(places) == (10 - size) * (8 - size), "every place is drawn"


def test_cutout_inside_covers_an_image_that_is_smaller_than_the_square(images):
    assert not augment.cutout(
        augment.to_float(images), 9, (0, 0, 0), generator(), inside=True
    ).any()


def test_to_float_is_exact(images):
    pixels = augment.to_float(torch.arange(256, dtype=torch.uint8))
    assert torch.equal(pixels, torch.arange(256) / 255)
    assert pixels.dtype == torch.float32


def test_inputs_are_left_alone_and_draws_repeat(images):
    before = images.clone()
    for function in (
        lambda g: augment.random_crop(images, 4, g),
        lambda g: augment.random_crop(images, 4, g, mode="reflect"),
        lambda g: augment.random_flip(images, g),
        lambda g: augment.cutout(images, 3, (0, 0, 0), g),
        lambda g: augment.cutout(images, 3, (0, 0, 0), g, inside=True),
    ):
        assert torch.equal(function(generator(1)), function(generator(1)))
        assert not torch.equal(function(generator(1)), function(generator(2)))
    augment.to_float(images)
    assert torch.equal(images, before)


def test_shards_of_a_minibatch_are_augmented_as_in_the_whole():
    images = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8)
    for augmented in (
        lambda pixels, share: augment.random_crop(pixels, 2, generator(), share),
        lambda pixels, share: augment.random_crop(pixels, 2, generator(), share, "reflect"),
        lambda pixels, share: augment.random_flip(pixels, generator(), share),
        lambda pixels, share: augment.cutout(
            augment.to_float(pixels), 3, (0.1, 0.2, 0.3), generator(), share
        ),
        lambda pixels, share: augment.cutout(
            augment.to_float(pixels), 3, (0, 0, 0), generator(), share, True
        ),
    ):
        whole = augmented(images, None)
        assert not torch.equal(whole, images)
        for share in (Shard(7, 0, 2), Shard(7, 1, 2), Shard(7, 2, 9)):
            assert torch.equal(augmented(images[share.part], share), whole[share.part])
