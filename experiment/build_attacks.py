"""The attacks that a config describes, with its sizes in the pixel range `[0, 1]`."""

from collections.abc import Mapping
from typing import Any

from attacks.attack import Attack
from attacks.fgsm import FGSM
from attacks.losses import ATTACK_LOSSES
from attacks.pgd import crossing_step
from attacks.threat_model import ThreatModel, in_pixel_range
from base.config import Config
from base.config.adversarial import PGDAttackConfig, is_size
from base.config.arguments import OpenSection, parameters_of
from base.errors import ConfigError
from base.registry import ATTACKS, lookup
from base.text import one_line


def threat_model(config: Config) -> ThreatModel:
    """Return the norm and the radius of training and of attacks."""
    norm = config.adversarial.norm
    return ThreatModel(norm, in_pixel_range(config.attack_epsilon, norm))


def build_attack(config: Config, num_classes: int, stop_at_rank: int = 1) -> Attack:
    """Return the attack of `pgd_attack`, for robust validation and reports.

    Its constructor gets those of the following arguments that it has: epsilon, norm, steps,
    step_size, restarts, loss, early_stop and seed. It also gets its own arguments, which the
    section gives.

    Args:
        config: the resolved config.
        num_classes: of the data set.
        stop_at_rank: `early_stop` if the config does not set it. An image is attacked until its
            label is not among that many of the largest logits.

    Raises:
        ConfigError: the attack does not accept its arguments or needs more classes, or a package is
            missing.
    """
    threat = threat_model(config)
    settings = config.pgd_attack
    kind = lookup(ATTACKS, settings.type, "pgd_attack.type")
    offered: dict[str, Any] = {
        "epsilon": threat.epsilon,
        "norm": threat.norm,
        "steps": settings.K,
        "restarts": settings.restarts,
        "loss": settings.loss,
        "early_stop": stop_at_rank if settings.early_stop is None else settings.early_stop,
        "seed": config.seed,
    }
    taken = {parameter.name: parameter for parameter in parameters_of(kind)}
    # An attack's own default step takes precedence over the default here, which is PGD's.
    has_default_step = (
        "step_size" in taken and taken["step_size"].default is not taken["step_size"].empty
    )
    if settings.step is not None or not has_default_step:
        offered["step_size"] = _step_size(settings, threat)
    # Attacks differ in what they have: FGSM takes no steps, Square no step size.
    given = {name: value for name, value in offered.items() if name in taken}
    given |= entry_arguments(settings, settings.type, threat.norm)
    try:
        attack = kind(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"pgd_attack: {settings.type}: {one_line(error)}") from None
    if not isinstance(attack, Attack):
        raise ConfigError(
            f"pgd_attack.type: {settings.type}: expected a subclass of attacks.Attack, not"
            f" {type(attack).__name__}"
        )
    # An attack without a field for one of them would search another ball than the report names
    if attack.threat_model != threat:
        raise ConfigError(
            f"pgd_attack.type: {settings.type}: attacks within {attack.norm} {attack.epsilon:.6g},"
            f" not {threat.norm} {threat.epsilon:.6g}: declare the fields norm and epsilon"
        )
    if num_classes < attack.min_classes:
        # Where an attack has a choice of losses, the loss is what needs more classes.
        choice = f"loss: {attack.loss}" if "loss" in taken else f"type: {settings.type}"
        raise ConfigError(
            f"pgd_attack.{choice} needs at least {attack.min_classes} classes, this data set has"
            f" {num_classes}"
        )
    return attack


def entry_arguments(section: OpenSection, name: str, norm: str) -> dict[str, Any]:
    """Return the arguments in a section that belong to the entry `name` of its table.

    Sizes are in units of the pixel range.
    """
    (choice,) = section.choices
    given = section.arguments_for(choice.key, name)
    for argument in choice.arguments(name).values():
        if given.get(argument.name) is not None and is_size(argument.field):
            given[argument.name] = in_pixel_range(given[argument.name], norm)
    return given


def keys_of_other_attack(section: Mapping[str, Any], name: str) -> dict[str, None]:
    """Return the keys of `pgd_attack`, each with None, that have no meaning for another attack.

    These are the sizes and arguments of the attack that the section describes. `restarts` and
    `loss` are kept if they differ from that attack's defaults.

    Args:
        section: as it stands in the config.
        name: the other attack.
    """
    before = section.get("type", "pgd")
    if name == before:
        return {}
    kept = {"type"}
    if before in ATTACKS:
        old = PGDAttackConfig(type=before)
        kept |= {key for key in ("restarts", "loss") if section.get(key) != getattr(old, key)}
    return dict.fromkeys(key for key in section if key not in kept)


def _step_size(settings: PGDAttackConfig, threat: ThreatModel) -> float:
    if settings.step is not None:
        return in_pixel_range(settings.step, threat.norm)
    if threat.norm == "linf":
        # The step of Madry et al. on CIFAR-10.
        return in_pixel_range(2, "linf")
    return crossing_step(threat.epsilon, settings.K, threat.norm)


def fgsm(config: Config) -> FGSM:
    """Return FGSM with the config's norm, radius and loss; it detects catastrophic overfitting."""
    threat = threat_model(config)
    loss = config.pgd_attack.loss
    if loss not in ATTACK_LOSSES:
        # A user's own attack may have a loss that FGSM does not have.
        loss = "ce"
    return FGSM(threat.epsilon, threat.norm, early_stop=1, loss=loss)
