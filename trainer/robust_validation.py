"""Robust accuracy on a fixed part of the validation set, while training goes on."""

import logging

from torch import nn

from attacks.attack import Attack
from attacks.robustness import Autocast, Verdicts, attack_loader
from base.base_data_loader import BaseDataLoader
from base.ranks import gather

logger = logging.getLogger(__name__)


class RobustValidation:
    """Attacks the same images from the same starting points every `period` epochs, and in the last that the config has.

    `robust_validation(model, epoch)` returns `robust_top1` in the epochs in which it attacks, nothing in the others. For fast
    FGSM training it also returns `fgsm_top1` and warns of catastrophic overfitting (Wong et al., arXiv:2001.03994, section 5):
    the model then resists the single step it was trained with, while PGD breaks it.

    Args:
        loader: the images, neither shuffled nor augmented; with several processes this one's part of them.
        attack: PGD; its accuracy is `robust_top1`.
        fgsm: FGSM, where the training method is fast FGSM training; None otherwise.
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
        self.n_samples = sum(gather(loader.n_samples))

    def __call__(self, model: nn.Module, epoch: int) -> dict[str, float]:
        if epoch % self.period and epoch != self.epochs:
            return {}
        values = {"robust_top1": self._accuracy(model, self.attack)}
        if self.fgsm is not None:
            values["fgsm_top1"] = self._accuracy(model, self.fgsm)
            if has_overfitted(values, self.loader.num_classes):
                logger.warning(
                    "catastrophic overfitting: %.1f %% of the validation images resist FGSM, %.1f %% resist PGD; try a smaller"
                    " adversarial.step_size or another method; trainer.monitor 'max val_robust_top1' keeps an epoch before",
                    100 * values["fgsm_top1"],
                    100 * values["robust_top1"],
                )
        return values

    def _accuracy(self, model: nn.Module, attack: Attack) -> float:
        options = {"seed": self.seed, "autocast": self.autocast, "description": f"validating under {type(attack).__name__}"}
        return Verdicts.joined(gather(attack_loader(model, self.loader, attack, **options))).accuracy("robust_top1")


def has_overfitted(values: dict[str, float], num_classes: int) -> bool:
    """Whether PGD accuracy has collapsed while FGSM accuracy is high: less than half of it, which is well above chance (with
    few classes, halfway to 1).

    In healthy fast training PGD accuracy is 80 to 95 % of FGSM accuracy; after the collapse it is next to zero.
    """
    well_above_chance = min(2 / num_classes, (1 + 1 / num_classes) / 2)
    return values["fgsm_top1"] > well_above_chance and values["robust_top1"] < 0.5 * values["fgsm_top1"]
