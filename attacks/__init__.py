"""Attacks on classifiers: `attack(model, images, labels) -> adversarial images`.

Everything is in the pixel range `[0, 1]`.
"""

from attacks.attack import Attack
from attacks.auto_attack import AutoAttack
from attacks.auto_pgd import APGD
from attacks.fgsm import FGSM
from attacks.pgd import PGD
from attacks.square import Square
from attacks.threat_model import ThreatModel
from base.registry import ATTACKS

ATTACKS.update(fgsm=FGSM, pgd=PGD, apgd=APGD, square=Square, autoattack=AutoAttack)

__all__ = ["APGD", "ATTACKS", "FGSM", "PGD", "Attack", "AutoAttack", "Square", "ThreatModel"]
