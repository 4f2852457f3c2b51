"""Can a robustness number be believed? Signs that an attack failed for reasons of its own, not because the model is robust.

After Athalye et al., "Obfuscated gradients give a false sense of security" (arXiv:1802.00420), and Carlini et al., "On
evaluating adversarial robustness" (arXiv:1902.06705). Passing is no proof: a defence of a new kind needs attacks made for it.
"""

from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod, sqrt

import torch
from torch import Tensor, nn
from tqdm import tqdm

from attacks.attack import Attack, frozen
from attacks.losses import wrongness
from attacks.pgd import PGD
from attacks.robustness import Autocast, attack_batch, interval
from attacks.square import Square
from attacks.threat_model import ThreatModel, as_written
from base.base_data_loader import BaseDataLoader

ZERO_GRADIENTS = 0.05
"""Share of images that may have no gradient. In float32 that of cross entropy is exactly 0 from a margin of about 100 between
logits on: rare in healthy networks, and so for most images where gradients are hidden. An image without a gradient may pass for
robust unattacked, so up to this share robust accuracy is wrong by 5 points at most."""
PROBABILITY_ROUNDING = 0.01
"""How far sums of probabilities may be from 1: bfloat16 rounds less, and no batch of logits comes so close by chance."""
SAME_FORWARD, SAME_BATCH = 1e-4, 0.05
"""Difference, relative to the spread of logits, up to which two forward passes count as the same: one repeated (GPUs add in
varying order, about 1e-6), and one in batches of another size, for which libraries take other kernels (TF32 rounds by 5e-4 each
time; batch statistics changed logits by 0.4 and more)."""
LOOSE, LOOSE_FGSM = 0.05, 0.15
"""How much of the accuracy more steps may take: what they take, the attack overstated. On networks trained against it, PGD with
20 steps is 4 points below 7 steps, and 10 below FGSM (CIFAR-10, Madry et al., arXiv:1706.06083, table 2)."""
SQUARE_SHARE, SQUARE_QUERIES = 0.02, 500
"""Share of images that a black-box search may break beyond the attack; its 95 % interval must reach it. The search maximises
another loss, the margin: of a healthy network (simpleCNN trained with PGD on CIFAR-10) it broke 1.4 % that PGD on cross entropy
left. Where gradients were hidden it broke 14 to 33 %, for which 500 queries are enough."""
FEW_STEPS, ENOUGH_STEPS = 10, 20
"""Fewer steps than the first need not break everything at a large epsilon (FGSM does not), so PGD with the second is added."""
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
NOISE_DRAWS, MORE_STEPS, MORE_RESTARTS = 10, 4, 3
ROUNDING = 1e-9  # of shares: one image of 100 more or less is 1 %


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: what ought to be.
        passed: whether it is.
        detail: the numbers, in one line.
    """

    name: str
    passed: bool
    detail: str

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.name}: {self.detail}"


def quick_checks(
    model: nn.Module, images: Tensor, labels: Tensor, attack: Attack, batch_size: int | None = None
) -> list[Check]:
    """What three forward passes and a backward pass on one batch tell; the model is in evaluation mode meanwhile.

    Gradients of the attack's loss that are zero or not finite, probabilities in place of logits (softmax saturates, and cross
    entropy takes it twice), and a forward pass that is random, for which a single gradient says little.

    Args:
        model: maps images in `[0, 1]` to logits.
        images: `(B, C, H, W)` in `[0, 1]`.
        labels: int64 `(B,)`.
        attack: the attack whose loss counts.
        batch_size: images at a time; None for all.
    """
    passes = []
    with torch.inference_mode(False), frozen(model, training=False):
        images, labels, size = images.clone(), labels.clone(), batch_size or len(images)
        for points, classes in zip(images.split(size), labels.split(size), strict=True):
            with torch.no_grad():
                logits, again = model(points).float(), model(points).float()
            passes.append((logits, again, attack.ascend(model, points, classes)[2].flatten(1)))
    logits, again, gradient = (torch.cat(parts) for parts in zip(*passes, strict=True))
    attacked = (wrongness(logits, labels) == 0) != attack.targeted
    zero, of = int(((gradient == 0).all(dim=1) & attacked).sum()), int(attacked.sum())
    share = zero / max(1, of)
    not_finite = len(labels) - int((gradient.isfinite().all(dim=1) & logits.isfinite().all(dim=1)).sum())
    low, high, off = float(logits.amin()), float(logits.amax()), float((logits.sum(dim=1) - 1).abs().amax())
    probabilities = low >= 0 and high <= 1 and off <= PROBABILITY_ROUNDING
    between = f"between {low:.3g} and {high:.3g}, with sums up to {off:.3g} from 1" + ": probabilities" * probabilities
    change = _difference(logits, again)
    zeros = f"zero for {zero} of {of} images to attack ({_percent(share)}, at most {_percent(ZERO_GRADIENTS)})"
    return [
        Check("gradients are not zero", share <= ZERO_GRADIENTS, zeros),
        Check("gradients and logits are finite", not_finite == 0, f"not for {not_finite} of {len(labels)} images"),
        Check("outputs are logits", not probabilities, between),
        Check("the forward pass is not random", change <= SAME_FORWARD, f"a second one differs by {change:.1e} of the spread"),
    ]


def doctor(
    model: nn.Module, loader: BaseDataLoader, attack: PGD, *, seed: int, autocast: Autocast = nullcontext
) -> tuple[list[Check], list[tuple[float, float]]]:
    """Everything there is to check about a model and an attack on it, with a progress bar.

    All verdicts are top-1, by copies of the attack that stop there. On images that stand it costs up to 15 attacks and
    `SQUARE_QUERIES` forward passes. Differences of one image or 1 % are tolerated where nothing else is said.

    Args:
        model: maps images in `[0, 1]` to logits.
        loader: neither shuffled nor augmented; 100 to 256 images are enough.
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
    parts = (this.gradients, this.epsilon_zero, this.batch_size, this.epsilons, this.weaker_attacks, this.stronger_attacks)
    with tqdm((*parts, this.black_box), disable=None, leave=False) as bar:
        for part in bar:
            bar.set_description_str(f"checking {part.__name__.replace('_', ' ')}")
            checks += part()
    return checks, this.curve


class _Examination:
    """A model, the images it is examined on, and what is known so far. Verdicts are bool `(N,)`: still classified correctly."""

    def __init__(self, model: nn.Module, loader: BaseDataLoader, attack: PGD, seed: int, autocast: Autocast) -> None:
        self.model, self.seed, self.autocast = model, seed, autocast
        loader.set_epoch(1)
        batches = list(loader)
        self.images, self.labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        self.n, self.size = len(self.labels), len(batches[0][1])
        self.positions, self.num_classes = loader.positions[: self.n], loader.num_classes
        self.tolerance = max(1 / self.n, 0.01) + ROUNDING
        self.norm, self.epsilon = attack.threat_model.norm, attack.threat_model.epsilon
        self.attack = self.search = _variant(attack)
        if attack.steps < FEW_STEPS:
            enough = {"steps": ENOUGH_STEPS, "step_size": 2.5 * self.epsilon / ENOUGH_STEPS}
            self.search = _variant(attack, **enough, random_start=True)
        self.curve: list[tuple[float, float]] = []

    @cached_property
    def standing(self) -> Tensor:
        return self.verdicts(self.attack)

    @cached_property
    def searched(self) -> Tensor:
        return self.standing if self.search is self.attack else self.verdicts(self.search)

    def verdicts(self, attack: Attack, size: int | None = None, among: Tensor | None = None) -> Tensor:
        """Attack all images, or those `among` them, in batches of `size`; the others count as broken."""
        standing = torch.zeros(self.n, dtype=torch.bool)
        for part in (torch.ones_like(standing) if among is None else among).nonzero().squeeze(1).split(size or self.size):
            there, sources = part.to(self.images.device), {"positions": self.positions[part], "seed": self.seed}
            images, labels = self.images[there], self.labels[there]
            standing[part] = attack_batch(self.model, images, labels, attack, **sources, autocast=self.autocast)[0].robust_top1
        return standing

    @torch.no_grad()
    def logits(self, size: int) -> Tensor:
        """Of all images, computed in batches of `size`."""
        with frozen(self.model, training=False):
            return torch.cat([self.model(part).float() for part in self.images.split(size)])

    def gradients(self) -> list[Check]:
        with self.autocast():  # float16, for one, has its own zeros
            return quick_checks(self.model, self.images, self.labels, self.attack, self.size)

    def epsilon_zero(self) -> list[Check]:
        clean = (wrongness(self.logits(self.size), self.labels) == 0).cpu()
        zero = self.verdicts(_scaled(_variant(self.attack, steps=1, restarts=1), 0.0))
        self.curve = [(0.0, _share(zero))]
        same = bool((clean == zero).all())
        return [Check("epsilon 0 equals clean", same, f"{_percent(_share(zero))} and {_percent(_share(clean))}")]

    def batch_size(self) -> list[Check]:
        other = max(1, self.size // 3) if self.size > 1 else min(self.n, 16)
        changed = int((self.verdicts(self.attack, other) != self.standing).sum())
        change = _difference(self.logits(self.size), self.logits(other))
        verdicts = f"with {other} in place of {self.size} images {changed} of {self.n} verdicts change"
        detail = f"{verdicts}, and logits by {change:.1e} of their spread (at most {SAME_BATCH:g})"
        return [Check("batch size changes nothing", changed <= self.tolerance * self.n and change <= SAME_BATCH, detail)]

    def epsilons(self) -> list[Check]:
        # within 0.5 of every pixel every image can become flat grey, the same for all; that is this far in the Euclidean norm
        largest = 0.5 if self.norm == "linf" else 0.5 * sqrt(prod(self.images.shape[1:]))
        sizes = {factor * self.epsilon for factor in FACTORS if factor <= 1 or factor * self.epsilon < largest}
        for size in sorted(sizes | {largest}):
            search = _scaled(self.search, size / self.epsilon)
            self.curve.append((size, _share(self.searched if size == self.epsilon else self.verdicts(search))))
        rise = max(after - before for (_, before), (_, after) in pairwise(self.curve))
        points = [f"{_percent(share)} at {as_written(size, self.norm)}" for size, share in self.curve]
        share, chance = self.curve[-1][1], 1 / self.num_classes
        at_end = f"{points[-1]}, chance is {_percent(chance)}"
        return [
            Check("accuracy falls as epsilon grows", rise <= self.tolerance, ", ".join(points)),
            Check("a huge epsilon leaves chance", share <= chance + self.tolerance, at_end),
        ]

    def weaker_attacks(self) -> list[Check]:
        # a search that does not move tries its random starts
        noise = _variant(self.attack, steps=1, step_size=0.0, restarts=NOISE_DRAWS, random_start=True)
        checks = [self._compared("not weaker than random noise", self.verdicts(noise), self.standing)]
        if self.attack.steps > 1:
            fgsm = _variant(self.attack, steps=1, step_size=self.epsilon, restarts=1, random_start=False)
            checks.append(self._compared("not weaker than FGSM", self.verdicts(fgsm), self.standing))
        return checks

    def stronger_attacks(self) -> list[Check]:
        steps, longer = self.search.steps, self.searched
        if self.search is self.attack:
            steps *= MORE_STEPS
            longer = self.verdicts(_variant(self.attack, steps=steps))
        starts = MORE_RESTARTS * self.search.restarts
        restarted = self.verdicts(_variant(self.search, restarts=starts, random_start=True))
        limit = LOOSE_FGSM if self.attack.steps == 1 else LOOSE
        return [
            self._compared(f"{steps} steps, not {self.attack.steps}, find little more", self.standing, longer, limit),
            self._compared(f"{starts} starts, not {self.search.restarts}, find little more", self.searched, restarted, LOOSE),
        ]

    def _compared(self, name: str, weaker: Tensor, stronger: Tensor, limit: float = 1.0) -> Check:
        """The stronger attack leaves no more images standing than the weaker, and not fewer by more than `limit`, to
        which the 95 % interval of the difference must reach."""
        before, after = _share(weaker), _share(stronger)
        detail = f"{_percent(before)} of images stand, then {_percent(after)}"
        if limit == 1.0:
            return Check(name, before - after >= -self.tolerance, detail)
        low, high = interval(max(0.0, before - after), self.n)
        detail += f", {_percent(low)} to {_percent(high)} less (95 % interval; at most {_percent(limit)})"
        return Check(name, -self.tolerance <= before - after and low <= limit, detail)

    def black_box(self) -> list[Check]:
        standing = self.standing & self.searched
        left = self.verdicts(Square(self.epsilon, SQUARE_QUERIES, self.norm, seed=self.seed), among=standing)
        broken = int(standing.sum() - left.sum())
        low, high = interval(broken / self.n, self.n)
        shares = f"95 % interval {_percent(low)} to {_percent(high)} of all images, at most {_percent(SQUARE_SHARE)}"
        detail = f"Square breaks {broken} of {int(standing.sum())} that stand, with {SQUARE_QUERIES} queries ({shares})"
        return [Check("no black-box search finds more", broken <= 1 or low <= SQUARE_SHARE, detail)]


def _variant(attack: PGD, **changes: object) -> PGD:
    """A copy of the attack that stops at rank 1, with some attributes changed."""
    variant = copy(attack)
    vars(variant).update(early_stop=1, **changes)
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
