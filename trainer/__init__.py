"""Training methods. Models, loaders and attacks arrive as objects."""

from base.registry import TRAINERS
from trainer.adversarial_trainer import AdversarialTrainer, FGSMTrainer, FreeTrainer, TradesTrainer
from trainer.trainer import Trainer

TRAINERS.update(none=Trainer, free=FreeTrainer, fgsm=FGSMTrainer, pgd=AdversarialTrainer, trades=TradesTrainer)

__all__ = ["TRAINERS", "AdversarialTrainer", "FGSMTrainer", "FreeTrainer", "TradesTrainer", "Trainer"]
