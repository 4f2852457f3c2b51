"""Promise 13: training completes, with the same `metrics.jsonl`, without a GPU or any optional
package, in folders of any name, and with a terminal that can only show ASCII."""

import io
import json
import locale
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import base.run_folder.logs
import base.streams
import run_ablations
import train
import validate_pgd
from base.command_line import run_script
from base.config import files, validate
from base.tracking.tracker import TensorBoard, Trackers
from experiment import experiment
from tiny_runs import write_images

ROOT = Path(__file__).parents[2]
TINY = {
    "arch": {"type": "simpleCNN", "args": {"conv_layer_type": "conv", "norm_layer_type": "bn"}},
    "data_loader": {
        "type": "DigitsDataLoader",
        "args": {"batch_size": 8, "num_batches": 2, "validation_split": 0.1},
    },
    "trainer": {"epochs": 2},
    "system": {"num_threads": 1, "device": "cpu"},
}

# The imports of tensorboard and comet_ml warn.
pytestmark = pytest.mark.filterwarnings("ignore")


def warnings_in(folder):
    return [
        line
        for line in (folder / "info.log").read_text(encoding="utf-8").splitlines()
        if " INFO " not in line and line
    ]


def in_other_process(words, cwd):
    """Run Python with `words`; return exit code, stdout and stderr."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("COMET", "PYTHON"))
    }
    kept |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd, capture_output=True, timeout=200, env=kept,
    )  # fmt: skip
    return (
        done.returncode,
        done.stdout.decode(errors="replace"),
        done.stderr.decode(errors="replace"),
    )


OPTIONAL = ("comet_ml", "tensorboard", "pyautoattack", "submitit", "foolbox", "torchattacks")
BARE = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {optional}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import run_ablations, train, validate_pgd
from base.command_line import run_script
codes = []
for script, words in {calls}:
    sys.argv = [script, *words.split()]
    try:
        run_script(globals()[script].main)
    except SystemExit as end:
        codes.append(end.code)
print("\\n" + json.dumps(codes))
"""


def check_bare(tmp_path, start):
    """Train, attack and start a study without any optional package.

    `start` runs commands and returns their exit codes and stderr. Returns how many packages were
    missing.
    """
    tree = {**TINY, "comet": {}, "trainer": {"epochs": 2, "tensorboard": True}}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    (tmp_path / "grid.json").write_text(json.dumps({"variants": {"only": "config.json"}}))
    calls = [
        ("train", "-c config.json --run_dir run"),
        ("validate_pgd", "-s run --autoattack --limit 10"),
        ("run_ablations", "--grid grid.json --all --launcher local"),
    ]
    codes, errors = start(calls)
    assert codes == [0, 2, 2], errors
    autoattack, submitit = errors.splitlines()
    assert 'pip install -e ".[autoattack]"' in autoattack
    assert 'pip install -e ".[slurm]"' in submitit
    said = warnings_in(tmp_path / "run")
    assert len(said) == 2
    assert all("is asked for but not installed" in line for line in said)
    experiment.Experiment.from_config(validate(TINY)).run(str(tmp_path / "with all packages"))
    metrics = [
        (tmp_path / name / "metrics.jsonl").read_bytes() for name in ("run", "with all packages")
    ]
    assert metrics[0] == metrics[1]
    return len(OPTIONAL)


def test_without_optional_packages_and_gpu(tmp_path):
    def in_bare_process(calls):
        code, output, errors = in_other_process(
            ["-c", BARE.format(optional=OPTIONAL, calls=calls)], tmp_path
        )
        assert code == 0, errors
        return json.loads(output.splitlines()[-1]), errors

    assert check_bare(tmp_path, in_bare_process) == 6


def test_the_check_can_fail_for_packages(tmp_path, monkeypatch, capfd):
    def here(calls):
        monkeypatch.chdir(tmp_path)
        scripts = {"train": train, "validate_pgd": validate_pgd, "run_ablations": run_ablations}
        return [
            call(monkeypatch, scripts[name], *words.split()) for name, words in calls
        ], capfd.readouterr().err

    for module in [name for name in sys.modules if name.partition(".")[0] in OPTIONAL] + list(
        OPTIONAL
    ):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setattr(
        experiment,
        "start_trackers",
        lambda config, folder, history: Trackers([TensorBoard(folder, config)]),
    )
    with pytest.raises(ImportError, match="tensorboard"):
        check_bare(tmp_path, here)


def image_folder(root):
    """Two classes of a few 8x8 images, one with a Cyrillic name."""
    for part in ("train", "test"):
        write_images(root / part, {"кот": 6, "dog": 6})


def tree_of_images(data_dir, **rest):
    loader = {
        "type": "ImageFolderDataLoader",
        "args": {"data_dir": data_dir, "batch_size": 4, "validation_split": 0.3},
    }
    return {
        **TINY,
        "data_loader": loader,
        "trainer": {"epochs": 1, "sym": True, "percent": 0.3, **rest},
    }


def call(monkeypatch, script, *words):
    """Run a command in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
    with pytest.raises(SystemExit) as end:
        run_script(script.main)
    return end.value.code


def check_paths(tmp_path, monkeypatch, names):
    """Train, resume and evaluate where every path has an odd name; returns how many commands
    did."""
    count = 0
    for name in names:
        home = tmp_path / name
        images, configs, elsewhere = (
            home / f"{name} data",
            home / f"{name} configs",
            home / "elsewhere",
        )
        for folder in (configs, elsewhere):
            folder.mkdir(parents=True)
        image_folder(images)
        monkeypatch.chdir(elsewhere)
        monkeypatch.setenv("HOME", str(home))
        (configs / f"{name}.json").write_text(
            json.dumps(
                {**tree_of_images(f"~/{name} data", save_dir=f"../{name} saved"), "name": name}
            ),
            encoding="utf-8",
        )
        (configs / "child.json").write_text(
            json.dumps({"extends": f"{name}.json", "seed": 1}), encoding="utf-8"
        )
        (elsewhere / "link.json").symlink_to(configs / "child.json")
        (home / "real").mkdir()
        (elsewhere / "to runs").symlink_to(home / "real")
        runs = {
            "saved": ["-c", f"../{name} configs/{name}.json"],
            "relative": ["-c", "~/elsewhere/link.json", "--run_dir", f"../{name} run"],
            "tilde": ["-c", configs / "child.json", "--run_dir", f"~/{name} tilde"],
            "linked": ["-c", configs / "child.json", "--run_dir", f"to runs/{name}"],
        }
        for place, words in runs.items():
            assert call(monkeypatch, train, *words) == 0, (name, place)
            count += 1
        (saved,) = (home / f"{name} saved" / name).iterdir()
        (elsewhere / "to run").symlink_to(saved)
        metrics = {
            (home / path / "metrics.jsonl").read_bytes()
            for path in (f"{name} run", f"{name} tilde", f"real/{name}")
        }
        assert len(metrics) == 1, name
        for run_folder in ("to run", f"../{name} run", f"~/{name} tilde", f"to runs/{name}"):
            assert call(monkeypatch, train, "-r", run_folder, "--set", "trainer.epochs=2") == 0, (
                name,
                run_folder,
            )
            found = Path(run_folder).expanduser()
            assert len((found / "metrics.jsonl").read_text().splitlines()) == 2
            words = ["-s", found, "--steps", "1", "--json", elsewhere / f"{name} {count}.json"]
            assert call(monkeypatch, validate_pgd, *words) == 0, (name, run_folder)
            assert (elsewhere / f"{name} {count}.json").exists()
            count += 2
    return count


def test_odd_paths(tmp_path, monkeypatch):
    names = [
        "with two spaces",
        "прогон",
        "🙂",
        "%s {0} 'quoted' \"twice\" [a-z]*",
        "a=b,c;d&e#f$HOME",
    ]
    assert check_paths(tmp_path, monkeypatch, names) == 60


def test_the_check_can_fail_for_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(files.Path, "is_symlink", lambda self: False)
    with pytest.raises(AssertionError, match="relative"):
        check_paths(tmp_path, monkeypatch, ["plain"])


def check_terminal(tmp_path, monkeypatch):
    """Train where neither the terminal nor the locale has the letters of the data set's classes;
    the log has them."""
    image_folder(tmp_path / "images")
    (tmp_path / "config.json").write_text(json.dumps(tree_of_images("images")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "-c", "config.json", "--run_dir", "прогон"])
    terminal, errors = io.BytesIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", errors)
    before = locale.setlocale(locale.LC_CTYPE)
    # From now on open() uses ASCII by default.
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        with pytest.raises(SystemExit) as end:
            run_script(train.main)
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert (end.value.code, errors.getvalue()) == (0, "")
    sys.stdout.flush()
    assert r"\u043a\u043e\u0442" in terminal.getvalue().decode("ascii")
    log = (tmp_path / "прогон" / "info.log").read_text(encoding="utf-8")
    assert "кот" in log
    assert "прогон" in log


def test_a_terminal_of_ascii(tmp_path, monkeypatch):
    check_terminal(tmp_path, monkeypatch)


def _keeps_the_strict_terminal(monkeypatch):
    monkeypatch.setattr(base.streams, "TextIOWrapper", io.BytesIO)


def _leaves_the_log_to_the_locale(monkeypatch):
    class Handler(logging.FileHandler):
        def __init__(self, file, **_):
            super().__init__(file)

    monkeypatch.setattr(base.run_folder.logs, "_LogFile", Handler)


@pytest.mark.parametrize("break_it", [_keeps_the_strict_terminal, _leaves_the_log_to_the_locale])
def test_the_check_can_fail_for_terminals(tmp_path, monkeypatch, break_it):
    break_it(monkeypatch)
    with pytest.raises(AssertionError, match="UnicodeEncodeError"):
        check_terminal(tmp_path, monkeypatch)
