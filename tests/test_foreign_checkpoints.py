"""Checkpoints of other code: the formats of docs/checkpoints.md, and the assumptions reported."""

import json
import re
from pathlib import Path

import pytest
import torch

from base.checkpoint import load_checkpoint, load_weights, save_checkpoint
from base.errors import CheckpointError
from experiment.evaluation_flags import evaluation_parser
from experiment.loading import load_evaluation
from models import build_model
from tiny_runs import script

ROOT = Path(__file__).parents[1]
WIDE = {"type": "wide_resnet", "args": {"num_classes": 6, "depth": 16, "widen_factor": 1}}
MEAN, STD = torch.tensor([0.5, 0.25, 0.125]), torch.tensor([0.25, 0.5, 0.2])


def table():
    """The rows of docs/checkpoints.md's formats: who writes it -> what the report names."""
    section = (
        (ROOT / "docs" / "checkpoints.md").read_text().split("## Formats")[1].split("\n## ")[0]
    )
    rows = [line.strip("| ").split("|") for line in section.splitlines() if line.startswith("| ")][
        1:
    ]
    return {
        row[0].strip(): set(re.findall(r"`([\w ]+)`", row[2] if len(row) > 2 else ""))
        for row in rows
    }


def below(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


def robustness(own):
    named = {"new_mean": MEAN.reshape(3, 1, 1), "new_std": STD.reshape(3, 1, 1)}
    copy = below("module.attacker.model.", {key: value.clone() for key, value in own.items()})
    normalizers = below("module.normalizer.", named) | below("module.attacker.normalize.", named)
    return {
        "model": below("module.model.", own) | copy | normalizers,
        "epoch": 149,
        "optimizer": {"state": {}},
    }


def files(own):
    """For each row of the table, the file that is meant; `own` are the weights under this project's
    keys."""
    unused = {
        f"sub_{key}": torch.randn_like(value.float()).to(value.dtype)
        for key, value in own.items()
        if "block1." in key
    }
    unused = {key: value for key, value in unused.items() if key.startswith("sub_block1.")}
    many = below("module.", own)
    first = {"0.mean": MEAN.reshape(1, 3, 1, 1), "0.std": STD.reshape(1, 3, 1, 1)}
    return {
        "robust_overfitting, AWP, Bag of Tricks: `model_best.pth`": {
            "state_dict": many,
            "test_robust_acc": 0.5,
        },
        "robust_overfitting, AWP: `model_99.pth`": many,
        "fast_adversarial: `model.pth`": own,
        "TRADES: `model-wideres-epoch76.pt`": many | below("module.", unused),
        "RobustBench: TRADES' network": {"state_dict": own | unused},
        "RobustBench: networks that normalize": {
            "state_dict": {**many, "mu": MEAN.reshape(3, 1, 1), "sigma": STD.reshape(3, 1, 1)}
        },
        "RobustBench, timm: wrapped networks": {"state_dict": below("model.", own)},
        "`nn.Sequential(Normalize(), network)`": {"state_dict": first | below("1.", own)},
        "MadryLab's robustness": robustness(own),
        "GradAlign": {
            "last": {**own, "model_preact_hl1.1.weight": own["conv1.weight"]},
            "best": below("x.", own),
        },
    }


@pytest.mark.parametrize("name", table())
def test_every_row_of_the_table_loads(name, tmp_path):
    torch.manual_seed(3)
    reported, model, normalizing = (
        table()[name],
        build_model(WIDE).eval(),
        build_model(WIDE, MEAN.tolist(), STD.tolist()).eval(),
    )
    contents = files(model.state_dict())[name]
    normalizing.load_state_dict(model.state_dict())
    path, other = tmp_path / "m.pth", build_model(WIDE).eval()
    torch.save(contents, path)
    chosen = None
    if name == "GradAlign":
        chosen = "last"
        with pytest.raises(
            CheckpointError, match="several sets of weights: 'last', 'best'; choose with --weights"
        ):
            load_checkpoint(path)
    checkpoint = load_checkpoint(path, chosen)
    assumed = checkpoint["assumed"] | load_weights(other, checkpoint["state_dict"], path)
    images = torch.rand(5, 3, 16, 16)
    expected = normalizing if "normalization" in reported else model
    assert torch.equal(other(images), expected(images))
    assert assumed.keys() == reported


def test_a_resnets_norms_may_have_pytorch_cifars_names(tmp_path):
    arch = {"type": "resnet18", "args": {"num_classes": 3}}
    model, other = build_model(arch), build_model(arch)
    state = below("module.model.", model.state_dict())
    torch.save(
        {key.replace("norm", "bn"): value for key, value in state.items()}, tmp_path / "m.pth"
    )
    reported = load_weights(other, load_checkpoint(tmp_path / "m.pth")["state_dict"], "m.pth")
    assert reported == {
        "names": "bn1 as norm1, bn2 as norm2",
        "keys": "the prefix 'module.model.' is dropped",
    }
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    mixed = {key.replace("layer4.1.norm2", "layer4.1.bn2"): value for key, value in state.items()}
    with pytest.raises(
        CheckpointError, match=r"lacks 4 of .*layer4.1.norm2.*4 keys .*layer4.1.bn2"
    ):
        load_weights(other, mixed, "m.pth")


def test_the_table_has_the_ten_formats():
    assert list(table()) == list(files(build_model(WIDE).state_dict()))
    assert len(table()) == 10


def evaluate(path, config, *words):
    config_file = path.with_suffix(".json")
    config_file.write_text(json.dumps({"num_classes": 10, **config}))
    arguments = ["-s", str(path), "-c", str(config_file), "--set", "system.num_threads=1", *words]
    return load_evaluation(evaluation_parser("").parse_args(arguments), limit=10)


DIGITS = {"data_loader": {"type": "DigitsDataLoader"}}


def test_onis_rule_depends_on_who_wrote_the_checkpoint(tmp_path):
    arch = {"type": "simpleCNN2", "args": {"conv_layer_type": "oni_conv"}}
    state = build_model(arch).state_dict()
    path = tmp_path / "model.pth"

    def rule(*words):
        evaluation = evaluate(path, {**DIGITS, "arch": arch}, *words)
        return evaluation.model.conv1.rule, evaluation.assumed.get("arch.args.oni_rule")

    torch.save(
        {"arch": "CNN", "epoch": 3, "state_dict": state, "optimizer": {}, "monitor_best": 0.3}, path
    )
    found, reported = rule()
    assert found == "original"
    assert reported.startswith(
        "original, as the original ConvNorm's code has it; --set arch.args.oni_rule=paper"
    )
    assert rule("--set", "arch.args.oni_rule=paper") == ("paper", None)
    own = {"state_dict": state, "mean": [0.5] * 3, "std": [0.5] * 3}
    save_checkpoint(path, {**own, "config": {**DIGITS, "arch": arch}})
    assert rule() == ("paper", None)
    save_checkpoint(
        path,
        {**own, "config": {"arch": {**arch, "args": {**arch["args"], "oni_rule": "original"}}}},
    )
    assert rule() == ("original", None)
    assert rule("--set", "arch.args.oni_rule=paper") == ("paper", None)


def test_an_assumed_shortcut_input_is_reported(tmp_path):
    arch = {"type": "preact_resnet18"}
    path = tmp_path / "model.pth"
    torch.save(
        below("module.", build_model({**arch, "args": {"final_norm": False}}).state_dict()), path
    )
    words = ["--set", "arch.args.final_norm=false"]
    evaluation = evaluate(path, {**DIGITS, "arch": arch}, *words)
    assert evaluation.model.layer2[0].shortcut_input == "activated"
    assert (
        "shortcut_input=raw for fast_adversarial" in evaluation.assumed["arch.args.shortcut_input"]
    )
    evaluation = evaluate(
        path, {**DIGITS, "arch": arch}, *words, "--set", "arch.args.shortcut_input=raw"
    )
    assert evaluation.model.layer2[0].shortcut_input == "raw"
    assert "arch.args.shortcut_input" not in evaluation.assumed


CIFAR10, CIFAR100 = (
    ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
    ([0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]),
)


@pytest.mark.parametrize(
    ("classes", "adversarial", "expected", "reported"),
    [
        (10, False, CIFAR10, "normalizing by those of CIFAR-10, as the original's training does;"),
        (10, True, CIFAR10, "normalizing by those of CIFAR-10, as the original's training does;"),
        (
            100,
            False,
            CIFAR100,
            "normalizing by those of CIFAR100DataLoader, as the original's training does;",
        ),
        (
            100,
            True,
            CIFAR10,
            "its adversarial training on CIFAR-100 normalizes twice,"
            " which no mean and std can stand for;",
        ),
    ],
)
def test_the_originals_checkpoints_get_the_mean_and_std_of_their_training(
    tmp_path, fake_cifar, no_network, classes, adversarial, expected, reported
):
    arch = {"type": "simpleCNN2", "args": {"num_classes": classes}}
    path = tmp_path / "model.pth"
    state = build_model(arch).state_dict()
    torch.save(
        {"arch": "CNN", "epoch": 3, "state_dict": state, "optimizer": {}, "monitor_best": 0.3}, path
    )
    loader = {"type": f"CIFAR{classes}DataLoader", "args": {"data_dir": str(fake_cifar)}}
    config = {
        "num_classes": classes,
        "arch": arch,
        "data_loader": loader,
        "trainer": {"do_adv": adversarial},
    }
    evaluation = evaluate(path, config)
    normalization = evaluation.provenance["normalization"]
    assert (normalization["mean"], normalization["std"]) == expected
    assert reported in evaluation.assumed["normalization"]
    given = evaluate(
        path,
        config,
        "--set",
        "data_loader.args.mean=[0,0,0]",
        "--set",
        "data_loader.args.std=[1,1,1]",
    )
    assert given.provenance["normalization"] == {"mean": [0, 0, 0], "std": [1, 1, 1]}
    assert "normalization" not in given.assumed


def test_every_command_takes_the_same_file_and_reports_what_it_assumed(tmp_path):
    state = build_model({"type": "simpleCNN2"}).state_dict()
    torch.save(
        {"last": below("net.", state) | {"net.mu": MEAN, "net.sigma": STD}, "best": state},
        tmp_path / "m.pth",
    )
    (tmp_path / "c.json").write_text(
        json.dumps({"num_classes": 10, "arch": {"type": "simpleCNN2"}, **DIGITS})
    )
    words = ["-s", "m.pth", "-c", "c.json", "--set", "system.num_threads=1"]
    reports = {}
    for name, more in (
        ("fgsm.py", ["--limit", 10]),
        ("validate_pgd.py", ["--limit", 10, "--steps", 1]),
        ("spectrum.py", []),
    ):
        asked = script(name, *words, *more, cwd=tmp_path)
        assert (asked.returncode, len(asked.stderr.splitlines())) == (3, 1)
        assert (
            "m.pth: holds several sets of weights: 'last', 'best'; choose with --weights last"
            in asked.stderr
        )
        done = script(
            name, *words, *more, "--weights", "last", "--json", f"{name}.json", cwd=tmp_path
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "assumed: keys: the prefix 'net.' is dropped" in done.stdout
        reports[name] = json.loads((tmp_path / f"{name}.json").read_text())
        assert reports[name]["normalization"] == {"mean": MEAN.tolist(), "std": [0.25, 0.5, 0.2]}
    assert len({json.dumps(report["assumed"]) for report in reports.values()}) == 1
    assert reports["fgsm.py"]["assumed"].keys() == {"weights", "keys", "normalization"}
    done = script(
        "class_report.py", *words, "--weights", "best", "--json", "classes.json", cwd=tmp_path
    )
    assert done.returncode == 0
    assert json.loads((tmp_path / "classes.json").read_text())["assumed"].keys() == {
        "weights",
        "normalization",
    }
