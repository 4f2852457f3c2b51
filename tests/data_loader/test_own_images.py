"""A user's own loaders: what is done around them, what reaches them, and what is refused in one
line."""

from typing import Any

import numpy as np
import pytest
import torch

from base.base_data_loader import BaseDataLoader, Subset
from base.errors import ConfigError, DataError
from data_loader import (
    DigitsDataLoader,
    LabeledImages,
    LabelNoise,
    MemoryImages,
    TrainingDataLoader,
)
from data_loader.contract import check_labels
from data_loader.own_images import build_loader, check_first_batch

OPTIONS = {
    "batch_size": 16,
    "validation_split": 0.2,
    "subset_percent": 0.5,
    "noise": LabelNoise("sym", 0.4),
    "crop_padding": 2,
    "flip": True,
    "cutout": 4,
    "num_workers": 0,
    "pin_memory": False,
    "device": torch.device("cpu"),
    "seed": 3,
}
PLAIN = {"batch_size": 16, "seed": 3, "device": torch.device("cpu")}
DIGITS = {train: DigitsDataLoader().read(train) for train in (True, False)}


class Digits(BaseDataLoader):
    class_names = tuple("0123456789")

    def __init__(self, train: bool = True) -> None:
        self.pixels = DIGITS[train].images.pixels
        self.labels = torch.from_numpy(DIGITS[train].labels)

    def images_at(self, positions):
        return self.pixels[positions]

    def test_loader(self):
        return Digits(train=False)


class Floats(Digits):
    def images_at(self, positions):
        return super().images_at(positions) / 255


class Named(Digits):
    def sample_names(self):
        return [f"{position}.png" for position in range(len(self.labels))]


class Turned(Digits):
    class_names = tuple("9876543210")


class Batched(Digits):
    """Makes its batches itself, in its own order."""

    def order(self, epoch):
        return torch.arange(len(self.labels)).flip(0)


def same(ours, theirs):
    return all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(ours, theirs, strict=True)
    )


def test_images_by_position_are_trained_on_like_images_that_are_read():
    own, known = build_loader("Digits", Digits, OPTIONS), DigitsDataLoader(**OPTIONS)
    pairs = [
        (own, known),
        (own.split_validation(), known.split_validation()),
        (own.test_loader(), known.test_loader()),
    ]
    for ours, theirs in pairs:
        for epoch in (1, 2):
            ours.set_epoch(epoch, first_batch=1)
            theirs.set_epoch(epoch, first_batch=1)
            assert same(ours, theirs)
        assert (ours.mean, ours.std, ours.fingerprint()) == (
            theirs.mean,
            theirs.std,
            theirs.fingerprint(),
        )
    assert own.noise_report() == known.noise_report()
    assert own.noise_report()["train_rate"] > 0.2
    assert own.image_fingerprints().keys() == known.image_fingerprints().keys()


def test_floats_and_bytes_are_the_same_images():
    floats = build_loader("Floats", Floats, {**OPTIONS, "validation_split": 0.0})
    whole = build_loader("Digits", Digits, {**OPTIONS, "validation_split": 0.0})
    assert same(floats, whole)
    assert np.allclose(floats.mean + floats.std, whole.mean + whole.std, atol=1e-6, rtol=0)
    assert floats.image_digest() != whole.image_digest()


def test_a_loader_with_its_own_batches_is_used_as_it_is():
    loader = Named()
    assert (loader.n_samples, loader.num_classes, loader.image_shape, len(loader)) == (
        1438,
        10,
        (3, 32, 32),
        12,
    )
    images, labels = next(iter(loader))
    assert (images.dtype, float(images.max()), len(labels)) == (torch.float32, 1.0, 128)
    loader.set_epoch(1, first_batch=11)
    assert [len(labels) for _, labels in loader] == [1438 - 11 * 128]
    shards = [loader.shard(rank, 3) for rank in range(3)]
    assert isinstance(shards[1], Subset)
    assert torch.cat([shard.positions for shard in shards]).sort().values.equal(loader.positions)
    part = shards[1].subset(torch.tensor([5, 0]))
    assert part.positions.tolist() == [16, 1]
    assert part.sample_names() == ["16.png", "1.png"]
    assert torch.equal(next(iter(part))[0], images[[16, 1]])
    assert loader.label_arrays()["val_index"].tolist() == []
    assert (loader.noise_report(), loader.split_validation(), loader.image_digest()) == (
        None,
        None,
        "",
    )


def test_names_follow_images_into_every_part():
    loader = build_loader("Named", Named, {**PLAIN, "validation_split": 0.2})
    held_out = loader.split_validation()
    index = loader.label_arrays()["val_index"]
    assert held_out.sample_names() == tuple(f"{position}.png" for position in index)
    assert held_out.subset(torch.tensor([3])).sample_names() == (f"{index[3]}.png",)
    assert build_loader("Digits", Digits, PLAIN).sample_names() is None


def test_the_loaders_own_augmentation_comes_first():
    class Inverted(Digits):
        def augmented(self, images, epoch, number, share):
            return 1 - super().augmented(images, epoch, number, share)

    plain, inverted = (
        build_loader("own", make, {**PLAIN, "flip": True}) for make in (Digits, Inverted)
    )
    for (ours, _), (theirs, _) in zip(inverted, plain, strict=True):
        assert torch.equal(ours, 1 - theirs)
    assert same(inverted.test_loader(), plain.test_loader()), "only training images are augmented"


def test_a_loaders_own_validation_images_are_used():
    class WithValidation(Digits):
        def split_validation(self):
            return Digits(train=False)

    loader = build_loader("own", WithValidation, {**PLAIN, "validation_split": 0.2})
    assert loader.names_validation
    assert (loader.n_samples, loader.split_validation().n_samples) == (1438, 359)


def test_arguments_that_a_loader_with_own_batches_does_not_take_are_warnings_or_errors():
    asked = {
        "batch_size": 128,
        "device": torch.device("cpu"),
        "flip": True,
        "cutout": 0,
        "shuffle": False,
    }
    loader = build_loader("Batched", Batched, asked)
    assert type(loader) is Batched
    assert loader.warnings == (
        "augmentation.flip, data_loader.args.shuffle: without effect: Batched does not take them",
    )
    assert torch.equal(next(iter(loader))[1], Digits().labels[-128:].flip(0))
    for name, value, key in [
        ("noise", LabelNoise("sym", 0.4), "trainer.percent"),
        ("validation_split", 0.1, "data_loader.args.validation_split"),
        ("subset_percent", 0.5, "trainer.subset_percent"),
        ("num_batches", 3, "data_loader.args.num_batches"),
        ("batch_size", 64, "data_loader.args.batch_size"),
        ("mean", [0.5] * 3, "data_loader.args.mean"),
    ]:
        with pytest.raises(
            ConfigError, match=rf"^{key}: Batched does not take {name}, so it would have no effect"
        ):
            build_loader("Batched", Batched, {"batch_size": 128, name: value})
        assert build_loader("Digits", Digits, {**PLAIN, name: value})


def test_a_users_training_loader_gets_all_options_of_its_base_class():
    class Closed(TrainingDataLoader):
        def __init__(self, part: str) -> None:
            self.part = part
            super().__init__()

        def read(self, train):
            return DIGITS[train]

    class Open(TrainingDataLoader):
        def __init__(self, part: str, **options: Any) -> None:
            self.part = part
            super().__init__(**options)

        def read(self, train):
            return DIGITS[train]

    assert same(
        build_loader("Open", Open, {"part": "some", **OPTIONS}), DigitsDataLoader(**OPTIONS)
    )
    with pytest.raises(ConfigError, match=r"^trainer\.percent: Closed does not take noise"):
        build_loader("Closed", Closed, {"part": "some", "noise": LabelNoise("sym", 0.4)})
    with pytest.raises(
        ConfigError, match=r"^data_loader\.args\.data_dir: Closed takes no such argument"
    ):
        build_loader("Closed", Closed, {"part": "some", "data_dir": "here"})
    with pytest.raises(
        ConfigError, match=r"^data_loader\.args: Closed: missing a required argument: 'part'$"
    ):
        build_loader("Closed", Closed, {})


def broken(name, method):
    return type("Broken", (Digits,), {name: method})


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        (
            "images_at",
            lambda self, p: self.pixels[p].double(),
            r"Broken\.images_at returns float64; expected float32",
        ),
        (
            "images_at",
            lambda self, p: self.pixels[p].float(),
            r"returns pixels from 0 to 255; expected \[0, 1\]",
        ),
        (
            "images_at",
            lambda self, p: self.pixels[p] / torch.tensor(0.0),
            r"returns pixels from nan to nan",
        ),
        (
            "images_at",
            lambda self, p: self.pixels[p][:, 0],
            r"the shape \(2, 32, 32\); expected \(2, C, H, W\)",
        ),
        (
            "images_at",
            lambda self, p: self.pixels[:5],
            r"the shape \(5, 3, 32, 32\); expected \(2, C, H, W\)",
        ),
        (
            "images_at",
            lambda self, p: self.pixels[p].numpy(),
            r"returns a value of type ndarray; expected a tensor",
        ),
        (
            "images_at",
            lambda self, p: torch.rand(len(p), 3, 8, 8),
            r"different images for the same positions",
        ),
        (
            "images_at",
            lambda self, p: self.pixels[:9][p],
            r"images_at, asked for positions 0 and 1437: IndexError",
        ),
        (
            "images_at",
            lambda self, p: torch.ones(len(p), 3, 8, 8, requires_grad=True),
            r"images that require a gradient",
        ),
        (
            "augmented",
            lambda self, images, *_: 3.0 * images,
            r"Broken returns pixels from 0 to 765; expected \[0, 1\]",
        ),
        (
            "images_at",
            lambda self, p: {}["x"],
            r"Broken\.images_at, asked for positions 0 and 1437: KeyError: 'x'$",
        ),
        (
            "images_at",
            lambda self, p: self.gone if 9 in p else self.pixels[p],
            r"images_at: AttributeError: .*'gone'$",
        ),
        (
            "image_batches",
            lambda self, batches: map(self.images_at, batches[:1]),
            r"`image_batches` does not yield one batch of images for each batch of positions$",
        ),
        (
            "image_batches",
            lambda self, batches: map(self.images_at, [*batches, batches[0]]),
            r"`image_batches` does not yield one batch of images for each batch of positions$",
        ),
        (
            "sample_names",
            lambda self: ["a.png"],
            r"Broken\.sample_names returns 1 names for 1438 labels",
        ),
        ("labels", torch.arange(1438), r"labels: 10 is not in \[0, 10\)"),
        ("labels", torch.rand(1438), r"labels: float32 of the shape \(1438,\); expected integers"),
        ("labels", torch.zeros(0), r"labels: empty"),
        ("default_mean", [0.5], r"Broken\.default_mean: 1 values, but the images have 3 channels$"),
        ("default_std", 0.5, r"Broken\.default_std: 0\.5, but the images have 3 channels$"),
        ("class_names", 10, r"class_names: 10; expected a list of names"),
        ("labels", None, r"Broken: TypeError: object of type 'NoneType' has no len\(\)$"),
        ("test_loader", lambda self: None, r"NoneType: expected a BaseDataLoader from test_loader"),
        (
            "test_loader",
            lambda self: self.gone(),
            r"Broken\.test_loader: AttributeError: .*'gone'$",
        ),
        (
            "test_loader",
            lambda self: Turned(train=False),
            r"Broken: class_names \('9', .* but those that are trained on",
        ),
    ],
)
def test_a_broken_contract_is_one_line(name, method, message):
    def set_before(self, train=True):
        Digits.__init__(self, train)
        if not callable(method):
            setattr(self, name, method)

    kind = broken(name, method)
    kind.__init__ = set_before

    def read():
        loader = build_loader("Broken", kind, PLAIN)
        loader.prepare()
        check_first_batch(loader)
        loader.test_loader()

    with pytest.raises(DataError, match=message) as caught:
        read()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("__len__", lambda self: 3, r"__len__ is 3; expected 12 batches of 128 for n_samples 1438"),
        ("__iter__", lambda self: iter([]), r"yields a NoneType; expected \(images, labels\)"),
        (
            "__iter__",
            lambda self: iter([(self.pixels[:128], self.labels[:128])]),
            r"yields torch.uint8 images",
        ),
        (
            "__iter__",
            lambda self: iter([(self.pixels[:9] / 255, self.labels[:9])]),
            r"shape \(9, 3, 32, 32\)",
        ),
        (
            "__iter__",
            lambda self: iter([(self.pixels[:128] / 255, [0] * 128)]),
            r"labels that are not an int64",
        ),
    ],
)
def test_the_first_batch_of_a_users_loader_is_checked(name, method, message):
    loader = build_loader("Broken", broken(name, method), {"batch_size": 128})
    with pytest.raises(DataError, match=message):
        check_first_batch(loader)


def test_the_result_of_read_is_checked():
    class Own(TrainingDataLoader):
        def read(self, train):
            return pieces

    digits = DIGITS[True]
    pixels, labels, names = digits.images.pixels, digits.labels, digits.class_names
    for images, classes, message in [
        (pixels / 254, labels, r"type: Own returns pixels from 0 to 1\.004; expected \[0, 1\]"),
        (pixels[0], labels, r"the shape \(3, 32, 32\); expected \(B, C, H, W\)"),
        (pixels, labels[1:], r"Own: labels: 1437 of them for 1438 images"),
        (pixels, labels - 1, r"labels: -1 is not in \[0, 10\)"),
    ]:
        pieces = LabeledImages(MemoryImages(images), classes, names)
        with pytest.raises(DataError, match=message):
            build_loader("Own", Own, PLAIN)
    pieces = digits
    loader = build_loader("Own", Own, PLAIN)
    pieces = LabeledImages(MemoryImages(pixels[:, :1]), labels, names)
    with pytest.raises(
        DataError, match=r"of \(1, 32, 32\), but those that are trained on have \(3, 32, 32\)"
    ):
        loader.test_loader()
    with pytest.raises(
        ConfigError, match=r"^data_loader\.args\.std: 3 values, but the images have 1 channels$"
    ):
        build_loader("Own", Own, {**PLAIN, "std": [0.5] * 3})


def test_a_table_entry_that_returns_something_else_is_an_error():
    with pytest.raises(ConfigError, match="makes a list; expected a BaseDataLoader"):
        build_loader("list", lambda batch_size: [batch_size], PLAIN)
    with pytest.raises(ConfigError, match="own takes noise, which is done around a loader"):
        build_loader(
            "own", type("Own", (Digits,), {"__init__": lambda self, noise=None: None}), PLAIN
        )
    with pytest.raises(
        ConfigError, match=r"^data_loader\.args\.data_dir: Digits takes no such argument$"
    ):
        build_loader("Digits", Digits, {**PLAIN, "data_dir": "somewhere"})

    def missing(batch_size):
        raise FileNotFoundError("moons.npz")

    with pytest.raises(
        DataError, match=r"^data_loader\.type: missing: FileNotFoundError: moons\.npz$"
    ):
        build_loader("missing", missing, PLAIN)
    assert check_labels([0, 1, 1], 3, ["a", "b"], "here").tolist() == [0, 1, 1]


def test_read_that_returns_a_tensor_for_images_is_one_line():
    class Bare(TrainingDataLoader):
        def read(self, train):
            return LabeledImages(torch.zeros(4, 1, 2, 2), np.array([0, 1, 0, 1]), ("a", "b"))

    with pytest.raises(
        DataError, match="read: images: Tensor; expected MemoryImages or FileImages"
    ):
        Bare(batch_size=2)
