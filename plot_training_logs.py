"""Curves and tables from run folders: means and spreads over seeds.

python plot_training_logs.py saved/norms --metric val_top1 val_robust_top1 --group-by arch.args.norm_layer_type --out curves.png
python plot_training_logs.py saved/noise --group-by arch.args.conv_layer_type --against trainer.percent --out noise.pdf
python plot_training_logs.py saved/norms --group-by arch.args.norm_layer_type --table results.tex --baseline bn
"""

from base.command_line import Parser, run_script
from base.errors import ConfigError
from reports import panels, tables
from reports.curves import against_figure, curves_figure
from reports.groups import group_runs
from reports.output import check_output
from reports.panels import save_figure
from reports.runs import find_runs, only_finished


def main() -> None:
    parser = Parser(description="Curves and tables from run folders: means and spreads over seeds.", allow_abbrev=False)
    parser.add_argument("paths", nargs="+", metavar="RUN_OR_FOLDER", help="run folders, or folders with run folders below them")
    parser.add_argument("--group-by", nargs="+", default=[], metavar="KEY", help="config keys or axes of a study; its variants")
    parser.add_argument("--out", metavar="FILE", help="picture to write: .png, .pdf or .svg")
    parser.add_argument("--metric", nargs="+", metavar="NAME", help="a panel each; default: clean and robust top-1")
    parser.add_argument("--against", metavar="KEY", help="final values against this config key instead of curves over epochs")
    parser.add_argument("--table", metavar="FILE", help="table to write: .md, .tex or .csv")
    parser.add_argument("--result", nargs="+", metavar="NAME", help="values of result.json, a column each; default: accuracies")
    parser.add_argument("--baseline", metavar="ROW", help="row of the table that the others are tested against")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    if not (arguments.out or arguments.table):
        raise ConfigError("nothing to write: name a picture with --out FILE or a table with --table FILE")
    for needed, flags in (("out", ["metric"]), ("table", ["result", "baseline"])):
        if vars(arguments)[needed] is None and any(vars(arguments)[flag] for flag in flags):
            raise ConfigError(f"--{' and --'.join(flags)}: no effect without --{needed} FILE")
    for path, formats, what in ((arguments.out, panels.FORMATS, "pictures"), (arguments.table, tables.FORMATS, "tables")):
        if path:
            check_output(path, formats, what)

    runs, key = find_runs(arguments.paths), arguments.against
    by = arguments.group_by or (["variant"] if not key and all(run.labels for run in runs) else [])
    keys = [*(one for one in by if one != key), *([key] if key else [])]
    groups = group_runs(runs, keys)
    finished = group_runs(only_finished(runs), keys) if arguments.table or key else []
    if arguments.out:
        metrics = arguments.metric
        figure = against_figure(finished, key, metrics) if key else curves_figure(groups, metrics)
    if arguments.table:
        table = tables.compare(finished, arguments.result, arguments.baseline, by_last_key=bool(key and keys[1:]))
        tables.write_table(arguments.table, table)
    if arguments.out:
        save_figure(figure, arguments.out)
    for path, shown in ((arguments.out, finished if key else groups), (arguments.table, finished)):
        if path:
            print(f"wrote {path}: {sum(len(group.runs) for group in shown)} runs in {len(shown)} groups")


if __name__ == "__main__":
    run_script(main)
