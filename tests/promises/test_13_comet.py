"""Training completes, with the same `metrics.jsonl`, after one warning and within a bounded time,
where there is no network, or where Comet's server refuses, keeps silent, asks for patience or dies.

The servers are on this machine: they answer as comet_ml 3.58 expects. A real one has not been
asked."""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import base.tracking.comet
from base.config import validate
from experiment.experiment import Experiment

ROOT = Path(__file__).parents[2]
KEY = "a-key-of-comet-0123456789"
TINY = {
    "arch": {"type": "simpleCNN", "args": {"conv_layer_type": "conv", "norm_layer_type": "bn"}},
    "data_loader": {
        "type": "DigitsDataLoader",
        "args": {"batch_size": 8, "num_batches": 2, "validation_split": 0.1},
    },
    "trainer": {"epochs": 2},
    "system": {"num_threads": 1, "device": "cpu"},
}
ONLINE = {**TINY, "comet": {"offline": False, "api": KEY}}
ENDLESS = ("later", "stalls")
"""Ways to fail that only the end of patience ends. The others end by themselves, later on a busy
machine."""
SHORT, LONG = 4.0, 60.0
"""The patience in seconds where it has to run out, and where it must not."""

# comet_ml's imports and its threads, which a dead server leaves hanging
pytestmark = pytest.mark.filterwarnings("ignore")


class CometServer:
    """Answers as comet_ml 3.58 expects of a Comet server, or fails in one of several ways.

    Args:
        way: `well`, `401`, `403`, `unknown key`, `silent`, `later` (asks for patience of an hour),
            `dies` (with the first metrics that it is sent), `stalls` (keeps silent from then on).
    """

    def __init__(self, way):
        self.way = way
        self.asked = []
        self.server = None
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
            daemon_threads = True
            block_on_close = False

            def handle_error(self, *_):
                # Clients that have left
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.leave = threading.Event()
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()

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
                return refused, {
                    "msg": "no",
                    "sdk_error_code": 90212 if self.way == "unknown key" else 0,
                }
            return 200, {
                "runId": "run",
                "project_id": "project",
                "focusUrl": "http://127.0.0.1/",
                "lastOffset": 0,
            }
        beats = (
            "is_alive_beat",
            "gpu_monitor_interval",
            "cpu_monitor_interval",
            "parameter_update_interval",
        )
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
    """Comet with shorter timeouts, so that the test is over soon. Returns the timeouts with which
    the ends of runs have waited for Comet's thread, run by run."""
    for name, value in base.tracking.comet.COMET_DEFAULTS.items():
        monkeypatch.setenv(name, value)
    for name in (
        "COMET_TIMEOUT_HTTP",
        "COMET_TIMEOUT_API",
        "COMET_GET_OR_ADD_EXPERIMENT_RETRY_BACKOFF_MAX",
    ):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("COMET_TIMEOUT_CLEANING", "2")
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    waited = []

    class Recorded(threading.Thread):
        def join(self, timeout=None):
            waited.append(timeout)
            super().join(timeout)

    monkeypatch.setattr(base.tracking.comet, "Thread", Recorded)
    return waited


def patience_for(way):
    return SHORT if way in ENDLESS else LONG


def run(tree, folder):
    """Train into `folder`; returns its metrics."""
    Experiment.from_config(validate(tree)).run(str(folder))
    return (folder / "metrics.jsonl").read_bytes()


def warnings_in(folder):
    return [
        line
        for line in (folder / "info.log").read_text(encoding="utf-8").splitlines()
        if " INFO " not in line and line
    ]


def check_comet(tmp_path, monkeypatch, ways, waited):
    """Returns how many ways a server can fail were tried."""
    expected = run(TINY, tmp_path / "without")
    for way in ways:
        monkeypatch.setattr(base.tracking.comet, "PATIENCE", patience_for(way))
        for name in ("COMET_TIMEOUT_HTTP", "COMET_TIMEOUT_API"):
            monkeypatch.setenv(name, "1" if way in ("silent", *ENDLESS) else "20")
        waited.clear()
        server = CometServer("well" if way == "no server" else way)
        monkeypatch.setenv("COMET_URL_OVERRIDE", server.url)
        if way == "no server":
            server.close()
        folder = tmp_path / way
        metrics = run(ONLINE, folder)
        if way not in ("no server", "dies"):
            server.close()
        assert metrics == expected, way
        assert (folder / "result.json").exists()
        assert waited == [SHORT if way in ENDLESS else LONG], f"{way}: waited for {waited}"
        warnings = warnings_in(folder)
        assert len(warnings) == (0 if way == "well" else 1), f"{way}: {warnings}"
        assert all("Comet" in line for line in warnings)
        archives = list((folder / "comet").glob("*.zip")) if (folder / "comet").exists() else []
        assert len(archives) == (0 if way in ("well", "later") else 1) or way == "stalls", (
            f"{way}: {archives}"
        )
        for archive in archives:
            with zipfile.ZipFile(archive) as file:
                assert any(b"val_top1" in file.read(name) for name in file.namelist()), way
        assert way in ("no server", "silent", "later") or server.asked, (
            f"{way}: the server was never asked"
        )
    return len(ways)


def test_a_comet_server_that_fails_costs_a_warning(tmp_path, monkeypatch, impatient):
    ways = ["well", "no server", "401", "403", "unknown key", "silent", "dies", "stalls", "later"]
    assert check_comet(tmp_path, monkeypatch, ways, impatient) == 9


def _waits_too_long(monkeypatch):
    monkeypatch.setitem(globals(), "patience_for", lambda way: SHORT + 1)
    return "later"


def _does_not_check_whether_it_began(monkeypatch):
    monkeypatch.setattr(base.tracking.comet._PackageMessages, "report", lambda self, text: None)
    return "401"


def _repeats_every_message(monkeypatch):
    def warn_at_once(self, message):
        logging.getLogger("base.tracking.comet").warning("Comet: %s", message)
        self.last = message

    monkeypatch.setattr(base.tracking.comet._PackageMessages, "add", warn_at_once)
    return "no server"


@pytest.mark.parametrize(
    "break_it", [_waits_too_long, _does_not_check_whether_it_began, _repeats_every_message]
)
def test_the_check_can_fail_for_comet(tmp_path, monkeypatch, impatient, break_it):
    way = break_it(monkeypatch)
    with pytest.raises(AssertionError, match=way):
        check_comet(tmp_path, monkeypatch, [way], impatient)


def test_without_any_network(tmp_path):
    apart = ["unshare", "-rn"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*apart, "true"], capture_output=True).returncode != 0
    ):
        pytest.skip("network namespaces cannot be made here")
    (tmp_path / "config.json").write_text(json.dumps(ONLINE))
    expected = run(TINY, tmp_path / "without")
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("COMET", "PYTHON"))
    }
    command = [
        *apart,
        sys.executable,
        str(ROOT / "train.py"),
        "-c",
        "config.json",
        "--run_dir",
        "run",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=600, env=kept
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == expected
    assert len(warnings_in(tmp_path / "run")) == 1
    assert len(list((tmp_path / "run" / "comet").glob("*.zip"))) == 1
