from contextlib import suppress
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data_loader.images as images_module
from base.base_data_loader import BaseDataLoader
from base.config.arguments import arguments_of
from base.errors import DataError
from data_loader import (
    DATA_LOADERS,
    DigitsDataLoader,
    ImageFolderDataLoader,
    LabelNoise,
    data_loaders,
    training_data_loader,
)
from data_loader.decoding import decode_image
from data_loader.image_data_loader import ImageDataLoader
from data_loader.images import FileImages, MemoryImages
from data_loader.label_noise import CIFAR10_CLASSES, CIFAR100_FLIPS, explain_rate
from tiny_runs import write_images

AUGMENTED = {"crop_padding": 2, "flip": True, "cutout": 3}


def collect(loader, epoch=1, first_batch=0):
    loader.set_epoch(epoch, first_batch)
    return list(loader)


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(ours, theirs, strict=True)
    )


def folder_loader(folder, **options):
    return ImageFolderDataLoader(
        folder, **{"batch_size": 16, "validation_split": 0.2, **AUGMENTED, **options}
    )


def opened(name, folders):
    """Open the loader of this name on the first folder that has its layout, or without a folder if
    it needs none."""
    argument = arguments_of(DATA_LOADERS[name]).get("data_dir")
    for folder in folders if argument and argument.field.is_required() else [None]:
        with suppress(DataError):
            return DATA_LOADERS[name](
                **({} if folder is None else {"data_dir": folder}),
                batch_size=8,
                validation_split=0.2,
            )
    return pytest.skip(f"{name}: no folder of the tests has its layout")


@pytest.mark.parametrize("name", DATA_LOADERS)
def test_every_loader_of_the_table_keeps_the_contract(name, fake_cifar, session_folder):
    loader = opened(name, (fake_cifar, session_folder))
    assert isinstance(loader, BaseDataLoader)
    validation, test = loader.split_validation(), loader.test_loader()
    for part in (loader, validation, test):
        batches = collect(part)
        assert len(batches) == len(part)
        assert sum(len(labels) for _, labels in batches) == part.n_samples > 0
        for images, labels in batches:
            assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
            assert images.shape[1:] == part.image_shape == loader.image_shape
            assert 0 <= images.min() <= images.max() <= 1
            assert 0 <= labels.min() <= labels.max() < len(part.class_names)
        assert same(batches, collect(part))
    assert same(collect(loader)[1:], collect(loader, first_batch=1)), (
        "an epoch goes on where it was left"
    )


def test_batches_keep_the_contract(session_folder):
    loader = folder_loader(session_folder)
    assert (loader.n_samples, len(loader), loader.num_classes, loader.image_shape) == (
        48,
        3,
        3,
        (3, 8, 8),
    )
    assert loader.class_names == ("ant", "bee", "cow")
    for images, labels in collect(loader):
        assert images.dtype == torch.float32
        assert images.shape == (16, 3, 8, 8)
        assert labels.dtype == torch.int64
        assert 0 <= images.min() <= images.max() <= 1
    validation, test = loader.split_validation(), loader.test_loader()
    assert (validation.n_samples, test.n_samples) == (12, 15)
    assert validation.batch_size == test.batch_size == 256
    assert (validation.mean, validation.std) == (loader.mean, loader.std) == (test.mean, test.std)
    assert validation is loader.split_validation()
    assert validation.test_loader() is test is loader.test_loader() is test.test_loader()
    assert validation.split_validation() is None
    assert loader.clean_labels is None
    assert loader.noise_report() is None


def test_a_subset_holds_the_chosen_images_in_order(session_folder):
    whole = folder_loader(session_folder, noise=LabelNoise("sym", 0.5)).split_validation()
    images, labels = (torch.cat(parts) for parts in zip(*collect(whole), strict=True))
    index = torch.tensor([7, 2, 9, 0])
    part = whole.subset(index)
    found, found_labels = collect(part)[0]
    assert torch.equal(found, images[index])
    assert torch.equal(found_labels, labels[index])
    assert torch.equal(part.clean_labels, whole.clean_labels[index])
    assert part.positions.tolist() == [7, 2, 9, 0]
    assert part.subset(torch.tensor([2])).positions.tolist() == [9], (
        "positions in the whole part, after any number of subsets"
    )
    assert (part.mean, part.class_names, part.n_samples) == (whole.mean, whole.class_names, 4)


def test_a_folder_of_gray_images_has_one_channel_on_request(session_folder):
    gray, color = (
        folder_loader(session_folder, channels=channels, crop_padding=0) for channels in (1, 3)
    )
    assert gray.image_shape == (1, 8, 8)
    assert len(gray.mean) == len(gray.test_loader().std) == 1
    luma = torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)
    images, expected = (next(iter(loader.test_loader()))[0] for loader in (gray, color))
    assert torch.allclose(images[:, 0], (expected * luma).sum(dim=1), atol=1 / 255)
    assert gray.image_digest() != color.image_digest()
    assert collect(gray)[0][0].shape == (16, 1, 8, 8)


@pytest.mark.parametrize("in_memory", [True, False])
def test_files_are_named_by_their_paths_in_the_folder(session_folder, in_memory):
    loader = folder_loader(session_folder, in_memory=in_memory)
    loader.prepare()
    names = loader.sample_names()
    index = loader.label_arrays()["train_index"]
    assert names[0] == f"train/ant/{index[0]:03}.png"
    assert len(names) == loader.n_samples
    test = loader.test_loader()
    assert test.subset(torch.tensor([6, 0])).sample_names() == (
        "test/bee/001.png",
        "test/ant/000.png",
    )
    assert DigitsDataLoader().sample_names() is None


def test_the_last_batch_is_not_dropped(session_folder):
    loader = folder_loader(session_folder, batch_size=20)
    assert [len(labels) for _, labels in loader] == [20, 20, 8]
    assert len(loader) == 3


def test_evaluation_is_neither_shuffled_nor_augmented(session_folder):
    loader = folder_loader(session_folder)
    images, labels = next(iter(loader.test_loader()))
    assert labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    plain = ImageFolderDataLoader(session_folder, shuffle=False)
    everything, _ = next(iter(plain))
    index = loader.label_arrays()["val_index"]
    assert torch.equal(
        next(iter(loader.split_validation()))[0], everything[torch.from_numpy(index)]
    )
    assert torch.equal(next(iter(plain.test_loader()))[0], images)
    assert plain.split_validation() is None


def test_workers_and_memory_do_not_change_batches(session_folder):
    reference = folder_loader(session_folder, in_memory=True)
    for options in (
        {"in_memory": False},
        {"in_memory": False, "num_workers": 2},
        {"in_memory": True, "num_workers": 2},
    ):
        loader = folder_loader(session_folder, **options)
        assert (loader.mean, loader.std) == (reference.mean, reference.std)
        for epoch in (1, 2):
            assert same(collect(loader, epoch), collect(reference, epoch))
        assert same(collect(loader.split_validation()), collect(reference.split_validation()))
        assert same(collect(loader.test_loader()), collect(reference.test_loader()))


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_epoch_continues_where_it_was_interrupted(session_folder, in_memory):
    loader = folder_loader(session_folder, in_memory=in_memory)
    whole = collect(loader, epoch=3)
    assert same(collect(loader, epoch=3, first_batch=1), whole[1:])
    assert collect(loader, epoch=3, first_batch=3) == []
    assert len(loader) == 3


def test_batches_are_a_function_of_seed_and_epoch(session_folder):
    ours, again, other = (folder_loader(session_folder, seed=seed) for seed in (1, 1, 2))
    assert same(collect(ours, 2), collect(again, 2))
    assert not same(collect(ours, 2), collect(ours, 1))
    assert not same(collect(ours, 2), collect(other, 2))
    assert ours.fingerprint() == again.fingerprint() != other.fingerprint()


def test_augmentation_does_what_its_arguments_say():
    pixels = torch.full((40, 3, 6, 10), 200, dtype=torch.uint8)
    labels = np.zeros(40, dtype=np.int64)
    options = {"mean": (0.1, 0.2, 0.3), "std": (1, 1, 1), "batch_size": 40}

    def values(**augmentation):
        loader = ImageDataLoader(MemoryImages(pixels), labels, ["a"], **options, **augmentation)
        ((images, _),) = collect(loader)
        return images

    bright = 200 / 255
    assert values(crop_padding=3).min() == 0
    assert values(crop_padding=3, padding_mode="reflect").min() == pytest.approx(bright), (
        "there are no other pixels"
    )
    assert values(cutout=3)[:, 0].min() == pytest.approx(0.1), "the mean"
    black = values(cutout=3, cutout_fill="black", cutout_inside=True)
    assert (black == 0).sum(dim=(1, 2, 3)).tolist() == [27] * 40, "all squares are whole"


def test_an_iterator_keeps_its_epoch(session_folder):
    loader = folder_loader(session_folder)
    second = collect(loader, 2)
    loader.set_epoch(2)
    iterator = iter(loader)
    loader.set_epoch(3)
    assert same(list(iterator), second)


def test_iterating_leaves_the_global_generator_alone(session_folder):
    loader = folder_loader(session_folder, in_memory=False, num_workers=1)
    state = torch.get_rng_state()
    list(loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_epoch_covers_every_training_image_once(session_folder):
    loader = folder_loader(session_folder, crop_padding=0, flip=False, cutout=0)
    shuffled = torch.cat([images for images, _ in collect(loader)])
    ordered = torch.cat(
        [
            images
            for images, _ in folder_loader(
                session_folder, shuffle=False, crop_padding=0, flip=False, cutout=0
            )
        ]
    )
    sums = shuffled.double().sum(dim=(1, 2, 3)), ordered.double().sum(dim=(1, 2, 3))
    assert not torch.equal(*sums)
    assert torch.equal(sums[0].sort()[0], sums[1].sort()[0])


def test_num_batches_shortens_training_only(session_folder):
    whole, short = folder_loader(session_folder), folder_loader(session_folder, num_batches=2)
    assert (len(short), short.n_samples) == (2, 32)
    assert same(collect(short), collect(whole)[:2])
    assert short.split_validation().n_samples == 12
    assert short.test_loader().n_samples == 15
    assert (
        len(folder_loader(session_folder, num_batches=9)),
        folder_loader(session_folder, num_batches=9).n_samples,
    ) == (
        3,
        48,
    )


def test_mean_and_std_come_from_the_images_used(session_folder):
    loader = folder_loader(session_folder, subset_percent=0.5)
    pixels = loader.images.pixels.numpy() / 255
    assert len(pixels) == 30
    assert loader.mean == pytest.approx(pixels.mean(axis=(0, 2, 3)))
    assert loader.std == pytest.approx(pixels.std(axis=(0, 2, 3)))
    given = folder_loader(session_folder, mean=[0.1, 0.2, 0.3])
    assert given.mean == (0.1, 0.2, 0.3)
    assert given.std == folder_loader(session_folder).std


def test_streamed_statistics_come_from_a_seeded_sample(session_folder, monkeypatch):
    monkeypatch.setattr(training_data_loader, "STATISTICS_SAMPLE", 10)
    ours, again, other = (
        folder_loader(session_folder, in_memory=False, seed=seed) for seed in (1, 1, 2)
    )
    assert ours.mean == again.mean != other.mean
    assert ours.mean == pytest.approx(folder_loader(session_folder, seed=1).mean, abs=0.05)


def test_large_folders_are_streamed(session_folder, monkeypatch):
    """Training and validation images decide for themselves, the test images stay in memory if
    all of them fit."""
    own, image = 48 + 12, 3 * 8 * 8
    for limit, kept, test_kept in (
        (75, True, True),
        (74, True, False),
        (own, True, False),
        (own - 1, False, False),
    ):
        monkeypatch.setattr(data_loaders, "MEMORY_LIMIT", limit * image)
        loader = folder_loader(session_folder)
        parts = (loader, loader.split_validation(), loader.test_loader())
        assert [isinstance(part.images, MemoryImages) for part in parts] == [kept, kept, test_kept]
    assert isinstance(folder_loader(session_folder, subset_percent=0.5).images, MemoryImages)


def test_only_used_images_are_decoded(folder):
    used = folder_loader(folder, subset_percent=0.5, validation_split=0.0).label_arrays()[
        "train_index"
    ]
    files = sorted((folder / "train").rglob("*.jpg"))
    for position in set(range(1, 8)) - set(used.tolist()):  # the first one gives the size
        files[position].write_bytes(b"broken")
    assert len(next(iter(folder_loader(folder, subset_percent=0.5, validation_split=0.0)))[1]) == 4
    with pytest.raises(DataError, match="cannot be decoded"):
        _ = folder_loader(folder, validation_split=0.0).mean


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_truncated_image_is_one_line(folder, in_memory):
    path = folder / "train" / "ant" / "002.jpg"
    path.write_bytes(path.read_bytes()[:-40])
    given = {"mean": [0.5] * 3, "std": [0.5] * 3, "validation_split": 0.0, "in_memory": in_memory}
    with pytest.raises(DataError, match=r"ant/002\.jpg: cannot be decoded"):
        list(folder_loader(folder, num_workers=1, **given))
    with pytest.raises(DataError, match=r"ant/002\.jpg: cannot be decoded"):
        _ = folder_loader(folder, in_memory=in_memory, validation_split=0.0).mean


def read_all(loader):
    """Prepare all parts, as a run does."""
    for part in (loader, loader.split_validation(), loader.test_loader()):
        part.prepare()
    list(loader)


def test_streamed_images_are_decoded_once_before_they_are_evaluated(folder, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        "data_loader.images.decode_image",
        lambda path, *rest: decoded.append(path) or decode_image(path, *rest),
    )
    given = {"mean": [0.5] * 3, "std": [0.5] * 3, "validation_split": 0.25, "in_memory": False}
    loader = folder_loader(folder, **given)
    for part, count in ((loader, 0), (loader.split_validation(), 2), (loader.test_loader(), 4)):
        decoded.clear()
        part.prepare()
        assert len(decoded) == len(set(decoded)) == count
    for name, number in (("test/bee/001.jpg", 1), ("train/ant/003.jpg", 0)):
        broken = folder / name
        whole = broken.read_bytes()
        broken.write_bytes(whole[:60])
        loader = folder_loader(folder, **given, num_workers=number)
        with pytest.raises(DataError, match=rf"{broken}: cannot be decoded"):
            read_all(loader)
        broken.write_bytes(whole)


def test_image_size_brings_everything_to_one_size(session_folder):
    loader = folder_loader(session_folder, image_size=5)
    assert loader.image_shape == (3, 5, 5)
    assert next(iter(loader))[0].shape == (16, 3, 5, 5)
    assert next(iter(loader.test_loader()))[0].shape == (15, 3, 5, 5)


def test_noise_reaches_training_and_validation_but_not_test(session_folder):
    noise = LabelNoise("sym", 0.5, "exclusive")
    loader, clean = folder_loader(session_folder, noise=noise), folder_loader(session_folder)
    arrays, clean_arrays = loader.label_arrays(), clean.label_arrays()
    for part, count in (("train", 24), ("val", 6)):
        assert np.array_equal(arrays[f"{part}_index"], clean_arrays[f"{part}_index"])
        assert np.array_equal(arrays[f"{part}_clean_label"], clean_arrays[f"{part}_label"])
        assert np.sum(arrays[f"{part}_label"] != arrays[f"{part}_clean_label"]) == count
    assert all(array.dtype == np.int64 for array in clean_arrays.values())
    assert arrays["transition_matrix"].shape == (3, 3)
    validation = loader.split_validation()
    assert validation.clean_labels.tolist() == arrays["val_clean_label"].tolist()
    assert next(iter(validation))[1].tolist() == arrays["val_label"].tolist()
    assert loader.clean_labels is None  # it is shuffled
    assert loader.test_loader().clean_labels is None
    report = loader.noise_report()
    assert (report["asked_rate"], report["train_rate"], report["val_rate"]) == (0.5, 0.5, 0.5)
    assert loader.fingerprint() != clean.fingerprint()


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        (
            LabelNoise("sym", 0.6),
            "(trainer.noise_law: inclusive); with trainer.noise_law: exclusive it",
        ),
        (LabelNoise("sym", 0.6, "exclusive"), None),
        (
            LabelNoise("sym", 0.001, "exclusive"),
            "0.001, but 0.02083 of the training labels have changed: there",
        ),
    ],
)
def test_a_rate_that_differs_from_percent_is_explained(session_folder, noise, words):
    loader = folder_loader(session_folder, noise=noise)
    warning = loader.noise_warning()
    assert warning is None if words is None else words in warning
    assert folder_loader(session_folder).noise_warning() is None


def test_rates_of_asymmetric_laws_are_explained():
    few = explain_rate(LabelNoise("asym", 0.4), CIFAR10_CLASSES, 0.2)
    assert few == (
        "trainer.percent is 0.4, but 0.2 of the training labels have changed: "
        "the law changes labels of 5 of the 10 classes only"
    )
    assert explain_rate(LabelNoise("asym", 0.4), sorted(CIFAR100_FLIPS), 0.402) is None
    assert explain_rate(LabelNoise("sym", 0.4), ("a", "b"), 0.361) is None
    assert explain_rate(LabelNoise("sym", 0.4), ("a", "b"), 0.359) is not None
    assert explain_rate(LabelNoise("file", file="x"), ("a", "b"), 0.3) is None


def test_noise_can_leave_validation_clean(session_folder):
    loader = folder_loader(session_folder, noise=LabelNoise("sym", 0.5, on_validation=False))
    arrays = loader.label_arrays()
    assert np.array_equal(arrays["val_label"], arrays["val_clean_label"])
    assert loader.split_validation().clean_labels is None
    assert loader.noise_report()["val_rate"] == 0


def test_unshuffled_training_knows_its_clean_labels(session_folder):
    loader = folder_loader(
        session_folder, noise=LabelNoise("sym", 0.5), shuffle=False, num_batches=2
    )
    assert loader.clean_labels.tolist() == loader.label_arrays()["train_clean_label"][:32].tolist()


def test_a_noise_file_is_indexed_by_original_positions(session_folder, tmp_path):
    clean = np.repeat(np.arange(3), 20)
    labels = clean.copy()
    labels[::4] = (labels[::4] + 1) % 3
    np.save(tmp_path / "noise.npy", labels)
    loader = folder_loader(
        session_folder,
        subset_percent=0.5,
        noise=LabelNoise("file", file=str(tmp_path / "noise.npy")),
    )
    arrays = loader.label_arrays()
    assert np.array_equal(arrays["train_label"], labels[arrays["train_index"]])
    assert np.array_equal(arrays["val_label"], labels[arrays["val_index"]])
    assert loader.noise_report()["asked_rate"] is None


def test_validation_does_not_depend_on_the_subset(session_folder):
    index = [
        folder_loader(session_folder, subset_percent=p).label_arrays()["val_index"]
        for p in (0.1, 0.5, 1.0)
    ]
    assert np.array_equal(index[0], index[1])
    assert np.array_equal(index[0], index[2])


@pytest.mark.parametrize(
    ("name", "n_train", "classes"),
    [("CIFAR10DataLoader", 90, 10), ("CIFAR100DataLoader", 100, 100)],
)
def test_cifar_loaders(fake_cifar, name, n_train, classes):
    loader = DATA_LOADERS[name](
        fake_cifar, 32, validation_split=0.1, noise=LabelNoise("asym", 0.4), **AUGMENTED
    )
    assert (loader.n_samples, loader.num_classes, loader.image_shape) == (
        n_train,
        classes,
        (3, 32, 32),
    )
    assert loader.mean == loader.default_mean
    assert loader.std == loader.default_std
    assert sum(len(labels) for _, labels in loader) == n_train
    assert loader.test_loader().n_samples == classes
    assert loader.noise_report()["train_rate"] > 0


def test_digits_need_no_folder_and_keep_their_test_set():
    ours, other = (
        DigitsDataLoader(seed=1, validation_split=0.1),
        DigitsDataLoader("anywhere", seed=2, subset_percent=0.1),
    )
    assert ours.image_shape == (3, 32, 32)
    assert same(collect(ours.test_loader()), collect(other.test_loader()))
    assert ours.n_samples + ours.split_validation().n_samples + ours.test_loader().n_samples == 1797


def test_labels_follow_their_images():
    pixels = torch.arange(100, dtype=torch.uint8).reshape(100, 1, 1, 1).repeat(1, 3, 2, 2)
    options = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "batch_size": 7, "shuffle": True}
    loader = ImageDataLoader(
        MemoryImages(pixels), np.arange(100), list(map(str, range(100))), **options
    )
    seen = []
    for images, labels in loader:
        assert (images[:, 0, 0, 0] * 255).round().long().tolist() == labels.tolist()
        seen += labels.tolist()
    assert sorted(seen) == list(range(100))
    assert seen != sorted(seen)


def repaint(file):
    """Change the color of one corner. The size of the file stays the same if its format does not
    compress."""
    image = Image.open(file)
    image.putpixel((0, 0), tuple(255 - value for value in image.getpixel((0, 0))))
    image.save(file)


@pytest.mark.parametrize("suffix", ["bmp", "png"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_digests_depend_on_images_but_not_on_their_folder(tmp_path, in_memory, suffix):
    for part, count in (("train", 6), ("test", 2)):
        write_images(tmp_path / "data" / part, dict.fromkeys("wxyz", count), (10, 7), suffix)

    def digests(folder):
        loader = ImageFolderDataLoader(folder, 4, validation_split=0.3, in_memory=in_memory)
        attacked = loader.test_loader().data_digest()
        return {**loader.image_fingerprints(), "attacked images": attacked}

    first = digests(tmp_path / "data")
    assert set(first) == {"training images", "test images", "attacked images"}
    (tmp_path / "data").rename(tmp_path / "moved")
    assert digests(tmp_path / "moved") == first
    for file in sorted((tmp_path / "moved" / "train" / "x").iterdir()):  # trained on, or held out
        before = file.read_bytes()
        repaint(file)
        now = digests(tmp_path / "moved")
        assert [part for part in first if now[part] != first[part]] == ["training images"], file
        file.write_bytes(before)
    repaint(next((tmp_path / "moved" / "test" / "z").iterdir()))
    now = digests(tmp_path / "moved")
    changed = [part for part in first if now[part] != first[part]]
    assert changed == ["test images", "attacked images"]
    # Reports compare models whose images were kept in memory with others
    in_memory = not in_memory
    assert digests(tmp_path / "moved")["attacked images"] == now["attacked images"]
    before = digests(tmp_path / "moved")
    for part in ("train", "test"):
        for name, new in ("w_", "xw", "_x"):
            (tmp_path / "moved" / part / name).rename(tmp_path / "moved" / part / new)
    assert digests(tmp_path / "moved")["attacked images"] != before["attacked images"], "labels"


def test_the_digest_of_many_files_reads_every_nth_and_all_sizes(tmp_path, monkeypatch):
    write_images(tmp_path / "data", {"x": 9}, (5, 5), "bmp")
    files = FileImages(
        tuple(map(str, sorted((tmp_path / "data" / "x").iterdir()))), (3, 5, 5), resize=False
    )
    size = Path(files.paths[0]).stat().st_size
    monkeypatch.setattr(images_module, "FINGERPRINT_BYTES", 3 * size)
    first, changes = files.digest(), []
    for path in files.paths:
        before = Path(path).read_bytes()
        repaint(path)
        changes.append(files.digest() != first)
        Path(path).write_bytes(before)
    assert changes == [number % 3 == 0 for number in range(9)]
    with Path(files.paths[4]).open("ab") as file:
        file.write(b"x")
    assert files.digest() != first
    Path(files.paths[4]).unlink()
    with pytest.raises(DataError, match=r"004.bmp: cannot be read: No such file"):
        files.digest()


def test_the_default_fingerprint_depends_on_the_labels(session_folder):
    loader = folder_loader(session_folder)
    assert BaseDataLoader.image_fingerprints(loader) == {}
    other = folder_loader(session_folder, noise=LabelNoise("sym", 0.5))
    assert BaseDataLoader.fingerprint(loader) == BaseDataLoader.fingerprint(
        folder_loader(session_folder)
    )
    assert BaseDataLoader.fingerprint(loader) != BaseDataLoader.fingerprint(other)


def test_noise_of_validation_labels_is_drawn_independently():
    """One generator for both halves would pick the same places of each."""
    noise = LabelNoise("sym", 0.5, "exclusive")
    loader = DATA_LOADERS["DigitsDataLoader"](batch_size=32, validation_split=0.5, noise=noise)
    arrays = loader.label_arrays()
    train, val = (
        arrays[f"{part}_label"] != arrays[f"{part}_clean_label"] for part in ("train", "val")
    )
    n = min(len(train), len(val))
    assert np.mean(train[:n] & val[:n]) == pytest.approx(0.25, abs=0.05)


def test_every_batch_of_every_epoch_has_an_augmentation_of_its_own():
    """All images are the same one, so that batches differ by the draws of their augmentation."""
    pixels = torch.arange(192, dtype=torch.uint8).reshape(1, 3, 8, 8).repeat(24, 1, 1, 1)
    options = {"mean": (0, 0, 0), "std": (1, 1, 1), "batch_size": 8}
    for augmentation in ({"crop_padding": 2}, {"flip": True}, {"cutout": 3}):
        loader = ImageDataLoader(
            MemoryImages(pixels), np.zeros(24, np.int64), ["a"], **options, **augmentation
        )
        batches = [images for epoch in (1, 2) for images, _ in collect(loader, epoch)]
        assert len(batches) == 6
        assert not any(torch.equal(*pair) for pair in combinations(batches, 2))
