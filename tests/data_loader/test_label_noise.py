import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from base.errors import DataError
from data_loader.label_noise import (
    CIFAR10_CLASSES,
    CIFAR10_FLIPS,
    CIFAR100_FLIPS,
    CIFAR100_SUPERCLASSES,
    LabelNoise,
    apply_noise,
    asymmetric_noise,
    describe_transitions,
    realized_rate,
    symmetric_noise,
    transition_matrix,
)
from data_loader.noise_file import read_noise_file


def rng(seed=0):
    return np.random.default_rng(seed)


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 200),
    classes=st.integers(2, 12),
    percent=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_exclusive_noise_changes_exactly_the_requested_number(n, classes, percent, seed):
    labels = rng(seed).integers(0, classes, n)
    before = labels.copy()
    noisy = symmetric_noise(labels, classes, percent, "exclusive", rng(seed))
    assert np.sum(noisy != labels) == math.ceil(round(percent * n, 6))
    assert noisy.min() >= 0
    assert noisy.max() < classes
    assert np.array_equal(labels, before)


def test_inclusive_noise_keeps_a_tenth_of_the_picked_labels():
    labels = rng(1).integers(0, 10, 100_000)
    noisy = symmetric_noise(labels, 10, 0.4, "inclusive", rng(2))
    assert realized_rate(labels, noisy) == pytest.approx(0.36, abs=0.005)
    matrix = transition_matrix(labels, noisy, 10)
    assert matrix.sum(axis=1) == pytest.approx(np.ones(10))
    assert matrix[~np.eye(10, dtype=bool)] == pytest.approx(np.full(90, 0.04), abs=0.01)


def test_exclusive_noise_is_uniform_over_the_wrong_classes():
    labels = np.zeros(30_000, np.int64)
    counts = np.bincount(symmetric_noise(labels, 4, 1.0, "exclusive", rng(3)), minlength=4)
    assert counts[0] == 0
    assert counts[1:] == pytest.approx(np.full(3, 10_000), rel=0.05)


def test_percent_counts_without_rounding_errors():
    labels = np.zeros(100, np.int64)
    assert np.sum(symmetric_noise(labels, 5, 0.55, "exclusive", rng())) > 0
    assert np.count_nonzero(symmetric_noise(labels, 5, 0.55, "exclusive", rng())) == 55
    assert np.count_nonzero(symmetric_noise(labels, 5, 0.551, "exclusive", rng())) == 56


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(CIFAR10_CLASSES), percent=st.floats(0.01, 1))
def test_asymmetric_cifar10_starts_from_clean_labels_in_any_class_order(order, percent):
    labels = np.repeat(np.arange(10), 30)
    matrix = transition_matrix(labels, asymmetric_noise(labels, order, percent, rng()), 10)
    share = math.ceil(round(percent * 30, 6)) / 30
    for i, source in enumerate(order):
        expected = np.zeros(10)
        expected[i] = 1
        if source in CIFAR10_FLIPS:
            expected[i] = 1 - share
            # Cat and dog change places, none goes back
            expected[order.index(CIFAR10_FLIPS[source])] = share
        assert matrix[i] == pytest.approx(expected)


def test_cifar100_table_is_complete_and_stays_inside_superclasses():
    names = [name for group in CIFAR100_SUPERCLASSES for name in group]
    assert len(CIFAR100_SUPERCLASSES) == 20
    assert len(names) == len(set(names)) == 100
    for group in CIFAR100_SUPERCLASSES:
        assert len(group) == 5
        assert list(group) == sorted(group)
        assert {CIFAR100_FLIPS[name] for name in group} == set(group)
        assert all(CIFAR100_FLIPS[name] != name for name in group)
    assert CIFAR100_FLIPS["whale"] == "beaver"


def test_asymmetric_cifar100_flips_within_the_superclass():
    names = sorted(CIFAR100_FLIPS)
    labels = np.repeat(np.arange(100), 10)
    noisy = asymmetric_noise(labels, names, 0.4, rng())
    changed = noisy != labels
    assert changed.sum() == 400
    assert all(
        CIFAR100_FLIPS[names[a]] == names[b]
        for a, b in zip(labels[changed], noisy[changed], strict=True)
    )


def test_asymmetric_noise_of_other_classes_is_an_error():
    message = (
        r"trainer\.asym: asymmetric noise is not defined for the classes a, b;"
        " it is for those of CIFAR-10 and of CIFAR-100"
    )
    with pytest.raises(DataError, match=message):
        asymmetric_noise(np.zeros(3, np.int64), ["a", "b"], 0.1, rng())
    nine = [name for name in CIFAR10_CLASSES if name != "frog"]
    with pytest.raises(DataError, match=r"airplane, automobile, bird, cat, deer, \.\.\.;"):
        asymmetric_noise(np.zeros(3, np.int64), nine, 0.1, rng())


def test_apply_noise_chooses_the_law_and_does_nothing_at_rate_zero():
    labels = np.arange(10)
    assert np.array_equal(apply_noise(labels, CIFAR10_CLASSES, LabelNoise(), rng()), labels)
    assert np.array_equal(apply_noise(labels, ["x"], LabelNoise("asym", 0.0), rng()), labels)
    flipped = apply_noise(labels, CIFAR10_CLASSES, LabelNoise("asym", 1.0), rng())
    assert flipped.tolist() == [0, 1, 0, 5, 7, 3, 6, 7, 8, 1]
    assert (
        apply_noise(labels, CIFAR10_CLASSES, LabelNoise("sym", 1.0, "exclusive"), rng()) != labels
    ).all()


def test_transitions_are_described_most_frequent_first():
    lines = describe_transitions(
        np.array([[0.25, 0.75, 0], [0, 0, 0], [0, 0, 1]]), ("cat", "dog", "frog")
    )
    assert lines == ["cat -> dog 75.0%, cat 25.0%", "dog -> ", "frog -> frog 100.0%"]


def test_transition_matrix_of_an_absent_class_is_zero():
    assert transition_matrix(np.array([0, 0]), np.array([0, 1]), 3).tolist() == [
        [0.5, 0.5, 0],
        [0, 0, 0],
        [0, 0, 0],
    ]


CLEAN = np.arange(200) % 10
NOISY = np.where(np.arange(200) < 60, (CLEAN + 1) % 10, CLEAN)


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int32])
def test_a_plain_array_is_read(tmp_path, suffix, dtype):
    path = tmp_path / f"labels{suffix}"
    if suffix == ".npy":
        np.save(path, NOISY.astype(dtype))
    else:
        torch.save(torch.from_numpy(NOISY.astype(dtype)), path)
    read = read_noise_file(str(path), None, CLEAN, 10)
    assert np.array_equal(read, NOISY)
    assert read.dtype == np.int64


@pytest.fixture
def cifar_n(tmp_path):
    """A dict of numpy arrays, as the CIFAR-N files are."""
    path = tmp_path / "CIFAR-10_human.pt"
    torch.save(
        {"clean_label": CLEAN, "worse_label": NOISY, "random_label1": CLEAN.astype(np.uint8)}, path
    )
    return str(path)


def test_a_dict_of_numpy_arrays_is_read_by_key(cifar_n):
    assert np.array_equal(read_noise_file(cifar_n, "worse_label", CLEAN, 10), NOISY)
    assert np.array_equal(read_noise_file(cifar_n, "random_label1", CLEAN, 10), CLEAN)


def test_a_file_written_under_numpy_1_is_read(tmp_path, cifar_n):
    # numpy 1 called the module numpy.core; same length of a pickled name is not needed in the
    # legacy format's plain pickle.
    path = tmp_path / "legacy.pt"
    torch.save({"noisy_label": NOISY}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert b"numpy.core.multiarray" in path.read_bytes()
    assert np.array_equal(read_noise_file(str(path), "noisy_label", CLEAN, 10), NOISY)


def test_missing_and_unknown_keys_list_the_entries(cifar_n):
    with pytest.raises(DataError, match=r"several arrays.*clean_label, worse_label, random_label1"):
        read_noise_file(cifar_n, None, CLEAN, 10)
    with pytest.raises(
        DataError, match=r"no entry 'worst_label'; its entries are: .*did you mean 'worse_label'"
    ):
        read_noise_file(cifar_n, "worst_label", CLEAN, 10)


def test_labels_in_another_order_are_noticed(tmp_path, cifar_n):
    with pytest.raises(
        DataError, match=r"'clean_label' differs from the data set's labels in \d+ of 200 images"
    ):
        read_noise_file(cifar_n, "worse_label", np.sort(CLEAN), 10)
    np.save(tmp_path / "plain.npy", np.sort(CLEAN))
    with pytest.raises(DataError, match="no more than by chance"):
        read_noise_file(str(tmp_path / "plain.npy"), None, CLEAN, 10)
    with pytest.raises(DataError, match="single array, so it has no entry 'x'"):
        read_noise_file(str(tmp_path / "plain.npy"), "x", CLEAN, 10)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (NOISY[:-1], r"shape is \(199,\), expected \(200,\)"),
        (NOISY.astype(np.float32), "expected integers, but it holds 1.0"),
        (NOISY + 1, "range from 1 to 10, expected 0 to 9"),
        (NOISY - 1, "range from -1 to 8"),
    ],
)
def test_arrays_that_do_not_fit_are_errors(tmp_path, labels, message):
    np.save(tmp_path / "labels.npy", labels)
    with pytest.raises(DataError, match=message):
        read_noise_file(str(tmp_path / "labels.npy"), None, CLEAN, 10)


class Malicious:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_code_in_a_malicious_file_is_not_run(tmp_path):
    canary = tmp_path / "canary"
    torch.save({"noisy_label": Malicious(f"touch {canary}")}, tmp_path / "evil.pt")
    np.save(
        tmp_path / "evil.npy",
        np.array([Malicious(f"touch {canary}")], dtype=object),
        allow_pickle=True,
    )
    for name in ("evil.pt", "evil.npy"):
        with pytest.raises(DataError) as caught:
            read_noise_file(str(tmp_path / name), "noisy_label", CLEAN, 10)
        assert "\n" not in str(caught.value)
    assert not canary.exists()


def test_files_that_cannot_be_read_are_errors(tmp_path):
    (tmp_path / "broken.npy").write_bytes(b"not numpy")
    (tmp_path / "broken.pt").write_bytes(b"not torch")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("broken.npy", "broken.pt", "empty.pt", "absent.npy", "absent.pt", "labels.txt"):
        with pytest.raises(DataError, match=rf"trainer\.noise_file: '.*{name}'") as caught:
            read_noise_file(str(tmp_path / name), None, CLEAN, 10)
        assert "\n" not in str(caught.value)
