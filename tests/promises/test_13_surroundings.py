"""Training completes, with the same `metrics.jsonl`, whatever is missing around it: no network, a Comet server that refuses,
keeps silent, asks for patience or dies, no GPU, no optional package, folders of any name, a terminal that knows ASCII only.
"""

import io
import json
import locale
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import base.command_line
import base.run_folder
import base.tracking
import experiment
import run_ablations
import train
import validate_pgd
from base import config_files
from base.command_line import run_script
from base.config_files import validate

ROOT = Path(__file__).parents[2]
KEY = "a-key-of-comet-0123456789"
TINY = {
    "arch": {"type": "simpleCNN", "args": {"conv_layer_type": "conv", "norm_layer_type": "bn"}},
    "data_loader": {"type": "DigitsDataLoader", "args": {"batch_size": 8, "num_batches": 2, "validation_split": 0.1}},
    "trainer": {"epochs": 2},
    "system": {"num_threads": 1, "device": "cpu"},
}
ONLINE = {**TINY, "comet": {"offline": False, "api": KEY}}
BOUND = 9.0
"""Seconds that a run with Comet may take longer than one without, with the patience of `impatient`."""

pytestmark = pytest.mark.filterwarnings("ignore")  # comet_ml's imports and its threads, which a dead server leaves hanging


class CometServer:
    """Answers on this machine as comet_ml 3.58 expects of a Comet server, or fails in one of several ways.

    Args:
        ways: `well`, `401`, `403`, `unknown key`, `silent`, `later` (asks for patience of an hour), `dies` (with the first
            metrics that it is sent), `stalls` (keeps silent from then on).
    """

    def __init__(self, way):
        self.way, self.asked, self.server = way, [], None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self):
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.asked.append(self.path)
                code, content = outer.answer(self.path)
                if code is None:
                    self.close_connection = True
                    return
                body = json.dumps(content).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                if code == 503:
                    self.send_header("Retry-After", "3600")
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = answer  # noqa: N815 - the names that http.server looks for

        class Server(ThreadingHTTPServer):
            daemon_threads, block_on_close = True, False

            def handle_error(self, *_):
                pass  # clients that have left

        self.server = Server(("127.0.0.1", 0), Handler)
        self.leave = threading.Event()
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}/clientlib"

    def answer(self, path):
        """Status code (None: no answer at all) and content."""
        if path.endswith("/metric") and self.way == "dies":
            threading.Thread(target=self.close).start()
            self.way = "dead"
        if path.endswith("/metric") and self.way == "stalls":
            self.way = "silent"
        if self.way == "dead":
            return None, {}
        if self.way == "silent":
            self.leave.wait(60)
            return None, {}
        if path.endswith("isAlive/ver"):
            return 200, {"msg": "5.0.0", "version": "5.0.0"}
        if path.endswith("add/run"):
            refused = {"401": 401, "403": 403, "unknown key": 400, "later": 503}.get(self.way)
            if refused:
                return refused, {"msg": "no", "sdk_error_code": 90212 if self.way == "unknown key" else 0}
            return 200, {"runId": "run", "project_id": "project", "focusUrl": "http://127.0.0.1/", "lastOffset": 0}
        beats = ("is_alive_beat", "gpu_monitor_interval", "cpu_monitor_interval", "parameter_update_interval")
        return 200, {f"{name}_millis": 10000 for name in beats} | {
            "is_alive_beat_duration_millis": 10000,
            "pending_rpcs": False,
        }

    def close(self):
        self.leave.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def impatient(monkeypatch):
    """Comet with a second where the product gives it five, so that the test is over soon."""
    for name, value in base.tracking.COMET_DEFAULTS.items():
        monkeypatch.setenv(name, value)
    for name in ("COMET_TIMEOUT_HTTP", "COMET_TIMEOUT_API", "COMET_GET_OR_ADD_EXPERIMENT_RETRY_BACKOFF_MAX"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("COMET_TIMEOUT_CLEANING", "2")
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    monkeypatch.setattr(base.tracking, "PATIENCE", 6.0)


def run(tree, folder):
    """Train into `folder`; returns its metrics and the seconds it took."""
    begun = time.monotonic()
    experiment.Experiment.from_config(validate(tree)).run(str(folder))
    return (folder / "metrics.jsonl").read_bytes(), time.monotonic() - begun


def warnings_in(folder):
    return [line for line in (folder / "info.log").read_text(encoding="utf-8").splitlines() if " INFO " not in line and line]


def check_comet(tmp_path, monkeypatch, ways):
    """Returns how many ways a server can fail were tried."""
    expected, plain_seconds = run(TINY, tmp_path / "without")
    for way in ways:
        server = CometServer("well" if way == "no server" else way)
        monkeypatch.setenv("COMET_URL_OVERRIDE", server.url)
        if way == "no server":
            server.close()
        folder = tmp_path / way
        metrics, seconds = run(ONLINE, folder)
        if way not in ("no server", "dies"):
            server.close()
        assert metrics == expected, way
        assert (folder / "result.json").exists()
        assert seconds < plain_seconds + BOUND, f"{way}: {seconds:.1f} s"
        said = warnings_in(folder)
        assert len(said) == (0 if way == "well" else 1), f"{way}: {said}"
        assert all("Comet" in line for line in said)
        archives = list((folder / "comet").glob("*.zip")) if (folder / "comet").exists() else []
        assert len(archives) == (0 if way in ("well", "later") else 1) or way == "stalls", f"{way}: {archives}"
        for archive in archives:
            with zipfile.ZipFile(archive) as file:
                assert any(b"val_top1" in file.read(name) for name in file.namelist()), way
        assert way in ("no server", "silent", "later") or server.asked, f"{way}: the server was never asked"
    return len(ways)


def test_a_comet_server_that_fails_costs_a_warning(tmp_path, monkeypatch, impatient):
    ways = ["well", "no server", "401", "403", "unknown key", "silent", "dies", "stalls", "later"]
    assert check_comet(tmp_path, monkeypatch, ways) == 9


def _waits_too_long(monkeypatch):
    monkeypatch.setattr(base.tracking, "PATIENCE", BOUND + 1)
    return "later"


def _does_not_look_whether_it_began(monkeypatch):
    monkeypatch.setattr(base.tracking._Complaints, "tell", lambda self, text: None)
    return "401"


def _repeats_every_complaint(monkeypatch):
    def warn_at_once(self, message):
        logging.getLogger("base.tracking").warning("Comet: %s", message)
        self.last = message

    monkeypatch.setattr(base.tracking._Complaints, "add", warn_at_once)
    return "no server"


@pytest.mark.parametrize("break_it", [_waits_too_long, _does_not_look_whether_it_began, _repeats_every_complaint])
def test_the_check_can_fail_for_comet(tmp_path, monkeypatch, impatient, break_it):
    way = break_it(monkeypatch)
    with pytest.raises(AssertionError, match=way):
        check_comet(tmp_path, monkeypatch, [way])


def in_other_process(words, cwd):
    """Run Python with `words`; returns exit code, stdout and stderr."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("COMET", "PYTHON"))}
    kept |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*words[0], sys.executable, *map(str, words[1])],
        cwd=cwd, capture_output=True, timeout=200, env=kept,
    )  # fmt: skip
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


def test_without_any_network(tmp_path):
    apart = ["unshare", "-rn"]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], capture_output=True).returncode != 0:
        pytest.skip("network namespaces cannot be made here")
    (tmp_path / "config.json").write_text(json.dumps(ONLINE))
    expected, _ = run(TINY, tmp_path / "without")
    begun = time.monotonic()
    code, _, errors = in_other_process((apart, [ROOT / "train.py", "-c", "config.json", "--run_dir", "run"]), tmp_path)
    assert (code, errors) == (0, "")
    assert time.monotonic() - begun < 100
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == expected
    assert len(warnings_in(tmp_path / "run")) == 1
    assert len(list((tmp_path / "run" / "comet").glob("*.zip"))) == 1


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
    """Train, attack and start a study where no optional package is; `start` runs scripts and returns their exit codes and what
    they wrote to stderr. Returns how many packages were absent."""
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
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == run(TINY, tmp_path / "with all packages")[0]
    return len(OPTIONAL)


def test_without_optional_packages_and_gpu(tmp_path):
    def in_bare_process(calls):
        code, output, errors = in_other_process(([], ["-c", BARE.format(optional=OPTIONAL, calls=calls)]), tmp_path)
        assert code == 0, errors
        return json.loads(output.splitlines()[-1]), errors

    assert check_bare(tmp_path, in_bare_process) == 6


@pytest.mark.parametrize("careless", [False, True])
def test_the_check_can_fail_for_packages(tmp_path, monkeypatch, capfd, careless):
    def here(calls):
        monkeypatch.chdir(tmp_path)
        scripts = {"train": train, "validate_pgd": validate_pgd, "run_ablations": run_ablations}
        return [call(monkeypatch, scripts[name], *words.split()) for name, words in calls], capfd.readouterr().err

    for module in [name for name in sys.modules if name.partition(".")[0] in OPTIONAL] + list(OPTIONAL):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    if not careless:  # in this process as in a bare one, then
        assert check_bare(tmp_path, here) == 6
        return
    tensorboard = base.tracking.TensorBoard
    monkeypatch.setattr(experiment, "start_trackers", lambda config, folder, history: [tensorboard(folder, 0)])
    with pytest.raises(ImportError, match="tensorboard"):
        check_bare(tmp_path, here)


def image_folder(root):
    """Two classes of a few 8x8 images, one with a Cyrillic name."""
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("кот", "dog"):
            (root / part / name).mkdir(parents=True)
            for number in range(6):
                pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")


def tree_of_images(data_dir, **rest):
    loader = {"type": "ImageFolderDataLoader", "args": {"data_dir": data_dir, "batch_size": 4, "validation_split": 0.3}}
    return {**TINY, "data_loader": loader, "trainer": {"epochs": 1, "sym": True, "percent": 0.3, **rest}}


def call(monkeypatch, script, *words):
    """The exit code of a script, run in this process."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
    with pytest.raises(SystemExit) as end:
        run_script(script.main)
    return end.value.code


def check_paths(tmp_path, monkeypatch, names):
    """Train, resume and evaluate where every path has an odd name; returns how many commands did."""
    count = 0
    for name in names:
        home = tmp_path / name
        images, configs, elsewhere = home / f"{name} data", home / f"{name} configs", home / "elsewhere"
        for folder in (configs, elsewhere):
            folder.mkdir(parents=True)
        image_folder(images)
        monkeypatch.chdir(elsewhere)
        monkeypatch.setenv("HOME", str(home))
        (configs / f"{name}.json").write_text(
            json.dumps({**tree_of_images(f"~/{name} data", save_dir=f"../{name} saved"), "name": name}), encoding="utf-8"
        )
        (configs / "child.json").write_text(json.dumps({"extends": f"{name}.json", "seed": 1}), encoding="utf-8")
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
        metrics = {(home / path / "metrics.jsonl").read_bytes() for path in (f"{name} run", f"{name} tilde", f"real/{name}")}
        assert len(metrics) == 1, name
        for run_folder in ("to run", f"../{name} run", f"~/{name} tilde", f"to runs/{name}"):
            assert call(monkeypatch, train, "-r", run_folder, "--set", "trainer.epochs=2") == 0, (name, run_folder)
            found = Path(run_folder).expanduser()
            assert len((found / "metrics.jsonl").read_text().splitlines()) == 2
            words = ["-s", found, "--steps", "1", "--json", elsewhere / f"{name} {count}.json"]
            assert call(monkeypatch, validate_pgd, *words) == 0, (name, run_folder)
            assert (elsewhere / f"{name} {count}.json").exists()
            count += 2
    return count


def test_odd_paths(tmp_path, monkeypatch):
    names = ["with two spaces", "прогон", "🙂", "%s {0} 'quoted' \"twice\" [a-z]*", "a=b,c;d&e#f$HOME"]
    assert check_paths(tmp_path, monkeypatch, names) == 60


def test_the_check_can_fail_for_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(config_files.Path, "is_symlink", lambda self: False)
    with pytest.raises(AssertionError, match="relative"):
        check_paths(tmp_path, monkeypatch, ["plain"])


def check_terminal(tmp_path, monkeypatch):
    """Train where neither the terminal nor the locale has the letters of the data set's classes; the log has them."""
    image_folder(tmp_path / "images")
    (tmp_path / "config.json").write_text(json.dumps(tree_of_images("images")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "-c", "config.json", "--run_dir", "прогон"])
    terminal, errors = io.BytesIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", errors)
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")  # from now on open() means ASCII where it is not told otherwise
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
    monkeypatch.setattr(base.command_line, "TextIOWrapper", io.BytesIO)


def _leaves_the_log_to_the_locale(monkeypatch):
    class Handler(logging.FileHandler):
        def __init__(self, file, **_):
            super().__init__(file)

    monkeypatch.setattr(base.run_folder, "_LogFile", Handler)


@pytest.mark.parametrize("break_it", [_keeps_the_strict_terminal, _leaves_the_log_to_the_locale])
def test_the_check_can_fail_for_terminals(tmp_path, monkeypatch, break_it):
    break_it(monkeypatch)
    with pytest.raises(AssertionError, match="UnicodeEncodeError"):
        check_terminal(tmp_path, monkeypatch)
