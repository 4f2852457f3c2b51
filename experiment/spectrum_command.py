"""What spectrum.py does: network -> spectra of its layers -> report."""

import argparse

import torch

from base.command_line import Parser
from base.errors import ConfigError
from base.output import save_json
from base.run_folder.environment import package_versions
from base.text import say
from evaluation.spectral_norm import layer_spectra
from experiment.evaluation_flags import check_evaluation_outputs, evaluation_parser
from experiment.loading import load_evaluation
from reports.spectrum_figure import draw_spectrum
from reports.spectrum_table import spectrum_summary, spectrum_table


def spectrum_parser() -> Parser:
    """The command line of spectrum.py."""
    parser = evaluation_parser(
        "Spectral norms and distances from orthogonality of a network's layers."
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="of the power iteration's residual",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of first vectors and probes")
    return parser


def report_spectra(arguments: argparse.Namespace) -> None:
    """Measure the network that the command line names, print a table, write what is asked for.

    Raises:
        ConfigError, CheckpointError, DataError: before anything is measured.
        NonFiniteError: a layer's weights are infinite or NaN.
    """
    if not 0 < arguments.tolerance < 1:
        raise ConfigError(
            f"--tolerance: expected a number between 0 and 1, not {arguments.tolerance}"
        )
    check_evaluation_outputs(arguments)
    evaluation = load_evaluation(arguments, limit=1)
    spectra = layer_spectra(
        evaluation.model,
        evaluation.loader.image_shape,
        tolerance=arguments.tolerance,
        seed=arguments.seed,
        # Apple's devices have no float64
        dtype=torch.float32 if evaluation.device.type == "mps" else torch.float64,
    )
    if not spectra.layers:
        raise ConfigError(f"{evaluation.source}: its network calls no convolution or linear layer")
    values = {
        **evaluation.provenance,
        "ema": arguments.ema,
        **spectra.as_dict(),
        "versions": package_versions(),
    }
    print(spectrum_table(values["layers"]))
    if arguments.json:
        save_json(arguments.json, values)
        say(f"report {arguments.json}")
    if arguments.figure:
        draw_spectrum(arguments.figure, values["layers"], evaluation.described)
        say(f"figure {arguments.figure}")
    print(spectrum_summary(values))
