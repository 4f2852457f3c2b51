"""Figures show the values of the runs: means, standard deviations, skipped epochs, percent."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from base.errors import ConfigError
from base.output import PICTURES, check_outputs, save_figure
from reports.curves import against_figure, curves_figure
from reports.groups import group_runs
from reports.panels import COLORS, LINES, MARKERS
from reports.runs import find_runs


@pytest.fixture
def norms(make_run, tmp_path):
    """Two seeds of bn, one of gn, robust accuracy every other epoch."""
    robust = {"val_robust_top1": [None, 0.2, None, 0.4]}
    make_run(
        "a",
        {"val_top1": [0.5, 0.6, 0.7, 0.8], "loss": [4.0, 3.0, 2.0, 1.0], **robust},
        {"test_top1": 0.7},
        seed=0,
    )
    make_run(
        "b",
        {"val_top1": [0.7, 0.6, 0.9, 0.8], "loss": [4.0, 1.0, 2.0, 3.0], **robust},
        {"test_top1": 0.8},
        seed=1,
    )
    make_run(
        "c",
        {"val_top1": [0.1, 0.2, 0.3, 0.4], "loss": [4.0, 3.0, 2.0, 1.0]},
        arch={"args": {"norm_layer_type": "gn"}},
    )
    return group_runs(find_runs([tmp_path]), ["arch.args.norm_layer_type"])


def words(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()], legend.get_title().get_text()


def test_lines_are_means_and_bands_one_standard_deviation_in_percent(norms):
    axes = curves_figure(norms, ["val_top1"]).axes[0]
    bn, gn = axes.lines
    assert np.allclose(bn.get_xydata(), [(1, 60), (2, 60), (3, 80), (4, 80)])
    assert np.allclose(gn.get_ydata(), [10, 20, 30, 40])
    (band,) = axes.collections  # a single seed has none
    vertices = band.get_paths()[0].vertices
    spread = 100 * 0.1 * 2**0.5  # of two values 0.2 apart
    for edge in (
        (1, 60 - spread),
        (1, 60 + spread),
        (2, 60),
        (3, 80 - spread),
        (3, 80 + spread),
        (4, 80),
    ):
        assert np.isclose(vertices, edge).all(axis=1).any(), edge
    assert np.isclose(vertices[:, 1].max(), 80 + spread)
    assert axes.get_ylabel() == "val_top1 in %"
    assert words(curves_figure(norms, ["val_top1"])) == (
        ["bn  (n = 2)", "gn  (n = 1)"],
        "mean over seeds, band: one standard deviation to either side",
    )
    assert words(curves_figure(norms[1:], ["val_top1"])) == (["gn  (n = 1)"], "")
    crowd = curves_figure(4 * norms, ["val_top1"])
    assert not crowd.axes[0].collections, "eight bands would be one gray area"
    assert words(crowd)[1] == "mean over seeds"


def test_clean_panels_stand_left_and_epochs_without_a_measurement_are_skipped(norms):
    left, right = curves_figure(norms, ["val_robust_top1", "val_top1"]).axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("val_top1 in %", "val_robust_top1 in %")
    (line,) = right.lines  # the other group has not measured it
    assert np.allclose(line.get_xydata(), [(2, 20), (4, 40)])
    assert [axes.get_ylabel() for axes in curves_figure(norms).axes] == [
        "val_top1 in %",
        "val_robust_top1 in %",
    ]
    loss = curves_figure(norms, ["loss"]).axes[0]
    assert (loss.get_ylabel(), loss.lines[0].get_ydata().tolist()) == ("loss", [4, 2, 2, 2])


def test_a_line_skips_epochs_that_a_seed_did_not_measure(make_run, tmp_path, caplog):
    make_run("a", {"val_top1": [0.5, 0.6, 0.7]}, seed=0)
    make_run("b", {"val_top1": [0.5, 0.8]}, seed=1)
    axes = curves_figure(group_runs(find_runs([tmp_path]), []), ["val_top1"]).axes[0]
    assert np.allclose(axes.lines[0].get_xydata(), [(1, 50), (2, 70)])
    assert (
        f"made: val_top1 is drawn for 2 of 3 epochs,"
        f" because {tmp_path / 'b'} has no value for the others" in caplog.text
    )


def test_a_seed_that_diverged_leaves_a_gap_and_is_named(make_run, tmp_path, caplog):
    loss = {0: [2.0, 1.0, 1.0], 1: [2.0, 1.0, float("nan")]}
    for seed, values in loss.items():
        noisy(make_run, seed, 0.2, [0.5, 0.5, 0.5], {"test_top1": 0.5}, val_loss=values)
    groups = group_runs(find_runs([tmp_path]), ["trainer.percent"])
    line = curves_figure(groups, ["val_loss"]).axes[0].lines[0]
    assert np.array_equal(line.get_xydata(), [(1, 2), (2, 1), (3, np.nan)], equal_nan=True)
    bad = f"{tmp_path / '1_0.2_0'}: val_loss is not finite"
    assert f"{bad} (first in epoch 3): the run has diverged" in caplog.text
    assert "has no value" not in caplog.text
    point = against_figure(groups, "trainer.percent", ["val_loss"]).axes[0].lines[0]
    assert np.isnan(point.get_ydata()).all()
    assert f"{bad} (at the end)" in caplog.text


def noisy(make_run, seed, rate, values, result=None, val_loss=None, **sections):
    trainer = {"percent": rate, "sym": True, **sections.pop("trainer", {})}
    return make_run(
        f"{seed}_{rate}_{len(sections)}",
        {"val_top1": values, "val_loss": val_loss or [None] * len(values)},
        result,
        seed=seed,
        trainer=trainer,
        **sections,
    )


def test_final_values_against_a_key(make_run, tmp_path):
    for seed, shift in ((0, 0.0), (1, 0.1)):
        noisy(make_run, seed, 0.4, [0.9, 0.5 + shift], {"test_top1": 0.3 + shift})
        noisy(make_run, seed, 0.2, [0.1, 0.7 + shift], {"test_top1": 0.6 + shift})
    noisy(
        make_run, 0, 0.2, [0.1, 0.2], {"test_top1": 0.2}, arch={"args": {"norm_layer_type": "gn"}}
    )
    cells = group_runs(find_runs([tmp_path]), ["arch.args.norm_layer_type", "trainer.percent"])
    figure = against_figure(cells, "trainer.percent")
    axes = figure.axes[0]
    points = {
        line.get_marker(): line.get_xydata()
        for line in axes.lines
        if len(line.get_xydata()) and line.get_linestyle() != "None"
    }
    assert np.allclose(points[MARKERS[0]], [(0.2, 65), (0.4, 35)])
    assert np.allclose(points[MARKERS[1]], [(0.2, 20)])
    bars = np.array([bar for collection in axes.collections for bar in collection.get_segments()])
    spread = 100 * 0.05 * 2**0.5
    assert np.allclose(
        bars, [[(0.2, 65 - spread), (0.2, 65 + spread)], [(0.4, 35 - spread), (0.4, 35 + spread)]]
    )
    assert words(figure) == (
        ["bn  (n = 2)", "gn  (n = 1)"],
        "mean over seeds, error bars: one standard deviation to either side",
    )
    assert axes.get_xlabel() == "rate of label noise (trainer.percent)"
    last = against_figure(cells, "trainer.percent", ["val_top1"]).axes[0].lines[0]
    assert np.allclose(last.get_xydata(), [(0.2, 75), (0.4, 55)])


def test_noise_is_drawn_at_the_realized_rate(make_run, tmp_path):
    rates = {(0, 0.5): 0.26, (1, 0.5): 0.24, (0, 0.1): 0.05}
    for (seed, rate), realized in rates.items():
        noisy(make_run, seed, rate, [0.5], {"test_top1": 0.3, "noise_rate": realized})
    older = noisy(make_run, 1, 0.1, [0.5], {"test_top1": 0.3})
    clean = np.arange(50) % 3
    changed = np.where(np.arange(50) < 3, (clean + 1) % 3, clean)
    np.savez(older / "labels.npz", train_label=changed, train_clean_label=clean)
    noisy(make_run, 0, 0.0, [0.5], {"test_top1": 0.9})
    cells = group_runs(find_runs([tmp_path]), ["trainer.percent"])
    axes = against_figure(cells, "trainer.percent", ["test_top1"]).axes[0]
    assert np.allclose(axes.lines[0].get_xdata(), [0, (0.05 + 0.06) / 2, 0.25])
    assert np.allclose(axes.lines[0].get_ydata(), [90, 30, 30])
    assert axes.get_xlabel() == "realized rate of label noise (requested by trainer.percent)"
    for damage in (b"damaged", b"", b"PK\x03\x04", (older / "labels.npz").read_bytes()[:-40]):
        (older / "labels.npz").write_bytes(damage)
        axes = against_figure(cells, "trainer.percent", ["test_top1"]).axes[0]
        assert np.allclose(axes.lines[0].get_xdata(), [0, 0.1, 0.5]), "not known of one of them"
        assert axes.get_xlabel() == "rate of label noise (trainer.percent)"


def test_axis_of_epsilon_has_its_unit_and_other_differences_are_named(make_run, tmp_path, caplog):
    for epsilon, epochs in ((4, 10), (8, 20)):
        make_run(
            f"{epsilon}",
            {"val_top1": [0.5]},
            {"x": 1},
            trainer={"epochs": epochs},
            adversarial={"epsilon": epsilon},
        )
    cells = group_runs(find_runs([tmp_path]), ["adversarial.epsilon"])
    figure = against_figure(cells, "adversarial.epsilon", ["val_top1"])
    assert (
        figure.axes[0].get_xlabel()
        == "epsilon of training and of the attack (1/255 of the pixel range, l-inf)"
    )
    assert words(figure)[0] == ["all runs  (n = 1)"]
    assert [record.getMessage() for record in caplog.records] == [
        "all runs: trainer.epochs also differs along the line: 10 and 20"
    ]
    make_run("l2", {"val_top1": [0.5]}, {"x": 1}, adversarial={"epsilon": 0.5, "norm": "l2"})
    with pytest.raises(
        ConfigError, match="l-inf and l2 runs have different units; plot them separately"
    ):
        against_figure(
            group_runs(find_runs([tmp_path]), ["adversarial.epsilon"]),
            "adversarial.epsilon",
            ["val_top1"],
        )


def test_accuracies_beyond_0_and_100_are_not_on_the_axis(make_run, tmp_path):
    make_run("a", {"val_top1": [1.0, 0.0]}, seed=0)
    make_run("b", {"val_top1": [0.9, 0.1]}, seed=1)
    bottom, top = (
        curves_figure(group_runs(find_runs([tmp_path]), []), ["val_top1"]).axes[0].get_ylim()
    )
    assert -1 <= bottom < 0
    assert 100 < top <= 101


def test_lines_differ_in_gray_and_without_color():
    gray = [float(np.dot(to_rgb(color), (0.299, 0.587, 0.114))) for color in COLORS]
    assert min(abs(a - b) for a, b in zip(gray, [*gray[1:], gray[0]], strict=True)) > 0.1
    assert max(gray) < 0.75, "seen on white"
    styles = {(COLORS[index % len(COLORS)], LINES[index % len(LINES)]) for index in range(28)}
    assert len(styles) == 28
    assert (
        len({(LINES[index % len(LINES)], MARKERS[index % len(MARKERS)]) for index in range(8)}) == 8
    )


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg", "PNG"])
def test_every_format_and_names_of_all_kinds(make_run, tmp_path, suffix):
    make_run("a", {"val_top1": [0.5, 0.6]}, {"test_top1": 0.5}, name="_$x_{1}$")
    groups = group_runs(find_runs([tmp_path]), ["name"])
    path = tmp_path / "new" / f"curves.{suffix}"
    check_outputs({"--out": path}, {"--out": PICTURES})
    save_figure(curves_figure(groups, ["val_top1"]), path)
    assert path.read_bytes().startswith(
        {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix.lower()]
    )
    assert words(curves_figure(groups, ["val_top1"]))[0] == ["_$x_{1}$  (n = 1)"]


def test_errors(norms, tmp_path):
    messages = {
        "val_topp1": r"^--metric val_topp1: no run logs it;"
        r" there are: val_top1, loss, val_robust_top1; did you mean",
        "test_top1": "measured once, after training: use --table or --against$",
    }
    for metric, message in messages.items():
        with pytest.raises(ConfigError, match=message):
            curves_figure(norms, ["val_top1", metric])
    with pytest.raises(
        ConfigError, match=r"^--against arch.args.norm_layer_type: bn in .*a is not a number$"
    ):
        against_figure(norms, "arch.args.norm_layer_type", ["val_top1"])
    with pytest.raises(
        ConfigError,
        match=r"^--metric test_top5: no run measured it;"
        r" there are: val_top1, loss, val_robust_top1, test_top1",
    ):
        against_figure(norms, "arch.args.norm_layer_type", ["test_top5"])
    with pytest.raises(
        ConfigError,
        match=r"a.bmp: '.bmp' is not a format of pictures; expected one of: png, pdf, svg$",
    ):
        check_outputs({"--out": tmp_path / "a.bmp"}, {"--out": PICTURES})
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/curves.png: cannot be written: "):
        check_outputs({"--out": tmp_path / "file" / "curves.png"}, {"--out": PICTURES})
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ConfigError, match=r"folder.png: cannot be written: a folder"):
        check_outputs({"--out": tmp_path / "folder.png"}, {"--out": PICTURES})
    with pytest.raises(ConfigError, match=r"folder.png: cannot be written: Is a directory"):
        save_figure(curves_figure(norms, ["val_top1"]), tmp_path / "folder.png")


def test_without_a_default_metric_the_error_lists_the_known_ones(make_run, tmp_path):
    make_run("a", {"loss": [0.5]}, {"parameters": 5})
    groups = group_runs(find_runs([tmp_path]), ["seed"])
    with pytest.raises(ConfigError, match=r"^--metric val_top1: no run logs it; there are: loss$"):
        curves_figure(groups)
    with pytest.raises(
        ConfigError, match=r"^--metric test_top1: no run measured it; there are: loss, parameters$"
    ):
        against_figure(groups, "seed")
