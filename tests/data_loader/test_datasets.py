import errno
import fcntl
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torchvision.datasets
import torchvision.transforms.functional as TF
from PIL import Image

from base.errors import DataError
from data_loader.datasets import LOCK, read_cifar, read_digits, read_image_folder
from data_loader.decoding import decode_image
from data_loader.images import MemoryImages, pixel_statistics
from tiny_runs import write_images


def everything(images):
    return images.in_memory(torch.device("cpu")).pixels


@pytest.mark.parametrize(("num_classes", "n_train", "n_test"), [(10, 100, 10), (100, 200, 100)])
def test_cifar_is_unpacked_from_the_archive_and_read(
    fake_cifar, no_network, num_classes, n_train, n_test
):
    for train, n in ((True, n_train), (False, n_test)):
        part = read_cifar(num_classes, fake_cifar, train)
        source = {10: torchvision.datasets.CIFAR10, 100: torchvision.datasets.CIFAR100}[
            num_classes
        ](fake_cifar, train)
        assert part.images.shape == (3, 32, 32)
        assert len(part.images) == len(part.labels) == n
        assert part.images.pixels.is_contiguous()
        assert part.class_names == tuple(source.classes)
        assert part.labels.dtype == np.int64
        image, label = source[n - 1]
        assert torch.equal(part.images.pixels[-1], TF.pil_to_tensor(image))
        assert part.labels[-1] == label


def test_missing_cifar_without_a_network_is_an_error(tmp_path, no_network):
    with pytest.raises(DataError) as caught:
        read_cifar(10, tmp_path / "nothing", train=True)
    message = str(caught.value)
    assert message.startswith("data_loader.args.data_dir: CIFAR-10 is not in '")
    assert "network is unreachable" in message
    assert message.endswith(
        "put cifar-10-python.tar.gz (md5 c58f30108f718f92721af3b95e74349a) there"
    )
    assert "\n" not in message
    with pytest.raises(
        DataError,
        match=r"CIFAR-100.*cifar-100-python\.tar\.gz \(md5 eb9058c3a382ffc7106e4002c42a8d85\)",
    ):
        read_cifar(100, tmp_path / "nothing", train=True)
    assert [path.name for path in (tmp_path / "nothing").iterdir()] == [LOCK]


def test_damaged_cifar_files_are_named(fake_cifar, no_network):
    read_cifar(10, fake_cifar, train=True)
    archive, batch = (
        fake_cifar / "cifar-10-python.tar.gz",
        fake_cifar / "cifar-10-batches-py" / "data_batch_2",
    )
    whole = batch.read_bytes()
    batch.write_bytes(whole[:-10])
    read_cifar(10, fake_cifar, train=True)  # repaired from the archive
    assert batch.read_bytes() == whole
    batch.write_bytes(whole[:-10])
    archive.unlink()
    with pytest.raises(
        DataError,
        match=r"data_dir: CIFAR-10: '.*data_batch_2' is damaged \(its md5 is not .*put cifar-10",
    ):
        read_cifar(10, fake_cifar, train=True)
    batch.write_bytes(whole)
    (batch.parent / "batches.meta").write_bytes(b"")
    with pytest.raises(DataError, match=r"batches\.meta' is damaged"):
        read_cifar(10, fake_cifar, train=True)


@pytest.mark.parametrize("can_lock", [True, False])
def test_processes_that_start_together_unpack_one_after_the_other(
    fake_cifar, no_network, monkeypatch, can_lock
):
    unpack, calls = torchvision.datasets.cifar.download_and_extract_archive, []

    def slowly(*arguments, **named):
        calls.append(arguments)
        time.sleep(0.2)
        unpack(*arguments, **named)

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", slowly)
    if not can_lock:
        monkeypatch.setattr(fcntl, "flock", refuse)
    with ThreadPoolExecutor(3 if can_lock else 1) as pool:
        parts = list(pool.map(lambda _: read_cifar(10, fake_cifar, train=True), range(3)))
    assert len(calls) == 1, "the others find the files"
    assert [len(part.images) for part in parts] == [100] * 3


def test_image_folder_order_labels_and_pixels(session_folder):
    train, test = read_image_folder(session_folder, None)
    assert train.class_names == test.class_names == ("ant", "bee", "cow")
    assert train.labels.tolist() == [0] * 20 + [1] * 20 + [2] * 20
    assert train.images.shape == (3, 8, 8)
    pixels = everything(train.images)
    with Image.open(session_folder / "train" / "bee" / "003.png") as image:
        assert torch.equal(pixels[23], TF.pil_to_tensor(image))
    assert torch.equal(pixels, torch.cat(list(train.images.batches(torch.arange(60).split(7)))))


@pytest.mark.parametrize("size", [(50, 37), (37, 50), (16, 16), (9, 40), (20, 20)])
def test_resizing_equals_torchvision(tmp_path, size):
    write_images(tmp_path, {"a": 1}, size)
    path = tmp_path / "a" / "000.png"
    with Image.open(path) as image:
        expected = TF.pil_to_tensor(TF.center_crop(TF.resize(image, 16), 16))
    assert torch.equal(decode_image(str(path), (3, 16, 16), resize=True), expected)


def test_gray_and_transparent_images_become_rgb(tmp_path):
    for mode in ("L", "RGBA", "1", "CMYK"):
        path = tmp_path / f"{mode}.tif"
        Image.new(mode, (4, 4)).save(path)
        assert decode_image(str(path), (3, 4, 4), resize=False).shape == (3, 4, 4)


@pytest.mark.parametrize("missing", ["", "train", "test"])
def test_missing_folders_are_named(tmp_path, missing):
    write_images(tmp_path / ("train" if missing == "test" else "test"), {"ant": 1})
    target = tmp_path / "absent" if missing == "" else tmp_path
    expected = target if missing == "" else tmp_path / missing
    with pytest.raises(DataError) as caught:
        read_image_folder(target, None)
    message = str(caught.value)
    assert message.startswith(
        f"data_loader.args.data_dir: '{expected}' is not a folder; expected {target}/train/<class>/"
    )


def test_folders_without_classes_or_images_or_with_other_classes(folder):
    (folder / "train" / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"train/empty' has no images; expected files of type \.jpg"
    ):
        read_image_folder(folder, None)
    (folder / "train" / "empty").rmdir()
    write_images(folder / "test", {"wasp": 1})
    with pytest.raises(
        DataError, match=r"test' must have the classes of train: only one of them has wasp"
    ):
        read_image_folder(folder, None)
    (folder / "none" / "train").mkdir(parents=True)
    (folder / "none" / "test").mkdir()
    with pytest.raises(DataError, match="none/train' has no class folders"):
        read_image_folder(folder / "none", None)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_named(folder, workers):
    path = folder / "train" / "bee" / "001.jpg"
    path.write_bytes(path.read_bytes()[:-40])
    train, _ = read_image_folder(folder, None, num_workers=workers)
    with pytest.raises(DataError) as caught:
        everything(train.images)
    assert str(caught.value).startswith(f"{path}: cannot be decoded as an image (")
    assert "\n" not in str(caught.value)
    path.write_bytes(b"text")
    with pytest.raises(
        DataError, match=r"001\.jpg: cannot be decoded as an image \(cannot identify image file\)"
    ):
        list(train.images.batches([torch.tensor([5])]))


def test_a_link_to_itself_is_broken(folder):
    circle = folder / "train" / "bee" / "zzz.jpg"
    circle.symlink_to("zzz.jpg")
    train, _ = read_image_folder(folder, None)
    with pytest.raises(DataError, match=r"is a broken link to 'zzz\.jpg'"):
        everything(train.images)


def test_a_broken_first_image_is_named(folder):
    (folder / "train" / "ant" / "000.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"000\.jpg: cannot be decoded"):
        read_image_folder(folder, None)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_another_size_are_named(folder, workers):
    Image.new("RGB", (9, 8)).save(folder / "test" / "bee" / "000.jpg")
    train, test = read_image_folder(folder, None, num_workers=workers)
    assert len(everything(train.images)) == 8
    message = (
        r"bee/000\.jpg: is 9x8 pixels, the first training image is 8x8:"
        r" set data_loader\.args\.image_size"
    )
    with pytest.raises(DataError, match=message):
        everything(test.images)
    _, test = read_image_folder(folder, 8, num_workers=workers)
    assert len(everything(test.images)) == 4


def test_decoding_leaves_the_global_generators_alone(session_folder):
    train, _ = read_image_folder(session_folder, None, num_workers=1)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    everything(train.images)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_statistics_equal_numpy():
    pixels = torch.randint(
        0, 256, (600, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    pixels[:, 2] = 255
    mean, std = pixel_statistics(MemoryImages(pixels))
    values = pixels.numpy() / 255
    assert mean == pytest.approx(values.mean(axis=(0, 2, 3)))
    assert std[:2] == pytest.approx(values.std(axis=(0, 2, 3))[:2])
    assert std[2] == 1e-3


def test_digits_are_whole_stratified_and_scaled():
    from sklearn.datasets import load_digits

    train, test = read_digits(train=True), read_digits(train=False)
    assert len(train.labels) + len(test.labels) == 1797
    share = np.bincount(test.labels) / np.bincount(load_digits().target)
    assert share == pytest.approx(np.full(10, 0.2), abs=0.005)
    pixels = train.images.pixels
    assert pixels.shape == (len(train.labels), 3, 32, 32)
    assert pixels.min() == 0
    assert pixels.max() == 255
    assert torch.equal(pixels[:, 0], pixels[:, 2])
    assert train.class_names == tuple("0123456789")
