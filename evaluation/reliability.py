"""The doctor: checks that show whether an attack failed because the model is robust, or for
reasons of its own.

The checks follow Athalye et al., "Obfuscated gradients give a false sense of security"
(arXiv:1802.00420, section 3.1), Carlini et al., "On evaluating adversarial robustness"
(arXiv:1902.06705), and Croce and Hein, "Reliable evaluation of adversarial robustness with an
ensemble of diverse parameter-free attacks" (arXiv:2003.01690). Passing is no proof: a new kind of
defense needs attacks that are made for it.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from math import prod, sqrt

import torch
from torch import Tensor
from tqdm import tqdm

from attacks.attack import Attack, check_attack
from attacks.classifier import Classifier, Model
from attacks.frozen import frozen
from attacks.losses import wrongness
from attacks.pgd import PGD, crossing_step
from attacks.square import Square
from attacks.threat_model import format_size
from base.distributed import hide_progress_bar
from base.precision import full_precision
from evaluation.attack_batch import Autocast, attack_batch
from evaluation.batches import Batches, Data, FittingSize
from evaluation.checks import (
    ENOUGH_STEPS,
    FOUND,
    FOUND_BESIDE_FGSM,
    HIDDEN,
    SAME_BATCH,
    Check,
    as_pgd,
    judge_rate,
    parts_of,
    quick_checks,
    relative_difference,
)
from evaluation.report import DoctorReport

# Enough for a black-box search to break the images that hidden gradients protect.
SQUARE_QUERIES = 500
# An attack of fewer steps may leave robust images at a large epsilon (FGSM does), so PGD with
# `ENOUGH_STEPS` is run beside it.
FEW_STEPS = 10
# The epsilons of the curve, as multiples of the attack's own.
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
NOISE_DRAWS = 10
MORE_STEPS = 4
MORE_RESTARTS = 3


@full_precision()
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
    """Run all of `CHECKS` on a model and an attack on it, with a progress bar.

        report = doctor(model, test_loader, PGD(8 / 255, 2 / 255, 20), limit=200)
        report.reliable     # True, False, or None if more images are needed
        print(report)

    All verdicts are top-1, by variants of the attack that stop at misclassification. A robust image
    costs up to 15 attacks and `SQUARE_QUERIES` forward passes. Most checks ask how many images only
    seem robust: the attack does not break them, and another attack does. They pass if the share of
    such images is at most `HIDDEN` or `FOUND`, by its 95 % interval; see `judge_rate`.

    Args:
        model, data, device, limit, batch_size, progress: see `robust_accuracy`. 200 images are
            enough for most models; fewer than 73 never are. All of them are held in memory.
        attack: untargeted. An attack of another kind than PGD is replaced by PGD with
            `ENOUGH_STEPS` on the same loss. PGD of fewer than `FEW_STEPS` steps, and FGSM, are
            checked beside PGD with `ENOUGH_STEPS`.
        seed: the seed of all random draws.
        autocast: the context of the attack's forward passes.

    Raises:
        ValueError: a targeted attack, or an epsilon of 0; and see `robust_accuracy`.
    """
    check_attack(attack)
    if attack.targeted or attack.epsilon == 0:
        raise ValueError("only an untargeted attack with an epsilon above 0 can be checked")
    batches = Batches(data, model, device=device, batch_size=batch_size, limit=limit)
    exam = _Exam(model, batches, as_pgd(attack), seed, autocast)
    results: list[Check] = []
    disable = hide_progress_bar() if progress else True
    with tqdm(CHECKS, disable=disable, leave=False) as bar:
        for check in bar:
            bar.set_description_str(f"checking {check.__name__.replace('_', ' ')}")
            results += check(exam)
    return DoctorReport(
        checks=tuple(results),
        examined=attack if isinstance(attack, PGD) else as_pgd(attack),
        curve=tuple(exam.curve),
        curve_attack=exam.search,
        n=exam.n,
        num_classes=exam.num_classes,
    )


class _Exam:
    """A model, the images on which it is examined, and the results that several checks share.

    Verdicts are bool `(N,)` on the CPU: whether an image is still classified correctly.

    Attributes:
        attack: the attack examined, stopping at top-1.
        search: the same, or PGD with `ENOUGH_STEPS` if the attack has fewer than `FEW_STEPS`.
        size: images per batch.
        curve: pairs (epsilon, accuracy under the search); the checks of epsilons fill it.
    """

    def __init__(
        self, model: Model, batches: Batches, attack: PGD, seed: int, autocast: Autocast
    ) -> None:
        self.model = model
        self.seed = seed
        self.autocast = autocast
        self.fitting = FittingSize()
        every = list(batches)
        self.images = torch.cat([batch.images for batch in every])
        self.labels = torch.cat([batch.labels for batch in every])
        self.positions = torch.cat([batch.positions for batch in every])
        self.n = len(self.labels)
        self.size = len(every[0].labels)
        self.num_classes = batches.num_classes
        self.norm = attack.norm
        self.epsilon = attack.epsilon
        self.attack = replace(attack, early_stop=1)
        self.search = self.attack
        if attack.steps < FEW_STEPS:
            self.search = replace(
                self.attack,
                steps=ENOUGH_STEPS,
                step_size=crossing_step(self.epsilon, ENOUGH_STEPS, self.norm),
                random_start=True,
            )
        self.curve: list[tuple[float, float]] = []

    @cached_property
    def robust(self) -> Tensor:
        """The verdicts under the attack."""
        return self.verdicts(self.attack)

    @cached_property
    def robust_to_search(self) -> Tensor:
        """The verdicts under the search."""
        if self.search is self.attack:
            return self.robust
        return self.verdicts(self.search)

    def verdicts(
        self, attack: Attack, size: int | None = None, among: Tensor | None = None
    ) -> Tensor:
        """Attack all images, or those `among` them, in batches of `size`; the others count as
        broken."""
        if among is None:
            among = torch.ones(self.n, dtype=torch.bool)
        return self.fitting.run(lambda fits: self._verdicts(attack, fits, among), size or self.size)

    def _verdicts(self, attack: Attack, size: int, among: Tensor) -> Tensor:
        robust = torch.zeros(self.n, dtype=torch.bool)
        for part in parts_of(among, size):
            on_device = part.to(self.images.device)
            verdicts, _ = attack_batch(
                self.model,
                self.images[on_device],
                self.labels[on_device],
                attack,
                positions=self.positions[part],
                seed=self.seed,
                autocast=self.autocast,
            )
            robust[part] = verdicts.robust_top1
        return robust

    @torch.no_grad()
    def logits(self, size: int) -> Tensor:
        """Return the logits of all images, in batches of `size`, float32 `(N, classes)`."""
        with frozen(self.model, training=False):
            classifier = Classifier(self.model, self.labels)
            return self.fitting.run(
                lambda fits: torch.cat(
                    [classifier(part).float() for part in self.images.split(fits)]
                ),
                size,
            )

    def compare(self, name: str, robust: Tensor, other: Tensor, limit: float = HIDDEN) -> Check:
        """Check that another attack breaks at most a share of `limit` of all images that are robust
        to the first."""
        before = _percent(_share(robust))
        after = _percent(_share(other))
        detail = f"accuracy {before}, {after} under the other attack; only the other breaks"
        only_other = int((robust & ~other).sum())
        return judge_rate(name, only_other, self.n, limit, detail)


def gradients(exam: _Exam) -> list[Check]:
    """Do gradients of the loss, the logits and the forward pass give an attack a chance?

    Limit: `HIDDEN` for images that zero gradients hide; none may have numbers that are not finite.
    Source: Carlini et al.; Croce and Hein, for cross entropy that saturates with large logits.
    """
    # Under autocast, like the attack: float16 rounds gradients to zero that float32 holds
    with exam.autocast():
        return exam.fitting.run(
            lambda size: quick_checks(exam.model, exam.images, exam.labels, exam.attack, size),
            exam.size,
        )


def epsilon_zero(exam: _Exam) -> list[Check]:
    """Is the accuracy at epsilon 0 the clean accuracy? Otherwise the evaluation is wrong.

    Limit: every verdict is the same. Source: no paper; it tests the evaluation itself.
    """
    clean = (wrongness(exam.logits(exam.size), exam.labels) == 0).cpu()
    zero = exam.verdicts(replace(exam.attack, steps=1, restarts=1).scaled(0.0))
    exam.curve = [(0.0, _share(zero))]
    same = bool((clean == zero).all())
    detail = f"{_percent(_share(zero))} and {_percent(_share(clean))}"
    return [Check("epsilon 0 equals clean", same, detail)]


def batch_size(exam: _Exam) -> list[Check]:
    """Does an image's verdict depend on the images beside it, as with batch statistics?

    Limit: `SAME_BATCH` of the spread of logits, and `HIDDEN` of the verdicts. Source: no paper;
    a network that is evaluated in training mode is a common mistake.
    """
    name = "batch size changes nothing"
    other = max(1, exam.size // 3)
    if exam.size == 1:
        other = min(exam.n, 16)
    changed = int((exam.verdicts(exam.attack, other) != exam.robust).sum())
    change = relative_difference(exam.logits(exam.size), exam.logits(other))
    by = f"by {change:.1e} of their spread (at most {SAME_BATCH:g})"
    detail = f"in batches of {other}, not {exam.size}, logits change {by}"
    if change > SAME_BATCH:
        return [Check(name, False, f"{detail}, and {changed} of {exam.n} verdicts")]
    return [judge_rate(name, changed, exam.n, HIDDEN, f"{detail}, and verdicts")]


def larger_epsilons(exam: _Exam) -> list[Check]:
    """Does accuracy fall as epsilon grows, and reach chance at an epsilon that allows everything?

    Limit: `HIDDEN` for images that an epsilon breaks and the next larger one does not; chance plus
    `HIDDEN` for those that stay robust at the largest. Source: Athalye et al.; Carlini et al.
    """
    # Within 0.5 of every pixel each image can become flat gray, the same for all images. In the
    # Euclidean norm that is 0.5 times the root of the number of pixels away.
    largest = 0.5
    if exam.norm == "l2":
        largest = 0.5 * sqrt(prod(exam.images.shape[1:]))
    sizes = {largest}
    for factor in FACTORS:
        size = factor * exam.epsilon
        if factor <= 1 or size < largest:
            sizes.add(size)
    verdicts = []
    for size in sorted(sizes):
        if size == exam.epsilon:
            robust = exam.robust_to_search
        else:
            robust = exam.verdicts(exam.search.scaled(size / exam.epsilon))
        verdicts.append(robust)
        exam.curve.append((size, _share(robust)))
    missed = max(int((larger & ~smaller).sum()) for smaller, larger in pairwise(verdicts))
    points = [f"{_percent(share)} at {format_size(size, exam.norm)}" for size, share in exam.curve]
    chance = 1 / exam.num_classes
    falls = f"{', '.join(points)}; a larger epsilon misses, and a smaller one breaks"
    at_end = f"{points[-1]}, chance is {_percent(chance)}"
    robust = int(verdicts[-1].sum())
    return [
        judge_rate("accuracy falls as epsilon grows", missed, exam.n, HIDDEN, falls),
        judge_rate("a huge epsilon leaves chance", robust, exam.n, chance + HIDDEN, at_end),
    ]


def random_noise(exam: _Exam) -> list[Check]:
    """Does random noise break images that the attack does not?

    Limit: `HIDDEN`. Source: Athalye et al., "random sampling finds adversarial examples".
    """
    # A search with steps of 0 tries its random starts, and nothing else.
    noise = replace(exam.attack, steps=1, step_size=0.0, restarts=NOISE_DRAWS, random_start=True)
    return [exam.compare("not weaker than random noise", exam.robust, exam.verdicts(noise))]


def single_step(exam: _Exam) -> list[Check]:
    """Does FGSM break images that the attack of several steps does not?

    Limit: `HIDDEN`. Source: Athalye et al., "one-step attacks perform better than iterative
    attacks".
    """
    if exam.attack.steps == 1:
        return []
    fgsm = replace(exam.attack, steps=1, step_size=exam.epsilon, restarts=1, random_start=False)
    return [exam.compare("not weaker than FGSM", exam.robust, exam.verdicts(fgsm))]


def more_steps(exam: _Exam) -> list[Check]:
    """Do more steps break many images that the attack does not?

    Limit: `FOUND`, or `FOUND_BESIDE_FGSM` for an attack of one step. Source: Carlini et al., an
    attack must have converged.
    """
    if exam.search is exam.attack:
        steps = MORE_STEPS * exam.attack.steps
        longer = exam.verdicts(replace(exam.attack, steps=steps))
    else:
        steps = exam.search.steps
        longer = exam.robust_to_search
    limit = FOUND
    if exam.attack.steps == 1:
        limit = FOUND_BESIDE_FGSM
    name = f"{steps} steps, not {exam.attack.steps}, find little more"
    return [exam.compare(name, exam.robust, longer, limit)]


def more_starts(exam: _Exam) -> list[Check]:
    """Do more random starts break many images that the search does not?

    Limit: `FOUND`. Source: Carlini et al.
    """
    starts = MORE_RESTARTS * exam.search.restarts
    restarted = exam.verdicts(replace(exam.search, restarts=starts, random_start=True))
    name = f"{starts} starts, not {exam.search.restarts}, find little more"
    return [exam.compare(name, exam.robust_to_search, restarted, FOUND)]


def black_box(exam: _Exam) -> list[Check]:
    """Does an attack that uses no gradients break many images that the search does not?

    Limit: `FOUND`. Source: Athalye et al.; Carlini et al.; Square, as Croce and Hein use it.
    """
    robust = exam.robust & exam.robust_to_search
    square = Square(exam.epsilon, SQUARE_QUERIES, exam.norm, seed=exam.seed)
    still_robust = exam.verdicts(square, among=robust)
    broken = int(robust.sum() - still_robust.sum())
    detail = f"of {int(robust.sum())} robust images, Square with {SQUARE_QUERIES} queries breaks"
    return [judge_rate("no black-box search finds more", broken, exam.n, FOUND, detail)]


# In the order of their cost, about; `larger_epsilons` continues the curve of `epsilon_zero`.
CHECKS = (
    gradients,
    epsilon_zero,
    batch_size,
    larger_epsilons,
    random_noise,
    single_step,
    more_steps,
    more_starts,
    black_box,
)


def _share(verdicts: Tensor) -> float:
    return float(verdicts.double().mean())


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
