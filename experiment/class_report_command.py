"""The function of class_report.py: network, test images -> predictions -> scores per class."""

import argparse
import csv
from collections.abc import Sequence
from io import StringIO
from math import isnan
from pathlib import Path

from base.base_data_loader import BaseDataLoader
from base.command_line import Parser
from base.output import save_figure, save_json, write_output, writing
from base.run_folder.environment import package_versions
from base.text import csv_text, say
from evaluation.class_scores import Predictions, class_scores, predict
from experiment.evaluation_flags import check_evaluation_outputs, evaluation_parser
from experiment.loading import load_evaluation
from experiment.own_network import network_explained
from reports.class_table import class_summary, class_table, class_warnings
from reports.confusion_figure import confusion_figure


def class_report_parser() -> Parser:
    """Return the parser of class_report.py."""
    parser = evaluation_parser("Precision, recall and confusions of every class of the test set.")
    parser.add_argument(
        "--csv",
        type=Path,
        metavar="FILE",
        help="write a line for every image: file, label, prediction",
    )
    return parser


def report_classes(arguments: argparse.Namespace) -> None:
    """Evaluate the network that the command line names, print a table and write the reports.

    Raises:
        ConfigError, CheckpointError, DataError: before anything is predicted.
    """
    check_evaluation_outputs(arguments, csv=arguments.csv)
    evaluation = load_evaluation(arguments)
    loader = evaluation.loader
    with network_explained(evaluation.place):
        predictions = predict(evaluation.model, loader, autocast=evaluation.autocast)
    scores = class_scores(predictions.label, predictions.prediction, loader.class_names).as_dict()
    values = {
        **evaluation.provenance,
        "ema": arguments.ema,
        "data": evaluation.data,
        **scores,
        # Nothing checks that scores can be trusted; it is only known if they cannot.
        "reliable": False if scores["without_answer"] else None,
        "warnings": class_warnings(scores),
        "versions": package_versions(),
    }
    print(class_table(scores))
    for warning in values["warnings"]:
        print(f"warning: {warning}")
    if arguments.json:
        save_json(arguments.json, values)
        say(f"report {arguments.json}")
    if arguments.csv:
        with writing(arguments.csv):
            write_output(arguments.csv, _predictions_csv(predictions, loader).encode())
        say(f"predictions {arguments.csv}")
    if arguments.figure:
        title = f"{evaluation.described} on {scores['n']} test images: top-1 {scores['top1']:.2%}"
        figure = confusion_figure(scores["confusion"], loader.class_names, title)
        save_figure(figure, arguments.figure)
        say(f"figure {arguments.figure}")
    print(class_summary(scores))


def _predictions_csv(predictions: Predictions, loader: BaseDataLoader) -> str:
    """Return a CSV table with a line for each image.

    `label` and `prediction` are names of classes, and `confidence` is the probability of the
    prediction. If the model returns NaN, the last two are empty.
    """
    names: Sequence[str] = loader.class_names
    text = StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["position", "file", "label", "prediction", "confidence"])
    rows = zip(
        loader.positions.tolist(),
        loader.sample_names() or [""] * loader.n_samples,
        predictions.label.tolist(),
        predictions.prediction.tolist(),
        predictions.confidence.tolist(),
        strict=True,
    )
    for position, file, label, prediction, confidence in rows:
        answer = ["", ""]
        if not isnan(confidence):
            answer = [csv_text(names[prediction]), f"{confidence:.6g}"]
        table.writerow([position, csv_text(file), csv_text(names[label]), *answer])
    return text.getvalue()
