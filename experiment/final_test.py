"""The final test of a run: its last and best models, and their averages, clean and under attack."""

import logging
import signal
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from base.base_data_loader import BaseDataLoader
from base.base_model import BaseModel
from base.base_trainer import BaseTrainer
from base.checkpoint import load_checkpoint, load_weights
from base.config import Config
from base.distributed import (
    barrier,
    exit_unless_primary,
    from_primary,
    is_primary,
    rank,
    world_size,
)
from base.errors import CheckpointError, NonFiniteError, Stopped
from base.output import replace_json
from base.run_folder.environment import provenance
from base.run_folder.logs import format_values
from base.run_folder.names import BEST, EVALUATIONS, LAST, RESULT
from base.signals import Interrupted
from base.train_state import not_finite
from data_loader.splits import some_of_every_class
from evaluation.identity import evaluation_digests
from evaluation.partial import partial_file, remove_partials
from evaluation.report import RobustnessReport
from evaluation.robust_accuracy import robust_accuracy
from evaluation.verdicts import attack_rank
from experiment import build, build_attacks

logger = logging.getLogger(__name__)


def run_final_test(
    trainer: BaseTrainer, test_loader: BaseDataLoader, counts: Mapping[str, float]
) -> dict[str, Any]:
    """Test the models of a finished run, and write `result.json`.

    If the config asks for it, they are also attacked, and the reports are written to `eval/`.

    Args:
        trainer: after training. Its model has the weights of the best epoch afterwards.
        test_loader: the test set.
        counts: the numbers of training, validation and test images, and the rate of label noise, by
            name.

    Returns:
        The contents of `result.json`: values of the best model (`test_top1`, `test_robust_top1`),
        of the last model with the prefix `last_`, of averaged weights with `ema_`, and the
        provenance. If the best model of earlier epochs was lost, `best_since_epoch` is the epoch
        from which on the best was chosen.

    Raises:
        NonFiniteError: a value is infinite or NaN. It is written as null, the others as they are.
        Stopped: a signal stopped the test. A resume continues it from the verdicts so far.
    """
    try:
        # A signal interrupts this at once, because an attack may take hours and changes nothing.
        with trainer.signals.caught(), trainer.signals.interrupting():
            return _test_and_write(trainer, test_loader, counts)
    except Interrupted:
        number = trainer.signals.asked
        # Rank 0 reports for all processes; the others exit with the same code.
        exit_unless_primary(128 + number)
        what = "test"
        if trainer.config.reports_robustness:
            what = "attack, whose verdicts so far are kept"
        message = (
            f"stopped by {signal.Signals(number).name} after training, in the final {what};"
            f" continue with -r {trainer.folder}"
        )
        raise Stopped(message, number) from None


def _test_and_write(
    trainer: BaseTrainer, test_loader: BaseDataLoader, counts: Mapping[str, float]
) -> dict[str, Any]:
    config, state, folder = trainer.config, trainer.state, trainer.folder
    shard = test_loader.shard(rank(), world_size())
    tester = _Tester(config, test_loader, shard, trainer.autocast)
    # A run without a monitor has no best epoch. Its last model then counts as the best.
    last_is_best = state.best_epoch in (None, state.epochs_done) and state.batches_done == 0
    averaged = trainer.ema.model if trainer.ema else None
    if last_is_best:
        files = [folder / LAST, folder / BEST]
        best = last = tester.test_with_average(trainer.model, averaged, files)
    else:
        last = tester.test_with_average(trainer.model, averaged, [folder / LAST])
        averaged = _load_best(trainer)
        best = tester.test_with_average(trainer.model, averaged, [folder / BEST])
    # Validation values are those of the epoch whose weights are reported.
    log = state.history[(state.best_epoch or state.epochs_done) - 1]
    result = {
        **best,
        **{f"last_{name}": value for name, value in last.items()},
        "val_top1": log.get("val_top1"),
        **{
            key: value
            for key, value in log.items()
            if key.startswith(("val_clean_", "val_ema_", "val_robust_"))
        },
        "best_epoch": state.best_epoch,
    }
    if state.best_since > 1:
        result["best_since_epoch"] = state.best_since
    result |= {
        "epochs": state.epochs_done,
        "train_seconds": state.train_seconds,
        "images_per_second": state.images_seen / state.train_seconds,
        **counts,
        "parameters": trainer.model.num_parameters(),
        "seed": config.seed,
    }
    if is_primary():
        replace_json(folder / RESULT, result | provenance(config))
    bad = not_finite(result)
    if bad:
        exit_unless_primary(NonFiniteError.exit_code)
        raise NonFiniteError(
            f"{folder / RESULT}: {bad[0]} is not finite, and null there: the model has diverged"
        )
    logger.info("done: %s", format_values(result))
    return result | provenance(config)


def _load_best(trainer: BaseTrainer) -> BaseModel | None:
    """Load the best epoch's weights into the trainer's model; return the averaged model, if any."""
    file = trainer.folder / BEST
    # Other machines may not see the run folder, so rank 0 reads the file for all.
    saved = from_primary(lambda: load_checkpoint(file))
    load_weights(trainer.model, saved["state_dict"], file)
    if not trainer.ema:
        return None
    if "ema_state_dict" not in saved:
        raise CheckpointError(
            f"{file}: holds no averaged weights, but trainer.ema_decay asks for them"
        )
    averaged = deepcopy(trainer.model)
    load_weights(averaged, saved["ema_state_dict"], file)
    return averaged


@dataclass(frozen=True)
class _Tester:
    """Tests models on the test set, all processes together.

    Attributes:
        config: of the run.
        loader: the test set.
        shard: this process's shard of it.
        autocast: the context of forward passes on clean images.
    """

    config: Config
    loader: BaseDataLoader
    shard: BaseDataLoader
    autocast: Callable[[], AbstractContextManager]

    @cached_property
    def attacked(self) -> BaseDataLoader:
        """The test images that are attacked, as many as the config asks for."""
        count = self.config.adversarial.report_images or self.loader.n_samples
        return some_of_every_class(self.loader, count)

    def test_with_average(
        self, model: BaseModel, averaged: BaseModel | None, files: list[Path]
    ) -> dict[str, float]:
        """Return the values of a model, and those of its average with the prefix `ema_`.

        `files` are the checkpoints that hold both.
        """
        values = self.test(model, files, "")
        if averaged is not None:
            for key, value in self.test(averaged, files, "_ema").items():
                values[f"ema_{key}"] = value
        return values

    def test(self, model: BaseModel, files: list[Path], suffix: str) -> dict[str, float]:
        """Return the values of one model, with the prefix `test_`.

        For each of the checkpoints `files`, a report on its robustness is written to `eval/`, if
        the config asks for it.
        """
        evaluate = build.evaluator(self.config, self.autocast)
        clean = evaluate(model, self.shard, description="testing")
        values = {f"test_{key}": value for key, value in clean.items()}
        if self.config.reports_robustness:
            report = self._attack(model, files, suffix)
            values["test_robust_top1"] = report.robust_top1
            if report.robust_top5 is not None:
                values["test_robust_top5"] = report.robust_top5
        return values

    def _attack(self, model: BaseModel, files: list[Path], suffix: str) -> RobustnessReport:
        """Attack one model, and write a report for each of its checkpoints."""
        config = self.config
        folder = files[0].parent / EVALUATIONS
        names = [file.stem.removeprefix("model_") + suffix for file in files]
        targets = [folder / f"{config.pgd_attack.type}_{name}.json" for name in names]
        images = self.attacked
        classes = self.loader.num_classes
        attack = build_attacks.build_attack(config, classes, attack_rank(classes))
        digests = evaluation_digests(model, images)
        settings = (config.seed, images.batch_size)
        report = robust_accuracy(
            model,
            images,
            attack,
            seed=config.seed,
            # Always float32: in bf16 an attack finds a little less.
            autocast=nullcontext,
            partial=partial_file(targets[0], digests, attack, settings),
            description=f"attacking the {names[0]} model",
            provenance=digests,
        )
        if is_primary():
            for file, target in zip(files, targets, strict=True):
                checkpoint = f"{file} (averaged weights)" if suffix else str(file)
                replace(report, checkpoint=checkpoint).save(target)
        # Another process's verdicts are removed, too, so the report must be on the disk.
        barrier()
        remove_partials(targets[0])
        logger.info("%s model: %s", " and ".join(names), report)
        for warning in report.warnings:
            logger.warning("%s model: %s", names[0], warning)
        return report
