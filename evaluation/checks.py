"""Checks of a model and of an attack on it that cost a few passes, and how a rate is judged."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from attacks.attack import Attack, frozen
from attacks.classifier import Classifier, Model
from attacks.losses import ATTACK_LOSSES, wrongness
from attacks.pgd import PGD
from attacks.worst_case import DONE
from evaluation.verdicts import Z, interval

HIDDEN, FOUND, FOUND_BESIDE_FGSM = 0.05, 0.10, 0.15
"""Largest share of all images that only seem to stand.

By the first: those that vanishing gradients hide, or that a weaker attack breaks (noise, FGSM, a
smaller epsilon, other batches). A sound model and attack have hardly any; of 200 images 3 pass, as
their 95 % interval ends at 4.3 %, and 17 fail, as theirs begins at 5.4 %.

By the second: those that more steps, more starts or a black-box search break. Of 200 images 11 pass
and 29 fail. They find something everywhere: on networks trained against it, PGD with 20 steps is 4
points below 7 steps (CIFAR-10, Madry et al., arXiv:1706.06083, table 2). Of small networks trained
with PGD on scikit-learn's digits, with a robust accuracy of 0.6, three starts broke 2 to 5 % and
Square 2 to 5.5 % that one start of PGD-20 left; of simpleCNN on CIFAR-10 Square broke 1.4 %. Where
gradients were hidden it broke 14 to 33 %.

By the third: those that PGD breaks beside FGSM, which is 10 points above it (ibid.)."""
SATURATED = 2.0**-24
"""A gradient that is this much smaller than that of the margin, or zero, counts as vanishing: in
float32 the probability of the label rounds to 1, and what is left of the gradient of cross entropy
no longer pushes the label down."""
PROBABILITY_ROUNDING = 0.01
"""How far sums of probabilities may be from 1: bfloat16 rounds less, and no batch of logits comes
so close by chance."""
SAME_FORWARD, SAME_BATCH = 1e-4, 0.05
"""Difference, relative to the spread of logits, up to which two forward passes count as the same:
one repeated (GPUs add in varying order, about 1e-6), and one in batches of another size, for which
libraries take other kernels (TF32 rounds by 5e-4 each time; batch statistics changed logits by 0.4
and more)."""
ENOUGH_STEPS = 20
"""Steps of the PGD that stands in for an attack of another kind, or of few steps."""
PASSED, FAILED, UNDECIDED = "passed", "failed", "undecided"


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: what should hold.
        passed: whether it is, as far as can be known from so many images; False also where they
            cannot decide.
        detail: the numbers, in one line.
        verdict: `"passed"`, `"failed"` or `"undecided"`.
        images_needed: where the verdict is undecided, the number of images that would decide if the
            rate found stayed as it is.
    """

    name: str
    passed: bool
    detail: str
    verdict: str = ""
    images_needed: int | None = None

    def __post_init__(self) -> None:
        if not self.verdict:
            object.__setattr__(self, "verdict", PASSED if self.passed else FAILED)

    def __str__(self) -> str:
        word = {PASSED: "pass", FAILED: "FAIL", UNDECIDED: "undecided"}[self.verdict]
        return f"{word}  {self.name}: {self.detail}"


def judge_rate(name: str, found: int, n: int, limit: float, detail: str) -> Check:
    """Whether so many of all images are at most a share of `limit`: passed where the 95 % interval
    of the share lies below the limit, failed where it lies above, and undecided where it holds the
    limit.

    Args:
        name, detail: see `Check`; the interval is added to the detail.
        found: how many of the `n` images examined.
        limit: in (0, 1).
    """
    low, high = interval(found / n, n)
    between = f"{100 * low:.2f} to {100 * high:.2f} %"
    detail = (
        f"{detail}: {found} of {n} images, {between} (95 % interval; at most {100 * limit:g} %)"
    )
    if high <= limit or low > limit:
        return Check(name, high <= limit, detail)
    needed = images_to_decide(found, n, limit)
    return Check(name, False, f"{detail}; about {needed} images would decide", UNDECIDED, needed)


def images_to_decide(found: int, n: int, limit: float) -> int:
    """How many images it takes until the Wilson interval of the rate `found / n` excludes `limit`.

    The interval holds all shares `q` with `|rate - q| <= z sqrt(q (1 - q) / images)`. No number of
    images could tell a rate of exactly `limit` from it; it counts as half an image off.
    """
    distance = abs(found / n - limit)
    if distance < 1e-9:
        distance = 0.5 / n
    return max(n + 1, ceil(Z**2 * limit * (1 - limit) / distance**2))


def images_needed(checks: Sequence[Check]) -> int | None:
    """How many images would decide all of the checks that are undecided; None where none is."""
    return max((check.images_needed for check in checks if check.images_needed), default=None)


def failures(checks: Sequence[Check]) -> tuple[str, ...]:
    """A line for each check that has failed, once."""
    lines = [f"{check.name}: {check.detail}" for check in checks if check.verdict == FAILED]
    return tuple(dict.fromkeys(lines))


def quick_checks(
    model: Model, images: Tensor, labels: Tensor, attack: Attack, batch_size: int | None = None
) -> list[Check]:
    """What four forward and two backward passes on one batch, in evaluation mode, tell.

    Gradients of the attack's loss that vanish or are not finite, probabilities in place of logits
    (softmax saturates, and cross entropy takes it twice), and a forward pass that is random, for
    which a single gradient says little. Vanishing gradients are judged by what they hide: where
    there are any, the attack and its like on the margin are tried on those images.

    Args:
        model: maps images in `[0, 1]` to logits.
        images: `(B, C, H, W)` in `[0, 1]`.
        labels: int64 `(B,)`.
        attack: the attack whose loss counts.
        batch_size: images at a time; None for all.

    Raises:
        TypeError, ValueError: the model does not return logits, or a label is not one of its
            classes.
    """
    passes = []
    margin = replace(plain_pgd(attack), loss="margin")
    with torch.inference_mode(False), frozen(model, training=False):
        images, labels, size = images.clone(), labels.clone().long(), batch_size or len(images)
        asked = Classifier(model, labels)
        for points, classes in zip(images.split(size), labels.split(size), strict=True):
            with torch.no_grad():
                logits, again = asked(points).float(), asked(points).float()
            of_loss = _largest(attack.value_and_grad(asked, points, classes)[2])
            of_margin = _largest(margin.value_and_grad(asked, points, classes)[2])
            passes.append((logits, again, of_loss, of_margin))
        logits, again, gradient, of_margin = (
            torch.cat(parts) for parts in zip(*passes, strict=True)
        )
        attacked = (wrongness(logits, labels) == 0) != attack.targeted
        vanishing = attacked & (gradient <= SATURATED * of_margin)
        hidden = 0
        for part in parts_of(vanishing, size):
            hidden += _hidden(model, images[part], labels[part], attack)
    not_finite = len(labels) - int((gradient.isfinite() & logits.isfinite().all(dim=1)).sum())
    low, high = float(logits.amin()), float(logits.amax())
    off = float((logits.sum(dim=1) - 1).abs().amax())
    probabilities = low >= 0 and high <= 1 and off <= PROBABILITY_ROUNDING
    between = (
        f"between {low:.3g} and {high:.3g}, with sums up to {off:.3g} from 1"
        + ": probabilities" * probabilities
    )
    change = relative_difference(logits, again)
    of_attacked = f"{int(vanishing.sum())} of {int(attacked.sum())} images to attack"
    vanishes = f"they vanish for {of_attacked}; the margin finds what they hide"
    return [
        judge_rate("gradients are not zero", hidden, len(labels), HIDDEN, vanishes),
        Check(
            "gradients and logits are finite",
            not_finite == 0,
            f"not for {not_finite} of {len(labels)} images",
        ),
        Check("outputs are logits", not probabilities, between),
        Check(
            "the forward pass is not random",
            change <= SAME_FORWARD,
            f"a second one differs by {change:.1e} of the spread",
        ),
    ]


def _largest(gradient: Tensor) -> Tensor:
    return gradient.flatten(1).abs().amax(dim=1)


def _hidden(model: Model, images: Tensor, labels: Tensor, attack: Attack) -> int:
    """How many of the images only seem to stand: the attack leaves them, but on the margin it
    breaks them, or has no gradient where it ended.

    In place of attacks other than PGD, PGD with `ENOUGH_STEPS` on their loss is tried.
    """
    searching = replace(as_pgd(attack), early_stop=1)
    on_margin = replace(searching, loss="margin")
    found, other = searching(model, images, labels), on_margin(model, images, labels)
    asked = Classifier(model, labels)
    with torch.no_grad():
        standing = searching.reached(asked(found), labels) < DONE
        broken = on_margin.reached(asked(other), labels) == DONE
    flat = _largest(on_margin.value_and_grad(asked, found, labels)[2]) == 0
    return int((standing & (broken | flat)).sum())


def as_pgd(attack: Attack) -> PGD:
    """The attack itself, where it is PGD, as one of which every number can be replaced; otherwise
    `plain_pgd` in its place."""
    return attack.as_pgd() if isinstance(attack, PGD) else plain_pgd(attack)


def plain_pgd(attack: Attack) -> PGD:
    """PGD with `ENOUGH_STEPS` steps, in place of an attack of another kind with the same threat
    model, loss and goal; on cross entropy where it has a loss of its own."""
    step_size = 2.5 * attack.epsilon / ENOUGH_STEPS
    loss = attack.loss if attack.loss in ATTACK_LOSSES else "ce"
    goal = {"targeted": attack.targeted, "loss": loss}
    return PGD(attack.epsilon, step_size, ENOUGH_STEPS, attack.norm, early_stop=True, **goal)


def parts_of(chosen: Tensor, size: int) -> list[Tensor]:
    """The positions where `chosen` `(N,)` is true, in batches.

    Where it is true nowhere the list is empty: some models cannot answer a batch without images.
    """
    places = chosen.nonzero().squeeze(1)
    return list(places.split(size)) if len(places) else []


def relative_difference(logits: Tensor, others: Tensor) -> float:
    """The largest difference of finite logits, relative to their spread: the median distance from
    the mean of their image."""
    finite = (logits.isfinite() & others.isfinite()).all(dim=1)
    if not finite.any():
        return 0.0
    logits, others = logits[finite], others[finite]
    spread = (logits - logits.mean(dim=1, keepdim=True)).abs().median()
    return float((logits - others).abs().max() / spread.clamp_min(torch.finfo(spread.dtype).tiny))
