"""Promise 7: Comet's key is in no file and no log, in whichever form it was given.

The working directory is searched, with zips unpacked, and all that was printed. The rest of promise
7 is elsewhere."""

import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import base.command_line
import base.tracking.comet
import run_ablations
import studies.grid
import train
from base.command_line import run_script
from studies.grid import plan
from studies.launchers import command_of_job

ROOT = Path(__file__).parents[2]
KEY = "SeCrEt-0123456789-kEy"
TINY = {
    "arch": {"type": "simpleCNN", "args": {"conv_layer_type": "conv", "norm_layer_type": "bn"}},
    "data_loader": {
        "type": "DigitsDataLoader",
        "args": {"batch_size": 8, "num_batches": 2, "validation_split": 0.1},
    },
    "trainer": {"epochs": 1, "tensorboard": True},
    "system": {"num_threads": 1, "device": "cpu"},
}
WAYS = {
    "environment": [],
    "config file": [],
    "--key": ["--key", KEY],
    "--key=": [f"--key={KEY}"],
    "--comet_key": ["--comet_key", KEY],
    "--comet_key=": [f"--comet_key={KEY}"],
    "--set": ["--set", f"comet.api={KEY}"],
    "--set=": [f"--set=comet.api={KEY}"],
    "--set section": ["--set", json.dumps({"api": KEY}).join(["comet=", ""])],
}
ENDS = {
    "offline": ([], 0),
    # To a server that does not know the key; comet_ml prints such a key in full
    "online": (["--offline", "False"], 0),
    "wrong value": (["--set", "trainer.epochs=many"], 2),
    "wrong value of comet": (["--set", "comet.offline=perhaps"], 2),
    "no Unicode": (["--set", "name=\udcff"], 2),
    "wrong flag": (["--epoch", "3"], 2),
    "wrong data": (
        ["--set", 'data_loader={"type":"ImageFolderDataLoader","args":{"data_dir":"nowhere"}}'],
        4,
    ),
    "diverges": (["--lr", "1e30"], 5),
}
SOURCES = {"environment", "config file", "--key"}
NO_WAY = {
    "without equals": ["--set", "comet.api", KEY],
    "with a colon": ["--set", f"comet.api:{KEY}"],
    "for the section": ["--set", f"comet={KEY}"],
    "below": ["--set", f"comet.api.key={KEY}"],
    "two": ["--key", KEY, "x", KEY],
}

# comet_ml's own imports warn.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("only_few_digits")]


@pytest.fixture
def server(monkeypatch):
    """A Comet server that knows no key."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            version = self.path.endswith("isAlive/ver")
            self.send_response(200 if version else 400)
            self.end_headers()
            self.wfile.write(
                json.dumps(
                    {"version": "5.0.0", "msg": f"no {KEY}", "sdk_error_code": 90212}
                ).encode()
            )

        do_GET = do_POST = answer  # noqa: N815 - names that http.server requires

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    ).start()
    for name, value in base.tracking.comet.COMET_DEFAULTS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COMET_URL_OVERRIDE", f"http://127.0.0.1:{server.server_port}/clientlib")
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    yield server
    server.shutdown()
    server.server_close()


def holders(folder):
    """Return what below `folder` holds the key in its name or contents, with zips unpacked, and how
    many things were searched."""
    found, searched = [], 0
    for path in folder.rglob("*"):
        contents = {str(path): b""}
        if path.is_file():
            contents |= unpacked(str(path), path.read_bytes())
        searched += len(contents)
        found += [
            name for name, content in contents.items() if KEY.encode() in content or KEY in name
        ]
    return found, searched


def unpacked(name, content):
    contents = {name: content}
    if zipfile.is_zipfile(io.BytesIO(content)):  # checkpoints and arrays are zips, too
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for part in archive.namelist():
                contents |= unpacked(f"{name}/{part}", archive.read(part))
    return contents


def train_here(tmp_path, monkeypatch, capfd, way, words):
    """Return the exit code of train.py with the key given in that way, and its output."""
    folder = tmp_path / f"{way} {len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    comet = {"project": "test"} | ({"api": KEY} if way == "config file" else {})
    # The only file that may hold the key, outside the folder that is searched
    config = tmp_path.parent / f"{tmp_path.name} config.json"
    config.write_text(json.dumps({**TINY, "comet": comet}))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    if way == "environment":
        monkeypatch.setenv("COMET_API_KEY", KEY)
    else:
        monkeypatch.delenv("COMET_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", "-c", str(config), "--run_dir", "run", *words])
    with pytest.raises(SystemExit) as end:
        run_script(train.main)
    return end.value.code, "".join(capfd.readouterr())


def check_training(tmp_path, monkeypatch, capfd, ways, ends):
    """Return how many runs left no key behind."""
    count = 0
    for way, given in ways.items():
        for end, (words, expected) in ends.items():
            if end in ("online", "diverges") and way not in SOURCES:
                continue  # what runs no longer knows by which flag the key came
            code, printed = train_here(tmp_path, monkeypatch, capfd, way, [*given, *words])
            assert code == expected, (way, end, printed)
            assert KEY not in printed, f"{way}, {end}: printed: {printed}"
            count += 1
    found, searched = holders(tmp_path)
    assert found == [], found
    assert searched >= count
    if "online" in ends:
        assert searched > 10 * count
        logs = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("info.log")]
        assert sum("The given API key '***' is invalid" in log for log in logs) == len(
            SOURCES & ways.keys()
        )
        assert len(list(tmp_path.rglob("comet/*.zip"))) >= len(ways) + len(SOURCES & ways.keys())
    return count


def test_training_leaves_no_key(tmp_path, monkeypatch, capfd, server):
    assert check_training(tmp_path, monkeypatch, capfd, WAYS, ENDS) == 60


def test_commands_that_are_refused_show_no_key(tmp_path, monkeypatch, capfd):
    refused = {name: (words, 2) for name, words in NO_WAY.items()}
    assert check_training(tmp_path, monkeypatch, capfd, {"otherwise": []}, refused) == 5


def _writes_the_command(monkeypatch):
    monkeypatch.setattr("base.run_folder.environment.command_without_key", list)
    return "--set", "offline", "environment.json"


def _dumps_the_key(monkeypatch):
    dump = base.config.Config.dump

    def all_of_it(self):
        return {**dump(self), "comet": {"api": self.comet.api}} if self.comet else dump(self)

    monkeypatch.setattr(base.config.Config, "dump", all_of_it)
    return "config file", "offline", "config.json|model_"


def _passes_messages_on(monkeypatch):
    def add(self, message):
        self.last = message

    monkeypatch.setattr(base.tracking.comet._PackageMessages, "add", add)
    return "environment", "online", "printed"


def _quotes_the_command(monkeypatch):
    monkeypatch.setattr(base.command_line, "without_keys", lambda message, command: message)
    return "--set", "wrong flag", "printed"


@pytest.mark.parametrize(
    "break_it", [_writes_the_command, _dumps_the_key, _passes_messages_on, _quotes_the_command]
)
def test_the_check_can_fail_for_training(tmp_path, monkeypatch, capfd, server, break_it):
    way, end, place = break_it(monkeypatch)
    words, code = ENDS[end]
    if end == "wrong flag":
        way, words = "otherwise", NO_WAY["with a colon"]
    with pytest.raises(AssertionError, match=place):
        check_training(tmp_path, monkeypatch, capfd, {way: WAYS.get(way, [])}, {end: (words, code)})


def check_study(tmp_path, monkeypatch, capfd):
    """A study whose base config holds the key, until it would start processes; returns how many
    outputs were searched."""
    (tmp_path / "base.json").write_text(json.dumps({**TINY, "comet": {"api": KEY}}))
    (tmp_path / "grid.json").write_text(
        json.dumps({"base": "base.json", "variants": {"one": {}, "two": {"trainer.epochs": 2}}})
    )
    monkeypatch.chdir(tmp_path)
    for word in ("--list", "--dry-run"):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "run_ablations.py",
                "--grid",
                "grid.json",
                *([word] if word == "--list" else [word, "--all"]),
            ],
        )
        with pytest.raises(SystemExit) as end:
            run_script(run_ablations.main)
        printed = "".join(capfd.readouterr())
        assert (end.value.code, "two" in printed) == (0, True)
        assert KEY not in printed, f"{word}: {printed}"
    for run in plan(Path("grid.json")):
        assert KEY.encode() not in pickle.dumps([run, command_of_job(run)]), "what a job is told"
        assert KEY not in repr(run) + " ".join(run.words())
    for settings in ({"comet.api": KEY}, {"comet": {"api": KEY}}):
        (tmp_path / "grid.json").write_text(
            json.dumps({"base": "base.json", "variants": {"one": settings}})
        )
        monkeypatch.setattr(
            sys, "argv", ["run_ablations.py", "--grid", "grid.json", "--all", "--dry-run"]
        )
        with pytest.raises(SystemExit) as end:
            run_script(run_ablations.main)
        printed = "".join(capfd.readouterr())
        assert KEY not in printed, printed
        assert end.value.code == 2
        assert "one: comet.api: would be shown and stored" in printed
    return 6


def test_a_study_passes_no_key_on(tmp_path, monkeypatch, capfd):
    assert check_study(tmp_path, monkeypatch, capfd) == 6


def _stores_whole_configs(monkeypatch):
    monkeypatch.setattr(base.config.Config, "model_copy", lambda self, **_: self)
    return "what a job is told"


def _takes_keys_in_grids(monkeypatch):
    monkeypatch.setattr(studies.grid, "_holds_key", lambda settings: False)
    return "--set comet.api="


@pytest.mark.parametrize("break_it", [_stores_whole_configs, _takes_keys_in_grids])
def test_the_check_can_fail_for_studies(tmp_path, monkeypatch, capfd, break_it):
    with pytest.raises(AssertionError, match=break_it(monkeypatch)):
        check_study(tmp_path, monkeypatch, capfd)


def processes(tmp_path, script, *words):
    """Run a command in other processes; return its exit code and its output."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("COMET", "TORCHELASTIC"))
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, words)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**kept, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(
    "SLOW_PROMISES" not in os.environ, reason="a minute of processes: set SLOW_PROMISES=1"
)
def test_in_several_processes(tmp_path):
    config, work = tmp_path / "config.json", tmp_path / "work"
    work.mkdir()
    config.write_text(json.dumps({**TINY, "n_gpu": 2, "comet": {"api": KEY}}))
    (tmp_path / "grid.json").write_text(json.dumps({"variants": {"one": "single.json"}}))
    (tmp_path / "single.json").write_text(json.dumps({**TINY, "comet": {"api": KEY}}))
    study = ["run_ablations.py", "--grid", tmp_path / "grid.json", "--all"]
    two = ["-c", config, "--run_dir"]
    commands = {
        "two processes": (["train.py", *two, "two", "--key", KEY], 0),
        "two processes that fail early": (
            ["train.py", *two, "no", "--set", f"comet.api={KEY}", "--bs", "1"],
            2,
        ),
        "two processes that diverge": (
            ["train.py", *two, "nan", f"--key={KEY}", "--lr", "1e30"],
            5,
        ),
        "a study": ([*study, "--seed", "0"], 0),
        "a study by submitit": ([*study, "--seed", "1", "--launcher", "local"], 0),
    }
    for name, (words, expected) in commands.items():
        code, printed = processes(work, *words)
        assert code == expected, (name, printed)
        assert KEY not in printed, (name, printed)
    found, searched = holders(work)
    assert found == [], found
    assert searched > 100
    assert list(work.rglob("*_submitted.pkl"))
