"""Attack: what every attack does around its own search."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from inspect import Parameter, signature
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from attacks.arguments import check_count, check_size
from attacks.classifier import Classifier, Model, ask
from attacks.losses import ATTACK_LOSSES, wrongness
from attacks.threat_model import Generators, ThreatModel
from attacks.worst_case import DONE, MISSED
from base.seeding import torch_generator


class Attack(ABC):
    """Searches a threat model for images that a model gets wrong: `attack(model, images, labels) ->
    adversarial images`.

    Works with any module or function that maps images in `[0, 1]` to logits. All sizes are in units
    of the pixel range (8/255, not 8).

    A subclass writes `perturb`; everything else that an attack promises happens around it. The
    project's attacks are frozen dataclasses, and yours should be one: its fields are its
    arguments, they stand in `repr` and in reports, and `dataclasses.replace` makes variants.

        @dataclass(frozen=True)
        class Mine(Attack):
            epsilon: float
            norm: str = "linf"
            steps: int = 10

            def perturb(self, model, images, labels, generators):
                ...

    Fields of the names epsilon, norm, step_size, steps, restarts, loss and seed mean what they mean
    here and in `PGD`, and are checked. What a subclass does not declare has the value that it has
    here. A subclass that is not a dataclass may keep this constructor, or write one.

    Args:
        epsilon: radius of the threat model.
        norm: `"linf"` or `"l2"`.
        targeted: `labels` are the classes to lead the model to, instead of the true ones.
        loss: what is maximized: `"ce"`, `"margin"` or `"dlr"`; see `attacks.losses`.
        seed: of the random starts, where a call brings no generators: every call then draws the
            same ones.

    Attributes:
        confidence: see `confident`; above 0 only in attacks with a field of this name.
        warnings: what speaks against the images found so far, in the order in which it was noticed.
        description: how reports name the attack, where class and numbers do not say it all.

    Raises:
        ValueError: an argument out of its range.
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
        Attack.__post_init__(self)

    def __post_init__(self) -> None:
        """Check the fields that attacks share, and turn numbers of other kinds, such as numpy's,
        into plain ones."""
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
            # the way past the lock of a frozen dataclass
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        """What a subclass that is not a dataclass was made with."""
        values = ", ".join(f"{name}={value!r}" for name, value in settings(self).items())
        return f"{type(self).__qualname__}({values})"

    @property
    def threat_model(self) -> ThreatModel:
        """The images that the attack may return."""
        return ThreatModel(self.norm, self.epsilon)

    def confident(self, confidence: float) -> Self:
        """The same attack, for a network that answers nearly as the one that is meant: an image
        counts as misclassified once the label's logit falls short by `confidence` times the image's
        largest logit, so that little is believed too early. An attack without a field `confidence`
        comes back as it is."""
        return (
            replace(self, confidence=confidence) if "confidence" in arguments(type(self)) else self
        )

    @property
    def rank(self) -> int:
        """The search goes on until the label is not among this many of the largest logits."""
        return 1

    @property
    def min_classes(self) -> int:
        """The classes that a model must have."""
        return 3 if self.loss == "dlr" else 2

    @property
    def single_step(self) -> bool:
        """Whether all that the search asks is what gradient the images themselves have. An
        evaluation then takes clean logits from that pass, and does not search in low precision or
        on a copy of the model, as there is nothing to save."""
        return False

    def __call__(
        self, model: Model, images: Tensor, labels: Tensor, *, generators: Generators | None = None
    ) -> Tensor:
        """Adversarial images for `images` `(B, C, H, W)` in `[0, 1]` and integer `labels` `(B,)`,
        of their type and device.

        A module is attacked in evaluation mode and gets its modes back; its parameters' `.grad`
        are not touched, and no gradient of a weight is computed. A function's modes are the
        caller's. Every image returned lies in the threat model, to the rounding of float32, also
        where the model writes into its input, and `images` stay as they are. An image for which the
        model answers NaN counts as misclassified. All of this holds whatever `perturb` does.

        Args:
            generators: where random numbers come from: one generator, or one for each image; None
                for the attack's seed.

        Raises:
            TypeError: the model does not return a tensor of logits, or `perturb`
                one of images.
            ValueError: images outside `[0, 1]` or in half precision, images, labels and generators
                that do not match, labels that are not classes of the model, or a model of fewer
                than two; or what `perturb` returns has another shape than the images.
        """
        check_batch(images, labels)
        if isinstance(generators, Sequence) and len(generators) != len(images):
            raise ValueError(
                f"generators: expected one, or {len(images)}, one per image, not {len(generators)}"
            )
        # a search may take gradients itself; behind it they are on or off as they were
        with torch.inference_mode(False), torch.enable_grad(), frozen(model, training=False):
            # clones are ordinary tensors, also of tensors that were made in inference mode
            images, labels = images.detach().clone(), labels.detach().clone().long()
            if len(images) == 0:
                return images
            generators = torch_generator(self.seed, "attack") if generators is None else generators
            asked = Classifier(model, labels)
            points = self.perturb(asked, images.clone(), labels, generators)
            points = self._checked(points, images)
            points = torch.where(points.isfinite(), points, images)
            return self.threat_model.project(points, images)

    def _checked(self, points: Tensor, images: Tensor) -> Tensor:
        """What `perturb` has returned, detached, of the images' type and device."""
        name = f"{type(self).__name__}.perturb"
        if not isinstance(points, Tensor):
            raise TypeError(f"{name}: must return a tensor of images, not {type(points).__name__}")
        if points.shape != images.shape:
            expected, found = tuple(images.shape), tuple(points.shape)
            raise ValueError(f"{name}: must return images of the shape {expected}, not {found}")
        return points.detach().to(images)

    @abstractmethod
    def perturb(
        self, model: Model, images: Tensor, labels: Tensor, generators: Generators
    ) -> Tensor:
        """The search: points `(B, C, H, W)` for `images` `(B, C, H, W)` and int64 `labels` `(B,)`.

        Points outside of the threat model are projected into it afterwards, and NaN pixels become
        the image's own. `value_and_grad` gives logits, losses and gradients; `reached` tells which
        images are broken. Random numbers come from `attacks.threat_model.draw`, with `generators`;
        those of some of the images are `generators_of(generators, index)`. The model's modes are
        the caller's, and `frozen` holds: adversarial training attacks in training mode."""

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What is maximized, `(B,)`, in float32."""
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

    def value_and_grad(
        self, model: Model, points: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits `(B, C)`, losses `(B,)` and the losses' gradients `(B, C, H, W)` at `points`,
        detached.

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


def arguments(kind: type[Attack]) -> dict[str, Parameter]:
    """What the constructor of an attack takes, by name."""
    return dict(signature(kind).parameters)


def settings(attack: Attack) -> dict[str, Any]:
    """Everything that an attack was made with: the fields that count when two are compared, and
    whatever else its own constructor keeps under a public name."""
    declared = (
        {field.name: field.compare for field in fields(attack)} if is_dataclass(attack) else {}
    )
    values = {name: getattr(attack, name) for name, compared in declared.items() if compared}
    kept = getattr(attack, "__dict__", {}).items()
    more = {name: value for name, value in kept if name not in declared and name[0] != "_"}
    return {name: value for name, value in (values | more).items() if name != "warnings"}


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


def check_attack(attack: Any) -> None:
    """Refuse what is not an attack, such as the class of one.

    Raises:
        TypeError: naming what was found.
    """
    if not isinstance(attack, Attack):
        found = f"the class {attack.__name__}" if isinstance(attack, type) else repr(attack)
        raise TypeError(f"attack: expected one, such as PGD(8 / 255, 2 / 255, 20), not {found}")


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
        hint = "" if images.dtype.is_floating_point else "; divide the pixels by 255"
        raise ValueError(f"images: expected float32 or float64, not {images.dtype}{hint}")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels: expected one per image, the shape ({len(images)},), not {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels: expected integers, not {labels.dtype}")
    if len(images) and not (images.amin() >= 0 and images.amax() <= 1):
        low, high = (_as_outside(float(end)) for end in (images.amin(), images.amax()))
        raise ValueError(
            f"images: expected pixels in [0, 1], found {low} to {high}; models normalize inside"
        )


def _as_outside(pixel: float) -> str:
    """A pixel in four digits, or in all where four would put it into `[0, 1]`."""
    short = f"{pixel:.4g}"
    seems_inside = 0 <= float(short) <= 1 and not 0 <= pixel <= 1
    return repr(pixel) if seems_inside else short
