"""Robust accuracy of a model on a loader, with a verdict for every image."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from math import sqrt
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from attacks.attack import Attack, check_batch, frozen
from attacks.classifier import Classifier, Model
from attacks.fgsm import FGSM
from attacks.losses import wrongness
from attacks.worst_points import DONE
from base.atomic import replacing
from base.base_data_loader import BaseDataLoader
from base.output import writing
from base.ranks import quiet
from base.runtime import torch_generator
from evaluation.fuse_conv_bn import TOLERANCE, folded

ROWS, MORE_ROWS = 16, 8
"""Batches are filled up to at least `ROWS` images, and to a multiple of `MORE_ROWS`. Libraries choose other kernels for odd
batch sizes, which round otherwise; and where an attack follows the sign of a gradient, rounding can change a verdict."""

CONFIDENCE, CONFIDENCE_FOLDED = 0.02, 2 * TOLERANCE
"""See `Attack.confident`: more than what logits are off by where a network is attacked in low precision (nearly always; what is
believed too early has to be attacked once more), and with its batch norms folded."""

Z = 1.959964
"""Standard deviations on both sides that hold 95 % of the normal distribution."""

NONE = -1
"""Prediction of a model that answers NaN."""

Autocast = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Verdicts:
    """What became of every attacked image; all tensors `(N,)`, on the CPU.

    Attributes:
        position: of the image in its data set.
        label: its class.
        clean_prediction: the predicted class of the image; `NONE` where a logit is NaN, which
            counts as wrong.
        prediction: the predicted class of the worst image found; `NONE` likewise.
        clean_top1: whether the image is classified correctly.
        robust_top1: whether it is, and stays so under attack.
        robust_top5: whether its label is among the five largest logits, and stays so under attack. Where the attack's `rank` is
            below 5 it did not try to prevent that, and nothing can be said: then it is False everywhere and not to be read
            (unless there are no more than five classes, when it is always true).
        perturbation: size of the change in the attack's norm, in units of the pixel range; 0 where none was needed.
    """

    position: Tensor
    label: Tensor
    clean_prediction: Tensor
    prediction: Tensor
    clean_top1: Tensor
    robust_top1: Tensor
    robust_top5: Tensor
    perturbation: Tensor

    def __len__(self) -> int:
        return len(self.position)

    def accuracy(self, name: str) -> float:
        """The share of images for which the verdict `name` is true."""
        return float(getattr(self, name).double().mean())

    def arrays(self) -> dict[str, np.ndarray]:
        """All columns, for a file."""
        return {field.name: getattr(self, field.name).numpy() for field in fields(self)}

    @classmethod
    def joined(cls, parts: Sequence["Verdicts"]) -> "Verdicts":
        """All images of all parts, in the order of their positions."""
        columns = {field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)}
        order = columns["position"].argsort()
        return cls(**{name: column[order] for name, column in columns.items()})


class _FullRows(nn.Module):
    """The model on batches filled up with copies of the last image; see `ROWS`.

    Attributes:
        first: the logits of the first batch; None before.
    """

    def __init__(self, model: Model, labels: Tensor) -> None:
        super().__init__()
        self.model = model
        self.ask = Classifier(model, labels)
        self.first: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        missing = max(ROWS - len(images), -len(images) % MORE_ROWS) if len(images) else 0
        if missing:
            images = torch.cat([images, images[-1:].detach().expand(missing, -1, -1, -1)])
        logits = self.ask(images)
        logits = logits[: len(logits) - missing]
        if self.first is None:
            self.first = logits.detach()
        return logits


def attack_loader(
    model: Model,
    loader: BaseDataLoader,
    attack: Attack,
    *,
    seed: int,
    autocast: Autocast = nullcontext,
    partial: Path | None = None,
    description: str = "attacking",
) -> Verdicts:
    """Attack every image of `loader`, batch by batch, with a progress bar.

    An image's random starts are a function of `seed` and its position alone; with full rows of images (see `ROWS`) verdicts do
    not depend on the batch size, on the CPU. An attack of several steps searches with batch norms folded into convolutions, see
    `folded`; verdicts are the model's own.

    Args:
        model: a module or a function that maps images in `[0, 1]` to logits; a module is evaluated
            in evaluation mode.
        loader: neither shuffled nor augmented.
        attack: what to try.
        seed: of the random starts.
        autocast: context of the attack's forward passes. Verdicts are always taken without it, in the model's own precision,
            and so is FGSM's one step, whose pass gives the clean logits, too.
        partial: a file that the verdicts so far are kept in; if it is there, its images are not attacked again. The caller
            removes it, and gives it a name that stands for model, images, attack and seed.
        description: of the progress bar.

    Raises:
        ConfigError: `partial` cannot be written; what has been attacked before is kept in it.
    """
    parts, skip, search = [], 0, None
    known = known_verdicts(partial)
    if known is not None:
        parts, skip = [known], -(-len(known) // loader.batch_size)
    loader.set_epoch(1, first_batch=skip)
    done = skip * loader.batch_size
    bar = tqdm(loader, desc=description, initial=skip, total=len(loader), disable=quiet(), leave=False)
    for images, labels in bar:
        positions = loader.positions[done : done + len(labels)]
        done += len(labels)
        if search is None and not isinstance(attack, FGSM):  # whose one step is also the pass that gives the clean logits
            search = folded(model, images[:ROWS])
        options = {"positions": positions, "seed": seed, "autocast": autocast, "search": search}
        parts.append(attack_batch(model, images, labels, attack, **options)[0])
        if partial is not None:
            # a disk that is full now would not take the report, either
            with writing(partial.parent), replacing(partial) as file:
                np.savez(file, **Verdicts.joined(parts).arrays())
        if not bar.disable:
            so_far = Verdicts.joined(parts)
            bar.set_postfix_str(f"clean {so_far.accuracy('clean_top1'):.1%}, robust {so_far.accuracy('robust_top1'):.1%}")
    loader.set_epoch(1)
    return Verdicts.joined(parts)


def attack_batch(
    model: Model,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    *,
    positions: Tensor,
    seed: int,
    autocast: Autocast = nullcontext,
    search: Model | None = None,
) -> tuple[Verdicts, Tensor]:
    """Verdicts on one batch, and the worst images found, `(B, C, H, W)`; see `attack_loader`.

    Only images that are not broken to begin with are attacked. Where an attack in low precision believed in a success that the
    verdict does not confirm, it is repeated on the model in its own precision.

    Args:
        search: the network that is attacked, whose logits are `model`'s to within `folding.TOLERANCE`; None for `model`.
            Verdicts are `model`'s.

    Raises:
        TypeError: the model does not return a tensor of logits.
        ValueError: what an attack refuses (see `Attack.__call__`), and a targeted attack, which has
            no true labels to give verdicts on.
    """
    check_batch(images, labels)
    if attack.targeted:
        raise ValueError("verdicts need an untargeted attack")
    search = model if search is None else search
    images, labels = images.detach(), labels.detach().long()
    rows = _FullRows(model, labels)
    passes = [(rows, nullcontext, attack)]
    if lowers(autocast, attack):
        passes.insert(0, (_FullRows(search, labels), autocast, attack.confident(CONFIDENCE)))
    elif search is not model:
        passes = [(_FullRows(search, labels), nullcontext, attack.confident(CONFIDENCE_FOLDED))]
    with (
        torch.inference_mode(False),
        frozen(model, training=False),
        frozen(search, training=False),
        torch.no_grad(),
    ):
        worst = images.clone()
        # FGSM takes its gradient at the images themselves: where the model itself is attacked, that pass gives the clean logits
        of_fgsm = attack(rows, images, labels) if isinstance(attack, FGSM) and search is model else None
        clean = rows(images) if of_fgsm is None else rows.first
        level = wrongness(clean, labels, attack.rank)
        final = clean.clone()
        left = (level < DONE).nonzero().squeeze(1)
        for searched, precision, searching in passes:
            if len(left) == 0:
                break
            if of_fgsm is None:
                generators = [torch_generator(seed, "attack", int(positions[index])) for index in left.tolist()]
                with precision():
                    found = searching(searched, images[left], labels[left], generators=generators)
            else:
                found = of_fgsm[left]
            logits = rows(found)
            confirmed = wrongness(logits, labels[left], attack.rank)
            better = confirmed >= level[left]
            worst[left[better]], final[left[better]] = found[better], logits[better]
            level[left[better]] = confirmed[better]
            if precision is not nullcontext:
                doubtful = confirmed < DONE
                left, found, confirmed = left[doubtful], found[doubtful], confirmed[doubtful]
                with precision():
                    believed = searching.reached(searched(found), labels[left]) if len(left) else confirmed
                left = left[believed > confirmed]
    return _verdicts(attack, positions, labels, clean, final, attack.threat_model.distance(worst, images)), worst


def lowers(autocast: Autocast, attack: Attack) -> bool:
    """Whether the attack searches in a lower precision than that of the verdicts."""
    return not isinstance(attack, FGSM) and not isinstance(autocast(), nullcontext)


def _verdicts(
    attack: Attack, positions: Tensor, labels: Tensor, clean: Tensor, final: Tensor, perturbation: Tensor
) -> Verdicts:
    """From the logits of images, `clean`, and of the worst that was found for each, `final`, both `(B, C)`."""
    right, among_five = wrongness(clean, labels) == 0, wrongness(clean, labels, 5) < 2
    return Verdicts(
        position=positions.cpu(),
        label=labels.cpu(),
        clean_prediction=_predicted(clean).cpu(),
        prediction=_predicted(final).cpu(),
        clean_top1=right.cpu(),
        robust_top1=(right & (wrongness(final, labels) == 0)).cpu(),
        robust_top5=(among_five & (wrongness(final, labels, 5) < 2) & knows_top5(attack, clean.shape[1])).cpu(),
        perturbation=perturbation.cpu(),
    )


def _predicted(logits: Tensor) -> Tensor:
    return logits.argmax(dim=1).where(~logits.isnan().any(dim=1), NONE)


def known_verdicts(partial: Path | None) -> Verdicts | None:
    """What an interrupted evaluation has left; None where it has left nothing, or a file that is damaged."""
    try:
        with np.load(partial or "") as file:
            return Verdicts(**{name: torch.from_numpy(file[name]) for name in file.files})
    except (OSError, ValueError, TypeError, KeyError, EOFError, BadZipFile):
        return None


def knows_top5(attack: Attack, num_classes: int) -> bool:
    """Whether `robust_top5` can be read after this attack."""
    return attack.rank >= 5 or num_classes <= 5


def interval(share: float, n: int, z: float = Z) -> tuple[float, float]:
    """The Wilson score interval of a share of `n` independent images, at 95 % by default."""
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)
