"""How well a checkpoint recognises each class of the test set, and what it takes it for.

python class_report.py -s saved/cifar10/20260101-120000-000000 --figure confusion.png --json classes.json
python class_report.py -c config.json -s model_best.pth
"""

from base.command_line import run_script, select_device_to_evaluate
from base.output import save_json
from base.run_folder import package_versions
from base.text import say
from evaluation.class_scores import class_scores
from experiment.evaluation_flags import check_evaluation_outputs, evaluation_parser
from experiment.loading import load_evaluation, predict
from reports.class_table import class_summary, class_table, class_warnings
from reports.confusion_figure import draw_confusion


def main() -> None:
    arguments = evaluation_parser("Precision, recall and confusions of every class of the test set.").parse_args()
    select_device_to_evaluate(arguments.device)
    check_evaluation_outputs(arguments)
    evaluation = load_evaluation(arguments)
    labels, predictions = predict(evaluation.model, evaluation.loader, evaluation.autocast)
    scores = class_scores(labels.numpy(), predictions.numpy(), evaluation.loader.class_names)
    values = {
        **evaluation.provenance,
        "ema": arguments.ema,
        "data": evaluation.data,
        **scores,
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
    if arguments.figure:
        title = f"{evaluation.described} on {scores['n']} test images: top-1 {scores['top1']:.2%}"
        draw_confusion(arguments.figure, scores["confusion"], evaluation.loader.class_names, title)
        say(f"figure {arguments.figure}")
    print(class_summary(scores))


if __name__ == "__main__":
    run_script(main)
