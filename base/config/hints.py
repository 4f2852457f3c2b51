"""What a config key that does not exist was meant to be: a misspelt one, one in the wrong place, or
another project's."""

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
    # nothing here does what these do
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
"""Names of other projects (pytorch-template, timm, Lightning, mmengine, codes of papers) -> our
dotted key for the same thing, or None where there is none and a name that looks alike is another
thing."""
OF_ITS_OWN = ("adversarial", "pgd_attack", "comet", "optimizer", "lr_scheduler")
"""Sections whose keys mean something only there: `steps` at another place says nothing about
attacks."""
ATTACKS = ("adversarial", "pgd_attack")
"""Sections that are easily taken for each other."""


def hint(path: Sequence[str], known: Sequence[str], arguments: Collection[str] = ()) -> str:
    """`"; did you mean 'x'?"` for the unknown key at a dotted path; empty where that would be a
    guess.

    Args:
        path: the parts of the dotted path.
        known: the keys that its section knows.
        arguments: what may stand in the section's free-form `args`, where it has some.
    """
    *section, name = path
    place = ".".join(section)
    other = OTHER_PROJECTS.get(f"{place}.{name}", OTHER_PROJECTS.get(name))
    if name in arguments:
        meant = f"{place}.args.{name}"
    elif f"{place}.{name}" in OTHER_PROJECTS or (name in OTHER_PROJECTS and place not in ATTACKS):
        meant = other
    else:
        meant = nearest_name(name, known) or _elsewhere(place, name) or other
    if not meant:
        return ""
    sibling = meant.removeprefix(f"{place}.")
    return f"; did you mean {(meant if '.' in sibling else sibling)!r}?"


def _elsewhere(place: str, name: str) -> str | None:
    """The only key of this name in other sections, or the only one below this section."""
    others = ("arch",) if place in ATTACKS else OF_ITS_OWN
    keys = [
        key
        for key in _keys(Config)
        if key.rpartition(".")[2] == name and key.partition(".")[0] not in others
    ]
    below = [key for key in keys if key.startswith(f"{place}.")]
    found = below or keys
    return found[0] if len(found) == 1 else None


def _keys(section: type[Section], path: str = "") -> Iterator[str]:
    """The dotted keys of all leaves."""
    for name, field in section.known_fields().items():
        inner = section_in(field.annotation)
        if inner is None:
            yield path + name
        else:
            yield from _keys(inner, f"{path}{name}.")
