"""Robust accuracy of any model on any images, with a verdict for every image."""

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from attacks.attack import Attack, check_attack
from attacks.classifier import Model
from base.atomic import replacing
from base.base_data_loader import BaseDataLoader
from base.distributed import all_gather_object, hide_progress_bar
from base.errors import ConfigError
from base.output import ARRAYS, check_outputs, is_stream, writing
from base.precision import full_precision
from base.run_folder.environment import package_versions
from evaluation.adversarial_images import AdversarialImages
from evaluation.attack_batch import ROWS, Autocast, attack_batch, report_precision
from evaluation.batches import Batch, Batches, Data, FittingSize
from evaluation.checks import quick_checks
from evaluation.fuse_conv_bn import fuse_conv_bn
from evaluation.report import RobustnessReport
from evaluation.verdicts import Verdicts, known_verdicts, knows_top5


@full_precision()
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

    The model takes pixels in `[0, 1]` and normalizes them itself, as above. It is evaluated in
    evaluation mode, then restored. An image's random starts are a function of `seed` and
    its position alone, so batch size and number of processes do not change a verdict. (AutoAttack
    draws for a batch as a whole.) With several processes, each attacks its shard of the images, and
    all of them get the report. If a batch does not fit into memory, the attack continues with
    batches of half the size, after a warning.

    `report.reliable` says whether the number can be believed; see `RobustnessReport.reliable`.

    Args:
        model: a module, or a function of images `(B, C, H, W)` that returns logits `(B, classes)`.
        data: batches `(images, labels)`, neither shuffled nor augmented: a loader of this project,
            a `torch.utils.data.DataLoader`, a list or a generator. Images are float32 in `[0, 1]`,
            labels integers `(B,)`. Both are moved to the model's device.
        attack: the attack; untargeted.
        seed: the seed of the random starts.
        device: the device of the model; None takes that of its weights. A function needs it if it
            does not compute on the device of the images.
        autocast: the context of the attack's forward passes; verdicts are in the model's own
            precision.
        limit: attack only the first `limit` images, in the order of `data`.
        batch_size: images at a time; None takes the batches as they come.
        progress: show a progress bar if there is a terminal.
        description: the text before the progress bar.
        partial: see `attack_loader`. After an interruption, `seconds` and `images_per_second` count
            the rest only.
        save_images: an `.npz` file for the adversarial images: `images`, as they were attacked, in
            the order of `position`, and all columns of the verdicts.
        checkpoint: the name that the report gives the model.
        provenance: more about model and data for the report's JSON.

    Raises:
        ConfigError: a file cannot be written (`save_images` is checked before the work), or a
            single image does not fit into memory.
        TypeError: the model does not return a tensor of logits, or `attack` is not an attack.
        ValueError: no images, or batches that are not as above (uint8, out of range, not a pair), a
            label that is not one of the model's classes, or a targeted attack.
    """
    check_attack(attack)
    if save_images is not None:
        check_images_file("save_images", save_images)
    # An attack that is used again still holds the warnings about the model before.
    if isinstance(attack.warnings, list):
        attack.warnings.clear()

    # Checks: a model or data that cannot be measured is an error before the work.
    batches = Batches(data, model, device=device, batch_size=batch_size, limit=limit, sharded=True)
    first = batches.first
    fitting = FittingSize()
    checks = fitting.run(
        lambda size: quick_checks(model, first.images, first.labels, attack, size),
        len(first.labels),
    )

    # Search: this process attacks its shard, except for images that have verdicts already.
    known = known_verdicts(partial)
    with _open_images(save_images, partial, first.images, known) as images:
        # Verdicts without their images would leave gaps in the file of images.
        if images is not None and not images.complete:
            known = Verdicts.empty()
        begin = perf_counter()
        own = _attack_batches(
            model,
            batches,
            attack,
            seed=seed,
            autocast=autocast,
            partial=partial,
            known=known,
            images=images,
            fitting=fitting,
            description=description,
            progress=progress,
        )
        # Verdicts: those of all processes, in the order of the images.
        verdicts = Verdicts.joined(all_gather_object(own))
        seconds = perf_counter() - begin
        if images is not None:
            images.save(Path(save_images), verdicts, _class_names(data))

    # Report: every process gets it.
    attacked = len(verdicts) - sum(all_gather_object(len(known)))
    top5_known = knows_top5(attack, batches.num_classes)
    return RobustnessReport(
        attack=attack,
        seed=seed,
        verdicts=verdicts,
        robust_top5=verdicts.accuracy("robust_top5") if top5_known else None,
        seconds=seconds,
        images_per_second=attacked / seconds,
        precision=report_precision(autocast, attack),
        quick_checks=_gathered(checks),
        attack_warnings=_gathered(attack.warnings),
        checkpoint=checkpoint,
        provenance=dict(provenance or {}),
        versions=package_versions(),
    )


@full_precision()
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

    An image's random starts are a function of `seed` and its position alone; on the CPU verdicts do
    not depend on the batch size (see `attack_batch.ROWS`). PGD and APGD search a copy with fused
    batch norms (see `fuse_conv_bn`), other attacks the model itself; verdicts are the model's own.

    Args:
        model: a module or a function that maps images in `[0, 1]` to logits; a module is evaluated
            in evaluation mode.
        loader: batches `(images, labels)`, neither shuffled nor augmented; see `robust_accuracy`.
        attack: the attack; untargeted.
        seed: the seed of the random starts.
        autocast: the context of the attack's forward passes. Verdicts are always taken without it,
            in the model's own precision, and so is the search of an attack of a `single_step`,
            whose pass also gives the clean logits.
        partial: a file that keeps the verdicts so far; if it exists, its images are not attacked
            again. The caller removes it, and its name must identify model, images, attack and
            seed.
        description: the text before the progress bar.

    Raises:
        ConfigError: `partial` cannot be written (it still holds the verdicts written before), or a
            single image does not fit into memory.
    """
    return _attack_batches(
        model,
        Batches(loader, model),
        attack,
        seed=seed,
        autocast=autocast,
        partial=partial,
        known=known_verdicts(partial),
        fitting=FittingSize(),
        description=description,
    )


def check_images_file(flag: str, path: str | Path) -> None:
    """Check that a file for adversarial images can be written.

    Raises:
        ConfigError: it cannot; the message names `flag`.
    """
    check_outputs({flag: path}, {flag: ARRAYS})
    if is_stream(path):
        raise ConfigError(f"{flag} {path}: expected a file, as images are put into it at the end")


@contextmanager
def _open_images(
    path: str | Path | None, partial: Path | None, images: Tensor, known: Verdicts
) -> Iterator[AdversarialImages | None]:
    """Open the file that holds the adversarial images until all of them are found; None if they
    are not to be saved."""
    if path is None:
        yield None
        return
    if partial is not None:
        yield AdversarialImages(partial.with_suffix(".images"), images, known.position)
        return
    # Of this process alone; `base.atomic.sweep` removes it after a crash.
    rows = Path(path).with_name(f".{Path(path).stem}.images.{os.getpid()}.incomplete")
    found = AdversarialImages(rows, images, known.position)
    try:
        yield found
    finally:
        # Without `partial` no later call can continue from the rows.
        rows.unlink(missing_ok=True)


def _attack_batches(
    model: Model,
    batches: Batches,
    attack: Attack,
    *,
    seed: int,
    autocast: Autocast,
    partial: Path | None,
    known: Verdicts,
    fitting: FittingSize,
    images: AdversarialImages | None = None,
    description: str = "attacking",
    progress: bool = True,
) -> Verdicts:
    """Return the verdicts on all batches; `known` are those of an interrupted evaluation."""
    verdicts = known
    fused = None

    def attack_parts(batch: Batch, size: int) -> tuple[Verdicts, Tensor]:
        parts = [
            attack_batch(
                model,
                part.images,
                part.labels,
                attack,
                positions=part.positions,
                seed=seed,
                autocast=autocast,
                fused=fused,
            )
            for part in batch.split(size)
        ]
        found, worst = zip(*parts, strict=True)
        return Verdicts.joined(found), torch.cat(worst)

    bar = tqdm(
        batches.without(known.position),
        desc=description,
        total=batches.count(len(known)),
        disable=hide_progress_bar() if progress else True,
        leave=False,
    )
    for batch in bar:
        # The copy costs a few passes, which an attack of a single step would not win back.
        if fused is None and not attack.single_step:
            fused = fuse_conv_bn(model, batch.images[:ROWS])
        # A process may halve its batches alone, because this waits for no other process
        found, worst = fitting.run(functools.partial(attack_parts, batch), len(batch.labels))
        verdicts = Verdicts.joined([verdicts, found])
        # Images go first: verdicts on the disk whose images are missing would be useless.
        if images is not None:
            images.append(batch.positions, worst)
        if partial is not None:
            # An error here ends the work: a disk that is full now would not take the report either.
            with writing(partial.parent), replacing(partial) as file:
                np.savez(file, **verdicts.arrays())
        if not bar.disable:
            clean = verdicts.accuracy("clean_top1")
            robust = verdicts.accuracy("robust_top1")
            bar.set_postfix_str(f"clean {clean:.1%}, robust {robust:.1%}")
    return verdicts


def _gathered(values: Sequence[Any]) -> tuple[Any, ...]:
    """Return the values of all processes, in the order of their ranks."""
    parts = all_gather_object(list(values))
    return tuple(value for part in parts for value in part)


def _class_names(data: Data) -> dict[str, np.ndarray]:
    """Return the names of the classes, for a file; only loaders of this project know them."""
    if not isinstance(data, BaseDataLoader):
        return {}
    return {"class_names": np.array(data.class_names, dtype=np.str_)}
