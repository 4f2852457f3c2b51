"""What an evaluation says: accuracies with their uncertainty, what was run, and whether to believe
it."""

import csv
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from attacks.attack import Attack, arguments, settings
from attacks.threat_model import format_size
from base.output import as_json, is_stream, write_output
from base.text import csv_text
from evaluation.verdicts import NONE, Verdicts

if TYPE_CHECKING:
    from evaluation.reliability import DoctorReport

IN_TITLES = ("epsilon", "norm", "step_size", "steps", "restarts", "loss", "early_stop", "seed")
"""Numbers of an attack that a title says in words of its own, or leaves out."""


@dataclass(frozen=True)
class RobustnessReport:
    """One attack on one model.

    Attributes:
        attack: what was tried.
        seed: of its random starts.
        n: images that were attacked.
        clean_top1: the share of them that the model classifies correctly.
        robust_top1: the share that stays so under attack.
        robust_top5: the share whose label stays among the five largest logits; None where the
            attack did not try to prevent that (see `Verdicts`).
        interval: of `robust_top1`, 95 %, after Wilson.
        seconds: that the attack took.
        images_per_second: that were attacked.
        max_perturbation: the largest change, in the attack's norm and units of the pixel range.
        precision: of the search and of the verdicts.
        reliable: whether to believe it: False where a check failed, True where the doctor found
            nothing, None where that is not known.
        images_needed: how many images would decide the checks that are undecided; None where none
            is.
        warnings: what speaks against it, a line each.
        verdicts: one for every image.
        checkpoint: the model's name.
        provenance: what else is known of model and data, plain values by name.
        versions: of the packages that were used.
        doctor: what the doctor found, where it has looked.
    """

    attack: Attack
    seed: int
    n: int
    clean_top1: float
    robust_top1: float
    robust_top5: float | None
    interval: tuple[float, float]
    seconds: float
    images_per_second: float
    max_perturbation: float
    precision: str
    reliable: bool | None
    images_needed: int | None
    warnings: tuple[str, ...]
    verdicts: Verdicts
    checkpoint: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    doctor: "DoctorReport | None" = None

    @property
    def title(self) -> str:
        """The attack in one line."""
        return title(self.attack)

    def with_doctor(self, doctor: "DoctorReport") -> "RobustnessReport":
        """This report with the doctor's findings: `reliable` is False where a check failed, and
        True where every check passed, the attack reported is the one examined, and nothing else was
        held against it. Where a check is undecided it stays None, and `images_needed` is the number
        of images that would decide all of them."""
        reliable = self.reliable
        unsuspicious = reliable is None and not self.warnings
        if doctor.reliable and unsuspicious and title(doctor.examined) == self.title:
            reliable = True
        if doctor.reliable is False:
            reliable = False
        return replace(
            self,
            doctor=doctor,
            reliable=reliable,
            images_needed=doctor.images_needed,
            warnings=tuple(dict.fromkeys((*self.warnings, *doctor.warnings))),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: everything but the verdicts, and every field of the attack."""
        apart = ("attack", "verdicts", "provenance", "doctor", "seed")
        values = {
            name: getattr(self, name)
            for name in (one.name for one in fields(self))
            if name not in apart
        }
        values["interval"], values["warnings"] = list(self.interval), list(self.warnings)
        values["versions"] = dict(self.versions)
        doctor: dict[str, Any] = {}
        if self.doctor is not None:
            of_doctor = self.doctor.as_dict()
            doctor = {key: of_doctor[key] for key in ("checks", "checked_attack")}
        # the seed of the evaluation, in place of that of calls without generators
        seed = {"seed": self.seed}
        return {**describe_attack(self.attack), **seed, **values, **self.provenance, **doctor}

    def save(self, path: str | Path) -> None:
        """Write `as_dict()` to `path` and the verdicts beside it, to `<name>.verdicts.npz`; nothing
        is beside a stream.

        Raises:
            OSError: it cannot be written.
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
        """Write the verdicts to `path`, a line for each image.

        Args:
            path: a file or stream.
            class_names: in label order; empty where they are not known.
            file_names: an image's position -> the name of its file.

        Raises:
            OSError: it cannot be written.
        """
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        classes = ("label", "clean_prediction", "prediction")
        numbers = [name for name in self.verdicts.arrays() if name not in ("position", *classes)]
        named = [column for name in classes for column in (name, f"{name}_name")]
        writer.writerow(["position", "file", *named, *numbers])
        columns = {name: values.tolist() for name, values in self.verdicts.arrays().items()}
        for row, position in enumerate(columns["position"]):
            cells: list[Any] = [position, csv_text((file_names or {}).get(position, ""))]
            for name in classes:
                label = columns[name][row]
                cells += [label, csv_text(_class_name(label, class_names))]
            cells += [_cell(columns[name][row]) for name in numbers]
            writer.writerow(cells)
        write_output(path, text.getvalue().encode())

    def __str__(self) -> str:
        low, high = (f"{share:.2%}" for share in self.interval)
        top5 = "" if self.robust_top5 is None else f"  top-5 {self.robust_top5:.2%}"
        return (
            f"{self.title} on {self.n} images: clean {self.clean_top1:.2%}"
            f"  top-1 {self.robust_top1:.2%} (95 % interval {low} to {high}){top5}"
        )


def _class_name(label: int, class_names: Sequence[str]) -> str:
    if label == NONE:
        return "NaN"
    return class_names[label] if label < len(class_names) else ""


def _cell(value: Any) -> Any:
    """A truth value as 0 or 1, which every reader of tables takes."""
    return int(value) if isinstance(value, bool) else value


def describe_attack(attack: Attack) -> dict[str, Any]:
    """What an attack is, in plain values: its class and everything it was made with; sizes in units
    of the pixel range."""
    made_with = {name: plain(value) for name, value in settings(attack).items()}
    return {
        "attack": type(attack).__name__,
        **({"description": attack.description} if attack.description else {}),
        "norm": attack.norm,
        "epsilon": attack.epsilon,
        "loss": None if attack.description else plain(attack.loss),
        **{
            name: plain(getattr(attack, name, None))
            for name in ("step_size", "steps", "restarts", "random_start")
        },
        **made_with,
    }


def plain(value: Any) -> Any:
    """A field of an attack as JSON has it: arrays by their digest, other things by their text."""
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
    return (
        f"{value.__module__}.{value.__qualname__}"
        if hasattr(value, "__qualname__")
        else repr(value)
    )


def title(attack: Attack) -> str:
    """One short line for an attack, such as `PGD-20, linf 8/255, step 2/255, 1 start`."""
    return ", ".join([attack.description or _name(attack), *_numbers(attack)])


def file_stem(attack: Attack) -> str:
    """The name of a report's file, such as `pgd-20_linf_8_step_2_1_start`: different attacks have
    different names."""
    words = ", ".join([_name(attack), *_numbers(attack)])
    words = words.lower().replace("/255", "").replace(",", "").replace(" ", "_")
    return "".join(letter if letter.isalnum() or letter in "._-+" else "-" for letter in words)


def _name(attack: Attack) -> str:
    """The class and its steps, where they are to be chosen."""
    name, taken = type(attack).__name__, arguments(type(attack))
    return f"{name}-{plain(getattr(attack, 'steps', None))}" if "steps" in taken else name


def _numbers(attack: Attack) -> Iterable[str]:
    """What a title says of an attack beside its name; of its own arguments those that are not at
    their defaults."""
    taken = arguments(type(attack))
    yield f"{attack.norm} {format_size(attack.epsilon, attack.norm)}"
    step_size, restarts = (getattr(attack, name, None) for name in ("step_size", "restarts"))
    if step_size is not None and "step_size" in taken:
        yield f"step {format_size(step_size, attack.norm)}"
    if restarts is not None and "restarts" in taken:
        yield f"{restarts} start{'s' if restarts > 1 else ''}"
    if attack.loss != "ce" and not attack.description:
        yield f"{attack.loss} loss"
    if "early_stop" in taken and not getattr(attack, "early_stop", True) and not attack.single_step:
        yield "no early stop"
    for name, value in settings(attack).items():
        default = taken[name].default if name in taken else value
        if name not in IN_TITLES and plain(value) != plain(default):
            yield f"{name} {plain(value)}"
