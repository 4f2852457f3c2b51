"""Quick checks of a model and an attack on it, and how a rate is judged."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from attacks.attack import Attack
from attacks.classifier import Classifier, Model
from attacks.frozen import frozen
from attacks.losses import ATTACK_LOSSES, wrongness
from attacks.pgd import PGD, crossing_step
from attacks.worst_case import DONE
from evaluation.verdicts import wilson_interval

# Limits on the share of all images that only seem robust.
#
# HIDDEN: images that vanishing gradients hide, or that a weaker attack breaks (noise, FGSM, a
# smaller epsilon, other batches). A sound model and attack have hardly any. Of 200 images 3 pass,
# as their 95 % interval ends at 4.3 %, and 17 fail, as theirs begins at 5.4 %.
HIDDEN = 0.05
# FOUND: images that more steps, more starts or a black-box search break. Of 200 images 11 pass and
# 29 fail. A stronger search breaks some images of every model: on networks trained against PGD, 20
# steps leave 4 points less than 7 steps (CIFAR-10, Madry et al., arXiv:1706.06083, table 2). On
# small networks trained with PGD on scikit-learn's digits, with a robust accuracy of 0.6, three
# starts broke 2 to 5 % and Square 2 to 5.5 % that one start of PGD-20 did not; for simpleCNN on
# CIFAR-10 Square broke 1.4 %. Where gradients were hidden it broke 14 to 33 %.
FOUND = 0.10
# FOUND_BESIDE_FGSM: images that PGD breaks and FGSM does not. FGSM accuracy is 10 points above PGD
# accuracy in the same table.
FOUND_BESIDE_FGSM = 0.15

# A gradient that is this much smaller than that of the margin, or zero, counts as vanishing: in
# float32 the probability of the label rounds to 1, and the rest of the gradient of cross entropy no
# longer pushes the label down.
SATURATED = 2.0**-24

# How far sums of probabilities may be from 1: bfloat16 rounds less, and no batch of logits comes so
# close by chance.
PROBABILITY_ROUNDING = 0.01

# Differences, relative to the spread of logits, up to which two forward passes count as the same.
# SAME_FORWARD is for one that is repeated: GPUs add in varying order, about 1e-6. SAME_BATCH is for
# batches of another size, for which libraries take other kernels: TF32 rounds by 5e-4 each time,
# and batch statistics changed logits by 0.4 and more.
SAME_FORWARD = 1e-4
SAME_BATCH = 0.05

# The steps of the PGD that replaces an attack of another kind, or of few steps.
ENOUGH_STEPS = 20

# The number of standard deviations of a two-sided 95 % interval.
Z = 1.959964

PASSED, FAILED, UNDECIDED = "passed", "failed", "undecided"


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: what should hold.
        passed: whether it holds; False also if there are too few images to decide.
        detail: the numbers, in one line.
        verdict: `"passed"`, `"failed"` or `"undecided"`.
        images_needed: if the verdict is undecided, the number of images that would decide if the
            rate found stayed the same.
    """

    name: str
    passed: bool
    detail: str
    verdict: str = ""
    images_needed: int | None = None

    def __post_init__(self) -> None:
        if not self.verdict:
            verdict = PASSED if self.passed else FAILED
            # A frozen dataclass forbids plain assignment
            object.__setattr__(self, "verdict", verdict)

    def __str__(self) -> str:
        word = {PASSED: "pass", FAILED: "FAIL", UNDECIDED: "undecided"}[self.verdict]
        return f"{word}  {self.name}: {self.detail}"


def judge_rate(name: str, found: int, n: int, limit: float, detail: str) -> Check:
    """Check that a rate is at most `limit`: passed if the 95 % interval of the rate lies below the
    limit, failed if it lies above, and undecided if it holds the limit.

    Args:
        name: see `Check`.
        found: the number of images found.
        n: the number of images examined.
        limit: in (0, 1).
        detail: see `Check`; the interval is added to it.
    """
    low, high = wilson_interval(found, n)
    between = f"{100 * low:.2f} to {100 * high:.2f} %"
    detail = (
        f"{detail}: {found} of {n} images, {between} (95 % interval; at most {100 * limit:g} %)"
    )
    if high <= limit or low > limit:
        return Check(name, high <= limit, detail)
    needed = images_to_decide(found, n, limit)
    return Check(name, False, f"{detail}; about {needed} images would decide", UNDECIDED, needed)


def images_to_decide(found: int, n: int, limit: float) -> int:
    """Return how many images it takes until the Wilson interval of `found / n` excludes `limit`.

    The interval holds all shares `q` with `|rate - q| <= Z sqrt(q (1 - q) / images)`.
    """
    distance = abs(found / n - limit)
    # No number of images could separate a rate of exactly `limit` from it: count half an image.
    if distance < 1e-9:
        distance = 0.5 / n
    return max(n + 1, ceil(Z**2 * limit * (1 - limit) / distance**2))


def images_needed(checks: Sequence[Check]) -> int | None:
    """Return how many images would decide all undecided checks; None if all are decided."""
    needed = [check.images_needed for check in checks if check.images_needed is not None]
    return max(needed, default=None)


def all_passed(checks: Sequence[Check]) -> bool | None:
    """Return True if all checks passed, False if one failed, None if one is undecided."""
    if any(check.verdict == FAILED for check in checks):
        return False
    if all(check.passed for check in checks):
        return True
    return None


def failures(checks: Sequence[Check]) -> tuple[str, ...]:
    """Return a line for each check that failed."""
    return tuple(f"{check.name}: {check.detail}" for check in checks if check.verdict == FAILED)


def quick_checks(
    model: Model, images: Tensor, labels: Tensor, attack: Attack, batch_size: int | None = None
) -> list[Check]:
    """Run the checks that take four forward and two backward passes on one batch, in evaluation
    mode.

    The checks find gradients of the attack's loss that vanish or are not finite, probabilities in
    place of logits (softmax saturates, and cross entropy applies it a second time), and a random
    forward pass, for which a single gradient says little (Athalye et al., arXiv:1802.00420).
    Vanishing gradients are judged by the images that they hide: images with such gradients are also
    attacked, by the attack and by the same attack on the margin loss.

    Args:
        model: maps images in `[0, 1]` to logits.
        images: `(B, C, H, W)` in `[0, 1]`.
        labels: int64 `(B,)`.
        attack: the attack whose loss is examined; untargeted.
        batch_size: images at a time; None for all.

    Raises:
        TypeError, ValueError: the model does not return logits, or a label is not one of its
            classes.
    """
    size = batch_size or len(images)
    passes = []
    margin_attack = replace(plain_pgd(attack), loss="margin")
    with torch.inference_mode(False), frozen(model, training=False):
        # Clones are ordinary tensors, also of tensors that were made in inference mode.
        images = images.clone()
        labels = labels.clone().long()
        classifier = Classifier(model, labels)
        for part, classes in zip(images.split(size), labels.split(size), strict=True):
            with torch.no_grad():
                logits = classifier(part).float()
                repeated = classifier(part).float()
            gradient = _largest(attack.value_and_grad(classifier, part, classes)[2])
            of_margin = _largest(margin_attack.value_and_grad(classifier, part, classes)[2])
            passes.append((logits, repeated, gradient, of_margin))
        logits, repeated, gradient, of_margin = map(torch.cat, zip(*passes, strict=True))
        correct = wrongness(logits, labels) == 0
        vanishing = correct & (gradient <= SATURATED * of_margin)
        hidden = 0
        for part in parts_of(vanishing, size):
            hidden += _hidden(model, images[part], labels[part], attack)
    n = len(labels)
    of_attacked = f"{int(vanishing.sum())} of {int(correct.sum())} images to attack"
    vanishes = f"they vanish for {of_attacked}, and hide from the attack"
    finite = gradient.isfinite() & logits.isfinite().all(dim=1)
    not_finite = n - int(finite.sum())
    change = relative_difference(logits, repeated)
    return [
        judge_rate("gradients are not zero", hidden, n, HIDDEN, vanishes),
        Check(
            "gradients and logits are finite",
            not_finite == 0,
            f"not finite for {not_finite} of {n} images",
        ),
        _outputs_are_logits(logits),
        Check(
            "the forward pass is not random",
            change <= SAME_FORWARD,
            f"a second one differs by {change:.1e} of the spread",
        ),
    ]


def _outputs_are_logits(logits: Tensor) -> Check:
    low = float(logits.amin())
    high = float(logits.amax())
    off = float((logits.sum(dim=1) - 1).abs().amax())
    probabilities = low >= 0 and high <= 1 and off <= PROBABILITY_ROUNDING
    detail = f"between {low:.3g} and {high:.3g}, with sums up to {off:.3g} from 1"
    if probabilities:
        detail += ": probabilities"
    return Check("outputs are logits", not probabilities, detail)


def _largest(gradient: Tensor) -> Tensor:
    return gradient.flatten(1).abs().amax(dim=1)


def _hidden(model: Model, images: Tensor, labels: Tensor, attack: Attack) -> int:
    """Return how many images only seem robust: the attack does not break them, but the same attack
    on the margin does, or has no gradient at the point where the attack ended.

    In place of an attack other than PGD, PGD with `ENOUGH_STEPS` on its loss is tried.
    """
    search = replace(as_pgd(attack), early_stop=1)
    on_margin = replace(search, loss="margin")
    found = search(model, images, labels)
    found_on_margin = on_margin(model, images, labels)
    classifier = Classifier(model, labels)
    with torch.no_grad():
        robust = search.reached(classifier(found), labels) < DONE
        broken = on_margin.reached(classifier(found_on_margin), labels) == DONE
    flat = _largest(on_margin.value_and_grad(classifier, found, labels)[2]) == 0
    return int((robust & (broken | flat)).sum())


def as_pgd(attack: Attack) -> PGD:
    """Return the attack itself if it is PGD, in a form of which every argument can be replaced;
    `plain_pgd` of it otherwise."""
    if isinstance(attack, PGD):
        return attack.as_pgd()
    return plain_pgd(attack)


def plain_pgd(attack: Attack) -> PGD:
    """Return PGD with `ENOUGH_STEPS` steps and the attack's threat model and loss; on cross entropy
    if the attack has a loss of its own."""
    loss = "ce"
    if attack.loss in ATTACK_LOSSES:
        loss = attack.loss
    return PGD(
        attack.epsilon,
        step_size=crossing_step(attack.epsilon, ENOUGH_STEPS, attack.norm),
        steps=ENOUGH_STEPS,
        norm=attack.norm,
        early_stop=True,
        loss=loss,
    )


def parts_of(chosen: Tensor, size: int) -> list[Tensor]:
    """Return the positions at which `chosen` `(N,)` is True, in batches of `size`."""
    positions = chosen.nonzero().squeeze(1)
    # Splitting no positions gives one empty batch, on which some models fail.
    if len(positions) == 0:
        return []
    return list(positions.split(size))


def relative_difference(logits: Tensor, others: Tensor) -> float:
    """Return the largest difference of finite logits, relative to their spread: the median distance
    from the mean of their image."""
    finite = (logits.isfinite() & others.isfinite()).all(dim=1)
    if not finite.any():
        return 0.0
    logits, others = logits[finite], others[finite]
    spread = (logits - logits.mean(dim=1, keepdim=True)).abs().median()
    # A network that gives one answer to everything has no spread.
    smallest = torch.finfo(spread.dtype).tiny
    return float((logits - others).abs().max() / spread.clamp_min(smallest))
