"""MART: adversarial training that gives misclassified images more weight (Wang et al. 2020,
"Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR)."""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from base.base_trainer import TrainerParts
from base.meters import BatchResult
from base.registry import TRAINERS
from trainer.adversarial_trainer import AdversarialTrainer


def mart_losses(logits: Tensor, attacked_logits: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Return the boosted cross entropy of attacked images plus their weighted divergence from the
    clean ones, `(B,)`.

    Args:
        logits: of the clean images, `(B, C)`.
        attacked_logits: of the attacked images, `(B, C)`.
        labels: int64 `(B,)`.
        weight: of the divergence, lambda in the paper.
    """
    label = labels.unsqueeze(1)
    log_clean = F.log_softmax(logits.float(), dim=1)
    log_attacked = F.log_softmax(attacked_logits.float(), dim=1)
    log_of_label = log_attacked.gather(1, label).squeeze(1)
    largest_other = log_attacked.scatter(1, label, -torch.inf).amax(dim=1).exp()
    # 1.0001 keeps the logarithm finite, as in the authors' code
    boosted = -log_of_label - torch.log(1.0001 - largest_other)
    divergence = F.kl_div(log_attacked, log_clean, reduction="none", log_target=True).sum(dim=1)
    doubt = 1 - log_clean.gather(1, label).squeeze(1).exp()
    return boosted + weight * divergence * doubt


class MARTTrainer(AdversarialTrainer):
    """Attacks the minibatch, then takes one update on `mart_losses`.

    Args:
        parts: see `TrainerParts`.
        weight: of the divergence between predictions for clean and attacked images.
        others: the arguments of `AdversarialTrainer`, which attacks.
    """

    default_bn_mode = "eval"
    # The loss needs one label per image
    takes_mixup = False

    def __init__(
        self, parts: TrainerParts, *, weight: Annotated[float, Field(ge=0)] = 5.0, **others: Any
    ) -> None:
        super().__init__(parts, **others)
        self.weight = weight

    def train_batch(self, images: Tensor, labels: Tensor) -> BatchResult:
        """Take one update; the loss and the accuracy logged are those of the attacked images."""
        attacked = self.attacked(images, labels)
        logits = self.forward(images)
        attacked_logits = self.forward(attacked)
        losses = mart_losses(logits, attacked_logits, labels, self.weight)
        self.update(losses)
        return self.result(losses, attacked_logits, labels)


TRAINERS["mart"] = MARTTrainer
