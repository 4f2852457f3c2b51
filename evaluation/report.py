"""Reports: accuracies under attack with their uncertainty, the attack, and their reliability."""

import csv
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from attacks.attack import Attack, arguments, settings
from attacks.threat_model import format_size
from base.output import as_json, is_stream, write_output
from base.text import csv_text
from evaluation.checks import Check, all_passed, failures, images_needed
from evaluation.verdicts import NONE, Verdicts, wilson_interval

# Fields of an attack that a title words in its own way, or leaves out.
IN_TITLES = ("epsilon", "norm", "step_size", "steps", "restarts", "loss", "early_stop", "seed")


@dataclass(frozen=True)
class DoctorReport:
    """The findings of the doctor.

    Attributes:
        checks: the results of all checks.
        examined: the attack that was examined; plain PGD if the attack is of another kind.
        curve: pairs (epsilon in units of the pixel range, accuracy in `[0, 1]`), from epsilon 0 to
            one at which every image can become gray.
        curve_attack: the attack of the curve, whose step size is scaled along with epsilon. It
            differs from `examined` if that has few steps.
        n: the number of images examined.
        num_classes: the number of the model's classes.
    """

    checks: tuple[Check, ...]
    examined: Attack
    curve: tuple[tuple[float, float], ...]
    curve_attack: Attack
    n: int
    num_classes: int

    @property
    def reliable(self) -> bool | None:
        """True if all checks passed, False if one failed, None if it takes more images."""
        return all_passed(self.checks)

    @property
    def images_needed(self) -> int | None:
        """How many images would decide the checks that are undecided; None if all are decided."""
        return images_needed(self.checks)

    @property
    def warnings(self) -> tuple[str, ...]:
        """A line for each check that failed."""
        return failures(self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "checks": [vars(check) for check in self.checks],
            "checked_attack": title(self.examined),
            "reliable": self.reliable,
            "images_needed": self.images_needed,
            "warnings": list(self.warnings),
            "curve": [list(point) for point in self.curve],
            "curve_attack": title(self.curve_attack),
            "n": self.n,
        }

    def __str__(self) -> str:
        return "\n".join(map(str, self.checks))


@dataclass(frozen=True)
class RobustnessReport:
    """The result of one attack on one model.

    Attributes:
        attack: the attack.
        seed: the seed of its random starts.
        verdicts: one for every image.
        robust_top5: the share of images whose label is among the five largest logits also under
            attack; None if the attack did not try to prevent that (see `Verdicts`).
        seconds: the duration of the attack.
        images_per_second: its speed.
        precision: the precision of the search and of the verdicts.
        quick_checks: the results of the checks on the first batch of every process.
        attack_warnings: the attack's own warnings about its result, one line each.
        checkpoint: the name of the model.
        provenance: more about model and data, plain values by name.
        versions: the versions of the packages used.
        doctor: the findings of the doctor; None if it was not run.
    """

    attack: Attack
    seed: int
    verdicts: Verdicts
    robust_top5: float | None
    seconds: float
    images_per_second: float
    precision: str
    quick_checks: tuple[Check, ...] = ()
    attack_warnings: tuple[str, ...] = ()
    checkpoint: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    doctor: DoctorReport | None = None

    @property
    def n(self) -> int:
        """The number of images attacked."""
        return len(self.verdicts)

    @property
    def clean_top1(self) -> float:
        """The share of images that the model classifies correctly."""
        return self.verdicts.accuracy("clean_top1")

    @property
    def robust_top1(self) -> float:
        """The share of images that the model classifies correctly also under attack."""
        return self.verdicts.accuracy("robust_top1")

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson score interval of `robust_top1`."""
        return wilson_interval(int(self.verdicts.robust_top1.sum()), self.n)

    @property
    def max_perturbation(self) -> float:
        """The largest change, in the attack's norm and units of the pixel range."""
        return float(self.verdicts.perturbation.max())

    @property
    def title(self) -> str:
        """The attack in one line."""
        return title(self.attack)

    @property
    def reliable(self) -> bool | None:
        """Whether the robust accuracy can be believed. The first row that applies decides:

        | finding                                                       | reliable |
        |---------------------------------------------------------------|----------|
        | a quick check failed                                          | False    |
        | a check of the doctor failed                                  | False    |
        | the doctor was not run                                        | None     |
        | a check of the doctor is undecided: it takes more images      | None     |
        | the attack itself warns                                       | None     |
        | the doctor examined another attack, beside the one reported   | None     |
        | every check of the doctor passed                              | True     |

        An undecided quick check does not count: the doctor repeats it on more images.
        """
        if all_passed(self.quick_checks) is False:
            return False
        if self.doctor is None:
            return None
        # False, or None
        if not self.doctor.reliable:
            return self.doctor.reliable
        if self.attack_warnings or title(self.doctor.examined) != self.title:
            return None
        return True

    @property
    def images_needed(self) -> int | None:
        """How many images would decide the checks that are undecided; None if all are decided."""
        if self.doctor is not None:
            return self.doctor.images_needed
        return images_needed(self.quick_checks)

    @property
    def warnings(self) -> tuple[str, ...]:
        """The reasons to doubt the robust accuracy, one line each."""
        lines = [*failures(self.quick_checks), *self.attack_warnings]
        if self.doctor is not None:
            lines += self.doctor.warnings
        # Each line once, in order: processes and the doctor repeat the quick checks
        return tuple(dict.fromkeys(lines))

    def with_doctor(self, doctor: DoctorReport) -> "RobustnessReport":
        """Return this report with the findings of the doctor."""
        return replace(self, doctor=doctor)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON: everything but the verdicts, and every field of the
        attack."""
        values = {
            **describe_attack(self.attack),
            # The seed of the evaluation. That of the attack is for calls without generators.
            "seed": self.seed,
            "n": self.n,
            "clean_top1": self.clean_top1,
            "robust_top1": self.robust_top1,
            "robust_top5": self.robust_top5,
            "interval": list(self.interval),
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "max_perturbation": self.max_perturbation,
            "precision": self.precision,
            "reliable": self.reliable,
            "images_needed": self.images_needed,
            "warnings": list(self.warnings),
            "checkpoint": self.checkpoint,
            "versions": dict(self.versions),
            **self.provenance,
        }
        if self.doctor is not None:
            findings = self.doctor.as_dict()
            for name in ("checks", "checked_attack", "curve", "curve_attack"):
                values[name] = findings[name]
        return values

    def save(self, path: str | Path) -> None:
        """Write `as_dict()` to `path`, and the verdicts to `<name>.verdicts.npz` beside it unless
        `path` is a stream.

        Raises:
            OSError: a file cannot be written.
        """
        write_output(path, as_json(self.as_dict()))
        if not is_stream(path):
            verdicts = BytesIO()
            np.savez_compressed(verdicts, **self.verdicts.arrays())
            write_output(Path(path).with_suffix(".verdicts.npz"), verdicts.getvalue())

    def save_csv(
        self,
        path: str | Path,
        class_names: Sequence[str] = (),
        file_names: Mapping[int, str] | None = None,
    ) -> None:
        """Write the verdicts to `path` as CSV, a line for each image.

        Args:
            path: a file or stream.
            class_names: in label order; empty if they are unknown.
            file_names: an image's position -> the name of its file.

        Raises:
            OSError: the file cannot be written.
        """
        names_of_files = file_names or {}
        columns = {name: values.tolist() for name, values in self.verdicts.arrays().items()}
        classes = ["label", "clean_prediction", "prediction"]
        numbers = [name for name in columns if name not in ("position", *classes)]
        header = ["position", "file"]
        for name in classes:
            header += [name, f"{name}_name"]
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*header, *numbers])
        for row, position in enumerate(columns["position"]):
            # `csv_text`: a spreadsheet must not take a name for a formula.
            cells: list[Any] = [position, csv_text(names_of_files.get(position, ""))]
            for name in classes:
                label = columns[name][row]
                cells += [label, csv_text(_class_name(label, class_names))]
            for name in numbers:
                cells.append(_cell(columns[name][row]))
            writer.writerow(cells)
        write_output(path, text.getvalue().encode())

    def __str__(self) -> str:
        low, high = self.interval
        line = (
            f"{self.title} on {self.n} images: clean {self.clean_top1:.2%}"
            f"  top-1 {self.robust_top1:.2%} (95 % interval {low:.2%} to {high:.2%})"
        )
        if self.robust_top5 is not None:
            line += f"  top-5 {self.robust_top5:.2%}"
        return line


def _class_name(label: int, class_names: Sequence[str]) -> str:
    if label == NONE:
        return "NaN"
    if label >= len(class_names):
        return ""
    return class_names[label]


def _cell(value: Any) -> Any:
    """Return a truth value as 0 or 1, which every reader of tables understands."""
    if isinstance(value, bool):
        return int(value)
    return value


def describe_attack(attack: Attack) -> dict[str, Any]:
    """Return the class of an attack and all its arguments, in plain values; sizes in units of the
    pixel range."""
    described: dict[str, Any] = {"attack": type(attack).__name__}
    if attack.description:
        described["description"] = attack.description
    described["norm"] = attack.norm
    described["epsilon"] = attack.epsilon
    # An attack with a description, such as AutoAttack, has several losses.
    described["loss"] = None if attack.description else plain(attack.loss)
    # Every report has these keys, so that reports of different attacks have the same columns.
    for name in ("step_size", "steps", "restarts", "random_start"):
        described[name] = plain(getattr(attack, name, None))
    for name, value in settings(attack).items():
        described[name] = plain(value)
    return described


def plain(value: Any) -> Any:
    """Return a field of an attack as a JSON value: an array as its digest, an unknown object as its
    text."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return f"{value.dtype} {value.shape} sha256:{digest}"
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    # The repr of a function or class would hold an address, which differs from run to run.
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)


def title(attack: Attack) -> str:
    """Return one short line for an attack, such as `PGD-20, linf 8/255, step 2/255, 1 start`."""
    return ", ".join([attack.description or _name(attack), *_numbers(attack)])


def file_stem(attack: Attack) -> str:
    """Return the stem of a report's file name, such as `pgd-20_linf_8_step_2_1_start`. Attacks that
    differ in more than `early_stop` have different stems."""
    words = ", ".join([_name(attack), *_numbers(attack)])
    words = words.lower().replace("/255", "").replace(",", "").replace(" ", "_")
    # Fields of a user's own attack may hold characters that a file name cannot.
    return re.sub(r"[^\w.+-]", "-", words)


def _name(attack: Attack) -> str:
    """Return the name of the class, and the number of steps if that is an argument."""
    name = type(attack).__name__
    if "steps" in arguments(type(attack)):
        return f"{name}-{plain(getattr(attack, 'steps', None))}"
    return name


def _numbers(attack: Attack) -> Iterator[str]:
    """Yield the parts of a title behind the name: the sizes, then all other arguments that are not
    at their defaults."""
    taken = arguments(type(attack))
    yield f"{attack.norm} {format_size(attack.epsilon, attack.norm)}"
    step_size = getattr(attack, "step_size", None)
    if step_size is not None and "step_size" in taken:
        yield f"step {format_size(step_size, attack.norm)}"
    restarts = getattr(attack, "restarts", None)
    if restarts is not None and "restarts" in taken:
        plural = "s" if restarts > 1 else ""
        yield f"{restarts} start{plural}"
    if attack.loss != "ce" and not attack.description:
        yield f"{attack.loss} loss"
    if "early_stop" in taken and not getattr(attack, "early_stop", True) and not attack.single_step:
        yield "no early stop"
    for name, value in settings(attack).items():
        # A public value that is not an argument has no default, and does not stand in a title.
        if name in IN_TITLES or name not in taken:
            continue
        if plain(value) != plain(taken[name].default):
            yield f"{name} {plain(value)}"
