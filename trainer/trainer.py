"""Standard training: one update per minibatch of clean images."""

from torch import Tensor

from base.base_trainer import BaseTrainer
from base.meters import BatchResult


class Trainer(BaseTrainer):
    """Minimizes the mean loss over each minibatch."""

    takes_mixup = True

    def train_batch(self, images: Tensor, labels: Tensor) -> BatchResult:
        """Take one forward pass and one update."""
        logits = self.forward(images)
        losses = self.loss(logits, labels)
        self.update(losses)
        return self.result(losses, logits, labels)
