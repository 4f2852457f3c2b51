"""Verdicts on one batch: search for adversarial images, then verify them on the model itself."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.attack import Attack, check_batch
from attacks.classifier import FilledClassifier, Model, without_benchmark
from attacks.frozen import frozen, under_attack
from attacks.losses import wrongness
from attacks.worst_case import DONE
from base.seeding import torch_generator
from evaluation.fuse_conv_bn import TOLERANCE
from evaluation.verdicts import NONE, Verdicts, knows_top5

Autocast = Callable[[], AbstractContextManager]
"""Makes the context of an attack's forward and backward passes, such as `torch.autocast`;
`search_precision` tells whether it lowers their precision."""

# Libraries choose other kernels for odd batch sizes, and these round differently. Where an attack
# follows the sign of a gradient, rounding can change a verdict. So on the CPU batches are filled up
# to at least ROWS images, and to a multiple of MORE_ROWS. Elsewhere see `FilledClassifier`.
ROWS = 16
MORE_ROWS = 8

# See `Attack.confident`. Each is larger than the error of the logits that a search sees: always for
# fused batch norms, so that attacks without confidence search the model itself, and nearly always
# in low precision, where an image that was believed to be broken too early is attacked once more.
# The one for low precision is that of bfloat16. TF32 keeps 3 bits more, so its searches could stop
# a step or two sooner; the verdicts are the same.
CONFIDENCE_LOW_PRECISION = 0.02
CONFIDENCE_FUSED = 2 * TOLERANCE


def attack_batch(
    model: Model,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    *,
    positions: Tensor,
    seed: int,
    autocast: Autocast = nullcontext,
    fused: Model | None = None,
) -> tuple[Verdicts, Tensor]:
    """Return the verdicts on one batch and the worst images found, `(B, C, H, W)`.

    An image is attacked unless it is broken already: its label is not among the `attack.rank`
    largest logits. (A single step attacks all images; see `_attack_once`.) Each search finds
    adversarial images, and `model`, in its own precision, decides which of them count. A search in
    low precision is followed by one in full precision, for the images that the first one wrongly
    believed to be broken.

    Args:
        model: a module or a function that maps images in `[0, 1]` to logits.
        images: `(B, C, H, W)` in `[0, 1]`.
        labels: integers `(B,)`.
        attack: the attack; untargeted.
        positions: int64 `(B,)`, on the CPU; an image's random starts depend on its position.
        seed: the seed of the random starts.
        autocast: the context of the search's forward passes.
        fused: a copy of `model`, whose logits are those of `model` to within
            `fuse_conv_bn.TOLERANCE`. Attacks that can allow for that (see `Attack.confident`), and
            those in low precision, search it in place of `model`.

    Raises:
        TypeError: the model does not return a tensor of logits.
        ValueError: an argument that `Attack.__call__` rejects, or a targeted attack, which has no
            true labels to give verdicts on.
    """
    check_batch(images, labels)
    if attack.targeted:
        raise ValueError("verdicts need an untargeted attack")
    if fused is None:
        fused = model
    images = images.detach()
    labels = labels.detach().to(images.device).long()
    verify = _PaddedClassifier(model, labels)
    with (
        # Tensors made in inference mode cannot take part in a gradient
        torch.inference_mode(False),
        frozen(model, training=False),
        under_attack(fused, training=False),
        without_benchmark(),
        torch.no_grad(),
    ):
        if attack.single_step:
            worst = _attack_once(attack, verify, images, labels)
        else:
            worst = _WorstImages(images, labels, verify(images), attack.rank)
            remaining = worst.remaining()
            for search in _searches(attack, verify, fused, labels, autocast):
                if len(remaining) == 0:
                    break
                # Every search begins at the same random starts.
                generators = [
                    torch_generator(seed, "attack", int(positions[index]))
                    for index in remaining.tolist()
                ]
                found = search.run(images[remaining], labels[remaining], generators)
                logits = verify(found)
                worst.update(remaining, found, logits)
                # The next search attacks the images about which this one was wrong.
                wrong = search.overestimates(found, logits, labels[remaining])
                remaining = remaining[wrong]
    perturbation = attack.threat_model.distance(worst.images, images)
    return _verdicts(attack, positions, labels, worst, perturbation), worst.images


def search_precision(autocast: Autocast, attack: Attack) -> str:
    """Return the precision in which an attack searches: `"fp32"`, `"bf16"`, `"fp16"`,
    `"tf32"`, or `"low precision"` for a context of another kind."""
    # The pass of a single step also gives the clean logits, which have to be in full precision.
    if attack.single_step or isinstance(autocast(), nullcontext):
        return "fp32"
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    with autocast() as context:
        is_autocast = isinstance(context, torch.amp.autocast_mode.autocast)
        # torch switches autocast off where it does not have the dtype.
        if is_autocast and torch.is_autocast_enabled(context.device):
            return names.get(context.fast_dtype, "low precision")
        if torch.backends.cuda.matmul.fp32_precision == "tf32":
            return "tf32"
    return "fp32" if is_autocast else "low precision"


def report_precision(autocast: Autocast, attack: Attack) -> str:
    """Return the precision of search and verdicts, as reports name it."""
    precision = search_precision(autocast, attack)
    if precision == "fp32":
        return precision
    return f"{precision}, verdicts in fp32"


def _searches(
    attack: Attack,
    verify: "_PaddedClassifier",
    fused: Model,
    labels: Tensor,
    autocast: Autocast,
) -> "list[_Search]":
    """Return the searches of an attack, the cheapest first."""
    exact = _Search(attack, verify)
    if search_precision(autocast, attack) != "fp32":
        classifier = _PaddedClassifier(fused, labels)
        return [_Search(attack.confident(CONFIDENCE_LOW_PRECISION), classifier, autocast), exact]
    if fused is not verify.model and attack.can_be_confident:
        return [_Search(attack.confident(CONFIDENCE_FUSED), _PaddedClassifier(fused, labels))]
    return [exact]


def _attack_once(
    attack: Attack, verify: "_PaddedClassifier", images: Tensor, labels: Tensor
) -> "_WorstImages":
    """Run an attack of a single step, whose first pass also gives the clean logits.

    All images are attacked, even misclassified ones: finding those first would take the forward
    pass that is saved here.
    """
    calls: list[tuple[Tensor, Tensor]] = []

    def recorded(inputs: Tensor) -> Tensor:
        logits = verify(inputs)
        calls.append((inputs.detach(), logits.detach()))
        return logits

    found = attack(recorded, images, labels)
    # An attack of a user's own may evaluate other points first, or none.
    first_was_clean = len(calls) > 0 and torch.equal(calls[0][0], images)
    clean = calls[0][1] if first_was_clean else verify(images)
    worst = _WorstImages(images, labels, clean, attack.rank)
    remaining = worst.remaining()
    if len(remaining) > 0:
        worst.update(remaining, found[remaining], verify(found[remaining]))
    return worst


class _PaddedClassifier(FilledClassifier):
    """A model on batches that are filled up, on the CPU as well; see `ROWS`."""

    def filled_size(self, n: int, device: torch.device) -> int:
        if n == 0 or device.type != "cpu":
            return super().filled_size(n, device)
        return max(ROWS, n + -n % MORE_ROWS)


@dataclass(frozen=True)
class _Search:
    """An attack on a classifier, in the classifier's own precision or under `autocast`."""

    attack: Attack
    classifier: _PaddedClassifier
    autocast: Autocast = nullcontext

    def run(self, images: Tensor, labels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        with self.autocast():
            return self.attack(self.classifier, images, labels, generators=generators)

    def overestimates(self, found: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Return which images the search believes to be broken further than the `logits` of the
        verdict confirm, bool `(n,)`."""
        confirmed = wrongness(logits, labels, self.attack.rank)
        wrong = torch.zeros_like(labels, dtype=torch.bool)
        unbroken = (confirmed < DONE).nonzero().squeeze(1)
        # In full precision the search saw the logits of the verdict, to within its confidence.
        if self.autocast is nullcontext or len(unbroken) == 0:
            return wrong
        with self.autocast():
            believed = self.attack.reached(self.classifier(found[unbroken]), labels[unbroken])
        wrong[unbroken] = believed > confirmed[unbroken]
        return wrong


class _WorstImages:
    """The worst adversarial image verified so far for each image of a batch.

    Attributes:
        images: `(B, C, H, W)`.
        clean: the logits of the images themselves, `(B, classes)`.
        logits: the logits of the worst images, `(B, classes)`.
    """

    def __init__(self, images: Tensor, labels: Tensor, clean: Tensor, rank: int) -> None:
        self.images = images.clone()
        self.clean = clean
        self.logits = clean.clone()
        self._labels = labels
        self._rank = rank
        self._wrongness = wrongness(clean, labels, rank)

    def remaining(self) -> Tensor:
        """Return the positions in the batch of the images that are not broken, int64 `(n,)`."""
        return (self._wrongness < DONE).nonzero().squeeze(1)

    def update(self, at: Tensor, found: Tensor, logits: Tensor) -> None:
        """Keep those images `found` for the positions `at` on which the model does no better than
        on the images kept so far."""
        reached = wrongness(logits, self._labels[at], self._rank)
        before = self._wrongness[at]
        kept = reached >= before
        # Not a selection by `kept`: the host would wait for its size
        self.images[at] = torch.where(kept.reshape(-1, 1, 1, 1), found, self.images[at])
        self.logits[at] = torch.where(kept.unsqueeze(1), logits, self.logits[at])
        self._wrongness[at] = torch.where(kept, reached, before)


def _verdicts(
    attack: Attack, positions: Tensor, labels: Tensor, worst: _WorstImages, perturbation: Tensor
) -> Verdicts:
    clean_top1 = wrongness(worst.clean, labels) == 0
    stays_first = wrongness(worst.logits, labels) == 0
    clean_top5 = wrongness(worst.clean, labels, 5) < DONE
    stays_among_five = wrongness(worst.logits, labels, 5) < DONE
    known = knows_top5(attack, worst.clean.shape[1])
    return Verdicts(
        position=positions.cpu(),
        label=labels.cpu(),
        clean_prediction=_predicted(worst.clean).cpu(),
        prediction=_predicted(worst.logits).cpu(),
        clean_top1=clean_top1.cpu(),
        robust_top1=(clean_top1 & stays_first).cpu(),
        robust_top5=(clean_top5 & stays_among_five & known).cpu(),
        perturbation=perturbation.cpu(),
    )


def _predicted(logits: Tensor) -> Tensor:
    return logits.argmax(dim=1).where(~logits.isnan().any(dim=1), NONE)
