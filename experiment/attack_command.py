"""The path that validate_pgd.py and fgsm.py share: checkpoint and config -> test images, model, attack -> report."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attacks import PGD, Attack
from base.agreement import Facts, agreed, config_facts, data_facts
from base.base_data_loader import BaseDataLoader
from base.command_line import KeyFlag, Parser, key_flags, set_overrides
from base.config.config import Config
from base.errors import CheckpointError, ConfigError
from base.output import check_folder, is_stream, writing
from base.ranks import from_first, rank, ranks, world_size
from base.runtime import memory_explained
from base.text import say
from data_loader.splits import some_of_every_class
from evaluation.figures import draw_epsilon_curve, draw_examples
from evaluation.partial import partial_file, remove_partials
from evaluation.reliability import doctor, plain_pgd
from evaluation.report import Report, add_doctor, describe_attack, file_stem, measure, title
from evaluation.robust_accuracy import Autocast, attack_batch
from experiment import build_attacks
from experiment.evaluation_flags import check_evaluation_outputs, evaluation_parser
from experiment.loading import Evaluation, load_evaluation

DOCTOR_IMAGES = 200
EXAMPLES = 8
SIZES = (
    ("--norm", "adversarial.norm", "linf or l2"),
    ("--epsilon", "adversarial.epsilon", "radius: in 1/255 for linf, in pixel ranges for l2; or 8/255"),
    ("--steps", "pgd_attack.K", "steps"),
    ("--step_size", "pgd_attack.step", "step size, in the units of epsilon"),
    ("--restarts", "pgd_attack.restarts", "random starts"),
    ("--loss", "pgd_attack.loss", "ce, margin or dlr"),
)
ATTACKS: dict[str, Callable[[Config, int], Attack]] = {
    "fgsm": build_attacks.fgsm,
    "pgd": build_attacks.pgd,
    "apgd": lambda config, _: build_attacks.apgd(config),
    "autoattack": lambda config, _: build_attacks.auto_attack(config),
}
"""Name -> `(config, rank to stop at) -> attack`."""
FIXED: dict[str, tuple[str, ...]] = {
    "fgsm": (),
    "pgd": (),
    "apgd": ("--step_size",),
    "autoattack": ("--steps", "--step_size", "--restarts", "--loss"),
}
"""The flags of `SIZES` that an attack has no use for."""


def attack_parser(description: str, sizes: tuple[str, ...]) -> Parser:
    """The command line of an attack script; `sizes` are the flags of `SIZES` that its attack has."""
    written = "write the report here, and a verdict per image beside it"
    parser = evaluation_parser(description, json=written, figure="draw clean and adversarial images")
    parser.add_argument(
        "--result_dir",
        type=Path,
        metavar="DIR",
        help="folder for the report, where --json names no file",
    )
    parser.add_argument(
        "--name", help="begins the name of the report's file, where --json names none"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random starts")
    parser.add_argument("--limit", type=int, metavar="N", help="attack N test images only, the first of every class")
    parser.add_argument("--batch_size", type=int, default=250, metavar="N", help="images attacked at a time")
    for flag, key, text in SIZES:
        if flag in sizes:
            parser.add_argument(flag, dest=key, metavar="VALUE", help=f"{text} ({key})", action=KeyFlag)
    parser.add_argument(
        "--doctor",
        type=int,
        nargs="?",
        const=DOCTOR_IMAGES,
        metavar="N",
        help=f"check on N images ({DOCTOR_IMAGES}) whether the number can be believed",
    )
    return parser


def evaluate_checkpoint(arguments: argparse.Namespace, attack_name: str) -> None:
    """Run one of `ATTACKS` on the checkpoint that the command line names; the last line printed holds the accuracies.

    Under torchrun the images are shared out over the processes; rank 0 writes and prints.

    Raises:
        ConfigError, CheckpointError, DataError: before anything is attacked.
    """
    _check(arguments, attack_name)
    with ranks():
        sizes = key_flags(arguments, [key for _, key, _ in SIZES])
        if "system.precision" not in dict(set_overrides(arguments.set)):
            sizes.append(("system.precision", "fp32"))  # an attack in bf16 finds a little less, whatever the training was in
        evaluation = agreed(
            lambda: load_evaluation(arguments, sizes, limit=arguments.limit, batch_size=arguments.batch_size),
            lambda evaluation: _facts(evaluation, attack_name, arguments),
        )
        config, loader, model = evaluation.config, evaluation.loader, evaluation.model
        if loader.n_samples < world_size():
            raise ConfigError(f"--limit: {loader.n_samples} images cannot be shared out over {world_size()} processes")
        attack = _attack(config, attack_name, loader.num_classes, arguments.doctor is not None)
        context = {"seed": arguments.seed, "autocast": evaluation.autocast}
        target = arguments.json or _default_target(evaluation.run_folder, attack, arguments)
        from_first(lambda: _check_target(target, arguments))
        partial = None
        if target is not None and not is_stream(target):
            settings = (config.dump(), evaluation.provenance, arguments.seed, arguments.batch_size)
            partial = partial_file(target, model, loader, attack, settings)
        with memory_explained("--batch_size", arguments.batch_size):
            report = measure(model, loader, attack, checkpoint=evaluation.source, partial=partial, **context)
        report.values.update(evaluation.provenance, data=evaluation.data)
        is_first = rank() == 0
        if target is not None and not is_stream(target):
            from_first(lambda: _save(report, target))
            # from here on the report is safe, and nobody needs what was kept for an interruption
            remove_partials(target)
    if is_first:
        _conclude(report, model, loader, attack, target, arguments, context)


def _facts(evaluation: Evaluation, attack_name: str, arguments: argparse.Namespace) -> Facts:
    """What processes that share an evaluation have to have alike."""
    asked = {"attack": attack_name, **{name: getattr(arguments, name) for name in ("seed", "batch_size", "ema")}}
    return {
        "command lines": (ConfigError, asked),
        **config_facts(evaluation.config),
        "checkpoints": (CheckpointError, evaluation.weights_digest()),
        **data_facts(test=evaluation.loader),
    }


def _check(arguments: argparse.Namespace, attack_name: str) -> None:
    """Refuse what would fail after the attack, or have no effect on it."""
    for name in ("limit", "batch_size", "doctor"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ConfigError(f"--{name}: expected at least 1, not {getattr(arguments, name)}")
    for flag, key, _ in SIZES:
        if flag in FIXED[attack_name] and getattr(arguments, key, None) is not None:
            raise ConfigError(f"{flag}: {attack_name} has no such setting")
    if arguments.name is not None and (
        not arguments.name or Path(arguments.name).name != arguments.name
    ):
        raise ConfigError(f"--name {arguments.name}: expected the beginning of a file's name")
    check_evaluation_outputs(arguments)


def _check_target(target: Path | None, arguments: argparse.Namespace) -> None:
    """Refuse to attack where report and verdicts could not be written, such as in a run folder that
    may only be read."""
    if target is None or is_stream(target):
        return
    try:
        check_folder(target.parent)
    except OSError as error:
        instead = "" if arguments.json else "; name a file for the report with --json FILE"
        raise ConfigError(
            f"{target.parent}: may not be written ({error.strerror}){instead}"
        ) from None


def _save(report: Report, target: Path) -> None:
    with _report_printed_on_failure(report), writing(target):
        report.save(target)


@contextmanager
def _report_printed_on_failure(report: Report) -> Iterator[None]:
    """A file that cannot be written does not cost the numbers: they are printed before the
    error."""
    try:
        yield
    except ConfigError:
        print(report)
        raise


def _conclude(
    report: Report,
    model: nn.Module,
    loader: BaseDataLoader,
    attack: Attack,
    target: Path | None,
    arguments: argparse.Namespace,
    context: dict[str, Any],
) -> None:
    """Doctor, files, pictures, and the report itself as the last line, also where a file cannot be
    written."""
    if arguments.doctor:
        few = some_of_every_class(loader, arguments.doctor)
        examined = attack if isinstance(attack, PGD) else plain_pgd(attack)
        checks, curve = doctor(model, few, examined, **context)
        add_doctor(report, checks, examined)
        say(*checks)
        with _report_printed_on_failure(report):
            _draw_curve(curve, report, few, arguments.figure or target)
    if target is not None:
        if arguments.doctor or is_stream(target):
            _save(report, target)
        say(
            f"report {target}"
            + ("" if is_stream(target) else f", verdicts {target.with_suffix('.verdicts.npz')}")
        )
    if arguments.figure:
        with _report_printed_on_failure(report):
            _draw_examples(arguments.figure, report, model, loader, attack, **context)
        say(f"figure {arguments.figure}")
    say(*(f"warning: {warning}" for warning in report.values["warnings"]))
    if arguments.doctor:
        print(_conclusion(report))
    print(report)


def _conclusion(report: Report) -> str:
    """What the doctor's checks come to, in one line."""
    values = report.values
    needed = values["images_needed"]
    if values["reliable"] is False:
        return "NOT RELIABLE: see the warnings"
    if needed is not None:
        how = f" (--doctor {needed})" if needed <= values["n"] else ""
        return f"UNDECIDED: about {needed} images would decide{how}"
    return f"every check passed (examined: {values['checked_attack']})"


def _attack(config: Config, name: str, num_classes: int, doctor: bool) -> Attack:
    """One of `ATTACKS`, which goes on until a label has left the top five where there are more classes than that."""
    classes_needed = 4 if name == "autoattack" else 3 if config.pgd_attack.loss == "dlr" else 2
    if num_classes < classes_needed:
        what = "--autoattack" if name == "autoattack" else f"pgd_attack.loss: {config.pgd_attack.loss}"
        raise ConfigError(f"{what} needs at least {classes_needed} classes, this data set has {num_classes}")
    attack = ATTACKS[name](config, 5 if num_classes > 5 else 1)
    if doctor and attack.threat_model.epsilon == 0:
        raise ConfigError("--doctor: with an epsilon of 0 there is nothing to examine")
    return attack


def _default_target(
    run_folder: Path | None, attack: Attack, arguments: argparse.Namespace
) -> Path | None:
    """Reports on a run folder go into it, or into `--result_dir`; everything else is reported on
    only where `--json` or `--result_dir` says so."""
    folder = arguments.result_dir or (run_folder and run_folder / "eval")
    if folder is None:
        return None
    extra = ["ema"] * arguments.ema + [f"n{arguments.limit}"] * (arguments.limit is not None) + [f"seed{arguments.seed}"]
    name = [] if arguments.name is None else [arguments.name]
    return folder / ("_".join([*name, file_stem(describe_attack(attack)), *extra]) + ".json")


def _draw_curve(curve: list[tuple[float, float]], report: Report, loader: BaseDataLoader, beside: Path | None) -> None:
    if beside is None or is_stream(beside):
        return
    suffix = beside.suffix if beside.suffix in (".png", ".pdf", ".svg") else ".png"
    path, values = beside.with_name(f"{beside.stem}_epsilon{suffix}"), report.values
    name = Path(values["checkpoint"] or values["model"]).name
    heading = f"{name} under PGD on {loader.n_samples} images"
    draw_epsilon_curve(path, curve, values["norm"], curve[0][1], 1 / loader.num_classes, values["epsilon"], heading)
    say(f"accuracy against epsilon {path}")


def _draw_examples(
    path: Path, report: Report, model: nn.Module, loader: BaseDataLoader, attack: Attack, *, seed: int, autocast: Autocast
) -> None:
    """Draw images that the attack broke, or else any. PGD finds the same points again, as its starts depend on the image only;
    AutoAttack draws for a batch as a whole and may find others."""
    verdicts = report.verdicts
    broken = (verdicts.clean_top1 & ~verdicts.robust_top1).nonzero().squeeze(1)
    chosen = broken if len(broken) else torch.arange(len(verdicts))
    few = some_of_every_class(loader.subset(chosen), EXAMPLES)
    few.batch_size = EXAMPLES
    images, labels = next(iter(few))
    found, worst = attack_batch(model, images, labels, attack, positions=few.positions, seed=seed, autocast=autocast)
    predictions = (found.clean_prediction, found.prediction)
    draw_examples(path, images.cpu(), worst.cpu(), *predictions, found.label, loader.class_names, title(report.values))
