"""The path that validate_pgd.py and fgsm.py share: checkpoint and config -> test images, model,
attack -> report."""

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attacks import ATTACKS, Attack
from base.base_data_loader import BaseDataLoader
from base.command_line import KeyFlag, Parser, key_flags, set_overrides
from base.config import Config
from base.config.arguments import takes
from base.config.origins import Flag
from base.device import memory_explained
from base.distributed import distributed_session, from_primary, is_primary, world_size
from base.distributed.agreement import Facts, agreed, config_facts, data_facts
from base.errors import CheckpointError, ConfigError
from base.output import check_folder, format_of, is_stream, writing
from base.registry import lookup
from base.run_folder.names import EVALUATIONS
from base.text import say
from data_loader.splits import some_of_every_class
from evaluation.batches import device_of
from evaluation.figures import draw_epsilon_curve, draw_examples
from evaluation.partial import partial_file, remove_partials
from evaluation.reliability import DoctorReport, doctor
from evaluation.report import RobustnessReport, file_stem, title
from evaluation.robust_accuracy import Autocast, attack_batch, check_images_file, robust_accuracy
from evaluation.verdicts import attack_rank
from experiment import build_attacks
from experiment.evaluation_flags import check_evaluation_outputs, evaluation_parser
from experiment.loading import Evaluation, load_evaluation

DOCTOR_IMAGES = 200
EXAMPLES = 8
SIZES = (
    ("--norm", "adversarial.norm", "linf or l2"),
    (
        "--epsilon",
        "adversarial.epsilon",
        "radius: in 1/255 for linf, in pixel ranges for l2; or 8/255",
    ),
    ("--steps", "pgd_attack.K", "steps"),
    ("--step_size", "pgd_attack.step", "step size, in the units of epsilon"),
    ("--restarts", "pgd_attack.restarts", "random starts"),
    ("--loss", "pgd_attack.loss", "ce, margin or dlr"),
)
OF_ATTACKS = {
    "--steps": "steps",
    "--step_size": "step_size",
    "--restarts": "restarts",
    "--loss": "loss",
}
"""Flags of `SIZES` that not every attack has a use for -> the argument of its constructor."""


@dataclass(frozen=True)
class AttackOptions:
    """How an attack command measures and where it writes; what its flags of the same names say."""

    seed: int = 0
    limit: int | None = None
    batch_size: int = 250
    ema: bool = False
    doctor: int | None = None
    json: Path | None = None
    csv: Path | None = None
    save_images: Path | None = None
    figure: Path | None = None
    result_dir: Path | None = None
    name: str | None = None
    flags: tuple[str, ...] = ()
    """The flags of `SIZES` that are given."""


def attack_parser(description: str, sizes: tuple[str, ...]) -> Parser:
    """The command line of an attack script; `sizes` are the flags of `SIZES` that its attack
    has."""
    written = "write the report here, and a verdict per image beside it"
    parser = evaluation_parser(
        description, json=written, figure="draw clean and adversarial images"
    )
    parser.add_argument(
        "--result_dir",
        type=Path,
        metavar="DIR",
        help="folder for the report, where --json names no file",
    )
    parser.add_argument(
        "--name", help="begins the name of the report's file, where --json names none"
    )
    parser.add_argument(
        "--csv",
        type=Path,
        metavar="FILE",
        help="write a line for each image here; - is standard output",
    )
    images = "write the adversarial images here (npz), float32 as they were attacked, with labels and predictions"
    parser.add_argument("--save_images", type=Path, metavar="FILE", help=images)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random starts")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="attack N test images only, the first of every class"
    )
    parser.add_argument(
        "--batch_size", type=int, default=250, metavar="N", help="images attacked at a time"
    )
    for flag, key, text in SIZES:
        if flag in sizes:
            parser.add_argument(
                flag, dest=key, metavar="VALUE", help=f"{text} ({key})", action=KeyFlag
            )
    parser.add_argument(
        "--doctor",
        type=int,
        nargs="?",
        const=DOCTOR_IMAGES,
        metavar="N",
        help=f"check on N images ({DOCTOR_IMAGES}) whether the number can be believed",
    )
    return parser


def evaluate_checkpoint(arguments: argparse.Namespace, attack: str | None = None) -> None:
    """Attack the network that the command line names; the last line printed holds the accuracies.

    Args:
        arguments: of an `attack_parser`.
        attack: a name in `ATTACKS`; None for that of the config.

    Raises:
        ConfigError, CheckpointError, DataError: before anything is attacked.
    """
    given = vars(arguments)
    fields_of_options = [field.name for field in fields(AttackOptions) if field.name in given]
    options = AttackOptions(
        **{name: given[name] for name in fields_of_options},
        flags=tuple(flag for flag, key, _ in SIZES if given.get(key) is not None),
    )
    _check(options)
    check_evaluation_outputs(arguments, csv=options.csv, save_images=options.save_images)
    overrides = key_flags(arguments, [key for _, key, _ in SIZES])
    if attack is not None:
        overrides.insert(0, Flag(("pgd_attack.type", attack), f"--attack {attack}"))
    if "system.precision" not in dict(set_overrides(arguments.set)):
        # an attack in bf16 finds a little less, whatever the training was in
        overrides.append(("system.precision", "fp32"))
    limits = {"limit": options.limit, "batch_size": options.batch_size}
    attack_evaluation(partial(load_evaluation, arguments, overrides, **limits), options)


def attack_evaluation(load: Callable[[], Evaluation], options: AttackOptions) -> None:
    """Attack what `load` returns, write the report and print it.

    Under torchrun the images are shared out over the processes; rank 0 writes and prints.

    Raises:
        ConfigError, CheckpointError, DataError: before anything is attacked.
    """
    with distributed_session():
        evaluation = agreed(load, lambda evaluation: _facts(evaluation, options))
        config, loader, model = evaluation.config, evaluation.loader, evaluation.model
        if loader.n_samples < world_size():
            raise ConfigError(
                f"--limit: {loader.n_samples} images cannot be shared out over {world_size()} processes"
            )
        attack = _attack(config, loader.num_classes, options)
        context: dict[str, Any] = {"seed": options.seed, "autocast": evaluation.autocast}
        target = options.json or _default_target(evaluation.run_folder, attack, options)
        from_primary(lambda: _check_target(target, options))
        kept = None
        if target is not None and not is_stream(target):
            settings = (config.dump(), evaluation.provenance, options.seed, options.batch_size)
            kept = partial_file(target, model, loader, attack, settings)
        with memory_explained("--batch_size", options.batch_size), _misfit_explained():
            report = robust_accuracy(
                model,
                loader,
                attack,
                partial=kept,
                save_images=options.save_images,
                checkpoint=evaluation.source,
                provenance={**evaluation.provenance, "data": evaluation.data},
                **context,
            )
        is_first = is_primary()
        if options.csv is not None:
            from_primary(lambda: _save_csv(report, loader, options.csv))
        if target is not None and not is_stream(target):
            from_primary(lambda: _save(report, target))
            # from here on the report is safe, and nobody needs what was kept for an interruption
            remove_partials(target)
    if is_first:
        _conclude(report, evaluation, attack, target, options, context)


def _facts(evaluation: Evaluation, options: AttackOptions) -> Facts:
    """What processes that share an evaluation have to have alike."""
    asked = {name: getattr(options, name) for name in ("seed", "batch_size", "ema")}
    return {
        "command lines": (ConfigError, {"attack": evaluation.config.pgd_attack.type, **asked}),
        **config_facts(evaluation.config),
        "checkpoints": (CheckpointError, evaluation.weights_digest()),
        **data_facts(test=evaluation.loader),
    }


def _check(options: AttackOptions) -> None:
    """Refuse what would fail after the attack."""
    for name in ("limit", "batch_size", "doctor"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}: expected at least 1, not {value}")
    name = options.name
    if name is not None and (not name or Path(name).name != name):
        raise ConfigError(f"--name {name}: expected the beginning of a file's name")
    if options.csv is not None:
        format_of(options.csv, ("csv",))
    if options.save_images is not None:
        check_images_file("--save_images", options.save_images)


def _check_target(target: Path | None, options: AttackOptions) -> None:
    """Refuse to attack where report and verdicts could not be written, such as in a run folder that
    may only be read."""
    if target is None or is_stream(target):
        return
    try:
        check_folder(target.parent)
    except OSError as error:
        instead = "" if options.json else "; name a file for the report with --json FILE"
        raise ConfigError(
            f"{target.parent}: may not be written ({error.strerror}){instead}"
        ) from None


def _save(report: RobustnessReport, target: Path) -> None:
    with _report_printed_on_failure(report), writing(target):
        report.save(target)


@contextmanager
def _misfit_explained() -> Iterator[None]:
    """An attack or a network of the user's own that breaks its contract is one line, not a
    traceback."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error


def _save_csv(report: RobustnessReport, loader: BaseDataLoader, path: Path) -> None:
    names = loader.sample_names()
    positions = loader.positions.tolist()
    file_names = None if names is None else dict(zip(positions, names, strict=True))
    with _report_printed_on_failure(report), writing(path):
        report.save_csv(path, loader.class_names, file_names)


@contextmanager
def _report_printed_on_failure(report: RobustnessReport) -> Iterator[None]:
    """A file that cannot be written does not cost the numbers: they are printed before the
    error."""
    try:
        yield
    except ConfigError:
        print(report)
        raise


def _conclude(
    report: RobustnessReport,
    evaluation: Evaluation,
    attack: Attack,
    target: Path | None,
    options: AttackOptions,
    context: Mapping[str, Any],
) -> None:
    """Doctor, files, pictures, and the report itself as the last line, also where a file cannot be
    written."""
    model, loader = evaluation.model, evaluation.loader
    if options.doctor:
        few = some_of_every_class(loader, options.doctor)
        found = doctor(model, few, attack, **context)
        report = report.with_doctor(found)
        say(*found.checks)
        with _report_printed_on_failure(report):
            _draw_curve(found, report, options.figure or target)
    if target is not None:
        if options.doctor or is_stream(target):
            _save(report, target)
        say(
            f"report {target}"
            + ("" if is_stream(target) else f", verdicts {target.with_suffix('.verdicts.npz')}")
        )
    if options.csv is not None:
        say(f"table {options.csv}")
    if options.save_images is not None:
        say(f"adversarial images {options.save_images}")
    if options.figure:
        with _report_printed_on_failure(report):
            _draw_examples(options.figure, report, model, loader, attack, **context)
        say(f"figure {options.figure}")
    say(*(f"warning: {warning}" for warning in report.warnings))
    if report.doctor is not None:
        print(_conclusion(report, report.doctor))
    print(report)


def _conclusion(report: RobustnessReport, found: DoctorReport) -> str:
    """What the doctor's checks come to, in one line."""
    needed = report.images_needed
    if report.reliable is False:
        return "NOT RELIABLE: see the warnings"
    if needed is not None:
        how = f" (--doctor {needed})" if needed <= report.n else ""
        return f"UNDECIDED: about {needed} images would decide{how}"
    return f"every check passed (examined: {title(found.examined)})"


def _attack(config: Config, num_classes: int, options: AttackOptions) -> Attack:
    """The config's attack, which goes on until a label has left the top five where there are more
    classes than that."""
    name = config.pgd_attack.type
    kind = lookup(ATTACKS, name, "pgd_attack.type")
    for flag in options.flags:
        if flag in OF_ATTACKS and not takes(kind, OF_ATTACKS[flag]):
            raise ConfigError(f"{flag}: {name} has no such setting")
    attack = build_attacks.build_attack(config, num_classes, attack_rank(num_classes))
    if options.doctor is not None and attack.epsilon == 0:
        raise ConfigError("--doctor: with an epsilon of 0 there is nothing to examine")
    return attack


def _default_target(run_folder: Path | None, attack: Attack, options: AttackOptions) -> Path | None:
    """Reports on a run folder go into it, or into `--result_dir`; everything else is reported on
    only where `--json` or `--result_dir` says so."""
    folder = options.result_dir or (run_folder and run_folder / EVALUATIONS)
    if folder is None:
        return None
    limit = [] if options.limit is None else [f"n{options.limit}"]
    extra = ["ema"] * options.ema + limit + [f"seed{options.seed}"]
    name = [] if options.name is None else [options.name]
    return folder / ("_".join([*name, file_stem(attack), *extra]) + ".json")


def _draw_curve(found: DoctorReport, report: RobustnessReport, beside: Path | None) -> None:
    if beside is None or is_stream(beside):
        return
    suffix = beside.suffix if beside.suffix in (".png", ".pdf", ".svg") else ".png"
    path, attack = beside.with_name(f"{beside.stem}_epsilon{suffix}"), found.examined
    heading = f"{Path(report.checkpoint).name} under PGD on {found.n} images"
    chance, clean = 1 / found.num_classes, found.curve[0][1]
    draw_epsilon_curve(path, found.curve, attack.norm, clean, chance, attack.epsilon, heading)
    say(f"accuracy against epsilon {path}")


def _draw_examples(
    path: Path,
    report: RobustnessReport,
    model: nn.Module,
    loader: BaseDataLoader,
    attack: Attack,
    *,
    seed: int,
    autocast: Autocast,
) -> None:
    """Draw images that the attack broke, or else any. PGD finds the same points again, as its
    starts depend on the image only; AutoAttack draws for a batch as a whole and may find others."""
    verdicts = report.verdicts
    broken = (verdicts.clean_top1 & ~verdicts.robust_top1).nonzero().squeeze(1)
    chosen = broken if len(broken) else torch.arange(len(verdicts))
    few = some_of_every_class(loader.subset(chosen), EXAMPLES)
    few.batch_size = EXAMPLES
    device = device_of(model)
    images, labels = (tensor.to(device) for tensor in next(iter(few)))
    found, worst = attack_batch(
        model, images, labels, attack, positions=few.positions, seed=seed, autocast=autocast
    )
    predictions = (found.clean_prediction, found.prediction)
    draw_examples(
        path, images.cpu(), worst.cpu(), *predictions, found.label, loader.class_names, report.title
    )
