"""The attacks that a config describes. Here, and nowhere else, its sizes become those of the pixel range `[0, 1]`."""

from collections.abc import Mapping
from typing import Any

from attacks.arguments import LARGEST_LINF
from attacks.attack import Attack
from attacks.fgsm import FGSM
from attacks.pgd import PGD
from attacks.threat_model import ThreatModel, in_pixel_range
from base.config.adversarial import PGDAttackConfig
from base.config.arguments import parameters_of
from base.config.config import Config
from base.errors import ConfigError
from base.registry import ATTACKS, lookup
from base.text import one_line


def threat_model(config: Config) -> ThreatModel:
    """Norm and radius of training and of attacks."""
    norm = config.adversarial.norm
    return ThreatModel(norm, in_pixel_range(config.attack_epsilon, norm))


def build_attack(config: Config, num_classes: int, stop_at_rank: int = 1) -> Attack:
    """The attack of `pgd_attack`, for robust validation and reports. Its constructor gets what the config offers, as far
    as it takes it: epsilon, norm, steps, step_size, restarts, loss, early_stop and seed; and the section's keys of its own.

    Args:
        config: the resolved config.
        num_classes: of the data set.
        stop_at_rank: `early_stop`: an image is attacked until its label is not among that many of the largest logits.

    Raises:
        ConfigError: the attack refuses its arguments or needs more classes, or the package that it needs is missing.
    """
    threat, settings = threat_model(config), config.pgd_attack
    kind = lookup(ATTACKS, settings.type, "pgd_attack.type")
    offered: dict[str, Any] = {
        "epsilon": threat.epsilon,
        "norm": threat.norm,
        "steps": settings.K,
        "restarts": settings.restarts,
        "loss": settings.loss,
        "early_stop": stop_at_rank,
        "seed": config.seed,
    }
    taken = {parameter.name: parameter for parameter in parameters_of(kind)}
    own_step = "step_size" in taken and taken["step_size"].default is not taken["step_size"].empty
    if settings.step is not None or not own_step:
        offered["step_size"] = _step_size(settings, threat)
    given = {name: value for name, value in offered.items() if name in taken}
    own = settings.arguments_for("pgd_attack.type", settings.type)
    try:
        attack = kind(**given, **own)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"pgd_attack: {settings.type}: {one_line(error)}") from None
    if not isinstance(attack, Attack):
        what = type(attack).__name__
        raise ConfigError(f"pgd_attack.type: {settings.type}: expected a subclass of attacks.Attack, not {what}")
    if num_classes < attack.min_classes:
        choice = f"loss: {attack.loss}" if "loss" in taken else f"type: {settings.type}"
        needs = f"needs at least {attack.min_classes} classes, this data set has {num_classes}"
        raise ConfigError(f"pgd_attack.{choice} {needs}")
    return attack


def other_attack(section: Mapping[str, Any], name: str) -> dict[str, None]:
    """What a config's section `pgd_attack` has to lose where another attack takes the place of the one that it is
    about: sizes and arguments of that one, and values that nobody chose, its defaults.

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
    """FGSM with the config's norm and radius, the alarm of fast FGSM training."""
    threat = threat_model(config)
    return FGSM(threat.epsilon, threat.norm, early_stop=1, loss=config.pgd_attack.loss)


def training_attack(config: Config) -> PGD:
    """The attack inside a training step of the methods `fgsm`, `pgd` and `trades`."""
    threat, settings = threat_model(config), config.adversarial
    steps = 1 if config.adversarial_method == "fgsm" else settings.steps
    return PGD(
        threat.epsilon,
        training_step_size(config),
        steps,
        threat.norm,
        restarts=settings.restarts if config.adversarial_method == "pgd" else 1,
        random_start=settings.random_start,
    )


def training_step_size(config: Config) -> float:
    """Step size of the config's training method, in units of the pixel range."""
    threat, settings, method = threat_model(config), config.adversarial, config.adversarial_method
    if settings.step_size is not None:
        return in_pixel_range(settings.step_size, settings.norm)
    if method == "free":
        return in_pixel_range(config.trainer.fgsm_step, "linf") if threat.norm == "linf" else threat.epsilon
    step = 1.25 * threat.epsilon if method == "fgsm" else 2.5 * threat.epsilon / settings.steps
    # a step of 1 crosses the whole pixel range
    return min(step, LARGEST_LINF) if threat.norm == "linf" else step
