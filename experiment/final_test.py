"""What a finished run came to: its last and its best model, and their averages, on the test set,
clean and under attack."""

import logging
import signal
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
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
from base.run_folder.environment import provenance
from base.run_folder.folder import write_json
from base.run_folder.logs import describe
from base.run_folder.names import BEST, EVALUATIONS, LAST, RESULT
from base.signals import Interrupted
from base.train_state import not_finite
from data_loader.splits import some_of_every_class
from evaluation.partial import partial_file, remove_partials
from evaluation.robust_accuracy import robust_accuracy
from evaluation.verdicts import attack_rank
from experiment import build, build_attacks

logger = logging.getLogger(__name__)


def conclude(
    trainer: BaseTrainer, test_loader: BaseDataLoader, counts: Mapping[str, float]
) -> dict[str, Any]:
    """Test the models of a finished run, attack them where the config asks for it, and write
    `result.json` and `eval/`.

    Args:
        trainer: when training has ended. Its model has the weights of the best epoch afterwards.
        test_loader: the test set.
        counts: how many images there were to train on, to validate and to test, and the rate of
            label noise, by name.

    Returns:
        What `result.json` holds: values of the best model by their names (`test_top1`,
        `test_robust_top1`), those of the last one with `last_` before them, those of averaged
        weights with `ema_`, and `PROVENANCE`. `best_since_epoch` is there only where the best
        model of the epochs before that was lost.

    Raises:
        NonFiniteError: a value is infinite or NaN; all are written, that one as null.
        Stopped: a signal asked for it. The verdicts so far are kept, and a resume goes on from
            them.
    """
    try:
        with trainer.signals.caught(), trainer.signals.interrupting():
            return _conclude(trainer, test_loader, counts)
    except Interrupted:
        number = trainer.signals.asked
        exit_unless_primary(128 + number)
        what = (
            "attack, whose verdicts so far are kept"
            if trainer.config.reports_robustness
            else "test"
        )
        name = signal.Signals(number).name
        message = f"stopped by {name} after training, in the final {what}; continue with -r {trainer.folder}"
        raise Stopped(message, number) from None


def _conclude(
    trainer: BaseTrainer, test_loader: BaseDataLoader, counts: Mapping[str, int]
) -> dict[str, Any]:
    config, state, folder = trainer.config, trainer.state, trainer.folder
    test = _Test(config, test_loader, test_loader.shard(rank(), world_size()), trainer.autocast)
    last_is_best = state.best_epoch in (None, state.epochs_done) and state.batches_done == 0
    files = [LAST, BEST] if last_is_best else [LAST]
    best = last = test.of_both(
        trainer.model, trainer.ema.model if trainer.ema else None, [folder / name for name in files]
    )
    if not last_is_best:
        saved, averaged = from_primary(lambda: load_checkpoint(folder / BEST)), None
        load_weights(trainer.model, saved["state_dict"], folder / BEST)
        if trainer.ema:
            if "ema_state_dict" not in saved:
                raise CheckpointError(
                    f"{folder / BEST}: holds no averaged weights, but trainer.ema_decay asks for them"
                )
            averaged = deepcopy(trainer.model)
            load_weights(averaged, saved["ema_state_dict"], folder / BEST)
        best = test.of_both(trainer.model, averaged, [folder / BEST])
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
        **({"best_since_epoch": state.best_since} if state.best_since > 1 else {}),
        "epochs": state.epochs_done,
        "train_seconds": state.train_seconds,
        "images_per_second": state.images_seen / state.train_seconds,
        **counts,
        "parameters": trainer.model.num_parameters(),
        "seed": config.seed,
    }
    if is_primary():
        write_json(folder / RESULT, result | provenance(config))
    bad = not_finite(result)
    if bad:
        exit_unless_primary(NonFiniteError.exit_code)
        raise NonFiniteError(
            f"{folder / 'result.json'}: {bad[0]} is not finite, null there: the model has diverged"
        )
    logger.info("done: %s", describe(result))
    return result | provenance(config)


@dataclass(frozen=True)
class _Test:
    """The test that every model of a run is put to, by all processes together, each with its `own`
    images of the `loader`."""

    config: Config
    loader: BaseDataLoader
    own: BaseDataLoader
    autocast: Callable[[], AbstractContextManager]

    def of_both(
        self, model: BaseModel, averaged: BaseModel | None, files: list[Path]
    ) -> dict[str, float]:
        """Values of a model, prefixed with `test_`, and of its average, prefixed with `ema_test_`;
        `files` hold both."""
        values = self.of(model, files, "")
        if averaged is not None:
            values |= {
                f"ema_{key}": value for key, value in self.of(averaged, files, "_ema").items()
            }
        return values

    def of(self, model: BaseModel, files: list[Path], suffix: str) -> dict[str, float]:
        """Values of one model; a report on its robustness goes to `eval/` for each of the
        checkpoints that hold it."""
        evaluate = build.evaluator(self.config, self.autocast)
        values = {
            f"test_{key}": value
            for key, value in evaluate(model, self.own, description="testing").items()
        }
        if not self.config.reports_robustness:
            return values
        names = [file.stem.removeprefix("model_") + suffix for file in files]
        images = some_of_every_class(
            self.loader, self.config.adversarial.report_images or self.loader.n_samples
        )
        classes = self.loader.num_classes
        attack = build_attacks.build_attack(self.config, classes, attack_rank(classes))
        kind = self.config.pgd_attack.type
        target = files[0].parent / EVALUATIONS / f"{kind}_{names[0]}.json"
        report = robust_accuracy(
            model,
            images,
            attack,
            seed=self.config.seed,
            autocast=nullcontext,  # float32, whatever the training was in
            partial=partial_file(
                target, model, images, attack, (self.config.seed, images.batch_size)
            ),
            description=f"attacking the {names[0]} model",
        )
        for file, name in zip(files, names, strict=True):
            if not is_primary():
                break
            checkpoint = f"{file}{' (averaged weights)' if suffix else ''}"
            replace(report, checkpoint=checkpoint).save(
                file.parent / EVALUATIONS / f"{kind}_{name}.json"
            )
        barrier()  # from here on the report is safe
        remove_partials(target)
        logger.info("%s model: %s", " and ".join(names), report)
        for warning in report.warnings:
            logger.warning("%s model: %s", names[0], warning)
        values["test_robust_top1"] = report.robust_top1
        if report.robust_top5 is not None:
            values["test_robust_top5"] = report.robust_top5
        return values
