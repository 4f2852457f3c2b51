"""Small runs that use everything a checkpoint holds."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from base.config.tree import merge

SMALL = {
    "name": "soak",
    "seed": 3,
    "arch": {
        "type": "simpleCNN",
        "args": {"conv_layer_type": "prec_conv", "norm_layer_type": "no"},
    },
    "data_loader": {
        "type": "ImageFolderDataLoader",
        "args": {"batch_size": 8, "validation_split": 0.1},
    },
    "optimizer": {"type": "SGD", "args": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}},
    "trainer": {"epochs": 10, "ema_decay": 0.9},
    "adversarial": {"method": "none", "report": False, "validate_images": 10},
    "system": {"num_threads": 1},
}
NOISY = {"sym": True, "percent": 0.4, "early_stop": 8}
WIDE = {
    "conv_layer_type": "conv",
    "norm_layer_type": "bn",
    "depth": 10,
    "widen_factor": 1,
    "dropout": 0.3,
}
SCENARIOS: dict[str, dict[str, Any]] = {
    "standard, label noise, early stop, plateau": {
        "trainer": NOISY,
        "lr_scheduler": {"type": "ReduceLROnPlateau", "args": {"patience": 1}},
    },
    "standard, dropout, AdamW, one cycle, mixup": {
        "arch": {"type": "wide_resnet", "args": WIDE},
        "optimizer": {"type": "AdamW", "args": {"momentum": None}},
        "lr_scheduler": {"type": "OneCycleLR", "args": {"max_lr": 0.01}},
        "augmentation": {"mixup_alpha": 0.5},
    },
    "free, noise carried": {
        "adversarial": {"method": "free", "noise": "carry"},
        "trainer": {"monitor": "max val_robust_top1", "adv_repeats": 2},
    },
    "FGSM, spectral norm, cosine": {
        "arch": {"args": {"conv_layer_type": "sn_conv", "norm_layer_type": "bn"}},
        "adversarial": {"method": "fgsm", "validate_every": 2},
        "lr_scheduler": {"type": "CosineAnnealingLR"},
    },
    "PGD, cutout": {
        "adversarial": {"method": "pgd", "steps": 2, "validate_every": 2},
        "pgd_attack": {"K": 3},
        "augmentation": {"cutout": 8},
    },
    "standard, two loader workers": {
        "data_loader": {"args": {"in_memory": False, "num_workers": 2}}
    },
    "standard, two processes": {
        "n_gpu": 2,
        "system": {"device": "cpu"},
        "trainer": {"save_period": 2},
    },
}
"""Name -> differences from `SMALL`."""


def tree_of(name: str, folder: Path) -> dict[str, Any]:
    """Return the config of a scenario, with image files in `folder`."""
    return merge(
        merge(SMALL, SCENARIOS[name]), {"data_loader": {"args": {"data_dir": str(folder)}}}
    )


def write_images(folder: Path, training: int = 24, test: int = 3, side: int = 16) -> None:
    """Write noise images of `side` x `side` pixels in three classes, with this many in each."""
    generator = np.random.default_rng(0)
    for part, count in (("train", training), ("test", test)):
        for label in "abc":
            (folder / part / label).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{number}.png")
