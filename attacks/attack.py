"""Attack: what every attack does around its own search."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from inspect import Parameter, signature
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from attacks.arguments import check_count, check_size
from attacks.classifier import FilledClassifier, Model, checked_logits, without_benchmark
from attacks.frozen import under_attack
from attacks.losses import ATTACK_LOSSES, wrongness
from attacks.threat_model import Generators, ThreatModel
from attacks.worst_case import DONE, MISSED
from base.seeding import torch_generator


class Attack(ABC):
    """Searches a threat model for images that a model gets wrong: `attack(model, images, labels) ->
    adversarial images`.

    Works with any module or function that maps images in `[0, 1]` to logits. All sizes are in units
    of the pixel range (8/255, not 8).

    A subclass writes `perturb`; the base class ensures everything else an attack promises. The
    project's attacks are frozen dataclasses, and yours should be one: its fields are its
    arguments, `repr` and reports list them, and `dataclasses.replace` makes variants.

        @dataclass(frozen=True)
        class Mine(Attack):
            epsilon: float
            norm: str = "linf"
            steps: int = 10

            def perturb(self, model, images, labels, generators):
                ...

    Fields named epsilon, norm, step_size, steps, restarts, loss and seed mean the same as here and
    in `PGD`, and are checked. Every dataclass declares `epsilon`; another field that a subclass
    does not declare has the value it has here. A subclass that is not a dataclass may keep this
    constructor, or write one.

    Args:
        epsilon: radius of the threat model.
        norm: `"linf"` or `"l2"`.
        targeted: `labels` are the target classes, instead of the true ones.
        loss: what is maximized: `"ce"`, `"margin"` or `"dlr"`; see `attacks.losses`.
        seed: of the random starts if a call passes no generators; every such call draws the same.

    Attributes:
        confidence: see `confident`; above 0 only in attacks with a field of this name.
        warnings: reasons to doubt the images found so far, in the order in which they were noticed.
        description: how reports name the attack, if its class and numbers do not suffice.

    Raises:
        TypeError: a subclass does not declare `epsilon`.
        ValueError: an argument is out of its range.
    """

    config_names: ClassVar[Mapping[str, str | None]] = {"targeted": None, "confidence": None}
    """Arguments that a config may not give; see `base.config.arguments`."""
    epsilon: float
    norm: str = "linf"
    targeted: bool = False
    loss: str = "ce"
    seed: int = 0
    confidence: float = 0.0
    warnings: Sequence[str] = ()
    description: str | None = None

    def __init__(
        self,
        epsilon: float,
        norm: str = "linf",
        *,
        targeted: bool = False,
        loss: str = "ce",
        seed: int = 0,
    ) -> None:
        self.epsilon = epsilon
        self.norm = norm
        self.targeted = targeted
        self.loss = loss
        self.seed = seed
        # Not self.__post_init__, which a subclass may have written for its own fields
        Attack.__post_init__(self)

    def __post_init__(self) -> None:
        """Check the fields that attacks share, and turn numbers of other kinds, such as numpy's,
        into Python's."""
        # The only shared field without a value here
        if not hasattr(self, "epsilon"):
            raise TypeError(
                f"{type(self).__name__} has no epsilon: declare it as a field, `epsilon: float`"
            )
        # A subclass with losses of its own may name them as it likes
        if type(self).losses is Attack.losses and self.loss not in ATTACK_LOSSES:
            raise ValueError(f"loss {self.loss!r} is not one of: {', '.join(ATTACK_LOSSES)}")
        checked: dict[str, float] = {"epsilon": self.threat_model.epsilon}
        for name, value in settings(self).items():
            if name == "step_size" and value is not None:
                checked[name] = check_size(name, value, self.norm)
            elif name in ("steps", "restarts"):
                checked[name] = check_count(name, value)
            elif name == "seed":
                checked[name] = check_count(name, value, 0)
        for name, value in checked.items():
            # A frozen dataclass forbids plain assignment
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        # For subclasses that are not dataclasses
        values = ", ".join(f"{name}={value!r}" for name, value in settings(self).items())
        return f"{type(self).__qualname__}({values})"

    @property
    def threat_model(self) -> ThreatModel:
        """The images that the attack may return."""
        return ThreatModel(self.norm, self.epsilon)

    @property
    def can_be_confident(self) -> bool:
        """Whether the attack has an argument `confidence`; see `confident`."""
        return "confidence" in arguments(type(self))

    def confident(self, confidence: float) -> Self:
        """Return a variant for a network whose answers are nearly, not exactly, those of the model
        that is measured.

        An image counts as misclassified only once the label's logit falls short by `confidence`
        times the image's largest logit, so that the model that is measured confirms nearly every
        success. An attack that cannot be confident returns itself.
        """
        if not self.can_be_confident:
            return self
        # An attack that was made more confident stays so
        return replace(self, confidence=max(confidence, self.confidence))

    @property
    def rank(self) -> int:
        """The search for an image ends when the label is not among this many of the largest
        logits."""
        return 1

    @property
    def min_classes(self) -> int:
        """The smallest number of classes that a model may have."""
        if self.loss == "dlr":
            return 3
        return 2

    @property
    def single_step(self) -> bool:
        """Whether the search needs no more than the gradient at the images themselves.

        An evaluation then takes the clean logits from that pass, and does not search in low
        precision or on a copy of the model, which would save nothing.
        """
        return False

    def __call__(
        self, model: Model, images: Tensor, labels: Tensor, *, generators: Generators | None = None
    ) -> Tensor:
        """Return adversarial images for `images` `(B, C, H, W)` in `[0, 1]` and integer `labels`
        `(B,)`, of their type and device.

        A module is attacked in evaluation mode and then restored; its parameters' `.grad` are not
        touched, and no gradient of a weight is computed. For a function, the caller
        sets the modes. Every image returned lies in the threat model, to the rounding of
        float32, and `images` stay as they are, even if the model writes into its input. An image
        for which the model answers NaN counts as misclassified. All of this holds for every
        `perturb`.

        Args:
            generators: sources of random numbers; None uses a generator seeded by `seed`.

        Raises:
            TypeError: the model does not return a tensor of logits, `perturb` does not return a
                tensor, or `generators` are something else.
            ValueError: images are outside of `[0, 1]` or in half precision; images, labels and
                generators do not match; labels are not classes of the model, or it has fewer than
                two; `perturb` returns another shape than that of the images.
        """
        check_batch(images, labels)
        _check_generators(generators, len(images))
        # A search may call backward itself, so gradients are on; the caller's setting comes back
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            under_attack(model, training=False),
            without_benchmark(),
        ):
            images = images.detach()
            labels = labels.detach().to(images.device, torch.int64, copy=True)
            if len(images) == 0:
                return images.clone()
            if generators is None:
                generators = torch_generator(self.seed, "attack")
            classifier = FilledClassifier(model, labels)
            # A clone, as perturb may write into it. It is an ordinary tensor, even if the images
            # were made in inference mode
            points = self.perturb(classifier, images.clone(), labels, generators)
            points = self._check_points(points, images)
            return self.threat_model.project(_finite(points, images), images)

    def _check_points(self, points: Tensor, images: Tensor) -> Tensor:
        """Return what `perturb` has returned, detached, with the images' type and device."""
        name = f"{type(self).__name__}.perturb"
        if not isinstance(points, Tensor):
            raise TypeError(f"{name}: must return a tensor of images, not {type(points).__name__}")
        if points.shape != images.shape:
            raise ValueError(
                f"{name}: must return images of the shape {tuple(images.shape)},"
                f" not {tuple(points.shape)}"
            )
        return points.detach().to(images)

    @abstractmethod
    def perturb(
        self, model: Model, images: Tensor, labels: Tensor, generators: Generators
    ) -> Tensor:
        """Search: return points `(B, C, H, W)` for `images` `(B, C, H, W)` and int64 `labels`
        `(B,)`.

        Points outside of the threat model are projected into it afterwards, and a NaN pixel becomes
        that of the image. `value_and_grad` gives logits, losses and gradients; `reached` tells
        which images are misclassified. Random numbers come from `attacks.threat_model.draw`, with
        `generators`; for some of the images, with `generators_of(generators, index)`.

        Do not change the model's modes (adversarial training attacks in training mode); gradients
        of the weights are off already.
        """

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return what is maximized, float32 `(B,)`."""
        losses = ATTACK_LOSSES[self.loss](logits.float(), labels)
        if self.targeted:
            return -losses
        return losses

    def reached(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the progress of the attack on each image, from `MISSED` to `DONE`; int64
        `(B,)`."""
        if self.targeted:
            return torch.where(wrongness(logits, labels) == 0, DONE, MISSED)
        if self.confidence:
            shortage = self.confidence * logits.detach().abs().amax(dim=1, keepdim=True)
            logits = logits.scatter_add(1, labels.unsqueeze(1), shortage)
        return wrongness(logits, labels, self.rank)

    def value_and_grad(
        self, model: Model, points: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits `(B, classes)`, losses `(B,)` and the losses' gradients `(B, C, H, W)` at
        `points`, detached.

        The gradient is zero where no path leads from the losses to the points: the model leaves
        torch, rounds to integers or answers a constant.
        """
        points = points.detach().requires_grad_()
        with torch.enable_grad():
            logits = checked_logits(model, points)
            losses = self.losses(logits, labels)
            gradient = None
            if losses.requires_grad:
                # The sum, not the mean: an image's gradient must not depend on its batch
                (gradient,) = torch.autograd.grad(losses.sum(), points, allow_unused=True)
        if gradient is None:
            gradient = torch.zeros_like(points)
        return logits.detach(), losses.detach(), gradient


def _check_generators(generators: Generators | None, n: int) -> None:
    if isinstance(generators, Sequence):
        if len(generators) != n:
            raise ValueError(
                f"generators: expected one, or {n}, one per image, not {len(generators)}"
            )
        return
    one = generators is None or isinstance(generators, torch.Generator)
    if not one and not callable(generators):
        raise TypeError(
            "generators: expected a torch.Generator, one per image in a list, or a function,"
            f" not {type(generators).__name__}"
        )


def _finite(points: Tensor, images: Tensor) -> Tensor:
    """Return `points` with the pixels of `images` where they are infinite or NaN."""
    # On the CPU a finite sum shows that all points are finite. Elsewhere the host would wait for it
    if points.device.type == "cpu" and bool(points.sum().isfinite()):
        return points
    return torch.where(points.isfinite(), points, images)


def arguments(kind: type[Attack]) -> dict[str, Parameter]:
    """Return the arguments of an attack's constructor by name."""
    return dict(signature(kind).parameters)


def settings(attack: Attack) -> dict[str, Any]:
    """Return everything that an attack was made with, by name.

    These are the fields by which attacks are compared, and all other public attributes, such as a
    constructor without a dataclass may set.
    """
    declared = {}
    if is_dataclass(attack):
        declared = {field.name: field.compare for field in fields(attack)}
    values = {name: getattr(attack, name) for name, compared in declared.items() if compared}
    for name, value in getattr(attack, "__dict__", {}).items():
        if name not in declared and not name.startswith("_"):
            values[name] = value
    values.pop("warnings", None)
    return values


def check_attack(attack: Any) -> None:
    """Check that a value is an attack, and not, for example, the class of one.

    Raises:
        TypeError: naming what was found.
    """
    if isinstance(attack, Attack):
        return
    found = repr(attack)
    if isinstance(attack, type):
        found = f"the class {attack.__name__}"
    raise TypeError(f"attack: expected an attack, such as PGD(8 / 255, 2 / 255, 20), not {found}")


def check_batch(images: Tensor, labels: Tensor) -> None:
    """Check that `images` are in `[0, 1]` and have one label each.

    Raises:
        ValueError: naming what was found.
    """
    for name, value in (("images", images), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor, not {type(value).__name__}")
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise ValueError(f"images: expected the shape (B, C, H, W), not {tuple(images.shape)}")
    # Half precision cannot hold 1/255 near 1
    if images.dtype not in (torch.float32, torch.float64):
        hint = ""
        if not images.dtype.is_floating_point:
            hint = "; divide the pixels by 255"
        raise ValueError(f"images: expected float32 or float64, not {images.dtype}{hint}")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels: expected one per image, the shape ({len(images)},), not {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels: expected integers, not {labels.dtype}")
    if len(images) == 0:
        return
    # Both in one read, because the host waits for every read
    low, high = torch.stack([images.amin(), images.amax()]).tolist()
    # False for NaN, too
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"images: expected pixels in [0, 1], found {_format_pixel(low)} to"
            f" {_format_pixel(high)}; models normalize inside"
        )


def _format_pixel(pixel: float) -> str:
    """Format a pixel with four digits, or with all where four would round it into `[0, 1]`."""
    short = f"{pixel:.4g}"
    if 0 <= float(short) <= 1 and not 0 <= pixel <= 1:
        return repr(pixel)
    return short
