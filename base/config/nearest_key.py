"""The key that a user meant by a config key that does not exist.

That may be a misspelt key, one in the wrong section, or the name that another project uses.
"""

import inspect
from collections.abc import Collection, Iterator, Sequence

from base.config.config import Config
from base.config.section import Section, section_in
from base.registry import nearest_name

OTHER_PROJECTS: dict[str, str | None] = {
    "loss": "train_loss",
    "criterion": "train_loss",
    "loss_fn": "train_loss",
    "loss_function": "train_loss",
    "len_epoch": "data_loader.args.num_batches",
    "limit_train_batches": "data_loader.args.num_batches",
    "model": "arch",
    "network": "arch",
    "model_name": "arch.type",
    "optimizer.name": "optimizer.type",
    "arch.name": "arch.type",
    "lr_scheduler.name": "lr_scheduler.type",
    "train": "trainer",
    "dataset": "data_loader",
    "dataloader": "data_loader",
    "data": "data_loader",
    "transform": "augmentation",
    "transforms": "augmentation",
    "data_path": "data_loader.args.data_dir",
    "data_root": "data_loader.args.data_dir",
    "root": "data_loader.args.data_dir",
    "lr": "optimizer.args.lr",
    "learning_rate": "optimizer.args.lr",
    "weight_decay": "optimizer.args.weight_decay",
    "wd": "optimizer.args.weight_decay",
    "momentum": "optimizer.args.momentum",
    "scheduler": "lr_scheduler",
    "lr_schedule": "lr_scheduler",
    "schedule": "lr_scheduler",
    "milestones": "lr_scheduler.args.milestones",
    "gamma": "lr_scheduler.args.gamma",
    "drop_rate": "arch.args.dropout",
    "max_epoch": "trainer.epochs",
    "output_dir": "trainer.save_dir",
    "log_dir": "trainer.save_dir",
    "ckpt_dir": "trainer.save_dir",
    "checkpoint_dir": "trainer.save_dir",
    "save_freq": "trainer.save_period",
    "save_interval": "trainer.save_period",
    "early_stopping": "trainer.early_stop",
    "patience": "trainer.early_stop",
    "ema": "trainer.ema_decay",
    "model_ema": "trainer.ema_decay",
    "noise_rate": "trainer.percent",
    "pgd_attack.steps": "pgd_attack.K",
    "eps": "adversarial.epsilon",
    "epsilon": "adversarial.epsilon",
    "attack_iters": "adversarial.steps",
    "num_steps": "adversarial.steps",
    "pgd_alpha": "adversarial.step_size",
    "amp": "system.precision",
    "fp16": "system.precision",
    "gpus": "n_gpu",
    # This project has no such feature, and a key with a similar name means something else
    "grad_clip": None,
    "clip_grad": None,
    "clip_grad_norm": None,
    "gradient_clip_val": None,
    "label_smoothing": None,
    "accumulate_grad_batches": None,
    "warmup": None,
    "warmup_epochs": None,
    "resume": None,
    "pretrained": None,
}
"""Names in other projects (pytorch-template, timm, Lightning, mmengine, code of papers) -> the
dotted key of the same thing here, or None."""
LOCAL_SECTIONS = ("adversarial", "pgd_attack", "comet", "optimizer", "lr_scheduler")
"""Sections whose keys mean something only there: `steps` elsewhere says nothing about attacks."""
ATTACK_SECTIONS = ("adversarial", "pgd_attack")
"""Sections that are easily confused with each other."""


def nearest_key(path: Sequence[str], known: Sequence[str]) -> str | None:
    """Return the key that the unknown key at a dotted path was meant to be.

    Args:
        path: the parts of the dotted path.
        known: the keys of its section.

    Returns:
        A name, if the key is in the same section, otherwise a dotted key; None where an answer
        would be a guess.
    """
    *section, name = path
    place = ".".join(section)
    other = OTHER_PROJECTS.get(f"{place}.{name}", OTHER_PROJECTS.get(name))
    if name in _torch_arguments(place):
        meant: str | None = f"{place}.args.{name}"
    # In the attack sections eps and steps are the names of keys that exist there
    elif f"{place}.{name}" in OTHER_PROJECTS or (
        name in OTHER_PROJECTS and place not in ATTACK_SECTIONS
    ):
        meant = other
    else:
        meant = nearest_name(name, known) or _key_elsewhere(place, name) or other
    if meant is None:
        return None
    sibling = meant.removeprefix(f"{place}.")
    return meant if "." in sibling else sibling


def dotted_keys(section: type[Section] = Config, path: str = "") -> Iterator[str]:
    """Yield the dotted keys of all leaves."""
    for name, field in section.known_fields().items():
        inner = section_in(field.annotation)
        if inner is None:
            yield path + name
        else:
            yield from dotted_keys(inner, f"{path}{name}.")


def _key_elsewhere(place: str, name: str) -> str | None:
    """The only key of this name in other sections, or the only one below this section."""
    # Somebody who writes about an attack in one attack section may well mean the other one
    excluded = ("arch",) if place in ATTACK_SECTIONS else LOCAL_SECTIONS
    keys = []
    for key in dotted_keys():
        if key.rpartition(".")[2] == name and key.partition(".")[0] not in excluded:
            keys.append(key)
    below = [key for key in keys if key.startswith(f"{place}.")]
    found = below or keys
    return found[0] if len(found) == 1 else None


def _torch_arguments(place: str) -> Collection[str]:
    """The arguments of all optimizers or of all schedules, where `place` is their section."""
    if place not in ("optimizer", "lr_scheduler"):
        return ()
    # Imported here because it brings torch, which a config without mistakes does not need
    from base.optim import OPTIMIZERS, SCHEDULERS

    classes = OPTIMIZERS if place == "optimizer" else SCHEDULERS
    return {name for cls in classes.values() for name in inspect.signature(cls).parameters}
