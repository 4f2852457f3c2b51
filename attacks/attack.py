"""Attack: what every attack does around its own search."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Self

import torch
from torch import Tensor, nn

from attacks.arguments import check_count
from attacks.classifier import Classifier, Model, ask
from attacks.losses import ATTACK_LOSSES, wrongness
from attacks.threat_model import Generators, ThreatModel
from attacks.worst_points import DONE, MISSED
from base.runtime import torch_generator


class Attack(ABC):
    """Searches a threat model for images that a model gets wrong: `attack(model, images, labels) -> adversarial images`.

    Works with any module or function that maps images in `[0, 1]` to logits. All sizes are in units
    of the pixel range (8/255, not 8). A subclass writes `perturb`.

    Args:
        epsilon: radius of the threat model.
        norm: `"linf"` or `"l2"`.
        targeted: `labels` are the classes to lead the model to, instead of the true ones.
        loss: what is maximised: `"ce"`, `"margin"` or `"dlr"`; see `attacks.losses`.
        seed: of the random starts, where a call brings no generators: every call then draws the same ones.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        epsilon: float,
        norm: str = "linf",
        *,
        targeted: bool = False,
        loss: str = "ce",
        seed: int = 0,
    ) -> None:
        if loss not in ATTACK_LOSSES:
            raise ValueError(f"loss {loss!r} is not one of: {', '.join(ATTACK_LOSSES)}")
        self.threat_model = ThreatModel(norm, epsilon)
        self.targeted = targeted
        self.loss = loss
        self.seed = check_count("seed", seed, 0)
        self.confidence = 0.0

    def confident(self, confidence: float) -> Self:
        """The same attack, for a network that answers nearly as the one that is meant: an image counts as misclassified once
        the label's logit falls short by `confidence` times the image's largest logit, so that little is believed too early."""
        attack = copy(self)
        attack.confidence = confidence
        return attack

    @property
    def rank(self) -> int:
        """The search goes on until the label is not among this many of the largest logits."""
        return 1

    def __call__(
        self, model: Model, images: Tensor, labels: Tensor, *, generators: Generators | None = None
    ) -> Tensor:
        """Adversarial images for `images` `(B, C, H, W)` in `[0, 1]` and integer `labels` `(B,)`, of their type and device.

        A module is attacked in evaluation mode and gets its modes back; its parameters' `.grad`
        are not touched, and no gradient of a weight is computed. A function's modes are the
        caller's. Every image returned lies in the threat model, to the rounding of float32, also
        where the model writes into its input, and `images` stay as they are. An image for which the
        model answers NaN counts as misclassified.

        Args:
            generators: where random numbers come from: one generator, or one for each image; None for the attack's seed.

        Raises:
            TypeError: the model does not return a tensor of logits.
            ValueError: images outside `[0, 1]` or in half precision, images, labels and generators
                that do not match, labels that are not classes of the model, or a model of fewer
                than two.
        """
        check_batch(images, labels)
        if isinstance(generators, Sequence) and len(generators) != len(images):
            raise ValueError(
                f"generators: expected one, or {len(images)}, one per image, not {len(generators)}"
            )
        with torch.inference_mode(False), frozen(model, training=False):
            # clones are ordinary tensors, also of tensors that were made in inference mode
            images, labels = images.detach().clone(), labels.detach().clone().long()
            if len(images) == 0:
                return images
            generators = torch_generator(self.seed, "attack") if generators is None else generators
            asked = Classifier(model, labels)
            points = self.perturb(asked, images.clone(), labels, generators).detach()
            points = torch.where(points.isfinite(), points, images)
            return self.threat_model.project(points, images)

    @abstractmethod
    def perturb(
        self, model: Model, images: Tensor, labels: Tensor, generators: Generators
    ) -> Tensor:
        """The search. The model's modes are the caller's, and `frozen` holds: adversarial training attacks in training mode."""

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What is maximised, `(B,)`, in float32."""
        losses = ATTACK_LOSSES[self.loss](logits.float(), labels)
        return -losses if self.targeted else losses

    def reached(self, logits: Tensor, labels: Tensor) -> Tensor:
        """How far the attack has come with each image, from `MISSED` to `DONE`; int64 `(B,)`."""
        if self.targeted:
            return torch.where(wrongness(logits, labels) == 0, DONE, MISSED)
        if self.confidence:
            shortage = self.confidence * logits.detach().abs().amax(dim=1, keepdim=True)
            logits = logits.scatter_add(1, labels.unsqueeze(1), shortage)
        return wrongness(logits, labels, self.rank)

    def ascend(self, model: Model, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits `(B, C)`, losses `(B,)` and the losses' gradients `(B, C, H, W)` at `points`, detached.

        Losses are summed, not averaged, so an image's gradient does not depend on the batch it is
        in. The gradient is zero where no path leads from the losses to the points: the model leaves
        torch, rounds to integers or answers a constant.
        """
        points = points.detach().requires_grad_()
        with torch.enable_grad():
            logits = ask(model, points)
            losses = self.losses(logits, labels)
            gradient = None
            if losses.requires_grad:
                (gradient,) = torch.autograd.grad(losses.sum(), points, allow_unused=True)
        if gradient is None:
            gradient = torch.zeros_like(points)
        return logits.detach(), losses.detach(), gradient


@contextmanager
def frozen(model: Model, training: bool | None = None) -> Iterator[None]:
    """Within the context no parameter asks for gradients, and all modules are in training mode
    (True), in evaluation mode (False), or as they were (None).

    Afterwards every module and parameter has its own flags again. A function has none.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        if training is not None:
            model.train(training)
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode


def check_batch(images: Tensor, labels: Tensor) -> None:
    """Refuse what is not a batch of images in `[0, 1]` with one label each.

    Raises:
        ValueError: naming what was found.
    """
    for name, value in (("images", images), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor, not {type(value).__name__}")
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise ValueError(f"images: expected the shape (B, C, H, W), not {tuple(images.shape)}")
    # half precision cannot hold 1/255 near 1
    if images.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"images: expected float32 or float64, not {images.dtype}")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels: expected one per image, the shape ({len(images)},), not {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels: expected integers, not {labels.dtype}")
    if len(images) and not (images.amin() >= 0 and images.amax() <= 1):
        low, high = (_as_outside(float(end)) for end in (images.amin(), images.amax()))
        raise ValueError(
            f"images: expected pixels in [0, 1], found {low} to {high}; models normalise inside"
        )


def _as_outside(pixel: float) -> str:
    """A pixel in four digits, or in all where four would put it into `[0, 1]`."""
    short = f"{pixel:.4g}"
    seems_inside = 0 <= float(short) <= 1 and not 0 <= pixel <= 1
    return repr(pixel) if seems_inside else short
