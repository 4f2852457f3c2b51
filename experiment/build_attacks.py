"""The attacks that a config describes. Here, and nowhere else, its sizes become those of the pixel
range `[0, 1]`."""

from collections.abc import Mapping
from typing import Any

from attacks.attack import Attack
from attacks.fgsm import FGSM
from attacks.losses import ATTACK_LOSSES
from attacks.threat_model import ThreatModel, in_pixel_range
from base.config import Config
from base.config.adversarial import PGDAttackConfig, is_size
from base.config.arguments import OpenSection, parameters_of
from base.errors import ConfigError
from base.registry import ATTACKS, lookup
from base.text import one_line


def threat_model(config: Config) -> ThreatModel:
    """Norm and radius of training and of attacks."""
    norm = config.adversarial.norm
    return ThreatModel(norm, in_pixel_range(config.attack_epsilon, norm))


def build_attack(config: Config, num_classes: int, stop_at_rank: int = 1) -> Attack:
    """The attack of `pgd_attack`, for robust validation and reports. Its constructor gets what the
    config offers, as far as it takes it: epsilon, norm, steps, step_size, restarts, loss,
    early_stop and seed; and the section's keys of its own.

    Args:
        config: the resolved config.
        num_classes: of the data set.
        stop_at_rank: `early_stop` where the config leaves it open: an image is attacked until its
            label is not among that many of the largest logits.

    Raises:
        ConfigError: the attack refuses its arguments or needs more classes, or the package that it
            needs is missing.
    """
    threat, settings = threat_model(config), config.pgd_attack
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
    own_step = "step_size" in taken and taken["step_size"].default is not taken["step_size"].empty
    if settings.step is not None or not own_step:
        offered["step_size"] = _step_size(settings, threat)
    given = {name: value for name, value in offered.items() if name in taken}
    own = own_arguments(settings, settings.type, threat.norm)
    try:
        attack = kind(**given, **own)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"pgd_attack: {settings.type}: {one_line(error)}") from None
    if not isinstance(attack, Attack):
        what = type(attack).__name__
        raise ConfigError(
            f"pgd_attack.type: {settings.type}: expected a subclass of attacks.Attack, not {what}"
        )
    if num_classes < attack.min_classes:
        choice = f"loss: {attack.loss}" if "loss" in taken else f"type: {settings.type}"
        needs = f"needs at least {attack.min_classes} classes, this data set has {num_classes}"
        raise ConfigError(f"pgd_attack.{choice} {needs}")
    return attack


def own_arguments(section: OpenSection, name: str, norm: str) -> dict[str, Any]:
    """The arguments of the entry `name` that stand in a section of one table, sizes in units of the
    pixel range."""
    (choice,) = section.choices
    given = section.arguments_for(choice.key, name)
    for argument in choice.arguments(name).values():
        if given.get(argument.name) is not None and is_size(argument.field):
            given[argument.name] = in_pixel_range(given[argument.name], norm)
    return given


def other_attack(section: Mapping[str, Any], name: str) -> dict[str, None]:
    """The keys that a config's section `pgd_attack` loses where another attack takes the place of
    the one that it describes: that one's sizes and arguments, and values at their default.

    Args:
        section: the section, as written.
        name: the new attack.
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
    return in_pixel_range(2, "linf") if threat.norm == "linf" else 2.5 * threat.epsilon / settings.K


def fgsm(config: Config) -> FGSM:
    """FGSM with the config's norm, radius and loss, which watches fast FGSM training for
    overfitting.

    It climbs cross entropy where a user's own attack has a loss that FGSM does not know.
    """
    threat, loss = threat_model(config), config.pgd_attack.loss
    return FGSM(
        threat.epsilon, threat.norm, early_stop=1, loss=loss if loss in ATTACK_LOSSES else "ce"
    )
