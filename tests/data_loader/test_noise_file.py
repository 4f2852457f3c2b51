"""Which label files are read, and which are accepted as labels of these images."""

import json
import os
import pickle

import numpy as np
import pytest
import torch

from base.errors import DataError
from data_loader import ImageFolderDataLoader, LabelNoise
from data_loader.noise_file import NO_LABEL, chance_agreement, read_noise_file

CLASSES, IMAGES = 7, 2100
RNG = np.random.default_rng(3)
CLEAN = np.sort(RNG.integers(0, CLASSES, IMAGES))


def flipped(clean, classes, rate, seed=0):
    """Change exactly this fraction of the labels, each to another class."""
    rng = np.random.default_rng(seed)
    noisy, picked = clean.copy(), rng.permutation(len(clean))[: int(rate * len(clean))]
    noisy[picked] = (clean[picked] + rng.integers(1, classes, len(picked))) % classes
    return noisy


NOISY = flipped(CLEAN, CLASSES, 0.3)


def read(path, key=None, clean=CLEAN, classes=CLASSES):
    return read_noise_file(str(path), key, clean, classes)


def judged(tmp_path, labels, clean, classes):
    np.save(tmp_path / "labels.npy", labels)
    return read(tmp_path / "labels.npy", None, clean, classes)


# ---- agreement with the data set


def test_chance_is_the_sum_of_products_with_the_deviation_of_random_orders():
    rng = np.random.default_rng(0)
    for shares in ([0.5, 0.5], [0.9, 0.1], [0.6, 0.3, 0.1]):
        first = rng.choice(len(shares), 400, p=shares)
        second = rng.choice(len(shares), 400, p=shares[::-1])
        mean, deviation = chance_agreement(first, second, len(shares))
        found = [np.mean(rng.permutation(second) == first) for _ in range(4000)]
        assert mean == pytest.approx(
            sum(np.mean(first == k) * np.mean(second == k) for k in range(len(shares)))
        )
        assert mean == pytest.approx(np.mean(found), abs=4 * deviation / 4000**0.5)
        assert deviation == pytest.approx(np.std(found), rel=0.05)
    assert chance_agreement(np.array([0]), np.array([0]), 2) == (1, 0)
    assert chance_agreement(np.zeros(9, int), np.arange(9) % 3, 3) == (pytest.approx(1 / 3), 0)


@pytest.mark.parametrize(
    ("classes", "images", "rate"),
    [
        (2, 3000, 0.45),
        (2, 400, 0.35),
        (3, 900, 0.6),
        (5, 2000, 0.72),
        (20, 4000, 0.9),
        (100, 5000, 0.95),
        (2, 10, 0.0),
    ],
)
def test_labels_of_these_images_are_accepted_with_any_noise(tmp_path, classes, images, rate):
    clean = np.random.default_rng(1).integers(0, classes, images)
    noisy = flipped(clean, classes, rate)
    assert np.array_equal(judged(tmp_path, noisy, clean, classes), noisy)


def test_mistakes_between_pairs_and_rare_classes_are_accepted(tmp_path):
    pairs = np.where(np.random.default_rng(2).random(IMAGES) < 0.45, (CLEAN + 1) % CLASSES, CLEAN)
    judged(tmp_path, pairs, CLEAN, CLASSES)
    rare = (np.arange(6000) % 20 == 0).astype(int)
    judged(tmp_path, flipped(rare, 2, 0.2), rare, 2)


@pytest.mark.parametrize("classes", [2, 3, 11, 100])
@pytest.mark.parametrize("seed", [0, 1])
def test_labels_in_another_order_are_errors(tmp_path, classes, seed):
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.ones(classes))
    clean = rng.choice(classes, 3000, p=share)
    with pytest.raises(
        DataError,
        match=r"no more than by chance \([0-9.]+% \+- [0-9.]+% for these class frequencies\)",
    ):
        judged(tmp_path, rng.permutation(flipped(clean, classes, 0.3)), clean, classes)


@pytest.mark.parametrize("images", [1, 2, 97, 100, 331])
def test_labels_that_are_all_the_same_are_errors(tmp_path, images):
    clean = (np.arange(images) * 5 % 7 == 3).astype(int)
    constant = np.full(images, 1 if images < 3 else 0)
    with pytest.raises(DataError, match="no more than by chance"):
        judged(tmp_path, constant, clean, 2)


@pytest.mark.parametrize("classes", [12, 40])
def test_classes_in_another_numbering_are_errors(tmp_path, classes):
    """Folders called 0 to K - 1 sort as words; their labels are the numbers."""
    number = np.array(sorted(map(str, range(classes)))).astype(int)
    clean = np.random.default_rng(4).integers(0, classes, 3000)
    message = (
        r"labels are the data set's own, but 7\d\.\d% would be"
        r" if they stood for other classes \(2 for class "
    )
    with pytest.raises(DataError, match=message):
        judged(tmp_path, flipped(number[clean], classes, 0.25), clean, classes)


def test_two_swapped_classes_are_an_error(tmp_path):
    clean = np.random.default_rng(5).integers(0, 2, 500)
    message = (
        r"but 7\d\.\d% would be if they stood for other classes \(0 for class 1, 1 for class 0"
    )
    with pytest.raises(DataError, match=message):
        judged(tmp_path, 1 - flipped(clean, 2, 0.25), clean, 2)


def test_labels_of_superclasses_are_an_error_also_in_a_file_with_clean_labels(tmp_path):
    clean = np.random.default_rng(6).integers(0, 60, 6000)
    group = np.random.default_rng(7).permutation(np.arange(60) % 12)
    torch.save(
        {"clean_label": clean, "coarse": group[clean], "fine": flipped(clean, 60, 0.4)},
        tmp_path / "both.pt",
    )
    read(tmp_path / "both.pt", "fine", clean, 60)
    with pytest.raises(DataError, match="entry 'coarse': .*or holds other classes"):
        read(tmp_path / "both.pt", "coarse", clean, 60)


# ---- formats


def test_json_lists_and_objects_are_read(tmp_path):
    (tmp_path / "0.3_sym.json").write_text(json.dumps(NOISY.tolist()))
    assert np.array_equal(read(tmp_path / "0.3_sym.json"), NOISY)
    (tmp_path / "o.json").write_text(
        json.dumps({"noise_labels": NOISY.tolist(), "open_noise": [[1, 2]], "rate": 0.3})
    )
    assert np.array_equal(read(tmp_path / "o.json", "noise_labels"), NOISY)
    with pytest.raises(
        DataError,
        match="several arrays; choose one with trainer.noise_key: noise_labels, open_noise, rate",
    ):
        read(tmp_path / "o.json")


@pytest.mark.parametrize(("delimiter", "start"), [(",", ""), (";", "\ufeff"), ("\t", "")])
def test_columns_of_csv_are_read(tmp_path, delimiter, start):
    lines = [delimiter.join(["image", "worse label", "sure"])]
    lines += [
        delimiter.join([f"img_{number}.png", str(label), "0.5"])
        for number, label in enumerate(NOISY)
    ]
    (tmp_path / "labels.csv").write_text(
        start + "\r\n".join(lines) + "\n\n", encoding="utf-8", newline=""
    )
    assert np.array_equal(read(tmp_path / "labels.csv", "worse label"), NOISY)
    with pytest.raises(
        DataError, match="choose one with trainer.noise_key: image, worse label, sure"
    ):
        read(tmp_path / "labels.csv")
    with pytest.raises(DataError, match="entry 'sure': expected integers, but it holds '0.5'"):
        read(tmp_path / "labels.csv", "sure")


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.csv", "label,label\n1,2\n3,4\n", "two of its columns are named 'label'"),
        ("a.json", '{"label": [1, 2], "label": [3, 4]}', "is given twice in one object"),
        ("a.json", "{}", "holds no labels"),
    ],
)
def test_labels_are_read_from_one_place(tmp_path, name, text, reason):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=reason):
        read(tmp_path / name)


def test_a_single_column_needs_no_key(tmp_path):
    numbers = "\n".join(map(str, NOISY))
    (tmp_path / "bare.csv").write_text(numbers)
    (tmp_path / "named.csv").write_text(f"label\n{numbers}\n")
    assert np.array_equal(read(tmp_path / "bare.csv"), NOISY)
    assert np.array_equal(read(tmp_path / "named.csv"), NOISY)
    assert np.array_equal(read(tmp_path / "named.csv", "label"), NOISY)
    with pytest.raises(
        DataError, match="no entry 'labl'; its entries are: label; did you mean 'label'"
    ):
        read(tmp_path / "named.csv", "labl")


def test_a_column_of_clean_labels_must_equal_the_data_set(tmp_path):
    rows = [f"{clean},{noisy}" for clean, noisy in zip(CLEAN, NOISY, strict=True)]
    (tmp_path / "n.csv").write_text("\n".join(["clean_label,noisy_label", *rows]))
    assert np.array_equal(read(tmp_path / "n.csv", "noisy_label"), NOISY)
    (tmp_path / "n.csv").write_text("\n".join(["clean_label,noisy_label", *reversed(rows)]))
    with pytest.raises(
        DataError, match="'clean_label' differs from the data set's labels in .* of 2100 images"
    ):
        read(tmp_path / "n.csv", "noisy_label")


@pytest.mark.parametrize("dtype", ["<i8", ">i4", "|u1", "list", "column"])
def test_a_pickled_dict_in_an_npy_is_read(tmp_path, dtype):
    """CIFAR-N's own `.npy` files are written like this."""
    noisy = (
        NOISY.tolist()
        if dtype == "list"
        else NOISY[:, None]
        if dtype == "column"
        else NOISY.astype(dtype)
    )
    np.save(
        tmp_path / "human.npy",
        {"clean_label": CLEAN, "worse_label": noisy, "rate": np.float64(0.3)},
        allow_pickle=True,
    )
    found = read(tmp_path / "human.npy", "worse_label")
    assert np.array_equal(found, NOISY)
    assert found.dtype == np.int64
    with pytest.raises(DataError, match="noise_key: clean_label, worse_label, rate"):
        read(tmp_path / "human.npy")


@pytest.mark.parametrize("protocol", [2, 3])
def test_a_pickled_dict_of_numpy_1_is_read(tmp_path, protocol):
    content = np.array({"noisy_label": NOISY.astype("<i4")}, dtype=object)
    blob = pickle.dumps(content, protocol).replace(b"numpy._core.", b"numpy.core.")
    assert b"numpy.core.multiarray" in blob
    with (tmp_path / "old.npy").open("wb") as file:
        header = {"descr": "|O", "fortran_order": False, "shape": ()}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(blob)
    assert np.array_equal(read(tmp_path / "old.npy", "noisy_label"), NOISY)


@pytest.mark.parametrize("place", ["beside", "above"])
def test_an_ordered_file_is_sorted_to_the_order_of_the_data_set(tmp_path, place):
    """CIFAR-N's ordered files are in TensorFlow's order; image_order_*.npy holds the positions."""
    folder = tmp_path / "data"
    folder.mkdir()
    order = np.random.default_rng(8).permutation(IMAGES)
    content = {"clean_label": CLEAN[order], "worse_label": NOISY[order]}
    np.save(folder / "human_ordered.npy", content, allow_pickle=True)
    with pytest.raises(
        DataError,
        match="'_ordered' files need image_order_c10.npy or image_order_c100.npy beside them",
    ):
        read(folder / "human_ordered.npy", "worse_label")
    beside = folder if place == "beside" else tmp_path
    np.save(beside / "image_order_c10.npy", order[::-1].copy())
    with pytest.raises(DataError, match="image_order_c10.npy does not bring it into order"):
        read(folder / "human_ordered.npy", "worse_label")
    np.save(beside / "image_order_c10.npy", order)
    (folder / "image_order_c1.npy").write_bytes(b"damaged")
    assert np.array_equal(read(folder / "human_ordered.npy", "worse_label"), NOISY)


def test_the_labels_of_a_run_are_read_by_their_positions(tmp_path):
    rng = np.random.default_rng(9)
    train, val = np.array_split(rng.permutation(IMAGES)[:2000], [1500])
    arrays = {
        f"{part}_{what}": labels[index]
        for part, index in (("train", np.sort(train)), ("val", np.sort(val)))
        for what, labels in (("index", np.arange(IMAGES)), ("label", NOISY), ("clean_label", CLEAN))
    }
    np.savez_compressed(tmp_path / "labels.npz", **arrays, transition_matrix=np.eye(CLASSES))
    found = read(tmp_path / "labels.npz")
    known = np.zeros(IMAGES, bool)
    known[[*train, *val]] = True
    assert np.array_equal(found[known], NOISY[known])
    assert set(found[~known]) == {NO_LABEL}
    other = CLEAN.copy()
    other[val[0]] = (other[val[0]] + 1) % CLASSES
    with pytest.raises(
        DataError, match="'val_clean_label' differs from the data set's labels in 1 of 500 images"
    ):
        read(tmp_path / "labels.npz", None, other)
    with pytest.raises(DataError, match="more training images than this data set, which has 1000"):
        read(tmp_path / "labels.npz", None, CLEAN[:1000])


def test_a_run_can_be_trained_again_on_its_labels(session_folder, tmp_path):
    options = {"batch_size": 16, "validation_split": 0.2, "subset_percent": 0.6}
    first = ImageFolderDataLoader(session_folder, noise=LabelNoise("sym", 1.0), seed=5, **options)
    np.savez(tmp_path / "labels.npz", **first.label_arrays())
    noise = LabelNoise("file", file=str(tmp_path / "labels.npz"))
    again = ImageFolderDataLoader(session_folder, noise=noise, seed=5, **options)
    assert again.fingerprint() == first.fingerprint()
    assert again.noise_report()["train_rate"] == first.noise_report()["train_rate"]
    smaller = ImageFolderDataLoader(
        session_folder, noise=noise, seed=5, **{**options, "subset_percent": 0.3}
    )
    chosen = np.isin(first.label_arrays()["train_index"], smaller.label_arrays()["train_index"])
    assert np.array_equal(
        smaller.label_arrays()["train_label"], first.label_arrays()["train_label"][chosen]
    )
    with pytest.raises(
        DataError,
        match=r"labels.npz' holds no labels for 12 of the 48 train images: its run used fewer",
    ):
        ImageFolderDataLoader(
            session_folder, noise=noise, seed=5, **{**options, "subset_percent": 1.0}
        )


# ---- hostile and damaged files


class Malicious:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def hostile_contents(canary):
    evil = Malicious(canary)
    return {
        "a value": {"clean_label": CLEAN, "worse_label": evil},
        "a key": {("x", evil): CLEAN},
        "in an array": np.array([evil, 1], dtype=object),
        "in a list": {"worse_label": [evil] * IMAGES},
    }


def test_code_in_pickles_of_npy_files_is_not_run(tmp_path):
    canary = tmp_path / "canary"
    for name, content in hostile_contents(canary).items():
        np.save(tmp_path / "evil.npy", content, allow_pickle=True)
        with pytest.raises(DataError, match="nothing in it was run") as caught:
            read(tmp_path / "evil.npy", "worse_label")
        assert "\n" not in str(caught.value), name
        assert not canary.exists(), name
        # The code in the file, which must not have run
        with pytest.raises(FileNotFoundError):
            os.rmdir(canary)  # noqa: PTH106
    np.load(tmp_path / "evil.npy", allow_pickle=True)
    assert canary.exists(), "the check can fail"


def test_arrays_of_objects_from_a_pickle_never_reach_numpy(tmp_path):
    """Bytes that call themselves an array of objects would be taken for pointers."""
    blob = pickle.dumps(np.array({"worse_label": NOISY.astype(np.int64)}, dtype=object), protocol=4)
    assert blob.count(b"\x8c\x02i8") == 1
    np.save(tmp_path / "x.npy", {"worse_label": NOISY}, allow_pickle=True)
    whole = (tmp_path / "x.npy").read_bytes()
    for code in (b"O8", b"V8", b"M8", b"S8", b"U2"):
        (tmp_path / "x.npy").write_bytes(whole.replace(b"\x8c\x02i8", b"\x8c\x02" + code))
        with pytest.raises(
            DataError, match=rf"holds arrays of type '{code.decode()}', expected integers"
        ):
            read(tmp_path / "x.npy", "worse_label")


def test_any_truncated_or_flipped_file_is_read_or_an_error_of_one_line(tmp_path):
    rng = np.random.default_rng(10)
    clean, noisy = CLEAN[::20], NOISY[::20]
    np.save(tmp_path / "a.npy", {"worse_label": noisy, "clean_label": clean}, allow_pickle=True)
    np.savez(tmp_path / "b.npz", worse_label=noisy, clean_label=clean)
    (tmp_path / "c.json").write_text(
        json.dumps({"worse_label": noisy.tolist(), "clean_label": clean.tolist()})
    )
    rows = [f"{one},{other}" for one, other in zip(clean, noisy, strict=True)]
    (tmp_path / "d.csv").write_text("\n".join(["clean_label,worse_label", *rows]))
    refused = []
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        assert np.array_equal(read(path, "worse_label", clean), noisy)
        damaged = [whole[:length] for length in rng.integers(0, len(whole), 60)]
        for position in rng.integers(0, len(whole), 120):
            damaged.append(whole[:position] + rng.bytes(1) + whole[position + 1 :])
        for content in [b"", b"\0" * 500, b"[" * 20_000, *damaged]:
            path.write_bytes(content)
            try:
                labels = read(path, "worse_label", clean)
            except DataError as error:
                refused.append(str(error))
                continue
            assert labels.shape == clean.shape
            assert labels.min() >= 0
            assert labels.max() < CLASSES
    assert len(refused) > 250
    assert all(
        line.startswith(f"trainer.noise_file: '{tmp_path}") and line.isprintable()
        for line in refused
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'"text"', "holds str, expected a list of labels"),
        ("a.json", b"[1, 2", "cannot be read"),
        ("a.json", b"[[1], [2, 3]]", "is not an array of integers"),
        ("a.json", b"[1e999, 2]", "1e999 is too large a number"),
        ("a.csv", b"", "it is empty"),
        ("a.csv", b"label\n", "nothing but a header"),
        ("a.csv", b"a,b\n1,2\n3\n", "row 3 has 1 columns, the first one 2"),
        ("a.csv", b"\xff\xfe", "cannot be read"),
        ("a.npz", b"PK", "cannot be read"),
        ("a.txt", b"1\n", r"expected one of the types \.npy \.npz \.pt \.pth \.json \.csv"),
    ],
)
def test_files_without_labels_are_errors(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_names_in_files_are_escaped(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"a\nb\x1b[31m": NOISY.tolist(), "c": []}))
    with pytest.raises(DataError, match=r"a\\nb\\x1b\[31m, c$"):
        read(tmp_path / "a.json")


def test_a_message_lists_few_of_many_entries(tmp_path):
    path = tmp_path / "by_image.json"
    path.write_text(json.dumps({str(image): image % 4 for image in range(333)}))
    with pytest.raises(DataError, match=r"noise_key: 0, 1, .*, 19, \.\.\. \(333 in all\)$"):
        read_noise_file(str(path), None, np.arange(333) % 4, 4)
