"""Can a robustness number be believed? Signs that an attack failed for reasons of its own, not
because the model is robust.

After Athalye et al., "Obfuscated gradients give a false sense of security" (arXiv:1802.00420), and
Carlini et al., "On evaluating adversarial robustness" (arXiv:1902.06705). Passing is no proof: a
defence of a new kind needs attacks made for it."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from attacks.arguments import LARGEST_LINF
from attacks.attack import Attack, check_attack, frozen
from attacks.classifier import Classifier, Model
from attacks.losses import wrongness
from attacks.pgd import PGD
from attacks.square import Square
from attacks.threat_model import format_size
from base.distributed import hide_progress_bar
from evaluation.batches import Batches, Data
from evaluation.checks import (
    ENOUGH_STEPS,
    FAILED,
    FOUND,
    FOUND_BESIDE_FGSM,
    HIDDEN,
    SAME_BATCH,
    Check,
    as_pgd,
    failures,
    images_needed,
    judge_rate,
    parts_of,
    quick_checks,
    relative_difference,
)
from evaluation.report import title
from evaluation.robust_accuracy import Autocast, attack_batch

SQUARE_QUERIES = 500
"""Enough for a black-box search to break what hidden gradients protect."""
FEW_STEPS = 10
"""Fewer steps need not break everything at a large epsilon (FGSM does not), so PGD with
`ENOUGH_STEPS` is added."""
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
NOISE_DRAWS, MORE_STEPS, MORE_RESTARTS = 10, 4, 3


@dataclass(frozen=True)
class DoctorReport:
    """What the doctor has found.

    Attributes:
        checks: everything that was checked.
        examined: the attack that was examined; plain PGD beside one of another kind.
        curve: (epsilon in units of the pixel range, accuracy), from epsilon 0 to one that leaves
            nothing of an image: the attack with its step size scaled along, or the PGD beside it.
        n: images that were examined.
        num_classes: of the model.
    """

    checks: tuple[Check, ...]
    examined: Attack
    curve: tuple[tuple[float, float], ...]
    n: int
    num_classes: int

    @property
    def reliable(self) -> bool | None:
        """True where every check has passed, False where one has failed, None where it takes more
        images to say."""
        if any(check.verdict == FAILED for check in self.checks):
            return False
        return True if all(check.passed for check in self.checks) else None

    @property
    def images_needed(self) -> int | None:
        """How many images would decide the checks that are undecided; None where none is."""
        return images_needed(self.checks)

    @property
    def warnings(self) -> tuple[str, ...]:
        """A line for each check that has failed."""
        return failures(self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "checks": [vars(check) for check in self.checks],
            "checked_attack": title(self.examined),
            "reliable": self.reliable,
            "images_needed": self.images_needed,
            "warnings": list(self.warnings),
            "curve": [list(point) for point in self.curve],
            "n": self.n,
        }

    def __str__(self) -> str:
        return "\n".join(map(str, self.checks))


def doctor(
    model: Model,
    data: Data,
    attack: Attack,
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    autocast: Autocast = nullcontext,
    limit: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> DoctorReport:
    """Check everything there is to check about a model and an attack on it, with a progress bar.

        report = doctor(model, test_loader, PGD(8 / 255, 2 / 255, 20), limit=200)
        report.reliable     # True, False, or None where more images are needed
        print(report)

    All verdicts on images are top-1, by copies of the attack that stop there. On images that stand
    it costs up to 15 attacks and `SQUARE_QUERIES` forward passes. Most checks ask how many images
    only seem to stand: the attack leaves them, and another breaks them. They pass where the share
    of such images is at most `HIDDEN` or `FOUND`, by its 95 % interval; see `judge_rate`.

    Args:
        model, data, device, limit, batch_size, progress: see `robust_accuracy`. 200 images are
            enough for most models; fewer than 73 never are. All of them are held in memory.
        attack: untargeted. In place of an attack of another kind PGD with `ENOUGH_STEPS` on the
            same loss is examined. PGD of fewer than `FEW_STEPS` steps, and FGSM, are checked beside
            PGD with `ENOUGH_STEPS`.
        seed: of all draws.
        autocast: context of the attack's forward passes.

    Raises:
        ValueError: a targeted attack, or an epsilon of 0; and see `robust_accuracy`.
    """
    check_attack(attack)
    if attack.targeted or attack.epsilon == 0:
        raise ValueError("only an untargeted attack with an epsilon above 0 can be checked")
    examined = as_pgd(attack)
    batches = Batches(data, model, device=device, batch_size=batch_size, limit=limit)
    this = _Examination(model, batches, examined, seed, autocast)
    checks: list[Check] = []
    parts = (
        this.gradients,
        this.epsilon_zero,
        this.batch_size,
        this.epsilons,
        this.weaker_attacks,
        this.stronger_attacks,
    )
    with tqdm(
        (*parts, this.black_box), disable=hide_progress_bar() if progress else True, leave=False
    ) as bar:
        for part in bar:
            bar.set_description_str(f"checking {part.__name__.replace('_', ' ')}")
            checks += part()
    shown = attack if isinstance(attack, PGD) else examined
    return DoctorReport(tuple(checks), shown, tuple(this.curve), this.n, this.num_classes)


class _Examination:
    """A model, the images it is examined on, and what is known so far. Verdicts are bool `(N,)`:
    still classified correctly."""

    def __init__(
        self, model: Model, batches: Batches, attack: PGD, seed: int, autocast: Autocast
    ) -> None:
        self.model, self.seed, self.autocast = model, seed, autocast
        every = list(batches)
        self.images = torch.cat([batch.images for batch in every])
        self.labels = torch.cat([batch.labels for batch in every])
        self.positions = torch.cat([batch.positions for batch in every])
        self.n, self.size = len(self.labels), len(every[0].labels)
        self.num_classes = batches.num_classes
        self.norm, self.epsilon = attack.norm, attack.epsilon
        self.attack = self.search = replace(attack, early_stop=1)
        if attack.steps < FEW_STEPS:
            step_size = 2.5 * self.epsilon / ENOUGH_STEPS
            self.search = replace(
                self.attack, steps=ENOUGH_STEPS, step_size=step_size, random_start=True
            )
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
        """Attack all images, or those `among` them, in batches of `size`; the others count as
        broken."""
        standing = torch.zeros(self.n, dtype=torch.bool)
        among = torch.ones_like(standing) if among is None else among
        for part in parts_of(among, size or self.size):
            there = part.to(self.images.device)
            images, labels, positions = self.images[there], self.labels[there], self.positions[part]
            options = {"positions": positions, "seed": self.seed, "autocast": self.autocast}
            verdicts, _ = attack_batch(self.model, images, labels, attack, **options)
            standing[part] = verdicts.robust_top1
        return standing

    @torch.no_grad()
    def logits(self, size: int) -> Tensor:
        """The logits of all images, computed in batches of `size`, float32 `(N, C)`."""
        with frozen(self.model, training=False):
            asked = Classifier(self.model, self.labels)
            return torch.cat([asked(part).float() for part in self.images.split(size)])

    def gradients(self) -> list[Check]:
        with self.autocast():  # float16, for one, has its own zeros
            return quick_checks(self.model, self.images, self.labels, self.attack, self.size)

    def epsilon_zero(self) -> list[Check]:
        clean = (wrongness(self.logits(self.size), self.labels) == 0).cpu()
        zero = self.verdicts(_scaled(replace(self.attack, steps=1, restarts=1), 0.0))
        self.curve = [(0.0, _share(zero))]
        same = bool((clean == zero).all())
        detail = f"{_percent(_share(zero))} and {_percent(_share(clean))}"
        return [Check("epsilon 0 equals clean", same, detail)]

    def batch_size(self) -> list[Check]:
        name = "batch size changes nothing"
        other = max(1, self.size // 3) if self.size > 1 else min(self.n, 16)
        changed = int((self.verdicts(self.attack, other) != self.standing).sum())
        change = relative_difference(self.logits(self.size), self.logits(other))
        by = f"by {change:.1e} of their spread (at most {SAME_BATCH:g})"
        detail = f"in batches of {other}, not {self.size}, logits change {by}"
        if change > SAME_BATCH:
            return [Check(name, False, f"{detail}, and {changed} of {self.n} verdicts")]
        return [judge_rate(name, changed, self.n, HIDDEN, f"{detail}, and verdicts")]

    def epsilons(self) -> list[Check]:
        # within 0.5 of every pixel every image can become flat gray, the same for all; that is this
        # far in the Euclidean norm
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
            f"{_percent(share)} at {format_size(size, self.norm)}" for size, share in self.curve
        ]
        standing, chance = int(verdicts[-1].sum()), 1 / self.num_classes
        falls = f"{', '.join(points)}; a larger epsilon misses what a smaller breaks"
        at_end = f"{points[-1]}, chance is {_percent(chance)}"
        return [
            judge_rate("accuracy falls as epsilon grows", missed, self.n, HIDDEN, falls),
            judge_rate("a huge epsilon leaves chance", standing, self.n, chance + HIDDEN, at_end),
        ]

    def weaker_attacks(self) -> list[Check]:
        # a search that does not move tries its random starts
        noise = replace(
            self.attack, steps=1, step_size=0.0, restarts=NOISE_DRAWS, random_start=True
        )
        checks = [
            self._compared("not weaker than random noise", self.standing, self.verdicts(noise))
        ]
        if self.attack.steps > 1:
            fgsm = replace(
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
            longer = self.verdicts(replace(self.attack, steps=steps))
        starts = MORE_RESTARTS * self.search.restarts
        restarted = self.verdicts(replace(self.search, restarts=starts, random_start=True))
        more_steps = f"{steps} steps, not {self.attack.steps}, find little more"
        more_starts = f"{starts} starts, not {self.search.restarts}, find little more"
        limit = FOUND_BESIDE_FGSM if self.attack.steps == 1 else FOUND
        return [
            self._compared(more_steps, self.standing, longer, limit),
            self._compared(more_starts, self.searched, restarted, FOUND),
        ]

    def _compared(self, name: str, standing: Tensor, other: Tensor, limit: float = HIDDEN) -> Check:
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


def _scaled(attack: PGD, factor: float) -> PGD:
    """The attack with epsilon and step size multiplied by `factor`."""
    # a step of 1 crosses the whole pixel range
    longest = LARGEST_LINF if attack.norm == "linf" else float("inf")
    step_size = min(factor * attack.step_size, longest)
    return replace(attack, epsilon=factor * attack.epsilon, step_size=step_size)


def _share(verdicts: Tensor) -> float:
    return float(verdicts.double().mean())


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
