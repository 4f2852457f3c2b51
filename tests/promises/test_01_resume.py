"""Promise 1: resume is bit-exact from any step, for every training method, with label noise, early
stop and averaged weights, with 0 and 2 loader workers; and evaluation never disturbs training.

Every scheduler is tested in `tests/base/optim/test_optim.py`.
"""

import json

import pytest
import torch

from base.base_trainer import BaseTrainer
from base.checkpoint import save_checkpoint
from base.config import validate
from base.config.tree import merge
from experiment.experiment import resume
from tiny_runs import difference, run

ALL_STEPS, SOME = range(1, 9), (2, 3, 4)
"""Steps to resume from, of nine in three epochs of three."""
WIDE = {
    "conv_layer_type": "conv",
    "norm_layer_type": "bn",
    "depth": 10,
    "widen_factor": 1,
    "dropout": 0.3,
}
CONV_NORM = {"args": {"conv_layer_type": "prec_conv", "norm_layer_type": "no"}}
SPECTRAL = {"args": {"conv_layer_type": "sn_conv", "norm_layer_type": "bn"}}
METHODS = {
    "standard, ConvNorm, label noise, early stop, plateau": {
        "arch": CONV_NORM,
        "trainer": {"sym": True, "percent": 0.4, "early_stop": 3, "monitor": "min val_loss"},
        "lr_scheduler": {"type": "ReduceLROnPlateau", "args": {"patience": 0}},
    },
    "standard, two workers, one cycle, dropout, mixup": {
        "arch": {"type": "wide_resnet", "args": WIDE},
        "data_loader": {"args": {"in_memory": False, "num_workers": 2}},
        "lr_scheduler": {"type": "OneCycleLR", "args": {"max_lr": 0.05}},
        "augmentation": {"mixup_alpha": 0.5},
    },
    "standard, AdamW, spectral norm, cutout": {
        "arch": SPECTRAL,
        "optimizer": {"type": "AdamW", "args": {"momentum": None}},
        "augmentation": {"cutout": 4},
    },
    "standard, bf16, OCNN, multi-step": {
        "arch": {
            "args": {
                "conv_layer_type": "conv",
                "norm_layer_type": "gn",
                "activation_layer_type": "srelu",
            }
        },
        "system": {"precision": "bf16"},
        "trainer": {"OCNN": True},
        "lr_scheduler": {"type": "MultiStepLR", "args": {"milestones": [1, 2]}},
    },
    "free, noise carried": {
        "arch": SPECTRAL,
        "adversarial": {"method": "free", "noise": "carry"},
        "trainer": {"adv_repeats": 2, "monitor": "max val_ema_robust_top1"},
    },
    "FGSM, cosine": {
        "adversarial": {"method": "fgsm", "validate_every": 2},
        "lr_scheduler": {"type": "CosineAnnealingLR"},
    },
    "PGD, mixup, averaged ConvNorm": {
        "arch": CONV_NORM,
        "adversarial": {"method": "pgd", "steps": 2},
        "augmentation": {"mixup_alpha": 0.5},
        "trainer": {"monitor": "max val_robust_top1"},
    },
    "TRADES, l2": {"adversarial": {"method": "trades", "steps": 2, "norm": "l2"}},
}
COMPARED_WITH_UNDISTURBED = (
    "standard, ConvNorm, label noise, early stop, plateau",
    "standard, two workers, one cycle, dropout, mixup",
    "free, noise carried",
    "PGD, mixup, averaged ConvNorm",
)
"""The methods that draw and carry most: saving must not change them."""


def of_method(small, name):
    return validate(
        merge(
            small(**METHODS[name]).dump(),
            {"trainer": {"keep_checkpoints": 0}, "pgd_attack": {"K": 2}},
        )
    )


def check_steps(folder, monkeypatch, config, steps):
    """Resume a run from each of the given steps, and compare the end with that of the whole run.

    The whole run, which is saved after every step, is left in `folder / "whole"`.
    """
    whole, asked = folder / "whole", BaseTrainer._asked_to_stop

    def save_every_step(self):
        path = folder / f"{3 * self.state.epochs_done + self.state.batches_done}.pth"
        # The method is called again when the epoch is finished
        if not path.exists():
            save_checkpoint(path, self.checkpoint())
        return asked(self)

    with monkeypatch.context() as patched:
        patched.setattr(BaseTrainer, "_asked_to_stop", save_every_step)
        run(whole, config)
    for step in steps:
        place = folder / f"from {step}"
        place.mkdir()
        for name in (*(f"model_epoch_{epoch}.pth" for epoch in (1, 2, 3)), "model_best.pth"):
            (place / name).write_bytes((whole / name).read_bytes())
        (place / "model_last.pth").write_bytes((folder / f"{step}.pth").read_bytes())
        # A new process does not have this one's generators
        torch.manual_seed(step)
        resume(str(place))
        for name in ("model_last.pth", "model_best.pth"):
            assert difference(whole / name, place / name) == [], f"step {step}: {name}"
        assert (whole / "metrics.jsonl").read_bytes() == (place / "metrics.jsonl").read_bytes(), (
            f"step {step}"
        )
        results = [json.loads((run / "result.json").read_text()) for run in (whole, place)]
        for result in results:
            del result["train_seconds"], result["images_per_second"]
        assert results[0] == results[1]


@pytest.mark.parametrize(
    ("method", "steps"),
    [(name, SOME if number else ALL_STEPS) for number, name in enumerate(METHODS)],
)
def test_resume_is_bit_exact(tmp_path, monkeypatch, small, method, steps):
    config = of_method(small, method)
    check_steps(tmp_path, monkeypatch, config, steps)
    if method in COMPARED_WITH_UNDISTURBED:
        run(tmp_path / "undisturbed", config)
        for name in ("model_last.pth", "model_best.pth"):
            assert difference(tmp_path / "undisturbed" / name, tmp_path / "whole" / name) == [], (
                "saving after every step has changed the run"
            )


def zero_momentum(contents):
    state = contents["optimizer"]["state"]
    for name, entry in state.items():
        state[name] = {key: torch.zeros_like(value) for key, value in entry.items()}


FORGOTTEN = {
    "momentum": ("free", zero_momentum),
    "generators": (
        "dropout",
        lambda contents: contents["rng"].update(cpu=torch.Generator().get_state()),
    ),
    "averaged updates": ("free", lambda contents: contents.update(ema_updates=0)),
    "carried noise": (
        "free",
        lambda contents: contents.update(
            method={key: 0 * value for key, value in contents["method"].items()}
        ),
    ),
    "sums of the epoch": (
        "free",
        lambda contents: contents["totals"].update(
            sums={key: 0 * value for key, value in contents["totals"]["sums"].items()}
        ),
    ),
}


@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_the_check_can_fail(tmp_path, monkeypatch, small, forgotten):
    """A checkpoint without one of the states that a run carries from step to step."""
    checkpoint, (method, forget) = BaseTrainer.checkpoint, FORGOTTEN[forgotten]

    def without(self):
        contents = checkpoint(self)
        contents["optimizer"] = {
            **contents["optimizer"],
            "state": dict(contents["optimizer"]["state"]),
        }
        contents["totals"] = dict(contents["totals"])
        forget(contents)
        return contents

    monkeypatch.setattr(BaseTrainer, "checkpoint", without)
    name = next(name for name in METHODS if method in name)
    with pytest.raises(AssertionError, match="step 4"):
        # In the middle of the second epoch
        check_steps(tmp_path, monkeypatch, of_method(small, name), (4,))


def check_evaluation_leaves_no_trace(folder, monkeypatch, config):
    """Validate three times as often, also under attack, and compare weights and logged values."""
    run(folder / "once", config)
    validate = BaseTrainer.validate
    with monkeypatch.context() as patched:
        patched.setattr(
            BaseTrainer, "validate", lambda self: [validate(self) for _ in range(3)][-1]
        )
        run(folder / "thrice", config)
    assert (
        difference(folder / "once" / "model_last.pth", folder / "thrice" / "model_last.pth") == []
    )
    lines = [
        (folder / name / "metrics.jsonl").read_text().splitlines() for name in ("once", "thrice")
    ]
    assert [json.loads(line) for line in lines[0]] == [json.loads(line) for line in lines[1]]


DROPOUT = {
    "arch": {"type": "wide_resnet", "args": WIDE},
    "adversarial": {"method": "fgsm"},
    "pgd_attack": {"K": 1},
    # The first validation is before the second epoch
    "trainer": {"epochs": 2},
}


def test_evaluation_never_disturbs_training(tmp_path, monkeypatch, small):
    check_evaluation_leaves_no_trace(tmp_path, monkeypatch, small(**DROPOUT))


def test_the_check_of_evaluation_can_fail(tmp_path, monkeypatch, small):
    validate = BaseTrainer.validate

    def disturbing(self):
        # The generator that dropout draws from
        torch.rand(1)
        return validate(self)

    monkeypatch.setattr(BaseTrainer, "validate", disturbing)
    with pytest.raises(AssertionError):
        check_evaluation_leaves_no_trace(tmp_path, monkeypatch, small(**DROPOUT))
