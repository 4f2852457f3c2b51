"""Adversarial training: free, PGD, fast FGSM, and TRADES. Each `train_batch` is the algorithm of
its paper."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from attacks.frozen import under_attack
from attacks.pgd import PGD, crossing_step, step_within_range
from attacks.threat_model import ThreatModel, draw, format_size, in_pixel_range
from base.base_trainer import BaseTrainer, TrainerParts
from base.config.adversarial import Size
from base.config.section import Count, Positive
from base.distributed import Shard, all_gather_object, rank, world_size
from base.meters import BatchResult
from base.precision import widened
from base.text import counted
from trainer.robust_validation import overfitting_warnings


class TrainerWithAdversary(BaseTrainer):
    """The base class of all methods that attack images.

    Args:
        parts: see `TrainerParts`.
        warmup_epochs: Epochs over which training radius and step grow linearly from 0; validation
            and reports attack with the whole radius. Pang et al. (arXiv:2010.00467) begin at 1/N of
            the radius, and keep the whole step.
    """

    attacks_while_training = True
    takes_mixup = True
    default_bn_mode: ClassVar[Literal["train", "eval"]] = "train"
    """Mode of the model while it is attacked, where the config names none: that of the authors'
    code."""

    def __init__(self, parts: TrainerParts, *, warmup_epochs: Count = 0) -> None:
        super().__init__(parts)
        self.threat_model = ThreatModel(parts.norm, parts.epsilon)
        self.warmup_epochs = warmup_epochs

    def describe_training_attack(self) -> str:
        """Return one line for the log about the attack in training."""
        threat = self.threat_model
        radius = f"{threat.norm} {format_size(threat.epsilon, threat.norm)}"
        if self.warmup_epochs:
            radius += f" (growing for {counted(self.warmup_epochs, 'epoch')})"
        return radius

    @property
    def radius_scale(self) -> float:
        """The factor in [0, 1] of radius and step size for the current minibatch: it grows linearly
        over the first `adversarial.warmup_epochs`, from 0 in the first minibatch to 1 in the first
        one after them.

        The idea is that of Pang et al. ("Bag of Tricks for Adversarial Training", arXiv:2010.00467,
        section 3.1), the schedule is not. In their code the factor of the radius is `(t + 1) / N`
        after t of the N epochs, where t counts the current minibatch: it begins at 1 / N, passes 1
        in the last of them, and is 1 from then on. Their step size does not grow.
        """
        if self.warmup_epochs == 0:
            return 1.0
        # At the beginning the features of a deep network with GroupNorm hardly tell images apart.
        # An adversary with the whole radius hides all of the difference, and the network learns to
        # give one answer to every image
        done = self.state.epochs_done + self.state.batches_done / len(self.train_loader)
        return min(1.0, done / self.warmup_epochs)


class FreeTrainer(TrainerWithAdversary):
    """Free adversarial training (Shafahi et al., arXiv:1904.12843, algorithm 1).

    Each minibatch is trained on `trainer.adv_repeats` times (m in the paper). The backward pass of
    every update also gives the gradient for the images, by which the perturbation takes one step.
    These updates are the whole cost: no other pass is made. An epoch is a pass over the images with
    m updates each, as in ConvNorm, and schedules count minibatches. The paper counts updates, so
    its epochs and the steps of its schedules have to be divided by m.

    In the paper the perturbation is carried from minibatch to minibatch; ConvNorm begins at zero
    for each. The sum of perturbation and image is clamped to `[0, 1]`, the perturbation itself is
    not. Values logged are sums over all updates, each counting its samples.

    Args:
        parts: see `TrainerParts`.
        step_size: Step of training; null: trainer.fgsm_step (free; under l2 epsilon), 1.25 epsilon
            (fgsm), 2.5 epsilon / steps (others).
        bn_mode: Mode of the model while it is attacked in training. train moves running statistics,
            too (free knows only train); null: eval for trades, train for the others, as in the
            authors' codes.
        noise: Perturbations begin at zero for each minibatch (reset, as in ConvNorm), or where the
            last ones ended (carry, as in the paper).
    """

    reads = ("trainer.adv_repeats", "trainer.fgsm_step")
    """Keys of other sections of the config that only this method uses."""

    def __init__(
        self,
        parts: TrainerParts,
        *,
        step_size: Size | None = None,
        warmup_epochs: Count = 0,
        bn_mode: Literal["train"] | None = None,
        noise: Literal["reset", "carry"] = "reset",
    ) -> None:
        super().__init__(parts, warmup_epochs=warmup_epochs)
        settings = parts.config.trainer
        if step_size is None:
            step_size = parts.epsilon
            if parts.norm == "linf":
                step_size = in_pixel_range(settings.fgsm_step, "linf")
        self.step_size = step_size
        self.repeats = settings.adv_repeats
        self.carry = noise == "carry"
        self._perturbation: Tensor | None = None

    def describe_training_attack(self) -> str:
        """See the base class."""
        step = format_size(self.step_size, self.threat_model.norm)
        radius = super().describe_training_attack()
        return f"{radius}, a step of {step} in each of {self.repeats} updates per minibatch"

    def train_batch(self, images: Tensor, labels: Tensor) -> BatchResult:
        """Take `repeats` updates; each also moves the perturbation by one step."""
        shard = self.shard(images)
        epsilon = self.radius_scale * self.threat_model.epsilon
        step_size = self.radius_scale * self.step_size
        threat_model = replace(self.threat_model, epsilon=epsilon)
        perturbation = self._first_perturbation(images, shard)
        results = []
        for _ in range(self.repeats):
            perturbation.requires_grad_()
            logits = self.forward((images + perturbation).clamp(0, 1))
            losses = self.loss(logits, labels)
            self.update(losses)
            results.append(self.result(losses, logits, labels))
            moved = threat_model.step(perturbation.detach(), perturbation.grad, step_size)
            perturbation = threat_model.bound(moved)
        if self.carry:
            # Where every process computes the whole minibatch, each keeps its own images only
            self._keep(perturbation[shard.own] if shard.copied else perturbation)
        sums = {
            name: torch.stack([result.sums[name] for result in results]).sum()
            for name in results[0].sums
        }
        return BatchResult(sums, sum(result.count for result in results))

    def _first_perturbation(self, images: Tensor, shard: Shard) -> Tensor:
        """The perturbation with which a minibatch begins, of the shape of `images`."""
        kept = self._perturbation
        if shard.copied:
            kept = self._gather_perturbation()
        if kept is None:
            return torch.zeros_like(images)
        # Fewer are kept than needed where a resumed run's first minibatch was an epoch's short last
        # one: the others begin at zero
        missing = max(0, len(images) - len(kept))
        return F.pad(kept[: len(images)], (0, 0, 0, 0, 0, 0, 0, missing))

    def _keep(self, perturbation: Tensor) -> None:
        """Keep a perturbation for the next minibatch."""
        kept = self._perturbation
        # A short last minibatch replaces only as many perturbations as it has images
        if kept is not None and len(perturbation) < len(kept):
            perturbation = torch.cat([perturbation, kept[len(perturbation) :]])
        self._perturbation = perturbation.detach()

    def _gather_perturbation(self) -> Tensor | None:
        """The perturbation that is carried, of all processes, in the order of the whole minibatch;
        None where nothing is."""
        if world_size() == 1 or not self.carry:
            return self._perturbation
        own = None
        if self._perturbation is not None:
            own = self._perturbation.cpu()
        parts = all_gather_object(own)
        if parts[0] is None:
            return None
        count = sum(len(part) for part in parts if part is not None)
        whole = torch.empty((count, *parts[0].shape[1:]))
        for number, part in enumerate(parts):
            if part is not None:
                whole[number :: len(parts)] = part
        return whole.to(self.device)

    def method_state(self) -> dict[str, Any]:
        perturbation = self._gather_perturbation()
        if perturbation is None:
            return {}
        return {"perturbation": perturbation}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        self._perturbation = None
        if not self.carry:
            return
        kept = state.get("perturbation")
        if kept is None:
            # Nothing is carried before the first minibatch
            if self.state.epochs_done or self.state.batches_done:
                raise ValueError("'perturbation' is missing, but adversarial.noise is 'carry'")
            return
        shape = tuple(self.train_loader.image_shape)
        fits = isinstance(kept, Tensor) and kept.dtype == torch.float32
        if not fits or kept.shape[1:] != shape or len(kept) == 0:
            raise ValueError(f"'perturbation' is not a float32 tensor of images of {shape}")
        self._perturbation = kept[rank() :: world_size()].to(self.device)


class AdversarialTrainer(TrainerWithAdversary):
    """Training on images attacked by PGD (Madry et al., arXiv:1706.06083).

    Every attack step costs one forward and one backward pass, without gradients of the weights; the
    update costs another pair. The values logged are those on the attacked images.

    A method of your own with another loss on attacked images derives from this class, takes its
    own arguments and passes the others on:
    `def __init__(self, parts, *, beta: float = 5.0, **others): super().__init__(parts, **others)`.

    Args:
        parts: see `TrainerParts`.
        step_size: Step of training; null: trainer.fgsm_step (free; under l2 epsilon), 1.25 epsilon
            (fgsm), 2.5 epsilon / steps (others).
        steps: Attack steps in training.
        restarts: Random starts in training, of which every image keeps the worst point.
        random_start: Begin attacks in training at a random point.
        bn_mode: Mode of the model while it is attacked in training. train normalizes by the
            statistics of the attacked minibatch, and running statistics follow every step of the
            attack; eval uses and keeps the running statistics; null: eval for trades, train for the
            others, as in the authors' codes.
    """

    def __init__(
        self,
        parts: TrainerParts,
        *,
        step_size: Size | None = None,
        steps: Positive = 10,
        restarts: Positive = 1,
        random_start: bool = True,
        warmup_epochs: Count = 0,
        bn_mode: Literal["train", "eval"] | None = None,
    ) -> None:
        super().__init__(parts, warmup_epochs=warmup_epochs)
        if step_size is None:
            step_size = crossing_step(parts.epsilon, steps, parts.norm)
        self.attack = PGD(
            parts.epsilon,
            step_size,
            steps,
            parts.norm,
            restarts=restarts,
            random_start=random_start,
        )
        self.bn_mode = bn_mode or self.default_bn_mode

    def describe_training_attack(self) -> str:
        """See the base class."""
        step = format_size(self.attack.step_size, self.attack.norm)
        steps = f"{counted(self.attack.steps, 'step')} of {step}"
        if self.attack.restarts > 1:
            steps += f" from each of {self.attack.restarts} starts"
        return f"{super().describe_training_attack()}, {steps}"

    def train_batch(self, images: Tensor, labels: Tensor) -> BatchResult:
        """Attack the minibatch, then take one update on the attacked images."""
        attacked = self.attacked(images, labels)
        logits = self.forward(attacked)
        losses = self.loss(logits, labels)
        self.update(losses)
        return self.result(losses, logits, labels)

    def attacked(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the minibatch under the training attack, which maximizes cross entropy; `images`
        stay as they are."""
        attack = self.attack.scaled(self.radius_scale)
        generator = self.generator("training attack", images)
        with self.attacking():
            # `perturb`, not attack(...), which would put the model into evaluation mode
            return attack.perturb(self.model, images, labels, generator)

    def epoch_warnings(self, log: Mapping[str, Any]) -> list[str]:
        """Return a warning if the network has collapsed since an earlier epoch, where it is also
        validated by FGSM; see `overfitting_warnings`."""
        return overfitting_warnings(log, self.state.history, self.train_loader.num_classes)

    @contextmanager
    def attacking(self) -> Iterator[None]:
        """Within the context parameters require no gradients, the model is in `bn_mode`, and
        forward passes are in the run's precision."""
        # None leaves the modes alone, as a network may hold some of its layers in evaluation mode
        training = None
        if self.bn_mode == "eval":
            training = False
        with under_attack(self.model, training), self.autocast():
            yield


class FGSMTrainer(AdversarialTrainer):
    """Fast FGSM training (Wong et al., arXiv:2001.03994): one step of 1.25 epsilon, from a random
    start.

    Args:
        parts: see `TrainerParts`; the other arguments are those of `AdversarialTrainer`.
    """

    validated_by_fgsm = True

    def __init__(
        self,
        parts: TrainerParts,
        *,
        step_size: Size | None = None,
        random_start: bool = True,
        warmup_epochs: Count = 0,
        bn_mode: Literal["train", "eval"] | None = None,
    ) -> None:
        if step_size is None:
            step_size = step_within_range(1.25 * parts.epsilon, parts.norm)
        super().__init__(
            parts,
            step_size=step_size,
            steps=1,
            random_start=random_start,
            warmup_epochs=warmup_epochs,
            bn_mode=bn_mode,
        )


class TradesTrainer(AdversarialTrainer):
    """TRADES (Zhang et al., arXiv:1901.08573, algorithm 1): `loss(f(x), y) + beta KL(f(x) ||
    f(x'))`, where x' is the point of the ball at which the attack finds the largest divergence.

    The attack begins at `x + 0.001 N(0, 1)`, as in the paper. `loss` is logged as it is minimized,
    without the penalty; `top1` counts clean images, `robust_top1` attacked ones.

    The authors' code passes clean images through the network twice in an update: for the loss,
    before the attacked images, and for the divergence, after them. To an optimizer both passes are
    the same, but each moves the running statistics of batch normalization: attacked images
    contribute 33 % there (momentum 0.1), and 53 % with one clean pass. One pass is the default
    here, as it saves a forward and a backward pass; `clean_passes` 2 follows the authors' code.

    Args:
        parts: see `TrainerParts`.
        beta: Weight of the divergence between predictions; larger is more robust and less accurate.
        clean_passes: Passes of the clean images through the network in an update. 2, as in the
            authors' code, costs a forward and a backward pass more; attacked images then make 33 %
            of batch normalization's running statistics, with 1 they make 53 %.
    """

    START_STD = 0.001
    default_bn_mode = "eval"

    def __init__(
        self,
        parts: TrainerParts,
        *,
        beta: Annotated[float, Field(ge=0)] = 6.0,
        clean_passes: Annotated[int, Field(ge=1, le=2)] = 1,
        step_size: Size | None = None,
        steps: Positive = 10,
        warmup_epochs: Count = 0,
        bn_mode: Literal["train", "eval"] | None = None,
    ) -> None:
        super().__init__(
            parts, step_size=step_size, steps=steps, warmup_epochs=warmup_epochs, bn_mode=bn_mode
        )
        self.beta = beta
        self.clean_passes = clean_passes

    def train_batch(self, images: Tensor, labels: Tensor) -> BatchResult:
        """Attack the minibatch, then take one update on the clean and the attacked images."""
        attacked = self.attacked(images, labels)
        with self.autocast():
            # In this order, as every pass moves running statistics
            logits = self.network(images)
            attacked_logits = self.network(attacked)
            clean_logits = logits
            if self.clean_passes == 2:
                clean_logits = self.network(images)
        log_clean = F.log_softmax(widened(clean_logits), dim=1)
        log_attacked = F.log_softmax(widened(attacked_logits), dim=1)
        divergence = F.kl_div(log_attacked, log_clean, reduction="none", log_target=True).sum(dim=1)
        losses = self.loss(logits, labels) + self.beta * divergence
        self.update(losses)
        clean = self.result(losses, logits, labels)
        robust = {
            f"robust_{name}": metric(attacked_logits.detach(), labels)
            for name, metric in self.metrics.items()
        }
        return BatchResult({**clean.sums, **robust}, clean.count)

    def attacked(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the minibatch at the points where the predictions diverge most from those for the
        clean images."""
        attack = self.attack.scaled(self.radius_scale)
        generator = self.generator("training attack", images)
        start = images + self.START_STD * draw(torch.randn, images, generator)
        with self.attacking():
            with torch.no_grad():
                predictions = widened(self.model(images)).softmax(dim=1)
            # The divergence and the cross entropy with the predictions as class probabilities have
            # the same gradient for x', as they differ by the predictions' entropy
            return attack.run(self.model, images, predictions, start)
