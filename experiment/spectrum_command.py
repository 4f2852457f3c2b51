"""The function of spectrum.py: network -> spectra of its layers -> report."""

import argparse

import torch

from base.command_line import Parser
from base.errors import ConfigError
from base.output import save_figure, save_json
from base.run_folder.environment import package_versions
from base.text import say
from evaluation.spectral_norm import layer_spectra
from experiment.evaluation_flags import check_evaluation_outputs, evaluation_parser
from experiment.loading import load_evaluation
from experiment.own_network import network_explained
from reports.spectrum_figure import spectrum_figure
from reports.spectrum_table import spectrum_summary, spectrum_table


def spectrum_parser() -> Parser:
    """Return the parser of spectrum.py."""
    parser = evaluation_parser(
        "Spectral norms and distances from orthogonality of a network's layers."
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="the largest residual of the power iteration",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of start vectors and probes")
    return parser


def report_spectra(arguments: argparse.Namespace) -> None:
    """Measure the network that the command line names, print a table and write the reports.

    Raises:
        ConfigError, CheckpointError, DataError: before anything is measured.
        NonFiniteError: a layer's weights are infinite or NaN.
    """
    if not 0 < arguments.tolerance < 1:
        raise ConfigError(
            f"--tolerance: expected a number between 0 and 1, not {arguments.tolerance}"
        )
    check_evaluation_outputs(arguments)
    # Only the shape of an image is needed.
    evaluation = load_evaluation(arguments, limit=1)
    dtype = torch.float64
    if evaluation.device.type == "mps":
        # Apple's devices have no float64.
        dtype = torch.float32
    with network_explained(evaluation.place):
        spectra = layer_spectra(
            evaluation.model,
            evaluation.loader.image_shape,
            tolerance=arguments.tolerance,
            seed=arguments.seed,
            dtype=dtype,
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
        figure = spectrum_figure(values["layers"], evaluation.described)
        save_figure(figure, arguments.figure)
        say(f"figure {arguments.figure}")
    print(spectrum_summary(values))
