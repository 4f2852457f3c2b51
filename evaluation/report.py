"""What an evaluation says: accuracies with their uncertainty, what was run, and whether to believe it."""

from contextlib import nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from attacks.attack import Attack
from attacks.classifier import Model
from attacks.threat_model import as_written
from base.base_data_loader import BaseDataLoader
from base.output import as_json, is_stream, write_output
from base.ranks import gather, rank, world_size
from base.run_folder import package_versions
from evaluation.reliability import FAILED, Check, quick_checks
from evaluation.robust_accuracy import Autocast, Verdicts, attack_loader, interval, known_verdicts, knows_top5, lowers


@dataclass(frozen=True)
class Report:
    """One attack on one model.

    Attributes:
        values: what the JSON file holds.
        verdicts: one for every image.
    """

    values: dict[str, Any]
    verdicts: Verdicts

    def save(self, path: Path) -> None:
        """Write the values to `path` and the verdicts beside it, to `<name>.verdicts.npz`; nothing
        is beside a stream."""
        write_output(path, as_json(self.values))
        if not is_stream(path):
            verdicts = BytesIO()
            np.savez_compressed(verdicts, **self.verdicts.arrays())
            write_output(path.with_suffix(".verdicts.npz"), verdicts.getvalue())

    def __str__(self) -> str:
        values = self.values
        low, high = (f"{share:.2%}" for share in values["interval"])
        top5 = "" if values["robust_top5"] is None else f"  top-5 {values['robust_top5']:.2%}"
        return (
            f"{title(values)} on {values['n']} images: clean {values['clean_top1']:.2%}"
            f"  top-1 {values['robust_top1']:.2%} (95 % interval {low} to {high}){top5}"
        )


def measure(
    model: Model,
    loader: BaseDataLoader,
    attack: Attack,
    *,
    seed: int,
    checkpoint: str,
    autocast: Autocast = nullcontext,
    partial: Path | None = None,
    description: str = "attacking",
) -> Report:
    """Attack every image of `loader`, shared out over all ranks, and report; see `attack_loader` for the arguments.

    `reliable` is False where one of the quick checks fails; it is None, not known, until the doctor
    has looked, too, and where the images examined cannot decide: `images_needed` then says how many
    would. `checkpoint` is the name that the report gives the model. After an interruption,
    `seconds` and `images_per_second` are those of the rest.

    Raises:
        ValueError: the loader holds no images, or the attack is targeted.
    """
    if loader.n_samples == 0:
        raise ValueError("the loader holds no images to attack")
    warnings = getattr(attack, "warnings", [])
    warnings.clear()  # those of another model
    share = loader.subset(torch.arange(rank(), loader.n_samples, world_size())) if world_size() > 1 else loader
    share.set_epoch(1)
    checks = quick_checks(model, *next(iter(share)), attack)
    known = len(known_verdicts(partial) or ())
    begin = perf_counter()
    own = attack_loader(model, share, attack, seed=seed, autocast=autocast, partial=partial, description=description)
    verdicts = Verdicts.joined(gather(own))
    seconds = perf_counter() - begin
    robust, n = verdicts.accuracy("robust_top1"), len(verdicts)
    attacked = n - sum(gather(known))
    values = {
        **describe_attack(attack),
        "seed": seed,
        "n": n,
        "clean_top1": verdicts.accuracy("clean_top1"),
        "robust_top1": robust,
        "robust_top5": verdicts.accuracy("robust_top5") if knows_top5(attack, loader.num_classes) else None,
        "interval": list(interval(robust, n)),
        "seconds": seconds,
        "images_per_second": attacked / seconds,
        "max_perturbation": float(verdicts.perturbation.max()),
        "precision": "bf16, verdicts in fp32" if lowers(autocast, attack) else "fp32",
        "reliable": None,
        "warnings": [],
        "checkpoint": checkpoint,
        "versions": package_versions(),
    }
    _judge(values, [check for part in gather(checks) for check in part])
    values["warnings"] += [line for part in gather(list(warnings)) for line in part]
    return Report(values, verdicts)


def add_doctor(report: Report, checks: list[Check], examined: Attack) -> None:
    """Add the doctor's findings on the attack `examined`: `reliable` is False where a check failed, and True where every check
    passed, the attack reported is the one examined, and nothing else was held against it. Where a
    check is undecided it stays None, and `images_needed` is the number of images that would decide
    all of them.
    """
    values = report.values
    values["checks"] = [vars(check) for check in checks]
    values["checked_attack"] = title(describe_attack(examined))
    passed = all(check.passed for check in checks)
    unsuspicious = values["reliable"] is None and not values["warnings"]
    if passed and unsuspicious and values["checked_attack"] == title(values):
        values["reliable"] = True
    _judge(values, checks)


def describe_attack(attack: Attack) -> dict[str, Any]:
    """What an attack is, in plain values; sizes in units of the pixel range."""
    description = getattr(attack, "description", None)
    return {
        "attack": type(attack).__name__,
        **({"description": description} if description else {}),
        "norm": attack.threat_model.norm,
        "epsilon": attack.threat_model.epsilon,
        "loss": None if description else attack.loss,
        **{name: getattr(attack, name, None) for name in ("step_size", "steps", "restarts", "random_start")},
    }


def title(values: dict[str, Any]) -> str:
    """One short line for an attack that `describe_attack` has described, such as `PGD-20, linf 8/255, step 2/255, 1 start`."""
    norm, steps, restarts = values["norm"], values["steps"], values["restarts"]
    name = values["attack"] if values["attack"] == "FGSM" or steps is None else f"{values['attack']}-{steps}"
    parts = [values.get("description", name), f"{norm} {as_written(values['epsilon'], norm)}"]
    if name != "FGSM" and values["step_size"] is not None:
        parts.append(f"step {as_written(values['step_size'], norm)}")
    if name != "FGSM" and restarts is not None:
        parts.append(f"{restarts} start{'s' if restarts > 1 else ''}")
    if values["loss"] not in ("ce", None):
        parts.append(f"{values['loss']} loss")
    return ", ".join(parts)


def file_stem(values: dict[str, Any]) -> str:
    """The name of a report's file, such as `pgd-20_linf_8_step_2_1_start`: different attacks have different names."""
    words = title({**values, "description": values["attack"]} if "description" in values else values)
    return words.lower().replace("/255", "").replace(",", "").replace(" ", "_")


def _judge(values: dict[str, Any], checks: list[Check]) -> None:
    undecided = [check.images_needed for check in checks if check.images_needed]
    values["images_needed"] = max(undecided, default=None)
    for check in checks:
        line = f"{check.name}: {check.detail}"
        if check.verdict == FAILED:
            values["reliable"] = False
            if line not in values["warnings"]:
                values["warnings"].append(line)
