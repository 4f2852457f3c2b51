"""Promise 7: reading runs no code. Every checkpoint, label file and array is read without
unpickling anything but tensors and plain values; code of a user's own runs only if a config that
`-c` gives, or `--imports`, names it, never because a checkpoint or a run folder asks for it; names
in configs resolve only through the tables and what was imported so; paths in configs cannot leave
`save_dir` for what is written. (Secrets: `test_07_secrets.py`; archives: `test_09_data.py`.)"""

import ast
import json
import os
import pickle
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from base.checkpoint import resume as resuming
from base.checkpoint import save_checkpoint
from base.config import Config, imports, load_config, validate
from base.errors import CheckpointError, ConfigError
from base.optim import check_optimization
from experiment.experiment import resume
from reports.runs import read_run
from tiny_runs import run

ROOT = Path(__file__).parents[2]
ROOMS = [folder for folder in ROOT.iterdir() if (folder / "__init__.py").exists()]
CODE = [*ROOT.glob("*.py"), *(file for room in ROOMS for file in room.rglob("*.py"))]


class Malicious:
    def __reduce__(self):
        return os.mkdir, (str(Malicious.place),)


def malicious_files(folder):
    """Write files that make a folder when they are unpickled, in every format that uses pickle."""
    contents = {"state_dict": {"weight": torch.zeros(1)}, "epoch": 1, "config": Malicious()}
    torch.save(contents, folder / "zip.pth")
    torch.save(contents, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    (folder / "pickle.pth").write_bytes(pickle.dumps(contents))
    (folder / "run").mkdir()
    torch.save(contents, folder / "run" / "model_best.pth")
    torch.save(contents, folder / "run" / "model_last.pth")
    np.save(folder / "noise.npy", np.array([Malicious()], dtype=object), allow_pickle=True)
    np.save(folder / "dict.npy", {"labels": Malicious()}, allow_pickle=True)
    np.savez(folder / "noise.npz", labels=np.array([Malicious()], dtype=object))
    torch.save({"labels": Malicious()}, folder / "noise.pt")
    return [folder / name for name in ("zip.pth", "legacy.pth", "pickle.pth", "run")]


def entry_points(folder, config):
    """Return every command line that reads a file which may come from others."""
    for file in malicious_files(folder):
        yield ["train.py", "-r", file]
        yield ["train_robust.py", "-r", file]
        for script in ("validate_pgd.py", "fgsm.py", "spectrum.py", "class_report.py"):
            yield [script, "-s", file]
            yield [script, "-s", file, "-c", config]
    for noise in ("noise.npy", "dict.npy", "noise.npz", "noise.pt"):
        yield ["train.py", "-c", config, "--set", f"trainer.noise_file={folder / noise}"]
    yield ["plot_training_logs.py", folder / "run"]


def check_every_entry_point(folder, monkeypatch, config):
    Malicious.place = folder / "ran"
    folder.mkdir()
    tried = 0
    (folder / "config.json").write_text(json.dumps(config.dump()))
    for script, *words in entry_points(folder, folder / "config.json"):
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert not Malicious.place.exists(), f"{script} {words} has run what it read"
        assert ended.value.code in (2, 3, 4), f"{script} {words}: exit {ended.value.code}"
        tried += 1
    return tried


def test_no_entry_point_runs_what_it_reads(tmp_path, monkeypatch, small):
    assert check_every_entry_point(tmp_path / "x", monkeypatch, small()) == 4 * 10 + 5


@pytest.mark.parametrize("reader", ["torch", "numpy"])
def test_the_check_can_fail(tmp_path, monkeypatch, small, reader):
    if reader == "torch":
        load = torch.load
        monkeypatch.setattr(
            torch,
            "load",
            lambda *args, **options: load(*args, **{**options, "weights_only": False}),
        )
    else:
        load_array = np.load
        monkeypatch.setattr(
            np,
            "load",
            lambda *args, **options: load_array(*args, **{**options, "allow_pickle": True}),
        )
    with pytest.raises(AssertionError, match="has run what it read"):
        check_every_entry_point(tmp_path / "x", monkeypatch, small())


def folder_that_asks_for_code(folder, config):
    """A run folder whose config names a file that makes a folder when it runs."""
    Malicious.place = folder / "ran"
    (folder / "run").mkdir(parents=True)
    code = folder / "asked_for.py"
    code.write_text(f"import os\nos.mkdir({str(Malicious.place)!r})\n")
    tree = {**config.dump(), "imports": [{"file": str(code)}]}
    for name in ("model_best.pth", "model_last.pth"):
        save_checkpoint(folder / "run" / name, {"state_dict": {}, "config": tree})
    (folder / "run" / "config.json").write_text(json.dumps(tree))
    (folder / "run" / "metrics.jsonl").write_text('{"epoch": 1, "loss": 1.0}\n')
    return folder / "run", code


def check_code_that_is_asked_for(folder, monkeypatch, config):
    run_folder, code = folder_that_asks_for_code(folder, config)
    evaluating = ("validate_pgd.py", "fgsm.py", "spectrum.py", "class_report.py")
    for place in (run_folder, run_folder / "model_last.pth"):
        commands = [
            ["train.py", "-r", place],
            ["train_robust.py", "-r", place],
            ["train.py", "--print-config", "-r", place],
        ]
        for script, *words in [*commands, *([script, "-s", place] for script in evaluating)]:
            monkeypatch.setattr(sys, "argv", [str(ROOT / script), *map(str, words)])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            assert not Malicious.place.exists(), (
                f"{script} {words} has run what the checkpoint asks for"
            )
            assert ended.value.code == 3, f"{script} {words}: exit {ended.value.code}"
    read_run(run_folder)
    assert not Malicious.place.exists()
    return code


def test_no_entry_point_runs_code_that_a_run_asks_for(tmp_path, monkeypatch, small, capsys):
    code = check_code_that_is_asked_for(tmp_path / "x", monkeypatch, small())
    assert capsys.readouterr().err.count(f": add --imports {code}") == 14


def test_the_check_of_code_that_is_asked_for_can_fail(tmp_path, monkeypatch, small, own_code):
    def run(recorded, source):
        return imports.import_own_code(
            imports.requests_of_flag([code.file_or_module for code in recorded])
        )

    monkeypatch.setattr(resuming, "imported_for", run)
    with pytest.raises(AssertionError, match="has run what the checkpoint asks for"):
        check_code_that_is_asked_for(tmp_path / "x", monkeypatch, small())
    sys.modules.pop("asked_for", None)


def unsafe_calls(text):
    """Return the calls in Python source that unpickle or run their arguments."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        unsafe = name in (
            "eval",
            "exec",
            "pickle.load",
            "pickle.loads",
            "joblib.load",
            "yaml.load",
            "os.system",
        )
        unsafe |= name == "torch.load" and options.get("weights_only") != "True"
        unsafe |= name == "np.load" and options.get("allow_pickle", "False") != "False"
        unsafe |= options.get("shell") == "True"
        if unsafe:
            found.append(name)
    return found


BETWEEN_PROCESSES = {"base/distributed/collectives.py": ["pickle.loads"]}
"""Processes of one job send each other pickled objects. Nothing else is unpickled."""


def test_no_source_unpickles_or_evaluates():
    found = {file.relative_to(ROOT).as_posix(): unsafe_calls(file.read_text()) for file in CODE}
    assert {name: calls for name, calls in found.items() if calls} == BETWEEN_PROCESSES
    assert len(CODE) > 100


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "eval(x)",
    ],
)
def test_the_check_of_sources_can_fail(text):
    assert unsafe_calls(text)


NAMES = ("..", ".", "", "a/b", "/etc", "../up", "a\\b", "a\0b")


def check_names(folder, config):
    """Names that would lead out of `save_dir` are refused; odd ones that do not are folders in
    it."""
    refused = 0
    for name in NAMES:
        with pytest.raises(ConfigError, match="name"):
            validate({**config.dump(), "name": name})
        refused += 1
    tree = config.dump()
    tree["trainer"] |= {"save_dir": str(folder / "saved"), "epochs": 1}
    for name in ("~", "-rf", "..x", " ", "$HOME", "имя 🙂"):
        run(None, validate({**tree, "name": name}))
        assert len(list((folder / "saved" / name).glob("*/result.json"))) == 1, name
    return refused


def test_names_cannot_leave_save_dir(tmp_path, monkeypatch, small):
    assert check_names(tmp_path, small()) == len(NAMES)


@pytest.fixture
def any_name_will_do(monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(Config.model_fields["name"], "metadata", [])
        Config.model_rebuild(force=True)
        yield
    Config.model_rebuild(force=True)


def test_the_check_of_names_can_fail(tmp_path, small, any_name_will_do):
    with pytest.raises(pytest.fail.Exception):
        check_names(tmp_path, small())


def check_tables(config, key, name):
    resolved = load_config(config, [(key, name)])
    check_optimization(resolved.optimizer, resolved.lr_scheduler)


@pytest.mark.parametrize(
    "key", ["arch.type", "data_loader.type", "optimizer.type", "lr_scheduler.type", "train_loss"]
)
@pytest.mark.parametrize(
    "name",
    ["os.system", "__import__", "torch.hub.load", "builtins", "Optimizer.__class__", "__class__"],
)
def test_names_resolve_only_through_tables(tmp_path, small, key, name):
    (tmp_path / "config.json").write_text(json.dumps(small().dump()))
    with pytest.raises(ConfigError, match=key):
        check_tables(tmp_path / "config.json", key, name)


def test_a_checkpoints_config_is_as_little_trusted(tmp_path, small):
    save_checkpoint(
        tmp_path / "model_last.pth",
        {"state_dict": {}, "config": {**small().dump(), "name": "../up"}},
    )
    with pytest.raises(CheckpointError, match="name: .*the checkpoint's own config cannot be used"):
        resume(str(tmp_path))
