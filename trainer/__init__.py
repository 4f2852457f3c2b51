"""Training methods, each a subclass of `BaseTrainer`."""

from base.registry import TRAINERS
from trainer.adversarial_trainer import AdversarialTrainer, FGSMTrainer, FreeTrainer, TradesTrainer
from trainer.trainer import Trainer

TRAINERS.update(
    none=Trainer, fgsm=FGSMTrainer, pgd=AdversarialTrainer, trades=TradesTrainer, free=FreeTrainer
)

__all__ = [
    "TRAINERS",
    "AdversarialTrainer",
    "FGSMTrainer",
    "FreeTrainer",
    "TradesTrainer",
    "Trainer",
]
