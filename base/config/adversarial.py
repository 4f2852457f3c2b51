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
    """Metadata of `Size`: configs give the number in 1/255 of the pixel range under l-inf."""


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
"""A radius or step size. Configs give it in 1/255 of the pixel range under l-inf, in units of the
pixel range under l2, or as text (see `read_sizes`). Constructors always get it in units of the
pixel range."""
LINF_SIZES = (("trainer", "adv_clip_eps"), ("trainer", "fgsm_step"))
"""Section and key of the sizes that are always in the units of l-inf."""
DEFAULT_L2 = 0.5
"""The radius under l2 if the config gives none: about 128/255, the usual one on CIFAR."""

# A size beyond these limits was meant in the other norm's units.
MIN_LINF_EPSILON = 0.5
"""In 1/255 of the pixel range. No published attack is so weak."""
MIN_LINF_STEP = 0.05
"""In 1/255 of the pixel range."""
MAX_L2_EPSILON = 6.0
"""In units of the pixel range. The largest published radius is 5, on large images; 8 is enough to
turn an image of 32 x 32 pixels into another one."""
MAX_L2_STEP = 3.0
"""In radii. The usual steps are at most 2.5 radii long."""


VALIDATION = Needs("robust validation", lambda config: config.robust_validation_period > 0)
REPORT = Needs("an attack after training", lambda config: config.reports_robustness)


class AdversarialConfig(OpenSection):
    """The training method with its arguments, robust validation, and the attack after training."""

    choices = (Choice("adversarial.method", TRAINERS, positional=1, others="ignored"),)
    fills_defaults = True

    method: Annotated[str, NameIn(TRAINERS, ("parts",))] | None = None
    """Training method. fgsm is fast adversarial training, with a random start and one step; none
    trains on clean images. null: free if trainer.do_adv is true, otherwise none."""
    norm: Literal["linf", "l2"] = "linf"
    """Norm in training and attacks. Sizes are in 1/255 of the pixel range for linf, and in units of
    the pixel range for l2; "8/255" is that fraction of the pixel range for both."""
    epsilon: Size | None = None
    """Radius in training and attacks; null: trainer.adv_clip_eps for linf, 0.5 for l2."""
    validate_every: Count | None = None
    """Epochs from one robust validation (the attack of pgd_attack) to the next; 0 for none; null: 1
    for a method that attacks images, otherwise 0."""
    validate_images: Annotated[Positive, VALIDATION] = 1000
    """How many validation images are attacked: the first of every class, the same in every
    epoch."""
    report: bool | None = None
    """Attack the test set after training; null: true if a method is given, even the method none."""
    report_images: Annotated[Positive | None, REPORT] = None
    """How many test images the report attacks: the first of every class; null for all."""

    @classmethod
    def chosen(cls, config: Any) -> dict[str, str]:
        """Return the method of a config, which trainer.do_adv may choose."""
        return {"adversarial.method": config.adversarial_method}


ATTACK_CONTRACT = frozenset(
    {"epsilon", "norm", "steps", "step_size", "restarts", "loss", "early_stop", "seed"}
)
"""Arguments of attacks that come from the config's fixed keys."""


ATTACK_LOSSES = ("ce", "margin", "dlr")
"""The losses of an attack whose type hint is not a `Literal` of others."""


def losses_of(kind: Constructor | None) -> tuple[str, ...]:
    """Return the losses that a config may give to an attack: those of its type hint if that is a
    `Literal`, otherwise `ATTACK_LOSSES` and its own default."""
    argument = None if kind is None else arguments_of(kind).get("loss")
    if argument is None:
        return ATTACK_LOSSES
    literals = get_args(argument.field.annotation)
    if literals:
        return tuple(loss for loss in literals if isinstance(loss, str))
    default = argument.field.default
    if isinstance(default, str) and default not in ATTACK_LOSSES:
        return (*ATTACK_LOSSES, default)
    return ATTACK_LOSSES


class LossOfAttack(NameIn):
    """Metadata of a type: the text is a loss of the attack of the same section; see `losses_of`."""

    def _known(self, name: str, info: ValidationInfo) -> str:
        # pydantic checks fields in their order, so the attack's type is in `data` by now
        known = losses_of(ATTACKS.get(info.data.get("type", "")))
        if checks_names(info.context) and name not in known:
            raise ValueError(not_one_of(name, known))
        return name


def _attack_with(argument: str) -> Needs:
    def is_met(config: Any) -> bool:
        kind = ATTACKS.get(config.pgd_attack.type)
        return kind is None or takes(kind, argument)

    return Needs(f"a pgd_attack.type that takes {argument}", is_met)


class PGDAttackConfig(OpenSection):
    """The attack in robust validation, in the report after training and in validate_pgd.py."""

    choices = (Choice("pgd_attack.type", ATTACKS, ATTACK_CONTRACT),)

    type: Annotated[str, NameIn(ATTACKS)] = "pgd"
    """Name of the attack. K, restarts and loss default to its own values, if it has them."""
    K: Annotated[Positive, _attack_with("steps")] = 10
    """Steps."""
    step: Annotated[Size | None, _attack_with("step_size")] = None
    """Step size in 1/255 of the pixel range for linf, in units of the pixel range for l2; null: the
    default of the attack, otherwise 2 for linf, 2.5 epsilon / K for l2."""
    restarts: Annotated[Positive, _attack_with("restarts")] = 1
    """Random starts."""
    loss: Annotated[str, LossOfAttack(dict.fromkeys(ATTACK_LOSSES)), _attack_with("loss")] = "ce"
    """What it maximizes: cross entropy, margin, difference of logits ratio, or a loss of your own
    attack."""
    early_stop: Annotated[Count | None, _attack_with("early_stop")] = None
    """Stop attacking an image once its label is not among this many of the largest logits. 0: never
    stop; with one start, PGD's last point counts then. null: 1, or 5 in a report on more than five
    classes."""

    @model_validator(mode="before")
    @classmethod
    def _use_defaults_of_attack(cls, values: Any) -> Any:
        """Use the attack's own defaults in place of this section's."""
        # This runs before pydantic has checked that the section is an object
        if not isinstance(values, Mapping):
            return values
        kind = ATTACKS.get(str(values.get("type")))
        if kind is None:
            return values
        own = {parameter.name: parameter.default for parameter in parameters_of(kind)}
        defaults = {key: own.get(name) for key, name in ATTACK_DEFAULTS.items()}
        # None and functions are defaults that a config cannot hold
        defaults = {key: value for key, value in defaults.items() if isinstance(value, int | str)}
        return {**defaults, **values}

    @model_validator(mode="after")
    def _check_arguments(self, info: ValidationInfo) -> Self:
        if checks_names(info.context):
            self.check({"pgd_attack.type": self.type})
        return self


ATTACK_DEFAULTS = {"K": "steps", "restarts": "restarts", "loss": "loss"}
"""Keys of `pgd_attack` whose default is the attack's own -> their names in attacks."""


def read_sizes(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's tree with numbers in place of fractions of the pixel range.

    A size such as `"8/255"` becomes a number in the units of its norm: 8 for l-inf, 8/255 for l2.
    """
    read = dict(tree)
    adversarial = tree.get("adversarial")
    norm = adversarial.get("norm") if isinstance(adversarial, Mapping) else None
    for section, key in size_keys():
        below = read.get(section)
        if not isinstance(below, Mapping) or not isinstance(below.get(key), str):
            continue
        is_l2 = norm == "l2" and (section, key) not in LINF_SIZES
        read[section] = {**below, key: _read_fraction(below[key], 1 if is_l2 else 255)}
    return read


def size_keys() -> Iterator[tuple[str, str]]:
    """Yield section and key of every size in a config, including those of all training methods."""
    for name, section in (("adversarial", AdversarialConfig), ("pgd_attack", PGDAttackConfig)):
        yield from ((name, key) for key, field in section.known_fields().items() if is_size(field))
    yield from LINF_SIZES


def is_size(field: FieldInfo) -> bool:
    """Whether the type of a key or argument is `Size` or an optional one."""
    metadata = list(field.metadata)
    for kind in (field.annotation, *get_args(field.annotation)):
        metadata += getattr(kind, "__metadata__", ())
    return any(isinstance(item, InUnitsOfNorm) for item in metadata)


def _read_fraction(text: str, unit: int) -> float | str:
    """`"8/255"` in multiples of 1/unit of the pixel range; other text is returned unchanged."""
    found = FRACTION_OF_RANGE.fullmatch(text)
    if found is None or float(found[2]) == 0:
        return text
    # The product first: 63.9 / 255 * 255 is not exactly 63.9
    return float(found[1]) * unit / float(found[2])


def check_epsilon_units(key: str, epsilon: float | None, norm: str) -> None:
    """Check that a radius was not meant in the other norm's units.

    Raises:
        ValueError: naming `key` and the radius.
    """
    # 0 is allowed: it switches the attack off
    if not epsilon:
        return
    if norm == "linf" and epsilon < MIN_LINF_EPSILON:
        raise ValueError(f"{key}: {_too_small(epsilon)}")
    if norm == "linf" and epsilon > 255:
        raise ValueError(f"{key}: {epsilon!r} is in 1/255 of the pixel range: expected at most 255")
    if norm == "l2" and epsilon > MAX_L2_EPSILON:
        raise ValueError(f"{key}: {_too_large(epsilon)}")


def check_step_units(key: str, step: float | None, norm: str, epsilon: float) -> None:
    """Check that a step size was not meant in the other norm's units.

    Raises:
        ValueError: naming `key` and the step size.
    """
    if not step:
        return
    if norm == "linf" and step < MIN_LINF_STEP:
        raise ValueError(f"{key}: {_too_small(step)}")
    if norm == "l2" and step > MAX_L2_STEP * epsilon > 0:
        raise ValueError(f"{key}: {_too_large(step)}")


def _too_small(size: float) -> str:
    return (
        f"{size:g} is in 1/255 of the pixel range and would have almost no effect:"
        f" write {size * 255:.3g} for {size:g} of the pixel range"
    )


def _too_large(size: float) -> str:
    return (
        f"{size:g} is in units of the pixel range under l2 and would be far too large:"
        f" write {size / 255:.3g} for {size:g}/255"
    )
