"""How well a checkpoint recognises each class of the test set, and what it takes it for.

python class_report.py -s saved/cifar10/20260101-120000-000000 --figure confusion.png --json classes.json
python class_report.py -c config.json -s model_best.pth
"""

from base.command_line import run_script, select_device
from base.run_folder import package_versions, write_json
from evaluation import check_outputs, evaluation_parser, load_evaluation, predict
from reports.class_scores import class_scores
from reports.class_table import class_summary, class_table
from reports.confusion_figure import draw_confusion


def main() -> None:
    arguments = evaluation_parser("Precision, recall and confusions of every class of the test set.").parse_args()
    select_device(arguments.device)
    check_outputs(arguments)
    evaluation = load_evaluation(arguments)
    labels, predictions = predict(evaluation.model, evaluation.loader, evaluation.autocast)
    scores = class_scores(labels.numpy(), predictions.numpy(), evaluation.loader.class_names)
    values = {
        **evaluation.provenance,
        "ema": arguments.ema,
        "data": evaluation.data,
        **scores,
        "versions": package_versions(),
    }
    print(class_table(scores))
    if arguments.json:
        write_json(arguments.json, values)
        print(f"report {arguments.json}")
    if arguments.figure:
        title = f"{evaluation.described} on {scores['n']} test images: top-1 {scores['top1']:.2%}"
        draw_confusion(arguments.figure, scores["confusion"], evaluation.loader.class_names, title)
        print(f"figure {arguments.figure}")
    print(class_summary(scores))


if __name__ == "__main__":
    run_script(main)
