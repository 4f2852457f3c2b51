"""Can a robustness number be believed? Signs that an attack failed for reasons of its own, not because the model is robust.

After Athalye et al., "Obfuscated gradients give a false sense of security" (arXiv:1802.00420), and Carlini et al., "On
evaluating adversarial robustness" (arXiv:1902.06705). Passing is no proof: a defence of a new kind needs attacks made for it.
"""

from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import ceil, prod, sqrt
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from attacks.attack import Attack, frozen
from attacks.classifier import Classifier, Model
from attacks.losses import wrongness
from attacks.pgd import PGD
from attacks.square import Square
from attacks.threat_model import ThreatModel, as_written
from attacks.worst_points import DONE
from base.base_data_loader import BaseDataLoader
from evaluation.robust_accuracy import Autocast, Z, attack_batch, interval

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
"""How far sums of probabilities may be from 1: bfloat16 rounds less, and no batch of logits comes so close by chance."""
SAME_FORWARD, SAME_BATCH = 1e-4, 0.05
"""Difference, relative to the spread of logits, up to which two forward passes count as the same: one repeated (GPUs add in
varying order, about 1e-6), and one in batches of another size, for which libraries take other kernels (TF32 rounds by 5e-4 each
time; batch statistics changed logits by 0.4 and more)."""
SQUARE_QUERIES = 500
"""Enough for a black-box search to break what hidden gradients protect."""
FEW_STEPS, ENOUGH_STEPS = 10, 20
"""Fewer steps than the first need not break everything at a large epsilon (FGSM does not), so PGD with the second is added."""
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
NOISE_DRAWS, MORE_STEPS, MORE_RESTARTS = 10, 4, 3
PASSED, FAILED, UNDECIDED = "passed", "failed", "undecided"


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: what ought to be.
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
        TypeError, ValueError: the model does not return logits, or a label is not one of its classes.
    """
    passes = []
    margin = _variant(attack, loss="margin")
    with torch.inference_mode(False), frozen(model, training=False):
        images, labels, size = images.clone(), labels.clone().long(), batch_size or len(images)
        asked = Classifier(model, labels)
        for points, classes in zip(images.split(size), labels.split(size), strict=True):
            with torch.no_grad():
                logits, again = asked(points).float(), asked(points).float()
            of_loss = _largest(attack.ascend(asked, points, classes)[2])
            of_margin = _largest(margin.ascend(asked, points, classes)[2])
            passes.append((logits, again, of_loss, of_margin))
        logits, again, gradient, of_margin = (
            torch.cat(parts) for parts in zip(*passes, strict=True)
        )
        attacked = (wrongness(logits, labels) == 0) != attack.targeted
        vanishing = attacked & (gradient <= SATURATED * of_margin)
        hidden = 0
        for part in _parts(vanishing, size):
            hidden += _hidden(model, images[part], labels[part], attack)
    not_finite = len(labels) - int((gradient.isfinite() & logits.isfinite().all(dim=1)).sum())
    low, high = float(logits.amin()), float(logits.amax())
    off = float((logits.sum(dim=1) - 1).abs().amax())
    probabilities = low >= 0 and high <= 1 and off <= PROBABILITY_ROUNDING
    between = (
        f"between {low:.3g} and {high:.3g}, with sums up to {off:.3g} from 1"
        + ": probabilities" * probabilities
    )
    change = _difference(logits, again)
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
    searching = _variant(attack, early_stop=1) if isinstance(attack, PGD) else plain_pgd(attack)
    on_margin = _variant(searching, loss="margin")
    found, other = searching(model, images, labels), on_margin(model, images, labels)
    asked = Classifier(model, labels)
    with torch.no_grad():
        standing = searching.reached(asked(found), labels) < DONE
        broken = on_margin.reached(asked(other), labels) == DONE
    flat = _largest(on_margin.ascend(asked, found, labels)[2]) == 0
    return int((standing & (broken | flat)).sum())


def plain_pgd(attack: Attack) -> PGD:
    """PGD with `ENOUGH_STEPS` steps, in place of an attack of another kind with the same threat
    model, loss and goal."""
    epsilon, norm = attack.threat_model.epsilon, attack.threat_model.norm
    step_size = 2.5 * epsilon / ENOUGH_STEPS
    goal = {"targeted": attack.targeted, "loss": attack.loss}
    return PGD(epsilon, step_size, ENOUGH_STEPS, norm, early_stop=True, **goal)


def doctor(
    model: Model,
    loader: BaseDataLoader,
    attack: PGD,
    *,
    seed: int,
    autocast: Autocast = nullcontext,
) -> tuple[list[Check], list[tuple[float, float]]]:
    """Everything there is to check about a model and an attack on it, with a progress bar.

    All verdicts on images are top-1, by copies of the attack that stop there. On images that stand
    it costs up to 15 attacks and `SQUARE_QUERIES` forward passes. Most checks ask how many images
    only seem to stand: the attack leaves them, and another breaks them. They pass where the share
    of such images is at most `HIDDEN` or `FOUND`, by its 95 % interval; see `judge_rate`.

    Args:
        model: maps images in `[0, 1]` to logits.
        loader: neither shuffled nor augmented. 200 images are enough for most models; fewer than 73
            never are.
        attack: PGD or FGSM, untargeted. An attack of fewer than `FEW_STEPS` steps is checked beside PGD with `ENOUGH_STEPS`.
        seed: of all draws.
        autocast: context of the attack's forward passes.

    Returns:
        The checks, and (epsilon in units of the pixel range, accuracy) of the attack with its step size scaled along, or of the
        PGD beside it, from epsilon 0 to one that leaves nothing of an image.

    Raises:
        ValueError: a targeted attack, or an epsilon of 0.
    """
    if attack.targeted or attack.threat_model.epsilon == 0:
        raise ValueError("only an untargeted attack with an epsilon above 0 can be checked")
    this = _Examination(model, loader, attack, seed, autocast)
    checks: list[Check] = []
    parts = (
        this.gradients,
        this.epsilon_zero,
        this.batch_size,
        this.epsilons,
        this.weaker_attacks,
        this.stronger_attacks,
    )
    with tqdm((*parts, this.black_box), disable=None, leave=False) as bar:
        for part in bar:
            bar.set_description_str(f"checking {part.__name__.replace('_', ' ')}")
            checks += part()
    return checks, this.curve


class _Examination:
    """A model, the images it is examined on, and what is known so far. Verdicts are bool `(N,)`: still classified correctly."""

    def __init__(
        self, model: Model, loader: BaseDataLoader, attack: PGD, seed: int, autocast: Autocast
    ) -> None:
        self.model, self.seed, self.autocast = model, seed, autocast
        loader.set_epoch(1)
        batches = list(loader)
        self.images, self.labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        self.n, self.size = len(self.labels), len(batches[0][1])
        self.positions, self.num_classes = loader.positions[: self.n], loader.num_classes
        self.norm, self.epsilon = attack.threat_model.norm, attack.threat_model.epsilon
        self.attack = self.search = _variant(attack, early_stop=1)
        if attack.steps < FEW_STEPS:
            enough = {"steps": ENOUGH_STEPS, "step_size": 2.5 * self.epsilon / ENOUGH_STEPS}
            self.search = _variant(self.attack, **enough, random_start=True)
        self.curve: list[tuple[float, float]] = []

    @cached_property
    def standing(self) -> Tensor:
        return self.verdicts(self.attack)

    @cached_property
    def searched(self) -> Tensor:
        return self.standing if self.search is self.attack else self.verdicts(self.search)

    def verdicts(
        self, attack: Attack, size: int | None = None, among: Tensor | None = None
    ) -> Tensor:
        """Attack all images, or those `among` them, in batches of `size`; the others count as broken."""
        standing = torch.zeros(self.n, dtype=torch.bool)
        among = torch.ones_like(standing) if among is None else among
        for part in _parts(among, size or self.size):
            there = part.to(self.images.device)
            images, labels, positions = self.images[there], self.labels[there], self.positions[part]
            options = {"positions": positions, "seed": self.seed, "autocast": self.autocast}
            verdicts, _ = attack_batch(self.model, images, labels, attack, **options)
            standing[part] = verdicts.robust_top1
        return standing

    @torch.no_grad()
    def logits(self, size: int) -> Tensor:
        """Of all images, computed in batches of `size`."""
        with frozen(self.model, training=False):
            asked = Classifier(self.model, self.labels)
            return torch.cat([asked(part).float() for part in self.images.split(size)])

    def gradients(self) -> list[Check]:
        with self.autocast():  # float16, for one, has its own zeros
            return quick_checks(self.model, self.images, self.labels, self.attack, self.size)

    def epsilon_zero(self) -> list[Check]:
        clean = (wrongness(self.logits(self.size), self.labels) == 0).cpu()
        zero = self.verdicts(_scaled(_variant(self.attack, steps=1, restarts=1), 0.0))
        self.curve = [(0.0, _share(zero))]
        same = bool((clean == zero).all())
        detail = f"{_percent(_share(zero))} and {_percent(_share(clean))}"
        return [Check("epsilon 0 equals clean", same, detail)]

    def batch_size(self) -> list[Check]:
        name = "batch size changes nothing"
        other = max(1, self.size // 3) if self.size > 1 else min(self.n, 16)
        changed = int((self.verdicts(self.attack, other) != self.standing).sum())
        change = _difference(self.logits(self.size), self.logits(other))
        by = f"by {change:.1e} of their spread (at most {SAME_BATCH:g})"
        detail = f"in batches of {other}, not {self.size}, logits change {by}"
        if change > SAME_BATCH:
            return [Check(name, False, f"{detail}, and {changed} of {self.n} verdicts")]
        return [judge_rate(name, changed, self.n, HIDDEN, f"{detail}, and verdicts")]

    def epsilons(self) -> list[Check]:
        # within 0.5 of every pixel every image can become flat grey, the same for all; that is this far in the Euclidean norm
        largest = 0.5 if self.norm == "linf" else 0.5 * sqrt(prod(self.images.shape[1:]))
        sizes = {
            factor * self.epsilon
            for factor in FACTORS
            if factor <= 1 or factor * self.epsilon < largest
        }
        verdicts = []
        for size in sorted(sizes | {largest}):
            search = _scaled(self.search, size / self.epsilon)
            verdicts.append(self.searched if size == self.epsilon else self.verdicts(search))
            self.curve.append((size, _share(verdicts[-1])))
        missed = max(int((larger & ~smaller).sum()) for smaller, larger in pairwise(verdicts))
        points = [
            f"{_percent(share)} at {as_written(size, self.norm)}" for size, share in self.curve
        ]
        standing, chance = int(verdicts[-1].sum()), 1 / self.num_classes
        falls = f"{', '.join(points)}; a larger epsilon misses what a smaller breaks"
        at_end = f"{points[-1]}, chance is {_percent(chance)}"
        return [
            judge_rate("accuracy falls as epsilon grows", missed, self.n, HIDDEN, falls),
            judge_rate(
                "a huge epsilon leaves chance", standing, self.n, chance + HIDDEN, at_end
            ),
        ]

    def weaker_attacks(self) -> list[Check]:
        # a search that does not move tries its random starts
        noise = _variant(
            self.attack, steps=1, step_size=0.0, restarts=NOISE_DRAWS, random_start=True
        )
        checks = [
            self._compared("not weaker than random noise", self.standing, self.verdicts(noise))
        ]
        if self.attack.steps > 1:
            fgsm = _variant(
                self.attack, steps=1, step_size=self.epsilon, restarts=1, random_start=False
            )
            checks.append(
                self._compared("not weaker than FGSM", self.standing, self.verdicts(fgsm))
            )
        return checks

    def stronger_attacks(self) -> list[Check]:
        steps, longer = self.search.steps, self.searched
        if self.search is self.attack:
            steps *= MORE_STEPS
            longer = self.verdicts(_variant(self.attack, steps=steps))
        starts = MORE_RESTARTS * self.search.restarts
        restarted = self.verdicts(_variant(self.search, restarts=starts, random_start=True))
        more_steps = f"{steps} steps, not {self.attack.steps}, find little more"
        more_starts = f"{starts} starts, not {self.search.restarts}, find little more"
        limit = FOUND_BESIDE_FGSM if self.attack.steps == 1 else FOUND
        return [
            self._compared(more_steps, self.standing, longer, limit),
            self._compared(more_starts, self.searched, restarted, FOUND),
        ]

    def _compared(
        self, name: str, standing: Tensor, other: Tensor, limit: float = HIDDEN
    ) -> Check:
        """How many images that stand under one attack another breaks: at most a share of `limit` of
        all images."""
        before, after = _percent(_share(standing)), _percent(_share(other))
        detail = f"{before} of images stand, {after} under the other attack; only the other breaks"
        return judge_rate(name, int((standing & ~other).sum()), self.n, limit, detail)

    def black_box(self) -> list[Check]:
        standing = self.standing & self.searched
        square = Square(self.epsilon, SQUARE_QUERIES, self.norm, seed=self.seed)
        left = self.verdicts(square, among=standing)
        broken = int(standing.sum() - left.sum())
        of_standing = f"of {int(standing.sum())} images that stand"
        detail = f"{of_standing} Square breaks, with {SQUARE_QUERIES} queries"
        return [judge_rate("no black-box search finds more", broken, self.n, FOUND, detail)]


def _parts(chosen: Tensor, size: int) -> list[Tensor]:
    """The positions where `chosen` `(N,)` is true, in batches.

    Where it is true nowhere the list is empty: some models cannot answer a batch without images.
    """
    places = chosen.nonzero().squeeze(1)
    return list(places.split(size)) if len(places) else []


def _variant(attack: Any, **changes: object) -> Any:
    """A copy of the attack with some attributes changed."""
    variant = copy(attack)
    vars(variant).update(changes)
    return variant


def _scaled(attack: PGD, factor: float) -> PGD:
    """The attack with epsilon and step size multiplied by `factor`."""
    threat_model = ThreatModel(attack.threat_model.norm, factor * attack.threat_model.epsilon)
    return _variant(attack, threat_model=threat_model, step_size=factor * attack.step_size)


def _difference(logits: Tensor, others: Tensor) -> float:
    """The largest difference of finite logits, relative to their spread: the median distance from the mean of their image."""
    finite = (logits.isfinite() & others.isfinite()).all(dim=1)
    if not finite.any():
        return 0.0
    logits, others = logits[finite], others[finite]
    spread = (logits - logits.mean(dim=1, keepdim=True)).abs().median()
    return float((logits - others).abs().max() / spread.clamp_min(torch.finfo(spread.dtype).tiny))


def _share(verdicts: Tensor) -> float:
    return float(verdicts.double().mean())


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
