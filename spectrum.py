"""The layers of a checkpoint as the linear operators that they are: spectral norms and distances from orthogonality.

python spectrum.py -s saved/cifar10_conv_norm/20260101-120000-000000 --figure spectrum.png --json spectrum.json
python spectrum.py -c config.json -s model_best.pth --tolerance 1e-6
"""

import torch
from tqdm import tqdm

from base.command_line import run_script, select_device_to_evaluate
from base.errors import ConfigError
from base.output import save_json
from base.run_folder import package_versions
from base.text import say
from evaluation.layer_trace import linear_calls
from evaluation.spectral_norm import describe, measure, product_of_norms
from experiment.evaluation_flags import check_evaluation_outputs, evaluation_parser
from experiment.loading import load_evaluation
from reports.spectrum_figure import draw_spectrum
from reports.spectrum_table import spectrum_summary, spectrum_table


def main() -> None:
    parser = evaluation_parser("Spectral norms and distances from orthogonality of a checkpoint's layers.")
    parser.add_argument("--tolerance", type=float, default=1e-4, metavar="X", help="of the power iteration's residual")
    parser.add_argument("--seed", type=int, default=0, help="seed of first vectors and probes")
    arguments = parser.parse_args()
    select_device_to_evaluate(arguments.device)
    if not 0 < arguments.tolerance < 1:
        raise ConfigError(f"--tolerance: expected a number between 0 and 1, not {arguments.tolerance}")
    check_evaluation_outputs(arguments)
    evaluation = load_evaluation(arguments)
    dtype = torch.float32 if evaluation.device.type == "mps" else torch.float64  # which that device does not have
    options = {"tolerance": arguments.tolerance, "seed": arguments.seed, "dtype": dtype}
    calls = linear_calls(evaluation.model, evaluation.loader.image_shape)
    layers = [describe(call, measure(call, **options)) for call in tqdm(calls, desc="layers", disable=None, leave=False)]
    values = {
        **evaluation.provenance,
        "ema": arguments.ema,
        "tolerance": arguments.tolerance,
        "seed": arguments.seed,
        "log10_product_of_norms": product_of_norms(layer["norm"] for layer in layers),
        "log10_product_with_batch_norms": product_of_norms(
            layer["norm"] * (layer["batch_norm_scale"] or 1.0) for layer in layers
        ),
        "layers": layers,
        "versions": package_versions(),
    }
    print(spectrum_table(layers))
    if arguments.json:
        save_json(arguments.json, values)
        say(f"report {arguments.json}")
    if arguments.figure:
        draw_spectrum(arguments.figure, layers, evaluation.described)
        say(f"figure {arguments.figure}")
    print(spectrum_summary(values))


if __name__ == "__main__":
    run_script(main)
