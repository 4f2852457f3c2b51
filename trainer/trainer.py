"""Standard training: one update per minibatch of clean images."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from base.base_trainer import BaseTrainer
from base.runtime import numpy_generator, torch_generator
from base.totals import BatchResult
from trainer.evaluate import Loss, Metric, batch_result


class Trainer(BaseTrainer):
    """Minimises the mean loss over each minibatch, plus an optional penalty on the weights, with optional mixup.

    Args:
        loss: per-sample loss.
        metrics: per-batch counts of correct samples, by name.
        penalty: a scalar function of the model that is added to the loss, such as OCNN's weighted orthogonality penalty.
        **parts: everything `BaseTrainer` takes.
    """

    def __init__(
        self,
        *,
        loss: Loss,
        metrics: Mapping[str, Metric],
        penalty: Callable[[nn.Module], Tensor] | None = None,
        **parts: Any,
    ) -> None:
        super().__init__(**parts)
        self.loss = loss
        self.metrics = metrics
        self.penalty = penalty

    def train_batch(self, images: Tensor, labels: Tensor) -> BatchResult:
        """One forward pass, one update. The logged loss is without the penalty."""
        alpha = self.config.augmentation.mixup_alpha
        if alpha > 0:
            return self._train_mixed_batch(images, labels, alpha)
        with self.autocast():
            logits = self.model(images)
        losses = self.loss(logits, labels)
        self.update(self._penalised(losses.mean()))
        return batch_result(losses, logits, labels, self.metrics)

    def _train_mixed_batch(self, images: Tensor, labels: Tensor, alpha: float) -> BatchResult:
        """Mixup (Zhang et al., arXiv 1710.09412): images and losses of pairs are averaged with one Beta(alpha, alpha) weight.

        Metrics are averaged over the two labels with the same weight, so a prediction of either counts its share.
        """
        key = ("mixup", self.progress.epochs_done + 1, self.progress.batches_done)
        weight = float(numpy_generator(self.config.seed, *key).beta(alpha, alpha))
        partner = torch.randperm(len(labels), generator=torch_generator(self.config.seed, *key)).to(labels.device)
        with self.autocast():
            logits = self.model(torch.lerp(images[partner], images, weight))
        losses = weight * self.loss(logits, labels) + (1 - weight) * self.loss(logits, labels[partner])
        self.update(self._penalised(losses.mean()))
        own = batch_result(losses, logits, labels, self.metrics).sums
        other = batch_result(losses, logits, labels[partner], self.metrics).sums
        return BatchResult({name: weight * own[name] + (1 - weight) * other[name] for name in own}, len(labels))

    def _penalised(self, loss: Tensor) -> Tensor:
        return loss if self.penalty is None else loss + self.penalty(self.model)
