"""The identity of a run in a study: a hash of everything that can change its result."""

import hashlib
import json
from collections.abc import Collection
from typing import Any

from base.config import Config
from base.config.same_experiment import WHERE_AND_HOW, remove_place
from base.config.section import lies_in
from base.config.tree import section_at

HASHED_AT_DEFAULT = (
    "seed", "n_gpu", "train_loss", "val_loss", "metrics", "arch.type",
    "arch.args.norm_layer_type", "arch.args.conv_layer_type", "arch.args.linear_layer_type",
    "arch.args.activation_layer_type", "data_loader.type", "data_loader.args.batch_size",
    "data_loader.args.shuffle", "data_loader.args.validation_split",
    "data_loader.args.num_batches", "augmentation.crop_padding", "augmentation.flip",
    "augmentation.cutout", "augmentation.mixup_alpha", "optimizer.type", "optimizer.args",
    "lr_scheduler.type", "lr_scheduler.args", "trainer.epochs", "trainer.monitor",
    "trainer.percent", "trainer.sym", "trainer.asym", "trainer.noise_law",
    "trainer.noisy_validation", "trainer.subset_percent", "trainer.OCNN", "trainer.lamb_ocnn",
    "trainer.do_adv", "trainer.fgsm_step", "trainer.adv_clip_eps", "trainer.adv_repeats",
    "adversarial.norm", "adversarial.steps", "adversarial.restarts", "adversarial.random_start",
    "adversarial.warmup_epochs", "adversarial.noise", "adversarial.beta",
    "adversarial.validate_images", "pgd_attack.K", "pgd_attack.restarts", "pgd_attack.loss",
    "system.precision", "system.sync_bn",
)  # fmt: skip
"""Keys that are hashed whatever their values are.

They had a default other than null when run folders were first named this way. The list does not
grow: a newer key is hashed only if its value is not the default, so that folders of earlier studies
keep their names.
"""


def identity(config: Config, settings: Collection[str] = ()) -> str:
    """Return ten hexadecimal digits of a hash of everything in a config that can change a result.

    Where and how a run computes (`WHERE_AND_HOW`) is left out, unless the grid compares it.

    Args:
        config: the resolved config.
        settings: dotted keys that the grid itself sets.
    """
    tree = config.dump()
    # Without places, so that a study can be continued with other devices and folders
    for place in WHERE_AND_HOW:
        if not any(lies_in(key, [place]) for key in settings):
            remove_place(tree, place)
    _remove_new_defaults(tree, ())
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:10]


def is_place(key: str) -> bool:
    """Return whether a dotted key, or the section that it lies in, is one of `WHERE_AND_HOW`."""
    return lies_in(key, WHERE_AND_HOW)


def _remove_new_defaults(tree: dict[str, Any], path: tuple[str, ...]) -> None:
    """Remove keys from the section at `path` that are newer than the list and at their default."""
    section = section_at(path)
    for name in list(tree):
        key = ".".join((*path, name))
        if section_at((*path, name)) is not None:
            _remove_new_defaults(tree[name], (*path, name))
            known = any(other.startswith(f"{key}.") for other in HASHED_AT_DEFAULT)
            # An empty section that is as old as the list was hashed as an empty section
            if not tree[name] and not known:
                del tree[name]
            continue
        if key in HASHED_AT_DEFAULT or is_place(key):
            continue
        # Some sections keep the arguments of a part only if the config gives them. There the
        # default has always been hashed when it was given, and it still is.
        if name not in section.model_fields and not section.fills_defaults:
            continue
        field = section.known_fields()[name]
        if field.is_required():
            continue
        if tree[name] == field.get_default(call_default_factory=True):
            del tree[name]
