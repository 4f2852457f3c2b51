"""Curves and tables from run folders: means and spreads over seeds.

python plot_training_logs.py saved/norms --group-by arch.args.norm_layer_type --out curves.png
python plot_training_logs.py saved/noise --against trainer.percent --out noise.pdf
python plot_training_logs.py saved/norms --table results.tex --baseline bn
python plot_training_logs.py saved/conv_norm_robust --table attacks.md --eval pgd-20 fgsm
"""

import base.startup  # noqa: F401 - before slow imports
from base.command_line import Parser, path_word, run_script
from reports.command import write_reports


def main() -> None:
    parser = Parser(
        description="Curves and tables from run folders: means and spreads over seeds.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "paths",
        nargs="+",
        type=path_word,
        metavar="RUN_OR_FOLDER",
        help="run folders, or folders that contain some",
    )
    add("--group-by", nargs="+", default=[], metavar="KEY", help="config keys or axes of a study")
    add("--out", metavar="FILE", help="picture to write: .png, .pdf or .svg")
    add("--metric", nargs="+", metavar="NAME", help="a panel each; default: clean and robust top-1")
    add("--against", metavar="KEY", help="final values against this config key, not over epochs")
    add("--table", metavar="FILE", help="table to write: .md, .tex or .csv; - is standard output")
    add("--result", nargs="+", metavar="NAME", help="columns: values of result.json")
    add(
        "--last-epoch",
        nargs="+",
        metavar="NAME",
        help="columns: values of the last line of metrics.jsonl",
    )
    add("--eval", nargs="+", metavar="NAME", help="columns: reports in eval/, such as pgd-20 fgsm")
    add("--baseline", metavar="ROW", help="row that the others are tested against (Welch's test)")
    add("--paired", action="store_true", help="pair the runs of equal seeds in these tests")
    add("--debug", action="store_true", help="show the traceback of an error")
    write_reports(parser.parse_args())


if __name__ == "__main__":
    run_script(main)
