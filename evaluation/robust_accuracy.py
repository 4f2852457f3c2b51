"""Robust accuracy of any model on any images, with a verdict for every image."""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from attacks.attack import Attack, check_attack, check_batch, frozen
from attacks.classifier import Classifier, Model
from attacks.losses import wrongness
from attacks.worst_case import DONE
from base.atomic import replacing
from base.base_data_loader import BaseDataLoader
from base.distributed import all_gather_object, hide_progress_bar
from base.errors import ConfigError
from base.output import ARRAYS, check_outputs, is_stream, writing
from base.run_folder.environment import package_versions
from base.seeding import torch_generator
from evaluation.adversarial_images import AdversarialImages
from evaluation.batches import Batches, Data
from evaluation.checks import FAILED, failures, images_needed, quick_checks
from evaluation.fuse_conv_bn import TOLERANCE, folded
from evaluation.report import RobustnessReport
from evaluation.verdicts import NONE, Verdicts, interval, known_verdicts, knows_top5

ROWS, MORE_ROWS = 16, 8
"""Batches are filled up to at least `ROWS` images, and to a multiple of `MORE_ROWS`. Libraries
choose other kernels for odd batch sizes, which round otherwise; and where an attack follows the
sign of a gradient, rounding can change a verdict."""

CONFIDENCE, CONFIDENCE_FOLDED = 0.02, 2 * TOLERANCE
"""See `Attack.confident`: more than what logits are off by where a network is attacked in low
precision (nearly always; what is believed too early has to be attacked once more), and with its
batch norms folded."""

Autocast = Callable[[], AbstractContextManager]


def robust_accuracy(
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
    description: str = "attacking",
    partial: Path | None = None,
    save_images: str | Path | None = None,
    checkpoint: str = "",
    provenance: Mapping[str, Any] | None = None,
) -> RobustnessReport:
    """Attack every image of `data` and report how many are still classified correctly.

        normalize = torchvision.transforms.Normalize(mean, std)
        model = torch.nn.Sequential(normalize, torchvision.models.resnet18(weights="DEFAULT"))
        report = robust_accuracy(model, test_loader, PGD(8 / 255, 2 / 255, 20), limit=1000)
        print(report)
        report.robust_top1, report.interval, report.verdicts.robust_top1

    The model takes pixels in `[0, 1]` and normalizes them itself, as above. It is asked in
    evaluation mode and gets its modes back. An image's random starts are a function of `seed` and
    its position alone, so that batch size and number of processes change no verdict. Where there
    are several processes, each attacks its part of the images, and all get the report.

    `reliable` in the report is False where one of the quick checks fails; it is None, not known,
    until `doctor` has looked, too, and where the images examined cannot decide: `images_needed`
    then says how many would.

    Args:
        model: a module, or a function of images `(B, C, H, W)` that returns logits `(B, classes)`.
        data: batches `(images, labels)`, neither shuffled nor augmented: a loader of this project,
            a `torch.utils.data.DataLoader`, a list or a generator. Images are float32 in `[0, 1]`,
            labels integers `(B,)`. Both are moved to the model's device.
        attack: what to try; untargeted.
        seed: of the random starts.
        device: where the model is; None asks its weights. A function that does not compute where
            the images are needs it.
        autocast: context of the attack's forward passes; verdicts are in the model's own precision.
        limit: attack the first that many images only.
        batch_size: images at a time; None takes the batches as they come.
        progress: show a progress bar, where there is a terminal.
        description: of the progress bar.
        partial: see `attack_loader`. After an interruption, `seconds` and `images_per_second` are
            those of the rest.
        save_images: an `.npz` file for the adversarial images: `images`, as they were attacked, in
            the order of `position`, and all columns of the verdicts.
        checkpoint: the name that the report gives the model.
        provenance: what else the report's JSON says of model and data.

    Raises:
        ConfigError: a file cannot be written; `save_images` is tried before the work.
        TypeError: the model does not return a tensor of logits, or `attack` is not an attack.
        ValueError: no images, or batches that are not as above (uint8, out of range, not a pair), a
            label that is not one of the model's classes, or a targeted attack.
    """
    check_attack(attack)
    if save_images is not None:
        check_images_file("save_images", save_images)
    batches = Batches(data, model, device=device, batch_size=batch_size, limit=limit, shared=True)
    # those of another model
    if isinstance(attack.warnings, list):
        attack.warnings.clear()
    first = batches.first
    checks = quick_checks(model, first.images, first.labels, attack)
    known = known_verdicts(partial)
    images, own = None, known
    if save_images is not None:
        rows = _beside(Path(save_images)) if partial is None else partial.with_suffix(".images")
        positions = torch.empty(0, dtype=torch.int64) if known is None else known.position
        images = AdversarialImages(rows, first.images, positions)
        own = known if images.complete else None
    done = len(own or ())
    begin = perf_counter()
    try:
        own = _attack_batches(
            model,
            batches,
            attack,
            seed=seed,
            autocast=autocast,
            partial=partial,
            known=own,
            images=images,
            description=description,
            progress=progress,
        )
        verdicts = Verdicts.joined(all_gather_object(own))
        seconds = perf_counter() - begin
        if images is not None:
            images.save(Path(save_images), verdicts, _names(data))
    finally:
        # no later call could continue from them
        if images is not None and partial is None:
            images.rows.unlink(missing_ok=True)
    attacked = len(verdicts) - sum(all_gather_object(done))
    told = [line for part in all_gather_object(list(attack.warnings)) for line in part]
    checks = [check for part in all_gather_object(checks) for check in part]
    top5 = verdicts.accuracy("robust_top5") if knows_top5(attack, batches.num_classes) else None
    return RobustnessReport(
        attack=attack,
        seed=seed,
        n=len(verdicts),
        clean_top1=verdicts.accuracy("clean_top1"),
        robust_top1=verdicts.accuracy("robust_top1"),
        robust_top5=top5,
        interval=interval(verdicts.accuracy("robust_top1"), len(verdicts)),
        seconds=seconds,
        images_per_second=attacked / seconds,
        max_perturbation=float(verdicts.perturbation.max()),
        precision="bf16, verdicts in fp32" if lowers(autocast, attack) else "fp32",
        reliable=False if any(check.verdict == FAILED for check in checks) else None,
        images_needed=images_needed(checks),
        warnings=(*failures(checks), *told),
        verdicts=verdicts,
        checkpoint=checkpoint,
        provenance=dict(provenance or {}),
        versions=package_versions(),
    )


def check_images_file(flag: str, path: str | Path) -> None:
    """Refuse a file for adversarial images that cannot be written.

    Raises:
        ConfigError: naming `flag`.
    """
    check_outputs({flag: path}, {flag: ARRAYS})
    if is_stream(path):
        raise ConfigError(f"{flag} {path}: expected a file, as images are put into it at the end")


def _beside(path: Path) -> Path:
    """A file of this process beside another one; see `base.atomic.sweep`."""
    return path.with_name(f".{path.stem}.images.{os.getpid()}.incomplete")


def _names(data: Data) -> dict[str, np.ndarray]:
    """Names of the classes, where the data has any, for a file."""
    if not isinstance(data, BaseDataLoader):
        return {}
    return {"class_names": np.array(data.class_names, dtype=np.str_)}


def attack_loader(
    model: Model,
    loader: Data,
    attack: Attack,
    *,
    seed: int,
    autocast: Autocast = nullcontext,
    partial: Path | None = None,
    description: str = "attacking",
) -> Verdicts:
    """Attack every image of `loader` in this process, batch by batch, with a progress bar.

    An image's random starts are a function of `seed` and its position alone; with full rows of
    images (see `ROWS`) verdicts do not depend on the batch size, on the CPU. An attack of several
    steps searches with batch norms folded into convolutions, see `folded`; verdicts are the model's
    own.

    Args:
        model: a module or a function that maps images in `[0, 1]` to logits; a module is evaluated
            in evaluation mode.
        loader: batches `(images, labels)`, neither shuffled nor augmented; see `robust_accuracy`.
        attack: what to try.
        seed: of the random starts.
        autocast: context of the attack's forward passes. Verdicts are always taken without it, in
            the model's own precision, and so is the search of an attack of a `single_step`, whose
            pass gives the clean logits, too.
        partial: a file that the verdicts so far are kept in; if it is there, its images are not
            attacked again. The caller removes it, and gives it a name that stands for model,
            images, attack and seed.
        description: of the progress bar.

    Raises:
        ConfigError: `partial` cannot be written; what has been attacked before is kept in it.
    """
    batches, known = Batches(loader, model), known_verdicts(partial)
    options = {"seed": seed, "autocast": autocast, "partial": partial, "known": known}
    return _attack_batches(model, batches, attack, description=description, **options)


def _attack_batches(
    model: Model,
    batches: Batches,
    attack: Attack,
    *,
    seed: int,
    autocast: Autocast,
    partial: Path | None,
    known: Verdicts | None,
    images: AdversarialImages | None = None,
    description: str = "attacking",
    progress: bool = True,
) -> Verdicts:
    """Verdicts on all batches; `known` are those that an earlier attempt has left."""
    parts = [] if known is None else [known]
    skip = torch.empty(0, dtype=torch.int64) if known is None else known.position
    search = None
    bar = tqdm(
        batches.without(skip),
        desc=description,
        total=batches.count(len(skip)),
        disable=hide_progress_bar() if progress else True,
        leave=False,
    )
    for batch in bar:
        # a folded copy cannot make an attack of a single gradient cheaper
        if search is None and not attack.single_step:
            search = folded(model, batch.images[:ROWS])
        verdicts, worst = attack_batch(
            model,
            batch.images,
            batch.labels,
            attack,
            positions=batch.positions,
            seed=seed,
            autocast=autocast,
            search=search,
        )
        parts.append(verdicts)
        if images is not None:
            images.append(batch.positions, worst)
        if partial is not None:
            # a disk that is full now would not take the report, either
            with writing(partial.parent), replacing(partial) as file:
                np.savez(file, **Verdicts.joined(parts).arrays())
        if not bar.disable:
            so_far = Verdicts.joined(parts)
            bar.set_postfix_str(
                f"clean {so_far.accuracy('clean_top1'):.1%}, robust {so_far.accuracy('robust_top1'):.1%}"
            )
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

    Only images that are not broken to begin with are attacked. Where an attack in low precision
    believed in a success that the verdict does not confirm, it is repeated on the model in its own
    precision.

    Args:
        search: the network that is attacked, whose logits are `model`'s to within
            `fuse_conv_bn.TOLERANCE`; None for `model`. Verdicts are `model`'s.

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
        worst, of_one_step = images.clone(), None
        if attack.single_step and search is model:
            of_one_step = attack(rows, images, labels)
        # the gradient of a single step is that at the images themselves: its pass gives the clean
        # logits, too
        asked = (
            of_one_step is not None and rows.asked is not None and torch.equal(rows.asked, images)
        )
        clean = rows.first if asked else rows(images)
        level = wrongness(clean, labels, attack.rank)
        final = clean.clone()
        left = (level < DONE).nonzero().squeeze(1)
        for searched, precision, searching in passes:
            if len(left) == 0:
                break
            if of_one_step is None:
                generators = [
                    torch_generator(seed, "attack", int(positions[index]))
                    for index in left.tolist()
                ]
                with precision():
                    found = searching(searched, images[left], labels[left], generators=generators)
            else:
                found = of_one_step[left]
            logits = rows(found)
            confirmed = wrongness(logits, labels[left], attack.rank)
            better = confirmed >= level[left]
            worst[left[better]], final[left[better]] = found[better], logits[better]
            level[left[better]] = confirmed[better]
            if precision is not nullcontext:
                doubtful = confirmed < DONE
                left, found, confirmed = left[doubtful], found[doubtful], confirmed[doubtful]
                with precision():
                    believed = (
                        searching.reached(searched(found), labels[left]) if len(left) else confirmed
                    )
                left = left[believed > confirmed]
    return _verdicts(
        attack, positions, labels, clean, final, attack.threat_model.distance(worst, images)
    ), worst


def lowers(autocast: Autocast, attack: Attack) -> bool:
    """Whether the attack searches in a lower precision than that of the verdicts."""
    return not attack.single_step and not isinstance(autocast(), nullcontext)


def _verdicts(
    attack: Attack,
    positions: Tensor,
    labels: Tensor,
    clean: Tensor,
    final: Tensor,
    perturbation: Tensor,
) -> Verdicts:
    """From the logits of images, `clean`, and of the worst that was found for each, `final`, both
    `(B, C)`."""
    right, among_five = wrongness(clean, labels) == 0, wrongness(clean, labels, 5) < 2
    return Verdicts(
        position=positions.cpu(),
        label=labels.cpu(),
        clean_prediction=_predicted(clean).cpu(),
        prediction=_predicted(final).cpu(),
        clean_top1=right.cpu(),
        robust_top1=(right & (wrongness(final, labels) == 0)).cpu(),
        robust_top5=(
            among_five & (wrongness(final, labels, 5) < 2) & knows_top5(attack, clean.shape[1])
        ).cpu(),
        perturbation=perturbation.cpu(),
    )


def _predicted(logits: Tensor) -> Tensor:
    return logits.argmax(dim=1).where(~logits.isnan().any(dim=1), NONE)


class _FullRows(nn.Module):
    """The model on batches filled up with copies of the last image; see `ROWS`.

    Attributes:
        asked, first: the first batch without its copies, and its logits; None before.
    """

    def __init__(self, model: Model, labels: Tensor) -> None:
        super().__init__()
        self.model = model
        self.ask = Classifier(model, labels)
        self.asked: Tensor | None = None
        self.first: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        missing = max(ROWS - len(images), -len(images) % MORE_ROWS) if len(images) else 0
        if missing:
            images = torch.cat([images, images[-1:].detach().expand(missing, -1, -1, -1)])
        logits = self.ask(images)
        logits = logits[: len(logits) - missing]
        if self.first is None:
            self.asked, self.first = images[: len(logits)].detach(), logits.detach()
        return logits
