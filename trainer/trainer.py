"""Standard training: one update per minibatch of clean images."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.base_trainer import BaseTrainer
from base.ranks import SharedGenerator
from base.runtime import numpy_generator, to_device, torch_generator
from base.totals import BatchResult
from evaluation.accuracy import Loss, Metric, batch_result


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
        return self.train_on(*self.mixed(images, labels))

    def train_on(self, images: Tensor, targets: Tensor) -> BatchResult:
        """One forward pass and one update on these images; `targets` are labels `(B,)` or class probabilities `(B, C)`."""
        with self.autocast():
            logits = self.network(images)
        losses = self.loss(logits, targets)
        self.update(self.penalised(self.share(images).mean(losses)))
        return batch_result(losses, logits, targets, self.metrics)

    def mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixup (Zhang et al., arXiv:1710.09412), where the config asks for it: pairs of images and of labels are averaged with
        one Beta(alpha, alpha) weight per minibatch.

        Returns images and class probabilities `(B, C)`; without mixup, images and labels `(B,)` as they came. As cross entropy
        is linear in the probabilities, it is that of both labels with their weights, in training and inside every attack.

        An image's partner may be any of the minibatch: where several processes train, mixup is given the whole minibatch and
        returns the share of this one.
        """
        alpha = self.config.augmentation.mixup_alpha
        if alpha == 0:
            return images, labels
        key = ("mixup", *self.minibatch)
        weight = float(numpy_generator(self.config.seed, *key).beta(alpha, alpha))
        partner = to_device(torch.randperm(len(labels), generator=torch_generator(self.config.seed, *key)), labels.device)
        targets = F.one_hot(labels, self.train_loader.num_classes).to(images.dtype)
        part = self.share(images).part
        own = partner[part]
        return torch.lerp(images[own], images[part], weight), torch.lerp(targets[own], targets[part], weight)

    @property
    def minibatch(self) -> tuple[int, int]:
        """Epoch and number of the minibatch that is being trained on, from which its random draws are derived."""
        return self.progress.epochs_done + 1, self.progress.batches_done

    def generator(self, purpose: str, images: Tensor) -> torch.Generator | SharedGenerator:
        """Where this minibatch's random numbers for `purpose` come from; they do not depend on the number of processes."""
        generator, share = torch_generator(self.config.seed, purpose, *self.minibatch), self.share(images)
        return generator if share.processes == 1 else SharedGenerator(generator, share)

    def penalised(self, loss: Tensor) -> Tensor:
        """The loss with the penalty on the weights, if there is one."""
        return loss if self.penalty is None else loss + self.penalty(self.model)
