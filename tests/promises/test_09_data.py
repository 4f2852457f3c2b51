"""Promise 9: nothing of a data set is unpickled or unpacked before its md5 is right; truncated,
mis-shaped and mis-labeled data is refused in one line that names the file."""

import io
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image, ImageFile

from base.errors import DataError
from data_loader.datasets import LOCK, read_cifar, read_image_folder
from data_loader.decoding import decode_image
from data_loader.noise_file import read_noise_file
from tiny_runs import write_images

CIFAR = {10: torchvision.datasets.CIFAR10, 100: torchvision.datasets.CIFAR100}


def refused(read, *named):
    """Call `read`, which must raise an error of one line that contains all these words."""
    try:
        read()
    except DataError as error:
        text = str(error)
    except Exception as error:
        raise AssertionError(f"not a DataError but {error!r}") from None
    else:
        raise AssertionError(f"taken, although damaged: {named}")
    assert "\n" not in text
    for words in named:
        assert str(words) in text
    return text


def is_file(path, md5=None):
    """Replaces torchvision's `check_integrity`, without the check."""
    return Path(path).is_file()


def files_of(num_classes, folder):
    source = CIFAR[num_classes]
    names = [name for name, _ in (*source.train_list, *source.test_list)] + [
        source.meta["filename"]
    ]
    return [folder / source.base_folder / name for name in names]


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def check_no_pickle_runs_before_its_md5(folder):
    canary, cases = folder.parent / "canary", 0
    for num_classes, source in CIFAR.items():
        archive = folder / source.filename
        read_cifar(num_classes, folder, train=True)
        for path in files_of(num_classes, folder):
            whole = path.read_bytes()
            hidden = archive.rename(folder / "hidden")
            path.write_bytes(pickle.dumps(Malicious(canary), protocol=2))
            for train in (True, False):
                refused(lambda: read_cifar(num_classes, folder, train), path, "md5")  # noqa: B023
                assert not canary.exists()
                cases += 1
            hidden.rename(archive)
            if path.name != source.meta["filename"]:
                read_cifar(num_classes, folder, train=True)  # replaced from the archive
                assert path.read_bytes() == whole
                cases += 1
            path.write_bytes(whole)
    return cases


def test_a_malicious_pickle_in_place_of_any_cifar_file_is_not_run(fake_cifar, no_network):
    assert check_no_pickle_runs_before_its_md5(fake_cifar) == 2 * (7 + 3) + 6 + 2


def test_the_check_can_fail_for_pickles(fake_cifar, no_network, monkeypatch):
    read_cifar(10, fake_cifar, train=True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", is_file)
    with pytest.raises(AssertionError):
        check_no_pickle_runs_before_its_md5(fake_cifar)
    assert (fake_cifar.parent / "canary").exists()


def check_no_archive_is_unpacked_before_its_md5(folder):
    archive = folder / CIFAR[10].filename
    whole, generator = archive.read_bytes(), np.random.default_rng(0)
    evil = io.BytesIO()
    with tarfile.open(fileobj=evil, mode="w:gz") as tar:
        for name in (
            "cifar-10-batches-py/data_batch_1",
            "../evil",
            f"{folder.parent}/evil_absolute",
        ):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    damaged = [
        evil.getvalue(),
        b"",
        b"text",
        *(whole[:length] for length in generator.integers(0, len(whole), 20)),
    ]
    for position in generator.integers(0, len(whole), 20):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << generator.integers(8)
        damaged.append(bytes(flipped))
    before = everything_in(folder.parent)
    for content in damaged:
        archive.write_bytes(content)
        refused(lambda: read_cifar(10, folder, train=True), archive, "md5", CIFAR[10].tgz_md5)
        assert everything_in(folder.parent) == before
    return len(damaged)


def everything_in(folder):
    return {path for path in folder.rglob("*") if path.name != LOCK}


def test_a_damaged_or_hostile_archive_is_not_unpacked(fake_cifar, no_network):
    assert check_no_archive_is_unpacked_before_its_md5(fake_cifar) == 43


def test_the_check_can_fail_for_archives(fake_cifar, no_network, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.utils, "check_integrity", is_file)
    with pytest.raises(AssertionError):
        check_no_archive_is_unpacked_before_its_md5(fake_cifar)


def check_bit_rot_of_cifar_is_noticed(folder, cases):
    generator = np.random.default_rng(9)
    for source in CIFAR.values():
        (folder / source.filename).unlink()
    for case in range(cases):
        num_classes = 10 if case % 2 else 100
        files = files_of(num_classes, folder)
        path = files[generator.integers(len(files))]
        whole = path.read_bytes()
        position = int(generator.integers(len(whole)))
        rotten = bytearray(whole)
        rotten[position] ^= 1 << generator.integers(8)
        path.write_bytes(whole[:position] if case % 4 < 2 else rotten)
        refused(lambda: read_cifar(num_classes, folder, bool(case % 3)), path, "md5")  # noqa: B023
        path.write_bytes(whole)
    for num_classes in CIFAR:
        read_cifar(num_classes, folder, train=True)


def test_400_flips_and_cuts_of_cifar_files_are_all_errors(fake_cifar, no_network):
    for num_classes in CIFAR:
        read_cifar(num_classes, fake_cifar, train=True)
    check_bit_rot_of_cifar_is_noticed(fake_cifar, 400)


def test_the_check_can_fail_for_bit_rot(fake_cifar, no_network, monkeypatch):
    for num_classes in CIFAR:
        read_cifar(num_classes, fake_cifar, train=True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", is_file)
    with pytest.raises(AssertionError):
        check_bit_rot_of_cifar_is_noticed(fake_cifar, 400)


def check_damaged_image_files_are_named(folder):
    """Every length that a file can be cut to, in three formats, and a flipped bit in every byte of
    a PNG: refused, or the pixels are the right ones. (JPEG and BMP have no sum that would tell a
    flipped bit.)"""
    pixels, cases = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8), 0
    for suffix in ("png", "jpg", "bmp"):
        path = folder / f"image.{suffix}"
        Image.fromarray(pixels).save(path)
        whole, good = path.read_bytes(), decode_image(str(path), (3, 8, 8), resize=False)
        damaged = [whole[:length] for length in range(len(whole))]
        if suffix == "png":
            for position in range(len(whole)):
                damaged.append(
                    whole[:position]
                    + bytes([whole[position] ^ 1 << position % 8])
                    + whole[position + 1 :]
                )
        for content in damaged:
            path.write_bytes(content)
            reasons = []
            try:
                read = decode_image(str(path), (3, 8, 8), resize=False)
            except DataError as error:
                reasons.append(str(error))
            else:
                assert torch.equal(read, good), f"other pixels were taken from a damaged {suffix}"
            assert all(reason.startswith(f"{path}: ") and "\n" not in reason for reason in reasons)
        cases += len(damaged)
    return cases


def test_a_cut_image_of_any_length_and_a_flipped_bit_in_a_png_are_errors(tmp_path):
    assert check_damaged_image_files_are_named(tmp_path) > 1000


def test_the_check_can_fail_for_image_files(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(AssertionError):
        check_damaged_image_files_are_named(tmp_path)


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>404 not found</html>"),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Malicious(path.parent / "canary"))),
    "too wide": lambda path: Image.new("RGB", (9, 8)).save(path),
    "too high": lambda path: Image.new("RGB", (8, 9)).save(path),
    "a link to nowhere": lambda path: (path.unlink(), path.symlink_to("nowhere.png")),
}


def check_damaged_folders_are_named(folder):
    def fresh():
        shutil.rmtree(folder, ignore_errors=True)
        write_images(folder / "train", {"ant": 3, "bee": 3})
        write_images(folder / "test", {"ant": 1, "bee": 1})

    cases = 0
    for damage in DAMAGE.values():
        for part, name in (
            (0, "train/bee/001.png"),
            (0, "train/bee/002.png"),
            (1, "test/ant/000.png"),
        ):
            for num_workers in (0, 2):
                fresh()
                damage(folder / name)
                parts = read_image_folder(folder, None, num_workers)
                refused(lambda: parts[part].images.in_memory(torch.device("cpu")), folder / name)  # noqa: B023
                assert not list(folder.rglob("canary"))
                cases += 1
    structures = {
        "a class more": (lambda: write_images(folder / "test", {"cow": 1}), "cow"),
        "a class less": (lambda: shutil.rmtree(folder / "test" / "bee"), "bee"),
        "another name": (
            lambda: (folder / "test" / "bee").rename(folder / "test" / "Bee"),
            "Bee, bee",
        ),
        "an empty class": (lambda: (folder / "train" / "cow").mkdir(), "train/cow"),
        "no classes": (
            lambda: (shutil.rmtree(folder / "train"), (folder / "train").mkdir()),
            folder / "train",
        ),
        "no test": (lambda: shutil.rmtree(folder / "test"), folder / "test"),
        "a file for a folder": (
            lambda: (shutil.rmtree(folder / "test"), (folder / "test").touch()),
            folder / "test",
        ),
    }
    for change, named in structures.values():
        fresh()
        change()
        refused(lambda: read_image_folder(folder, None), "data_loader.args.data_dir", named)
        cases += 1
    return cases


def test_damaged_folders_are_named(tmp_path):
    assert check_damaged_folders_are_named(tmp_path / "set") == 7 * 3 * 2 + 7


def test_the_check_can_fail_for_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "data_loader.images.decode_image",
        lambda path, shape, resize: torch.zeros(shape, dtype=torch.uint8),
    )
    with pytest.raises(AssertionError):
        check_damaged_folders_are_named(tmp_path / "set")


def check_mislabeled_noise_files_are_named(folder):
    clean = np.arange(200) % 10
    noisy = np.where(np.arange(200) < 60, (clean + 1) % 10, clean)
    arrays = {
        "too short": noisy[:-1],
        "too long": np.append(noisy, 0),
        "square": noisy.reshape(20, 10),
        "too high": np.where(np.arange(200) == 77, 10, noisy),
        "negative": np.where(np.arange(200) == 77, -1, noisy),
        "of another order": np.sort(noisy),
        "of floats": noisy.astype(np.float64),
        "not a number": np.where(np.arange(200) == 77, np.nan, noisy),
        "of words": noisy.astype(str),
    }
    cases = 0
    for suffix in (".npy", ".pt"):
        path, canary = folder / f"noise{suffix}", folder / "canary"
        save = np.save if suffix == ".npy" else lambda path, array: torch.save(array, path)
        for array in arrays.values():
            save(path, array)
            refused(lambda: read_noise_file(str(path), None, clean, 10), path)  # noqa: B023
            cases += 1
        save(path, noisy)
        whole = path.read_bytes()
        cut = [whole[: len(whole) * tenth // 10] for tenth in range(1, 10)]
        for content in (b"", b"text", pickle.dumps(Malicious(canary)), *cut):
            path.write_bytes(content)
            refused(lambda: read_noise_file(str(path), None, clean, 10), path)  # noqa: B023
            cases += 1
        path.unlink()
        refused(lambda: read_noise_file(str(path), None, clean, 10), path)  # noqa: B023
        assert not canary.exists()
        cases += 1
    wrong = {"clean_label": np.roll(clean, 1), "worse_label": noisy}
    torch.save(wrong, path)
    refused(lambda: read_noise_file(str(path), "worse_label", clean, 10), path, "clean_label")
    return cases + 1


def test_noise_files_with_wrong_labels_are_named(tmp_path):
    assert check_mislabeled_noise_files_are_named(tmp_path) == 2 * (9 + 12 + 1) + 1


def test_the_check_can_fail_for_noise_files(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "data_loader.noise_file._as_labels", lambda values, *_: np.asarray(values).astype(np.int64)
    )
    with pytest.raises(AssertionError):
        check_mislabeled_noise_files_are_named(tmp_path)
