"""The attacks that a config describes. Here, and nowhere else, its sizes become those of the pixel range `[0, 1]`."""

from attacks.auto_attack import AutoAttack
from attacks.auto_pgd import APGD
from attacks.fgsm import FGSM
from attacks.pgd import PGD
from attacks.threat_model import ThreatModel, in_pixel_range
from base.config.config import Config


def threat_model(config: Config) -> ThreatModel:
    """Norm and radius of training and of attacks."""
    norm = config.adversarial.norm
    return ThreatModel(norm, in_pixel_range(config.attack_epsilon, norm))


def pgd(config: Config, stop_at_rank: int = 1) -> PGD:
    """The PGD of robust validation and reports; it goes on until a label is not among the `stop_at_rank` largest logits."""
    threat, settings = threat_model(config), config.pgd_attack
    step_size = in_pixel_range(2, "linf") if threat.norm == "linf" else 2.5 * threat.epsilon / settings.K
    if settings.step is not None:
        step_size = in_pixel_range(settings.step, threat.norm)
    return PGD(
        threat.epsilon,
        step_size,
        settings.K,
        threat.norm,
        restarts=settings.restarts,
        early_stop=stop_at_rank,
        loss=settings.loss,
    )


def fgsm(config: Config, stop_at_rank: int = 1) -> FGSM:
    """FGSM with the config's norm and radius."""
    threat = threat_model(config)
    return FGSM(threat.epsilon, threat.norm, early_stop=stop_at_rank, loss=config.pgd_attack.loss)


def apgd(config: Config) -> APGD:
    """APGD with as many steps as `pgd_attack.K`, which should be 100 or so."""
    threat, settings = threat_model(config), config.pgd_attack
    return APGD(threat.epsilon, settings.K, threat.norm, restarts=settings.restarts, loss=settings.loss)


def auto_attack(config: Config) -> AutoAttack:
    """The standard AutoAttack, whose only parameters are norm and radius."""
    threat = threat_model(config)
    return AutoAttack(threat.epsilon, threat.norm)
