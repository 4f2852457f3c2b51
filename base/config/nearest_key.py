"""The key that a user meant by a config key that does not exist.

That may be a misspelt key, one in the wrong section, or the name that another project uses.
"""

import inspect
from collections.abc import Collection, Iterator, Sequence

from base.config.config import Config
from base.config.section import Section, section_in
from base.registry import nearest_name

OTHER_PROJECTS = {
    "loss": "train_loss",
    "len_epoch": "data_loader.args.num_batches",
    "limit_train_batches": "data_loader.args.num_batches",
    "model": "arch",
    "train": "trainer",
    "model_name": "arch.type",
    "dataset": "data_loader",
    "lr": "optimizer.args.lr",
    "learning_rate": "optimizer.args.lr",
    "weight_decay": "optimizer.args.weight_decay",
    "momentum": "optimizer.args.momentum",
    "warmup_epochs": "lr_scheduler",
    "drop_rate": "arch.args.dropout",
    "model_ema": "trainer.ema_decay",
    "eps": "adversarial.epsilon",
    "epsilon": "adversarial.epsilon",
    "pgd_attack.steps": "pgd_attack.K",
    "amp": "system.precision",
}
"""Names in pytorch-template, timm and Lightning that resemble none of ours, or the wrong one -> the
dotted key of the same thing here."""
LOCAL_SECTIONS = ("name", "adversarial", "pgd_attack", "comet", "optimizer", "lr_scheduler")
"""Keys that mean something only there: `steps` elsewhere says nothing about attacks."""
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
    meant = OTHER_PROJECTS.get(".".join(path))
    if name in _torch_arguments(place):
        meant = f"{place}.args.{name}"
    if meant is None:
        guesses = [
            OTHER_PROJECTS.get(name),
            nearest_name(name, known) or _key_elsewhere(place, name),
        ]
        # There names such as loss and warmup_epochs are those of keys that exist
        if place in ATTACK_SECTIONS:
            guesses.reverse()
        meant = guesses[0] or guesses[1]
    # Its own section is no answer
    if meant is None or f"{place}.".startswith(f"{meant}."):
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
    excluded = ("arch", "name") if place in ATTACK_SECTIONS else LOCAL_SECTIONS
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
