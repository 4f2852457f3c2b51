"""The names of run folders stay those of earlier versions."""

from pathlib import Path

import pytest

from base.config import validate
from base.config.tree import annotation_at
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
def test_folders_of_existing_studies_keep_their_names(grid):
    name = OF_6B87CE2[grid]
    variant, _, rest = name.rpartition("_seed")
    (run,) = plan(GRIDS / f"{grid}.json", [variant], [int(rest[0])])
    assert run.folder.name == name


OF_4BC1DE1 = [
    ("1824eb9021", {}),
    ("1824eb9021", {"arch": {"args": {"stem": None, "oni_rule": None}}}),
    ("ad1806bbb6", {"arch": {"args": {"stem": "cifar"}}}),
    ("75c0f37ce3", {"arch": {"args": {"norm_groups": 8}}}),
    (
        "054eea62e9",
        {"arch": {"type": "wide_resnet", "args": {"depth": 16, "widen_factor": 2, "dropout": 0}}},
    ),
    ("b34f72ffe8", {"arch": {"args": {"conv_layer_type": "oni_conv", "oni_rule": "paper"}}}),
    ("cd548141e9", {"adversarial": {"method": "trades", "beta": 6, "clean_passes": 1}}),
    ("36b4c05534", {"adversarial": {"method": "trades", "clean_passes": 2}}),
    ("8c86f26798", {"adversarial": {"method": "pgd", "steps": 10, "bn_mode": "train"}}),
    ("864a4b3bd3", {"adversarial": {"method": "none", "steps": 3}}),
    (
        "cfdd380721",
        {
            "data_loader": {
                "type": "ImageFolderDataLoader",
                "args": {"data_dir": "x", "image_size": 32, "in_memory": True, "test_split": 0.2},
            },
        },
    ),
]
"""Hashes of commit 4bc1de1, the last in which one list named the arguments of all parts."""


@pytest.mark.parametrize(("digest", "tree"), OF_4BC1DE1)
def test_arguments_of_parts_are_hashed_as_they_were(digest, tree):
    config = validate({"data_loader": {"type": "DigitsDataLoader"}, **tree})
    assert identity(config) == identity(validate(config.dump())) == digest


def test_every_hashed_key_is_a_config_key():
    assert [key for key in HASHED_AT_DEFAULT if annotation_at(key.split(".")) is None] == []


def test_a_new_key_changes_a_name_only_if_it_is_not_at_its_default(monkeypatch):
    tree = {"data_loader": {"type": "DigitsDataLoader"}, "augmentation": {"crop_padding": 3}}
    usual = identity(validate(tree))
    # As if a key, and then a whole section, had been added later
    monkeypatch.setattr(
        "studies.identity.HASHED_AT_DEFAULT", tuple(set(HASHED_AT_DEFAULT) - {"augmentation.flip"})
    )
    without = identity(validate(tree))
    assert without != usual, "it is no longer hashed"
    given = {**tree, "augmentation": {"crop_padding": 3, "flip": True}}
    assert identity(validate(given)) == without
    assert (
        identity(validate({**tree, "augmentation": {"crop_padding": 3, "flip": False}})) != without
    )
    later = tuple(key for key in HASHED_AT_DEFAULT if not key.startswith("pgd_attack."))
    monkeypatch.setattr("studies.identity.HASHED_AT_DEFAULT", later)
    alone = identity(validate(tree))
    assert alone == identity(validate({**tree, "pgd_attack": {"K": 10}}))
    assert alone != identity(validate({**tree, "pgd_attack": {"K": 11}}))
