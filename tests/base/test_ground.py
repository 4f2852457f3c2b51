"""The smaller parts of base: meters, train state, lookup, trackers, command line."""

import json
import logging
import os
import shlex
import signal
import sys
import zipfile
from math import inf, nan

import pytest
import torch

import models.layers  # noqa: F401 - fills the layer tables
from base.base_model import BaseModel
from base.command_line import (
    SHORT_FLAGS,
    config_overrides,
    config_parser,
    run_script,
    select_device,
)
from base.config import validate
from base.config.config import CometConfig
from base.config.files import override
from base.config.strict_json import parse_json
from base.config.tree import annotation_at
from base.errors import CheckpointError, ConfigError, DataError, NonFiniteError, Stopped
from base.meters import BatchResult, Meters
from base.output import replace_json
from base.registry import lookup
from base.secrets import command_without_key
from base.seeding import torch_generator
from base.tracking.start import start_trackers
from base.tracking.tracker import RunLog, Tracker, Trackers, _tag
from base.train_state import TrainState

DIGITS = {"data_loader": {"type": "DigitsDataLoader"}}


def test_meters_hold_sums_over_samples_not_means_of_means():
    meters = Meters()
    values = torch.rand(7, generator=torch_generator(0, "test"))
    for part in values.split([4, 2, 1]):
        meters.add(BatchResult({"loss": part.sum()}, len(part)))
    assert meters.means()["loss"] == pytest.approx(float(values.double().mean()), rel=1e-7)
    mean_of_means = sum(float(part.mean()) for part in values.split([4, 2, 1])) / 3
    assert meters.means()["loss"] != pytest.approx(mean_of_means, rel=1e-3), (
        "the test can tell the two apart"
    )
    resumed = Meters()
    resumed.load_state_dict(meters.state_dict(), torch.device("cpu"))
    assert resumed.means() == meters.means()
    assert Meters().means() == {}


def test_sums_from_a_cpu_go_on_on_a_device_without_float64():
    asked = []

    class Sum:
        def to(self, target):
            asked.append(target)
            return self

    Meters().load_state_dict({"sums": {"loss": Sum()}, "count": 3}, torch.device("mps"))
    assert asked == [torch.float32, torch.device("mps")]


@pytest.mark.parametrize(
    ("monitor", "values", "best_epoch", "without"),
    [
        ("max val_top1", [0.1, 0.3, 0.3, 0.2], 3, 2),
        ("min val_loss", [3.0, 1.0, 2.0, 0.5], 4, 0),
        ("off", [1.0, 2.0, 3.0], 3, 0),
        ("min val_loss", [nan, 2.0, nan, 3.0], 2, 2),
    ],
)
def test_the_train_state_holds_its_best_epoch(monitor, values, best_epoch, without):
    state = TrainState(batches_done=5)
    for value in values:
        state.finish_epoch({"val_top1": value, "val_loss": value}, monitor)
    assert (state.best_epoch, state.epochs_without_improvement) == (best_epoch, without)
    assert (state.epochs_done, state.batches_done, len(state.history)) == (
        len(values),
        0,
        len(values),
    )


@pytest.mark.parametrize("monitor", ["off", "max val_top1", "min val_loss"])
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_an_epoch_that_has_diverged_is_never_the_best(monitor, bad):
    state = TrainState()
    assert not state.finish_epoch({"val_top1": 0.9, "val_loss": 0.1, "loss": bad}, monitor)
    assert (state.best_epoch, state.best_value) == (None, None)
    assert state.finish_epoch({"val_top1": 0.2, "val_loss": 3.0, "loss": 1.0}, monitor)
    assert not state.finish_epoch({"val_top1": bad, "val_loss": bad, "loss": 1.0}, monitor)
    assert (state.best_epoch, state.epochs_without_improvement) == (2, int(monitor != "off"))


def test_json_holds_null_where_a_number_is_not_finite(tmp_path):
    replace_json(tmp_path / "a.json", {"a": nan, "b": [1.5, (inf, {"c": -inf})], "d": "NaN"})
    assert parse_json((tmp_path / "a.json").read_text()) == {
        "a": None,
        "b": [1.5, [None, {"c": None}]],
        "d": "NaN",
    }
    log = RunLog(tmp_path / "metrics.jsonl", [{"epoch": 1, "loss": nan}])
    log.log_epoch({"epoch": 2, "loss": inf})
    lines = [parse_json(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"epoch": 1, "loss": None}, {"epoch": 2, "loss": None}]


def test_lookup_lists_what_is_known():
    assert lookup({"a": 1}, "a", "key") == 1
    with pytest.raises(
        ConfigError,
        match=r"arch.type: 'resnet81' is not one of: resnet18, vgg11; did you mean 'resnet18'\?",
    ):
        lookup({"resnet18": 1, "vgg11": 2}, "resnet81", "arch.type")
    with pytest.raises(ConfigError, match="is not one of"):
        lookup({"a": 1}, ["a"], "key")


def test_model_normalizes_pixels_with_buffers_outside_its_state():
    class Identity(BaseModel):
        def forward_normalized(self, inputs):
            return inputs

    model = Identity(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    outputs = model(torch.full((1, 3, 1, 1), 0.75)).flatten()
    assert outputs.tolist() == [0.5, 2.0, 0.375]
    assert model.state_dict() == {}
    with pytest.raises(TypeError, match="abstract"):
        BaseModel()
    with pytest.raises(
        ConfigError, match=r"arch.args.norm_layer_type: 'bnn' .*did you mean 'bn'\?"
    ):
        Identity(norm_layer_type="bnn")


def test_secrets_are_cut_from_the_command():
    command = [
        "train.py",
        "--key",
        "s1",
        "--comet_key=s2",
        "--set",
        "comet.api=s3",
        "--set=comet.api=s4",
    ]
    command += [
        "--set",
        'comet={"api":"s5"}',
        "--set",
        "comet.apii=s6",
        "--set",
        "comet.api",
        "s7",
        "--seed",
        "1",
    ]
    cleaned = command_without_key(command)
    expected = (
        "train.py --key *** --comet_key=*** --set comet.api=*** --set=comet.api=*** --set comet=***"
    )
    expected += " --set comet.*** --set comet.api *** --seed 1"
    assert cleaned == shlex.split(expected)


def test_run_log_is_cut_back_to_the_resumed_history(tmp_path):
    log = RunLog(tmp_path / "metrics.jsonl")
    for epoch in (1, 2, 3):
        log.log_epoch({"epoch": epoch, "loss": 0.1})
    resumed = RunLog(tmp_path / "metrics.jsonl", [{"epoch": 1, "loss": 0.1}])
    resumed.log_epoch({"epoch": 2, "loss": 0.2})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"epoch": 1, "loss": 0.1},
        {"epoch": 2, "loss": 0.2},
    ]


@pytest.mark.parametrize("logged", [1, 2, 3])
def test_tensorboard_holds_every_epoch_once_also_after_a_kill(tmp_path, logged):
    """A killed run has saved two epochs, and logged one to three."""
    config = validate({**DIGITS, "trainer": {"tensorboard": True}})
    epochs = [{"epoch": epoch, "val_top1": epoch / 4} for epoch in (1, 2, 3)]
    for history, new in (([], epochs[:logged]), (epochs[:2], epochs[2:])):
        trackers = start_trackers(config, tmp_path, history)
        for log in new:
            trackers.log_epoch(log)
        trackers.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("top1/val")]
    assert found == [(1, 0.25), (2, 0.5), (3, 0.75)]
    (text,) = events.Tensors("config/text_summary")
    (shown,) = text.tensor_proto.string_val
    assert json.loads(shown) == config.dump()


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("loss", "loss/train"),
        ("val_loss", "loss/val"),
        ("val_ema_robust_top1", "robust_top1/val_ema"),
        ("lr", "lr"),
    ],
)
def test_charts_of_one_value_stand_beside_each_other(name, tag):
    assert _tag(name) == tag


@pytest.mark.filterwarnings("ignore")  # comet-ml's own imports warn
def test_comet_offline_writes_a_real_archive(tmp_path, monkeypatch):
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    config = validate({**DIGITS, "name": "my run", "comet": {"api": "secret-key", "offline": True}})
    trackers = start_trackers(config, tmp_path)
    trackers.log_epoch({"epoch": 1, "val_top1": 0.25})
    trackers.log_result({"test_top1": 0.5})
    trackers.close()
    archives = list((tmp_path / "comet").glob("*.zip"))
    assert len(archives) == 1
    with zipfile.ZipFile(archives[0]) as archive:
        text = b"".join(archive.read(name) for name in archive.namelist()).decode(errors="replace")
    assert "val_top1" in text
    assert "result_test_top1" in text
    assert "my run" in text
    assert "secret-key" not in text


@pytest.mark.parametrize(
    ("module", "tree"),
    [("comet_ml", {"comet": {}}), ("torch.utils.tensorboard", {"trainer": {"tensorboard": True}})],
)
def test_absent_tracker_is_one_warning(tmp_path, monkeypatch, caplog, module, tree):
    monkeypatch.setitem(sys.modules, module, None)
    with caplog.at_level(logging.WARNING):
        trackers = start_trackers(validate({**DIGITS, **tree}), tmp_path)
    assert [type(tracker) for tracker in trackers.trackers] == [RunLog]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not installed" in caplog.text


def test_a_tracker_that_fails_is_dropped_but_the_run_log_may_not_fail(tmp_path, caplog):
    class Broken(Tracker):
        def log_epoch(self, log):
            raise ConnectionError("no server")

    run_log = RunLog(tmp_path / "metrics.jsonl")
    trackers = Trackers([Broken(), run_log])
    trackers.log_epoch({"epoch": 1})
    assert trackers.trackers == [run_log]
    assert "Broken failed (no server): training goes on without it" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1}\n'
    run_log.path = tmp_path
    with pytest.raises(IsADirectoryError):
        trackers.log_epoch({"epoch": 2})


def test_comets_key_is_not_part_of_a_dump():
    assert "api" not in CometConfig(api="x").model_dump()


def test_short_flags_and_settings_become_overrides():
    arguments = config_parser("").parse_args(
        shlex.split(
            "-c x.json --sym --asym False --lr 0.5 --conv_layer conv"
            " --set trainer.epochs=3 --set name=a=b"
        )
    )
    overrides = config_overrides(arguments)
    assert overrides == [
        ("trainer.epochs", "3"), ("name", "a=b"), ("optimizer.args.lr", "0.5"),
        ("arch.args.conv_layer_type", "conv"), ("trainer.sym", "true"), ("trainer.asym", "False"),
    ]  # fmt: skip
    config = validate(override(DIGITS, overrides))
    assert (config.trainer.sym, config.trainer.asym, config.name) == (True, False, "a=b")


@pytest.mark.parametrize("key", [key for _, key, _ in SHORT_FLAGS])
def test_every_short_flag_names_a_config_key(key):
    section, _, name = key.rpartition(".")
    if section == "optimizer.args":  # the optimizer's own signature decides
        return
    assert annotation_at(key.split(".")) is not None, name


@pytest.mark.parametrize("words", [["--sedd", "1"], ["-c"]])
def test_wrong_command_line_is_one_line(words):
    with pytest.raises(ConfigError, match=r"\(see .* --help\)"):
        config_parser("").parse_args(words)
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        config_overrides(config_parser("").parse_args(["--set", "trainer.epochs"]))
    for devices in ("cuda:0", "0,,1", "0,0", "-1", ""):
        with pytest.raises(ConfigError, match=f"-d {devices}: expected the index of a CUDA device"):
            select_device(devices)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (CheckpointError("x"), 3),
        (DataError("x"), 4),
        (NonFiniteError("x"), 5),
        (Stopped("x", 2), 130),
        (Stopped("x", 15), 143),
        (KeyboardInterrupt(), 130),
        (None, 0),
    ],
)
def test_exit_codes(error, code, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def main():
        if error:
            raise error

    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert caught.value.code == code
    assert len(capsys.readouterr().err.splitlines()) == (1 if error else 0)


def test_ctrl_c_while_a_script_says_why_it_stops_changes_nothing(monkeypatch, capsys):
    def main():
        raise Stopped("saved", signal.SIGTERM)

    def interrupted(message, command):
        os.kill(os.getpid(), signal.SIGINT)
        return message

    monkeypatch.setattr("base.command_line.without_keys", interrupted)
    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert (caught.value.code, capsys.readouterr().err) == (143, "saved\n")


def test_a_command_ends_without_stdout(monkeypatch):
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: setattr(sys, "stdout", None))
    assert caught.value.code == 0


def test_debug_keeps_the_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--debug"])

    def main():
        raise ConfigError("x")

    with pytest.raises(ConfigError):
        run_script(main)


def test_sums_do_not_round_as_an_epoch_grows():
    meters = Meters()
    for value in (2.0**24, 1.0, 1.0, 1.0):
        meters.add(BatchResult({"loss": torch.tensor(value)}, 1))
    assert meters.means()["loss"] == (2**24 + 3) / 4
