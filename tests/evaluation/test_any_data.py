"""Robust accuracy and the doctor from Python: any model, any iterable of batches, saved files."""

import csv
import json
from copy import deepcopy
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
import torchvision
from own_attacks import MomentumFGSM
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from attacks import ATTACKS, FGSM, PGD
from attacks.attack import arguments
from base.errors import ConfigError
from data_loader.image_data_loader import ImageDataLoader
from data_loader.images import MemoryImages
from evaluation import DoctorReport, RobustnessReport, doctor, predict, robust_accuracy
from evaluation.identity import evaluation_digests
from evaluation.partial import partial_file, remove_partials
from tiny_runs import read_arrays

N = 23
ATTACK = PGD(0.03, 0.01, 3, early_stop=True)


@pytest.fixture(scope="module")
def problem():
    """A small network with batch norm and dropout, images, all of which it gets right but the first
    two, and labels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout()),
            *(nn.Flatten(), nn.Linear(216, 7)),
        ).eval()
        images = torch.randint(256, (N, 3, 8, 8)).float() / 255
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[:2] = (labels[:2] + 1) % 7
    return model.train(), images, labels


def project_loader(images, labels):
    pixels = MemoryImages((255 * images).round().byte())
    names = [f"class {number}" for number in range(7)]
    return ImageDataLoader(
        pixels, labels.numpy(), names, mean=[0.0] * 3, std=[1.0] * 3, batch_size=9
    )


def same(first, second):
    columns = second.verdicts.arrays()
    return all(
        np.array_equal(values, columns[name]) for name, values in first.verdicts.arrays().items()
    )


def test_every_kind_of_data_and_model_gives_the_same_verdicts(problem):
    model, images, labels = problem
    kinds = {
        "torch": DataLoader(TensorDataset(images, labels), batch_size=5),
        "one batch": [(images, labels)],
        "generator": ((images[i : i + 4], labels[i : i + 4].int()) for i in range(0, N, 4)),
        "project": project_loader(images, labels),
    }
    expected = robust_accuracy(model, [[images, labels]], ATTACK, seed=3)
    assert isinstance(expected, RobustnessReport)
    assert 0 < expected.robust_top1 < expected.clean_top1 == 21 / 23
    assert expected.verdicts.position.tolist() == list(range(N))
    for kind, data in kinds.items():
        report = robust_accuracy(model, data, ATTACK, seed=3)
        assert same(report, expected), kind
        assert report.as_dict().keys() == expected.as_dict().keys()
    model.eval()
    asked = robust_accuracy(
        lambda pixels: model(pixels), [(images, labels)], ATTACK, seed=3, device="cpu"
    )
    model.train()
    assert same(asked, expected), "a function"
    assert all(module.training for module in model.modules())
    assert all(value.grad is None and value.requires_grad for value in model.parameters())


def test_limit_and_batch_size_choose_images_and_nothing_else(problem):
    model, images, labels = problem
    whole = robust_accuracy(model, [(images, labels)], ATTACK, seed=3)
    seen = []
    hook = model[0].register_forward_hook(lambda *call: seen.append(len(call[1][0])))
    for data in (
        [(images[:8], labels[:8]), (images[8:], labels[8:])],
        project_loader(images, labels),
    ):
        seen.clear()
        part = robust_accuracy(model, data, ATTACK, seed=3, limit=11, batch_size=4)
        assert part.n == 11
        assert torch.equal(part.verdicts.robust_top1, whole.verdicts.robust_top1[:11])
        assert max(seen) == 16, "batches are filled up to 16 images"
    hook.remove()


def test_a_torchvision_network_is_measured_and_doctored():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchvision.models.resnet18(num_classes=4).eval()
        images = torch.rand(8, 3, 32, 32)
    with torch.no_grad():
        labels = model(images).argmax(1)
    attack = FGSM(8 / 255)
    report = robust_accuracy(model, DataLoader(TensorDataset(images, labels), batch_size=8), attack)
    assert report.n == 8
    found = attack(model, images, labels)
    with torch.no_grad():
        assert report.robust_top1 == float((model(found).argmax(1) == labels).float().mean())
    assert report.robust_top5 == 1, "four classes"


@pytest.fixture
def hasty(monkeypatch):
    """A doctor with few queries."""
    monkeypatch.setattr(import_module("evaluation.reliability"), "SQUARE_QUERIES", 5)


def test_the_doctor_takes_the_same_data(problem, hasty):
    model, images, labels = problem
    found = doctor(model, [(images, labels)], ATTACK, seed=3, limit=4)
    assert isinstance(found, DoctorReport)
    again = doctor(model, project_loader(images, labels), ATTACK, seed=3, limit=4, batch_size=4)
    assert found == again
    assert (found.n, found.num_classes, found.examined) == (4, 7, ATTACK)
    report = robust_accuracy(model, [(images, labels)], ATTACK, seed=3).with_doctor(found)
    values = json.loads(json.dumps(report.as_dict()))
    assert values["checks"] == [vars(check) for check in found.checks]
    assert values["checked_attack"] == report.title


def test_autocast_of_a_caller_changes_nothing(problem, hasty):
    model, images, labels = problem
    data = [(images, labels)]
    dtypes = set()
    hook = model.register_forward_hook(lambda *call: dtypes.add(call[2].dtype))
    expected = robust_accuracy(model, data, ATTACK)
    examined = doctor(model, data, ATTACK, limit=4)
    with torch.autocast("cpu", torch.bfloat16):
        report = robust_accuracy(model, data, ATTACK)
        assert doctor(model, data, ATTACK, limit=4) == examined
        assert predict(model, data).confidence.dtype == torch.float32
    hook.remove()
    assert dtypes == {torch.float32}
    assert report.precision == "fp32"
    assert same(report, expected)


def test_the_default_dtype_changes_nothing(problem, hasty):
    model, images, labels = problem
    data = [(images, labels)]
    expected = robust_accuracy(model, data, ATTACK)
    examined = doctor(model, data, ATTACK, limit=4)
    torch.set_default_dtype(torch.float64)
    try:
        assert same(robust_accuracy(model, data, ATTACK), expected)
        assert doctor(model, data, ATTACK, limit=4) == examined
    finally:
        torch.set_default_dtype(torch.float32)


def test_plain_pgd_is_examined_beside_an_attack_of_another_kind(problem, hasty):
    model, images, labels = problem
    attack = MomentumFGSM(0.03, steps=3)
    found = doctor(model, [(images, labels)], attack, seed=3, limit=3)
    assert found.as_dict()["checked_attack"].startswith("PGD-20, linf 7.65/255,")
    report = robust_accuracy(model, [(images, labels)], attack, seed=3)
    assert report.with_doctor(replace(found, checks=())).reliable is None, (
        "it was not the one that was examined"
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda images, labels: [], "^data: contains no images$"),
        (
            lambda images, labels: [((255 * images).byte(), labels)],
            "torch.uint8; divide the pixels by 255$",
        ),
        (lambda images, labels: [(255 * images, labels)], r"pixels in \[0, 1\], found 0 to 255"),
        (
            lambda images, labels: (images, labels),
            r"not a tensor; a single batch is \[\(images, labels\)\]$",
        ),
        (
            lambda images, labels: [{"image": images}],
            r"^data: expected batches \(images, labels\), not dict$",
        ),
        (lambda images, labels: [(images, labels, labels)], "not a tuple of 3$"),
        (
            lambda images, labels: [(images, labels.clamp_min(7))],
            "^labels: 7 is not one of the model's 7 classes, 0 to 6$",
        ),
        (
            lambda images, labels: project_loader(images[:0], labels[:0]),
            "^data: contains no images$",
        ),
    ],
)
def test_unusable_data_is_an_error_of_one_line(problem, data, message):
    model, images, labels = problem
    with pytest.raises(ValueError, match=message):
        robust_accuracy(model, data(images, labels), ATTACK)
    with pytest.raises(ValueError, match=message):
        predict(model, data(images, labels))


def test_predictions_are_checked_as_verdicts_are(problem):
    model, images, labels = problem
    data = [(images, labels)]
    before = images.clone()
    model.eval()
    in_place = predict(lambda pixels: model(pixels.mul_(0.5)), data)
    model.train()
    assert torch.equal(images, before), "a model may write into its input"
    halves = predict(model, [(0.5 * images, labels)])
    assert torch.equal(in_place.prediction, halves.prediction)
    clean = robust_accuracy(model, data, ATTACK).verdicts.clean_prediction
    assert torch.equal(predict(model, data).prediction, clean)
    for answer, error, message in (
        (lambda logits: (logits, logits), TypeError, "a tensor, not a tuple of 2"),
        (lambda logits: logits[:, :1], ValueError, "at least 2 classes, not of 1$"),
        (lambda logits: logits[1:], ValueError, r"here \(23, classes\), not \(22, 7\)$"),
    ):
        with pytest.raises(error, match=message):
            predict(lambda pixels, answer=answer: answer(model(pixels)), data)
    one_hot = nn.functional.one_hot(labels, 7)
    with pytest.raises(ValueError, match=r"^labels: expected one per image"):
        predict(model, [(images, one_hot)])


def test_a_class_in_place_of_an_object_is_named(problem):
    model, images, labels = problem
    for measure in (robust_accuracy, doctor):
        with pytest.raises(
            TypeError, match="^attack: expected an attack, such as .*, not the class PGD$"
        ):
            measure(model, [(images, labels)], PGD)
    with pytest.raises(
        TypeError, match="^model: expected a module or a function .*, not the class Linear$"
    ):
        robust_accuracy(torch.nn.Linear, [(images, labels)], ATTACK)


@pytest.mark.parametrize("value", [0, 9.5])
def test_numbers_out_of_range_are_named(problem, value):
    model, images, labels = problem
    for name in ("limit", "batch_size"):
        message = f"^{name}: expected an integer of at least 1, not {value}$"
        with pytest.raises(ValueError, match=message):
            robust_accuracy(model, [(images, labels)], ATTACK, **{name: value})


def test_adversarial_images_are_saved_as_they_were_attacked(problem, tmp_path):
    model, images, labels = problem
    file = tmp_path / "deep" / "a.npz"
    report = robust_accuracy(
        model, project_loader(images, labels), ATTACK, seed=3, save_images=file
    )
    saved = read_arrays(file)
    assert saved["images"].dtype == np.float32
    with torch.no_grad():
        predictions = model.eval()(torch.from_numpy(saved["images"])).argmax(1)
    model.train()
    assert np.array_equal(saved["prediction"], predictions)
    changed = np.abs(saved["images"] - images.numpy()).max((1, 2, 3))
    np.testing.assert_allclose(changed, saved["perturbation"], atol=1e-7)
    assert all(
        np.array_equal(saved[name], values) for name, values in report.verdicts.arrays().items()
    )
    assert saved["class_names"][6] == "class 6"
    assert [path.name for path in file.parent.iterdir()] == ["a.npz"]


def test_an_interrupted_evaluation_keeps_its_adversarial_images(problem, tmp_path, monkeypatch):
    model, images, labels = problem
    loader, target = project_loader(images, labels), tmp_path / "report.json"
    kept = partial_file(target, evaluation_digests(model, loader), ATTACK, (3,))
    whole = robust_accuracy(model, loader, ATTACK, seed=3, save_images=tmp_path / "whole.npz")
    module, calls = import_module("evaluation.robust_accuracy"), []
    attack_batch = module.attack_batch

    def broken(*given, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return attack_batch(*given, **options)

    monkeypatch.setattr(module, "attack_batch", broken)
    go_on = {"seed": 3, "partial": kept, "save_images": tmp_path / "a.npz"}
    with pytest.raises(KeyboardInterrupt):
        robust_accuracy(model, loader, ATTACK, **go_on)
    assert not (tmp_path / "a.npz").exists()
    assert same(robust_accuracy(model, loader, ATTACK, **go_on), whole)
    assert len(calls) == 4, "one batch before, two after"
    first, second = (read_arrays(tmp_path / f"{name}.npz") for name in ("whole", "a"))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    kept.with_suffix(".images").write_bytes(b"damaged")
    robust_accuracy(model, loader, ATTACK, **go_on)
    assert len(calls) == 7, "verdicts without their images are not continued"
    remove_partials(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "whole.npz"]


def test_files_that_cannot_be_written_are_rejected_before_the_work(problem, tmp_path, monkeypatch):
    model, images, labels = problem
    monkeypatch.setattr(import_module("evaluation.robust_accuracy"), "quick_checks", None)
    (tmp_path / "folder.npz").mkdir()
    messages = {
        "a.png": "'.png' is not a format of arrays; expected one of: npz$",
        "folder.npz": "^save_images .*: cannot be written: a folder$",
        "/dev/null": "^save_images /dev/null: expected a file, as images are put into it at",
    }
    for name, message in messages.items():
        with pytest.raises(ConfigError, match=message):
            robust_accuracy(model, [(images, labels)], ATTACK, save_images=tmp_path / name)


def test_a_table_has_a_line_for_each_image(problem, tmp_path):
    model, images, labels = problem
    report = robust_accuracy(model, [(images, labels)], ATTACK, seed=3)
    prediction = report.verdicts.prediction.clone()
    prediction[4] = -1
    report = replace(report, verdicts=replace(report.verdicts, prediction=prediction))
    names = ["=cmd", "two\nlines", *"cdefg"]
    report.save_csv(tmp_path / "a.csv", names, {0: "zero.png", 4: "@four.png"})
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["position"]) for row in rows] == list(range(N))
    assert [row["file"] for row in rows[:5]] == ["zero.png", "", "", "", "'@four.png"]
    assert (rows[4]["prediction"], rows[4]["prediction_name"]) == ("-1", "NaN")
    shown = {"=cmd": "'=cmd", "two\nlines": "two\\nlines"}
    for row, label in zip(rows, labels.tolist(), strict=True):
        assert (row["label"], row["label_name"]) == (
            str(label),
            shown.get(names[label], names[label]),
        )
    assert [row["robust_top1"] for row in rows] == [
        str(int(one)) for one in report.verdicts.robust_top1
    ]
    assert [float(row["perturbation"]) for row in rows] == pytest.approx(
        report.verdicts.perturbation.tolist()
    )


@pytest.mark.parametrize("name", ATTACKS)
def test_every_argument_of_an_attack_changes_the_name_of_its_partial_file(problem, tmp_path, name):
    model, images, labels = problem
    digests = evaluation_digests(model, project_loader(images, labels))
    given = {"epsilon": 0.03, "steps": 2, "step_size": 0.01}
    attack = ATTACKS[name](
        **{key: value for key, value in given.items() if key in arguments(ATTACKS[name])}
    )
    other = {
        "norm": "l2",
        "loss": "margin" if name != "square" else "ce",
        "targeted": True,
        "p_init": 0.5,
        "rho": 0.5,
    }
    files = {partial_file(tmp_path / "a", digests, attack, ())}
    for key, parameter in arguments(ATTACKS[name]).items():
        value = other.get(
            key, not parameter.default if parameter.default in (True, False) else 0.02
        )
        value = 7 if key in ("steps", "queries", "restarts", "seed") else value
        if key == "random_start":
            value = False
        changed = replace(attack, **{key: value})
        files.add(partial_file(tmp_path / "a", digests, changed, ()))
    assert len(files) == 1 + len(arguments(ATTACKS[name]))


def test_weights_pixels_labels_and_positions_change_the_digests(problem):
    model, images, labels = problem
    loader = project_loader(images, labels)
    first = evaluation_digests(model, loader)
    assert evaluation_digests(deepcopy(model), project_loader(images, labels)) == first
    other = deepcopy(model)
    next(other.parameters()).data.flatten()[0] += 1e-3
    assert evaluation_digests(other, loader)["weights_digest"] != first["weights_digest"]
    brighter = (images + 0.01).clamp(0, 1)
    twice = project_loader(images.repeat(2, 1, 1, 1), labels.repeat(2))
    second_half = twice.subset(torch.arange(len(labels), 2 * len(labels)))
    others = [project_loader(brighter, labels), project_loader(images, labels.roll(1)), second_half]
    assert len({each.data_digest() for each in (loader, *others)}) == 4
    assert twice.subset(torch.arange(len(labels))).data_digest() == first["data_digest"]


def test_fields_of_a_users_own_attack_are_in_the_report(problem):
    model, images, labels = problem
    attack = MomentumFGSM(0.03, steps=3, momentum=0.5)
    report = robust_accuracy(model, [(images, labels)], attack, seed=3)
    values = report.as_dict()
    assert (values["attack"], values["momentum"], values["steps"], values["seed"]) == (
        "MomentumFGSM",
        0.5,
        3,
        3,
    )
    assert report.title == "MomentumFGSM-3, linf 7.65/255, momentum 0.5"
    assert report.robust_top5 is None, "nobody knows"
