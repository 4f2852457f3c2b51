"""Every shipped config is valid, and its model takes a training step (on two small images)."""

import json
from pathlib import Path

import pytest
import torch

from base.base_data_loader import BaseDataLoader
from base.config import load_config
from base.config.files import read_layers
from base.optim import Schedule, build_optimizer, check_optimization
from experiment.build import build_trainer
from models import build_model
from studies.grid import plan

CONFIGS = Path(__file__).parents[1] / "configs"
GRIDS = sorted((CONFIGS / "ablations").glob("*.json"))
SCHEMAS = [CONFIGS / "schema.json", CONFIGS / "grid_schema.json"]
FILES = [file for file in sorted(CONFIGS.rglob("*.json")) if file not in [*GRIDS, *SCHEMAS]]


class NoImages(BaseDataLoader):
    """Only what trainers ask for."""

    num_classes = 10

    def __len__(self):
        return 1

    __iter__ = set_epoch = images_at = subset = split_validation = test_loader = None


def step(config, folder):
    torch.manual_seed(0)
    arch = config.arch.model_dump(exclude_none=True)
    model = build_model(
        {**arch, "args": {**arch["args"], "num_classes": 10}}, (0.5,) * 3, (0.25,) * 3
    ).train()
    optimizer = build_optimizer(config.optimizer, model)
    trainer = build_trainer(
        config, model=model, optimizer=optimizer,
        schedule=Schedule(config.lr_scheduler, optimizer, 1, 1, True),
        train_loader=NoImages(), validate=lambda model, epoch: {}, precision="fp32", folder=folder,
        metadata={},
    )  # fmt: skip
    before = [parameter.detach().clone() for parameter in model.parameters()]
    result = trainer.train_batch(torch.rand(2, 3, 16, 16), torch.tensor([0, 1]))
    assert torch.isfinite(result.sums["loss"])
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert any(
        not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_every_config_names_the_schema_and_trains(file, tmp_path):
    tree = json.loads(file.read_text())
    assert (file.parent / tree["$schema"]).resolve() == CONFIGS / "schema.json"
    assert tree["_about"].endswith(".")
    config = load_config(file, [("adversarial.steps", "1"), ("trainer.adv_repeats", "1")])
    check_optimization(config.optimizer, config.lr_scheduler)
    step(config, tmp_path)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_no_config_inherits_through_more_than_two_parents(file):
    assert len(read_layers(file)) <= 3


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_no_config_warns(file):
    assert load_config(file).warnings == ()


@pytest.mark.parametrize("file", GRIDS, ids=lambda file: file.stem)
def test_no_variant_of_a_grid_warns(file):
    for run in plan(file):
        assert run.config.warnings == (), run.name


@pytest.mark.parametrize("file", GRIDS, ids=lambda file: file.stem)
def test_every_variant_of_every_grid_can_be_optimized(file):
    for run in plan(file):
        check_optimization(run.config.optimizer, run.config.lr_scheduler)
