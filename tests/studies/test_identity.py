"""The names of run folders: those of earlier versions stay."""

from pathlib import Path

import pytest

from base.config.files import annotation_at, validate
from studies.grid import plan
from studies.identity import HASHED_AT_DEFAULT, identity

GRIDS = Path(__file__).parents[2] / "configs" / "ablations"
OF_6B87CE2 = {
    "conv_norm": "ONI_seed3_5c3b265f71",
    "conv_norm_robust": "ConvNorm_seed0_f500845946",
    "group_norm_recipe": "GroupNorm_lr_warmup_seed0_c81f60d90b",
    "label_noise": "ConvNorm_80%_seed1_c5a4742af6",
    "small": "GroupNorm_PGD_seed2_c3b1d74a33",
    "small_label_noise": "BatchNorm_20%_seed0_d2df87dfc2",
    "small_subsets": "ConvNorm_5%_seed2_68ba19fee2",
    "subsets": "BatchNorm_70%_seed0_f344e59a13",
}
"""Run folders as commit 6b87ce2 named them."""


@pytest.mark.parametrize("grid", OF_6B87CE2)
def test_folders_of_begun_studies_keep_their_names(grid):
    name = OF_6B87CE2[grid]
    variant, _, rest = name.rpartition("_seed")
    (run,) = plan(GRIDS / f"{grid}.json", [variant], [int(rest[0])])
    assert run.folder.name == name


def test_every_hashed_key_is_a_config_key():
    assert [key for key in HASHED_AT_DEFAULT if annotation_at(key.split(".")) is None] == []


def test_a_new_key_names_a_run_only_where_it_is_not_at_its_default(monkeypatch):
    tree = {"data_loader": {"type": "DigitsDataLoader"}, "augmentation": {"crop_padding": 3}}
    usual = identity(validate(tree))
    # as if a key, and then a whole section, had come later
    monkeypatch.setattr("studies.identity.HASHED_AT_DEFAULT", tuple(set(HASHED_AT_DEFAULT) - {"augmentation.flip"}))
    without = identity(validate(tree))
    assert without != usual, "it is hashed no more"
    given = {**tree, "augmentation": {"crop_padding": 3, "flip": True}}
    assert identity(validate(given)) == without
    assert identity(validate({**tree, "augmentation": {"crop_padding": 3, "flip": False}})) != without
    later = tuple(key for key in HASHED_AT_DEFAULT if not key.startswith("pgd_attack."))
    monkeypatch.setattr("studies.identity.HASHED_AT_DEFAULT", later)
    alone = identity(validate(tree))
    assert alone == identity(validate({**tree, "pgd_attack": {"K": 10}}))
    assert alone != identity(validate({**tree, "pgd_attack": {"K": 11}}))
