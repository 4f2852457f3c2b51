"""Reports in `eval/` and the last line of metrics.jsonl as columns of tables."""

import json

import pytest

from base.errors import ConfigError
from reports.attack_columns import attack_columns
from reports.groups import group_runs
from reports.runs import find_runs
from reports.tables import best_rows, compare, write_table

KEY = "arch.args.conv_layer_type"
PGD = {
    "attack": "PGD",
    "norm": "linf",
    "epsilon": 8 / 255,
    "steps": 20,
    "n": 50,
    "checkpoint": "a/model_best.pth",
}


def report(folder, name, accuracy, **values):
    (folder / "eval").mkdir(exist_ok=True)
    (folder / "eval" / f"{name}.json").write_text(
        json.dumps({**PGD, "robust_top1": accuracy, **values})
    )


@pytest.fixture
def methods(make_run, tmp_path):
    """Two methods of three seeds, each with a report of two attacks, whose seed is the run's."""
    for method, base in {"conv": 0.40, "sn_conv": 0.30}.items():
        for seed in (6, 8, 666):
            values = {"val_top1": [0.1, base], "top1": [0.2, base + 0.1]}
            folder = make_run(
                f"{method}{seed}",
                values,
                {"test_top1": 0.5},
                seed=seed,
                arch={"args": {KEY[10:]: method}},
            )
            report(folder, f"pgd-20_linf_8_step_2_1_start_seed{seed}", base + seed / 1e4)
            report(folder, f"fgsm_linf_8_seed{seed}", base + 0.1, attack="FGSM", steps=None)
            report(folder, "pgd_best", 0.9)
    return lambda: group_runs(find_runs([tmp_path]), [KEY])


def test_means_and_standard_deviations_over_seeds(methods):
    columns = attack_columns(methods(), ["pgd-20", "fgsm"])
    assert columns == [
        "eval.pgd-20_linf_8_step_2_1_start.robust_top1",
        "eval.fgsm_linf_8.robust_top1",
    ]
    conv, sn_conv = compare(methods(), [*columns, "last_epoch.val_top1", "last_epoch.top1"]).rows
    assert (conv.name, conv.n) == ("conv", 3)
    assert conv.cells[0].values == pytest.approx({6: 0.4006, 8: 0.4008, 666: 0.4666})
    assert [sn_conv.cells[column].mean for column in (1, 2, 3)] == pytest.approx([0.4, 0.3, 0.4])


def test_names_select_kinds_beginnings_and_patterns(methods):
    def kinds(*names):
        return [
            column.removeprefix("eval.").removesuffix(".robust_top1")
            for column in attack_columns(methods(), names)
        ]

    pgd = "pgd-20_linf_8_step_2_1_start"
    assert kinds("pgd") == [pgd, "pgd_best"]
    assert kinds("pgd_best", "pgd") == ["pgd_best", pgd]
    assert kinds("*linf*") == ["fgsm_linf_8", pgd]
    with pytest.raises(
        ConfigError,
        match=r"^--eval pgd-2: no run has such a report in eval/; there are: fgsm_linf_8, pgd-20_",
    ):
        kinds("pgd-2")


def test_several_attack_seeds_of_one_run_are_one_number(methods, tmp_path):
    report(tmp_path / "conv6", "fgsm_linf_8_seed7", 0.7, attack="FGSM", steps=None)
    row = compare(methods(), attack_columns(methods(), ["fgsm"])).rows[0]
    assert row.cells[0].values == pytest.approx({6: 0.6, 8: 0.5, 666: 0.5})


def test_different_attacks_do_not_share_a_column(methods, tmp_path, caplog):
    for method in ("conv", "sn_conv"):
        for seed in (6, 8, 666):
            report(
                tmp_path / f"{method}{seed}",
                "pgd_best",
                0.5,
                steps=20 if method == "conv" else 10,
                reliable=False,
            )
    assert attack_columns(methods(), ["pgd_best"]) == ["eval.pgd_best.robust_top1"]
    assert "pgd_best: the attack changes from row to row: steps is 20 in" in caplog.text
    assert caplog.text.count("not reliable: a check of the attack failed") == 6
    report(tmp_path / "conv8", "pgd_best", 0.5, n=40)
    with pytest.raises(
        ConfigError,
        match=r"^--eval pgd_best: n is 50 in .*conv6.*, but 40 in .*conv8.*: one column holds one",
    ):
        attack_columns(methods(), ["pgd_best"])
    report(tmp_path / "conv8", "pgd_best", 0.5)
    for key, value, other in (
        ("precision", "fp32", "bf16, verdicts in fp32"),
        ("data_digest", "0a", "0b"),
        ("decay", 0.5, 0.9),
    ):
        report(tmp_path / "conv6", "pgd_best", 0.5, **{key: value})
        attack_columns(methods(), ["pgd_best"])
        report(tmp_path / "conv8", "pgd_best", 0.5, **{key: other})
        with pytest.raises(ConfigError, match=f"pgd_best: {key} is {value} in .*, but {other} in"):
            attack_columns(methods(), ["pgd_best"])
        # One of an older version, which lacks the key, does not hide the difference
        report(tmp_path / "conv6", "pgd_best", 0.5)
        report(tmp_path / "conv666", "pgd_best", 0.5, **{key: value})
        with pytest.raises(ConfigError, match=f"pgd_best: {key} is {other} in .*, but {value} in"):
            attack_columns(methods(), ["pgd_best"])
        report(tmp_path / "conv666", "pgd_best", 0.5)
        report(tmp_path / "conv8", "pgd_best", 0.5, seconds=2.0, seed=3, warnings=["a"])


def test_a_column_is_read_by_the_value_and_not_by_the_reports_name(methods, tmp_path):
    """The names of reports hold words such as "early stop" and "margin loss"."""
    kind = "pgd-2_linf_8_margin_loss_no_early_stop"
    for method, base in {"conv": 0.4, "sn_conv": 0.3}.items():
        for seed in (6, 8, 666):
            report(tmp_path / f"{method}{seed}", kind, base + seed / 1e5, seconds=100 * base)
    columns = [f"eval.{kind}.{name}" for name in ("seconds", "n", "robust_top1")]
    table = compare(methods(), columns)
    assert [best_rows(table, column) for column in range(3)] == [set(), set(), {0}]
    write_table(tmp_path / "table.md", table)
    head, _, conv, *_, note = (tmp_path / "table.md").read_text().splitlines()
    assert [cell.endswith("(%)") for cell in head.split(" | ")[2:]] == [False, False, False]
    assert conv == "| conv | 3 | 40 ± 0 | 50 ± 0 | **40.23 ± 0.38** |"
    assert "`eval.`: from that report of `eval/`. `robust_top1`: top-1 accuracy under" in note
    write_table(tmp_path / "table.md", compare(methods(), columns[:1]))
    assert "under attack" not in (tmp_path / "table.md").read_text()


def test_a_broken_report_is_named(methods, tmp_path):
    (tmp_path / "conv8" / "eval" / "pgd_best.json").write_text("[1")
    with pytest.raises(ConfigError, match=r"conv8/eval/pgd_best.json: is not a JSON object$"):
        attack_columns(methods(), ["fgsm"])
