"""The function of validate_pgd.py and fgsm.py: model, test images, attack -> report."""

import argparse
import json
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
from base.device import kernels_explained, memory_explained
from base.distributed import distributed_session, from_primary, is_primary, world_size
from base.distributed.agreement import Facts, config_facts, data_facts, prepare_on_all_ranks
from base.errors import CheckpointError, ConfigError
from base.output import PICTURES, as_json, check_folder, format_of, is_stream, writing
from base.registry import lookup
from base.run_folder.names import EVALUATIONS
from base.text import say
from data_loader.splits import some_of_every_class
from evaluation.attack_batch import Autocast, attack_batch, report_precision
from evaluation.batches import device_of
from evaluation.figures import draw_epsilon_curve, draw_examples
from evaluation.identity import evaluation_digests, weights_digest
from evaluation.partial import partial_file, remove_partials
from evaluation.reliability import DoctorReport, doctor
from evaluation.report import RobustnessReport, describe_attack, file_stem, title
from evaluation.robust_accuracy import check_images_file, robust_accuracy
from evaluation.verdicts import attack_rank
from experiment import build_attacks
from experiment.evaluation import Evaluation
from experiment.evaluation_flags import check_evaluation_outputs, evaluation_parser
from experiment.loading import load_evaluation
from experiment.own_network import network_explained

DOCTOR_IMAGES = 200
"""How many images `--doctor` examines by default."""

EXAMPLES = 8
"""How many images the figure of examples shows."""

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
"""Flags of attacks, the config keys that they set, and their help texts."""

DIGESTS = {"data_digest": "of other images", "weights_digest": "of other weights"}
"""Digests in reports -> how a message says that two of them differ."""

ATTACK_ARGUMENTS = {
    "--steps": "steps",
    "--step_size": "step_size",
    "--restarts": "restarts",
    "--loss": "loss",
}
"""Flags that some attacks do not have -> the argument of the attack's constructor."""


@dataclass(frozen=True)
class AttackOptions:
    """How an attack command measures and where it writes.

    Each field is the value of the flag of the same name; `flags` are those of `SIZES` that were
    given.
    """

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


def attack_parser(description: str, sizes: tuple[str, ...]) -> Parser:
    """Return the parser of an attack command, which has those flags of `SIZES` that are named."""
    parser = evaluation_parser(
        description,
        json="write the report here, and a verdict per image beside it",
        figure="draw clean and adversarial images",
    )
    parser.add_argument(
        "--result_dir",
        type=Path,
        metavar="DIR",
        help="write the report into this folder, if --json names no file",
    )
    parser.add_argument(
        "--name", help="first part of the name of the report's file, if --json names no file"
    )
    parser.add_argument(
        "--csv",
        type=Path,
        metavar="FILE",
        help="write a table with a line for each image here; - is standard output",
    )
    parser.add_argument(
        "--save_images",
        type=Path,
        metavar="FILE",
        help="write the adversarial images (float32), labels and predictions here (npz)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random starts")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="attack only N test images, the first of every class"
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
        help=f"check on N images ({DOCTOR_IMAGES}) whether the result is reliable",
    )
    return parser


def attack_network(arguments: argparse.Namespace, attack: str | None = None) -> None:
    """Attack the network that the command line names, write the report and print it.

    Args:
        arguments: parsed by an `attack_parser`.
        attack: a name in `ATTACKS`; None for the config's.

    Raises:
        ConfigError, CheckpointError, DataError: before anything is attacked.
    """
    given = vars(arguments)
    names = [field.name for field in fields(AttackOptions) if field.name in given]
    options = AttackOptions(
        **{name: given[name] for name in names},
        flags=tuple(flag for flag, key, _ in SIZES if given.get(key) is not None),
    )
    _check_options(options)
    check_evaluation_outputs(arguments, csv=options.csv, save_images=options.save_images)
    overrides = key_flags(arguments, [key for _, key, _ in SIZES])
    if attack is not None:
        overrides.insert(0, Flag(("pgd_attack.type", attack), f"--attack {attack}"))
    if "system.precision" not in dict(set_overrides(arguments.set)):
        # Even for a network that was trained in bf16, a search in bf16 finds a little less.
        overrides.append(("system.precision", "fp32"))
    limits = {"limit": options.limit, "batch_size": options.batch_size}
    attack_evaluation(partial(load_evaluation, arguments, overrides, **limits), options)


def attack_evaluation(load: Callable[[], Evaluation], options: AttackOptions) -> None:
    """Attack the model that `load` returns, write the report and print it.

    Under torchrun the images are divided among the processes; rank 0 writes and prints. The last
    line has the accuracies.

    Raises:
        ConfigError, CheckpointError, DataError: before anything is attacked.
    """
    # Inside the session, a process that fails to load does not leave the others waiting.
    with distributed_session():
        evaluation = prepare_on_all_ranks(load, lambda evaluation: _facts(evaluation, options))
        config, loader, model = evaluation.config, evaluation.loader, evaluation.model
        if loader.n_samples < world_size():
            raise ConfigError(
                f"--limit: {loader.n_samples} images cannot be divided among {world_size()}"
                " processes"
            )
        attack = _build_attack(config, loader.num_classes, options)
        context: dict[str, Any] = {"seed": options.seed, "autocast": evaluation.autocast}
        target = options.json or _default_target(evaluation.run_folder, attack, options)
        from_primary(lambda: _check_target(target, options))
        digests = evaluation_digests(model, loader)
        precision = report_precision(evaluation.autocast, attack)
        measured = {**digests, "precision": precision, **describe_attack(attack)}
        from_primary(lambda: _check_same_evaluation(target, options, measured))
        # An interrupted attack continues from the verdicts that are kept beside the report.
        kept = None
        if target is not None and not is_stream(target):
            settings = (config.dump(), evaluation.provenance, options.seed, options.batch_size)
            kept = partial_file(target, digests, attack, settings)
        fitting = memory_explained("--batch_size", options.batch_size, evaluation.device)
        kernels = kernels_explained(evaluation.device)
        with network_explained(evaluation.place), fitting, kernels:
            report = robust_accuracy(
                model,
                loader,
                attack,
                partial=kept,
                save_images=options.save_images,
                checkpoint=evaluation.source,
                provenance={**evaluation.provenance, "data": evaluation.data, **digests},
                **context,
            )
        # Outside the session every process is the primary one.
        was_primary = is_primary()
        # Rank 0 alone decides what is written: each machine has a command line of its own.
        from_primary(lambda: _save_files(report, loader, target, options))
        if target is not None and not is_stream(target):
            # The report is on the disk now; removed earlier, the verdicts could be lost.
            remove_partials(target)
    if was_primary:
        _finish(report, evaluation, attack, target, options, context)


def _facts(evaluation: Evaluation, options: AttackOptions) -> Facts:
    """Return what the processes that share an evaluation must have in common."""
    command = {
        "attack": evaluation.config.pgd_attack.type,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "ema": options.ema,
        "save_images": options.save_images is not None,
    }
    return {
        "command lines": (ConfigError, command),
        **config_facts(evaluation.config),
        "checkpoints": (CheckpointError, weights_digest(evaluation.model)),
        **data_facts(test=evaluation.loader),
    }


def _check_options(options: AttackOptions) -> None:
    """Check, before the attack, what would otherwise fail after it."""
    for name in ("limit", "batch_size", "doctor"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}: expected at least 1, not {value}")
    name = options.name
    if name is not None and (not name or Path(name).name != name):
        raise ConfigError(f"--name {name}: expected the first part of a file's name")
    if options.csv is not None:
        format_of(options.csv, ("csv",))
    if options.save_images is not None:
        check_images_file("--save_images", options.save_images)


def _check_target(target: Path | None, options: AttackOptions) -> None:
    """Check that report and verdicts can be written; a run folder may be read-only."""
    if target is None or is_stream(target):
        return
    try:
        check_folder(target.parent)
    except OSError as error:
        instead = ""
        if options.json is None:
            instead = "; name a file for the report with --json FILE"
        raise ConfigError(
            f"{target.parent}: cannot be written ({error.strerror}){instead}"
        ) from None


def _check_same_evaluation(
    target: Path | None, options: AttackOptions, measured: Mapping[str, Any]
) -> None:
    """Check that a report at the default place, which the new one will replace, is one of the same
    evaluation: the name of the file says neither what was attacked nor in which precision."""
    if target is None or options.json is not None:
        return
    try:
        held = json.loads(target.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if not isinstance(held, dict):
        return
    # As JSON holds them. Reports of older versions lack some of the keys.
    for key, value in json.loads(as_json(measured)).items():
        if held.get(key, value) != value:
            what = DIGESTS.get(key, f"with {key} {json.dumps(held[key])}, not {json.dumps(value)}")
            raise ConfigError(
                f"{target}: holds the report {what}; write another file with --json FILE, or begin"
                " its name with --name NAME"
            )


def _save_files(
    report: RobustnessReport, loader: BaseDataLoader, target: Path | None, options: AttackOptions
) -> None:
    """Write the verdicts and the report, wherever the command line asks for them."""
    if options.csv is not None:
        _save_csv(report, loader, options.csv)
    if target is not None and not is_stream(target):
        _save(report, target)


def _save(report: RobustnessReport, target: Path) -> None:
    with _report_printed_on_failure(report), writing(target):
        report.save(target)


def _save_csv(report: RobustnessReport, loader: BaseDataLoader, path: Path) -> None:
    names = loader.sample_names()
    file_names = None
    if names is not None:
        file_names = dict(zip(loader.positions.tolist(), names, strict=True))
    with _report_printed_on_failure(report), writing(path):
        report.save_csv(path, loader.class_names, file_names)


@contextmanager
def _report_printed_on_failure(report: RobustnessReport) -> Iterator[None]:
    """Print the report if a file cannot be written, so that its numbers are not lost."""
    try:
        yield
    except ConfigError:
        print(report)
        raise


def _finish(
    report: RobustnessReport,
    evaluation: Evaluation,
    attack: Attack,
    target: Path | None,
    options: AttackOptions,
    context: Mapping[str, Any],
) -> None:
    """Examine the report's reliability, write the other files, and print the report last."""
    model, loader = evaluation.model, evaluation.loader
    # The checks attack each image many times, so they use few images.
    if options.doctor:
        few = some_of_every_class(loader, options.doctor)
        with network_explained(evaluation.place):
            found = doctor(model, few, attack, **context)
        report = report.with_doctor(found)
        say(*found.checks)
        with _report_printed_on_failure(report):
            _draw_curve(found, evaluation, options.figure or target)
    if target is not None:
        # A file was written before the reliability was known, a stream was not.
        if options.doctor or is_stream(target):
            _save(report, target)
        line = f"report {target}"
        if not is_stream(target):
            line += f", verdicts {target.with_suffix('.verdicts.npz')}"
        say(line)
    if options.csv is not None:
        say(f"table {options.csv}")
    if options.save_images is not None:
        say(f"adversarial images {options.save_images}")
    if options.figure:
        with _report_printed_on_failure(report), network_explained(evaluation.place):
            _draw_examples(options.figure, report, model, loader, attack, **context)
        say(f"figure {options.figure}")
    say(*(f"warning: {warning}" for warning in report.warnings))
    if report.doctor is not None:
        print(_verdict_on_reliability(report, report.doctor))
    print(report)


def _verdict_on_reliability(report: RobustnessReport, found: DoctorReport) -> str:
    """Return the outcome of all checks in one line."""
    needed = report.images_needed
    if report.reliable is False:
        return "NOT RELIABLE: see the warnings"
    if needed is not None:
        how = f" (--doctor {needed})" if needed <= report.n else ""
        return f"UNDECIDED: about {needed} images would decide{how}"
    return f"every check passed (examined: {title(found.examined)})"


def _build_attack(config: Config, num_classes: int, options: AttackOptions) -> Attack:
    """Return the config's attack, after checking that it has the arguments of all given flags."""
    name = config.pgd_attack.type
    kind = lookup(ATTACKS, name, "pgd_attack.type")
    for flag in options.flags:
        if flag in ATTACK_ARGUMENTS and not takes(kind, ATTACK_ARGUMENTS[flag]):
            raise ConfigError(f"{flag}: has no effect on the attack {name}")
    attack = build_attacks.build_attack(config, num_classes, attack_rank(num_classes))
    if options.doctor is not None and attack.epsilon == 0:
        raise ConfigError("--doctor: needs an epsilon above 0")
    return attack


def _default_target(run_folder: Path | None, attack: Attack, options: AttackOptions) -> Path | None:
    """Return the report's file if `--json` names none: in `--result_dir`, or in the run folder.

    It is None for a single checkpoint, which has no folder of its own.
    """
    if options.result_dir is not None:
        folder = options.result_dir
    elif run_folder is not None:
        folder = run_folder / EVALUATIONS
    else:
        return None
    words = [file_stem(attack)]
    if options.name is not None:
        words.insert(0, options.name)
    if options.ema:
        words.append("ema")
    if options.limit is not None:
        words.append(f"n{options.limit}")
    words.append(f"seed{options.seed}")
    return folder / f"{'_'.join(words)}.json"


def _draw_curve(found: DoctorReport, evaluation: Evaluation, beside: Path | None) -> None:
    if beside is None or is_stream(beside):
        return
    suffix = ".png"
    if beside.suffix.removeprefix(".") in PICTURES:
        suffix = beside.suffix
    path = beside.with_name(f"{beside.stem}_epsilon{suffix}")
    # The name of a checkpoint is that of every other run's, too
    named = Path(evaluation.source)
    if evaluation.run_folder is not None:
        named = evaluation.run_folder.resolve()
    attack = found.curve_attack
    draw_epsilon_curve(
        path,
        found.curve,
        attack.norm,
        clean=found.curve[0][1],
        chance=1 / found.num_classes,
        epsilon=attack.epsilon,
        title=f"{named.name}: {title(attack)}, scaled to each epsilon, on {found.n} images",
    )
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
    """Draw images that the attack broke, or any if it broke none.

    The images are attacked again. PGD finds the same points, because its starts depend only on the
    image. AutoAttack draws for a batch as a whole, and may find others.
    """
    verdicts = report.verdicts
    broken = (verdicts.clean_top1 & ~verdicts.robust_top1).nonzero().squeeze(1)
    if len(broken) == 0:
        broken = torch.arange(len(verdicts))
    few = some_of_every_class(loader.subset(broken), EXAMPLES)
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
