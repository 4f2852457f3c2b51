"""Training methods. Models, loaders and attacks arrive as objects."""

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
