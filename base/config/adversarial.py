"""The config's sections on adversarial training and attacks."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, ValidationInfo, WithJsonSchema, model_validator
from pydantic.fields import FieldInfo

from base.config.arguments import (
    Choice,
    NameIn,
    OpenSection,
    arguments_of,
    checks_names,
    parameters_of,
    takes,
)
from base.config.section import Count, Needs, Positive
from base.registry import ATTACKS, TRAINERS, Constructor, not_one_of

FRACTION_OF_RANGE = re.compile(r" *([0-9]+(?:\.[0-9]+)?) */ *([0-9]+(?:\.[0-9]+)?) *")


@dataclass(frozen=True)
class InUnitsOfNorm:
    """Metadata of a type: a config gives the number in 1/255 of the pixel range under l-inf; see
    `Size`."""


Size = Annotated[
    float,
    Field(ge=0, le=255),
    InUnitsOfNorm(),
    WithJsonSchema(
        {
            "type": ["number", "string"],
            "minimum": 0,
            "maximum": 255,
            "pattern": f"^{FRACTION_OF_RANGE.pattern}$",
        }
    ),
]
"""A radius or step size. A config gives it in 1/255 of the pixel range under l-inf and in units of
the pixel range under l2, or as text (see `read_sizes`); a constructor that takes it always gets it
in units of the pixel range."""
OF_LINF = (("trainer", "adv_clip_eps"), ("trainer", "fgsm_step"))
"""The places in a config's tree whose sizes are always of l-inf."""
SMALLEST_EPSILON, SMALLEST_STEP = 0.5, 0.05
"""In 1/255: a size below this, but not 0, was meant in the pixel range [0, 1]. No published attack
is so weak."""
DEFAULT_L2 = 0.5
"""Radius under l2 where the config gives none, about 128/255: the usual one on CIFAR."""
LARGEST_L2 = 6.0
"""In units of the pixel range: a size above this was meant in 1/255. A change of 5 is the largest
published, on large images; a change of 8 turns an image of 32 x 32 into another."""
LARGEST_STEP = 3.0
"""In radii: longer steps, where the usual ones are at most 2.5, were meant in 1/255."""


VALIDATION = Needs("robust validation", lambda config: config.robust_validation_period > 0)
REPORT = Needs("an attack after training", lambda config: config.reports_robustness)


class AdversarialConfig(OpenSection):
    """The training method with its arguments, robust validation, and the attack after training."""

    choices = (Choice("adversarial.method", TRAINERS, positional=1, others="ignored"),)
    fills_defaults = True

    method: Annotated[str, NameIn(TRAINERS, ("parts",))] | None = None
    """Training method. fgsm is the fast one, with a random start and one step; none trains on clean
    images. null: free where trainer.do_adv is true, else none."""
    norm: Literal["linf", "l2"] = "linf"
    """Norm of training and of attacks. linf sizes are in 1/255 of the pixel range, l2 sizes in
    units of the pixel range; "8/255" is that part of the pixel range in both."""
    epsilon: Size | None = None
    """Radius of training and of attacks; null: trainer.adv_clip_eps for linf, 0.5 for l2."""
    validate_every: Count | None = None
    """Epochs from one robust validation (PGD as in pgd_attack) to the next; 0 for none; null: 1
    with a method that attacks images, else 0."""
    validate_images: Annotated[Positive, VALIDATION] = 1000
    """How many validation images it attacks, the same in every epoch: the first of every class."""
    report: bool | None = None
    """Attack the test set after training; null: true where a method is named, also where that is
    none."""
    report_images: Annotated[Positive | None, REPORT] = None
    """How many test images the report attacks, the first of every class; null for all."""

    @classmethod
    def chosen(cls, config: Any) -> dict[str, str]:
        """The method of a config, also where trainer.do_adv says it."""
        return {"adversarial.method": config.adversarial_method}


OFFERED = frozenset(
    {"epsilon", "norm", "steps", "step_size", "restarts", "loss", "early_stop", "seed"}
)
"""Arguments of attacks that the config's own keys give."""


ATTACK_LOSSES = ("ce", "margin", "dlr")
"""What every attack that takes a loss can maximize, unless its type hint is a `Literal` of
others."""


def losses_of(kind: Constructor | None) -> tuple[str, ...]:
    """The losses that a config may give to an attack: those of its type hint, where that is a
    `Literal`, else `ATTACK_LOSSES` and its own default."""
    argument = None if kind is None else arguments_of(kind).get("loss")
    if argument is None:
        return ATTACK_LOSSES
    own, default = get_args(argument.field.annotation), argument.field.default
    if own:
        return tuple(one for one in own if isinstance(one, str))
    return (
        ATTACK_LOSSES
        if default in ATTACK_LOSSES or not isinstance(default, str)
        else (*ATTACK_LOSSES, default)
    )


class LossOfAttack(NameIn):
    """That a text is a loss of the attack chosen before it, as metadata of its type; see
    `losses_of`."""

    def _known(self, name: str, info: ValidationInfo) -> str:
        known = losses_of(ATTACKS.get(info.data.get("type", "")))
        if checks_names(info.context) and name not in known:
            raise ValueError(not_one_of(name, known))
        return name


def _attack_with(argument: str) -> Needs:
    def takes_it(config: Any) -> bool:
        kind = ATTACKS.get(config.pgd_attack.type)
        return kind is None or takes(kind, argument)

    return Needs(f"a pgd_attack.type that takes {argument}", takes_it)


class PGDAttackConfig(OpenSection):
    """The attack of robust validation, of the report after training and of validate_pgd.py."""

    choices = (Choice("pgd_attack.type", ATTACKS, OFFERED),)

    type: Annotated[str, NameIn(ATTACKS)] = "pgd"
    """Name of the attack. K, restarts and loss are then its own defaults, where it has any."""
    K: Annotated[Positive, _attack_with("steps")] = 10
    """Steps."""
    step: Annotated[Size | None, _attack_with("step_size")] = None
    """Step size, in 1/255 for linf, in units of the pixel range for l2; null: the attack's own
    default, where it has one, else 2 for linf, 2.5 epsilon / K for l2."""
    restarts: Annotated[Positive, _attack_with("restarts")] = 1
    """Random starts."""
    loss: Annotated[str, LossOfAttack(dict.fromkeys(ATTACK_LOSSES)), _attack_with("loss")] = "ce"
    """What it maximizes: cross entropy, margin, or difference of logits ratio; or a loss of an own
    attack."""
    early_stop: Annotated[Count | None, _attack_with("early_stop")] = None
    """An image is left alone once its label is not among this many of the largest logits. 0: it
    never is, and with one start PGD's last point counts. null: 1, or 5 in a report on more than
    five classes."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_attack(cls, values: Any) -> Any:
        """The attack's own defaults in place of this section's."""
        if not isinstance(values, Mapping):
            return values
        kind = ATTACKS.get(str(values.get("type")))
        own = {} if kind is None else {one.name: one.default for one in parameters_of(kind)}
        found = {key: own.get(name) for key, name in OF_ATTACKS.items()}
        return {key: value for key, value in found.items() if isinstance(value, int | str)} | dict(
            values
        )

    @model_validator(mode="after")
    def _arguments_fit(self, info: ValidationInfo) -> Self:
        if checks_names(info.context):
            self.check({"pgd_attack.type": self.type})
        return self


OF_ATTACKS = {"K": "steps", "restarts": "restarts", "loss": "loss"}
"""Keys of `pgd_attack` whose default is the attack's own -> what attacks call them."""


def read_sizes(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A config's tree in which sizes written as a fraction of the pixel range, such as `"8/255"`,
    are numbers in the units of their norm: 8 for l-inf, 8/255 for l2.
    """
    read = dict(tree)
    adversarial = tree.get("adversarial")
    norm = adversarial.get("norm") if isinstance(adversarial, Mapping) else None
    for section, key in size_keys():
        below = read.get(section)
        value = below.get(key) if isinstance(below, Mapping) else None
        if isinstance(value, str):
            unit = 1 if section != "trainer" and norm == "l2" else 255
            read[section] = {**below, key: _read_fraction(value, unit)}
    return read


def size_keys() -> Iterator[tuple[str, str]]:
    """Section and key of every size in a config's tree, including those of all training methods."""
    for name, section in (("adversarial", AdversarialConfig), ("pgd_attack", PGDAttackConfig)):
        yield from ((name, key) for key, field in section.known_fields().items() if is_size(field))
    yield from OF_LINF


def is_size(field: FieldInfo) -> bool:
    """Whether a key's or argument's type is `Size`, or may be."""
    metadata = list(field.metadata)
    for kind in (field.annotation, *get_args(field.annotation)):
        metadata += getattr(kind, "__metadata__", ())
    return any(isinstance(one, InUnitsOfNorm) for one in metadata)


def _read_fraction(text: str, unit: int) -> float | str:
    """`"8/255"` in multiples of 1/unit of the pixel range; any other text stays as it is."""
    found = FRACTION_OF_RANGE.fullmatch(text)
    if found is None or float(found[2]) == 0:
        return text
    return float(found[1]) * unit / float(found[2])


def refuse_other_units(key: str, epsilon: float | None, norm: str) -> None:
    """Refuse a radius that was obviously meant in the other norm's units.

    Raises:
        ValueError: naming `key` and the radius.
    """
    if not epsilon:
        return
    if norm == "linf" and epsilon < SMALLEST_EPSILON:
        raise ValueError(f"{key}: {_next_to_nothing(epsilon)}")
    if norm == "linf" and epsilon > 255:
        raise ValueError(f"{key}: {epsilon!r} is in 1/255 of the pixel range: expected at most 255")
    if norm == "l2" and epsilon > LARGEST_L2:
        raise ValueError(f"{key}: {_far_too_much(epsilon)}")


def refuse_other_units_of_step(key: str, step: float | None, norm: str, epsilon: float) -> None:
    """Refuse a step size that was obviously meant in the other norm's units.

    Raises:
        ValueError: naming `key` and the step size.
    """
    if not step:
        return
    if norm == "linf" and step < SMALLEST_STEP:
        raise ValueError(f"{key}: {_next_to_nothing(step)}")
    if norm == "l2" and step > LARGEST_STEP * epsilon > 0:
        raise ValueError(f"{key}: {_far_too_much(step)}")


def _next_to_nothing(size: float) -> str:
    return (
        f"{size:g} is in 1/255 of the pixel range, so it would be next to nothing: write {size * 255:.3g} for"
        f" {size:g} of the pixel range"
    )


def _far_too_much(size: float) -> str:
    return (
        f"{size:g} is in units of the pixel range under l2, so it would be far too much: write {size / 255:.3g}"
        f" for {size:g}/255"
    )
