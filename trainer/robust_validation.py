"""Robust accuracy on a fixed part of the validation set during training."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from attacks.attack import Attack
from base.base_data_loader import BaseDataLoader
from base.distributed import all_gather_object
from evaluation.attack_batch import Autocast
from evaluation.robust_accuracy import attack_loader
from evaluation.verdicts import Verdicts

ABOVE_CHANCE = 0.1
"""A network whose PGD accuracy was never this far above chance cannot collapse."""


class RobustValidation:
    """Attacks the same images from the same starting points every `period` epochs, and in the last
    epoch of the config.

    `robust_validation(model, epoch)` returns `robust_top1` in the epochs in which it attacks, and
    an empty dict in the others. For fast FGSM training it also returns `fgsm_top1`, by which
    `overfitting_warnings` recognizes catastrophic overfitting.

    Args:
        loader: the images, neither shuffled nor augmented; with several processes this one's part
            of them.
        attack: PGD; its accuracy is `robust_top1`.
        fgsm: FGSM, if the training method is fast FGSM training; None otherwise.
        period: epochs from one attack to the next.
        epochs: number of the last epoch.
        seed: of the starting points.
        autocast: context of the attack's forward passes.

    Attributes:
        n_samples: the images that all processes attack together.
    """

    def __init__(
        self,
        loader: BaseDataLoader,
        attack: Attack,
        fgsm: Attack | None,
        *,
        period: int,
        epochs: int,
        seed: int,
        autocast: Autocast,
    ) -> None:
        self.loader = loader
        self.attack = attack
        self.fgsm = fgsm
        self.period = period
        self.epochs = epochs
        self.seed = seed
        self.autocast = autocast
        self.n_samples = sum(all_gather_object(loader.n_samples))

    def __call__(self, model: nn.Module, epoch: int) -> dict[str, float]:
        if epoch % self.period and epoch != self.epochs:
            return {}
        values = {"robust_top1": self._accuracy(model, self.attack)}
        if self.fgsm is not None:
            values["fgsm_top1"] = self._accuracy(model, self.fgsm)
        return values

    def _accuracy(self, model: nn.Module, attack: Attack) -> float:
        verdicts = attack_loader(
            model,
            self.loader,
            attack,
            seed=self.seed,
            autocast=self.autocast,
            description=f"validating under {type(attack).__name__}",
        )
        return Verdicts.joined(all_gather_object(verdicts)).accuracy("robust_top1")


def overfitting_warnings(
    log: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    num_classes: int,
) -> list[str]:
    """Return warnings of catastrophic overfitting (Wong et al., arXiv:2001.03994, section 5): the
    network resists the single-step attack that it is trained with, but no longer resists PGD.

    Args:
        log: the values of an epoch. The network and its averaged weights are judged where both
            accuracies are among them.
        history: the values of the epochs before it, also of those before a resume.
        num_classes: in the data set.
    """
    warnings = []
    for prefix in ("val_", "val_ema_"):
        name = f"{prefix}robust_top1"
        earlier = [entry for entry in history if entry.get(name) is not None]
        if not earlier or name not in log or f"{prefix}fgsm_top1" not in log:
            continue
        best = max(earlier, key=lambda entry: entry[name])
        fgsm = log[f"{prefix}fgsm_top1"]
        pgd = log[name]
        if has_collapsed(fgsm, pgd, best[name], num_classes):
            warnings.append(
                f"catastrophic overfitting: {100 * fgsm:.1f} % of the validation images resist"
                f" FGSM, {100 * pgd:.1f} % resist PGD, as {100 * best[name]:.1f} % did in epoch"
                f" {best['epoch']}; try a smaller adversarial.step_size or another method;"
                " trainer.monitor 'max val_robust_top1' keeps an earlier epoch"
            )
    return warnings


def has_collapsed(fgsm: float, pgd: float, pgd_before: float, num_classes: int) -> bool:
    """Return whether PGD accuracy has fallen to less than half of what it was, and to less than
    half of FGSM accuracy.

    Args:
        fgsm, pgd: shares of the images that resist each attack now.
        pgd_before: the largest share that resisted PGD after an earlier epoch.
        num_classes: in the data set.
    """
    chance = 1 / num_classes
    # A network that gives one answer to all images is at chance under every attack, and one that
    # has learned little may resist FGSM better than PGD: neither is a collapse. Twice chance is too
    # much to ask with few classes
    well_above_chance = min(2 * chance, (1 + chance) / 2)
    has_learned = fgsm > well_above_chance and pgd_before > chance + ABOVE_CHANCE
    # In healthy fast training PGD accuracy is 80 to 95 % of FGSM accuracy, after a collapse near 0
    return has_learned and pgd < 0.5 * min(fgsm, pgd_before)
