"""Jobs of a cluster, their commands and the reasons of their failures."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest

from base.config import imports, validate
from base.config.tree import merge
from base.errors import ConfigError
from base.rooms import ROOT
from studies import launchers
from studies.grid import plan
from studies.launchers import ClusterJob, _environment, _quoted, command_of_job, work_of_job
from tiny_runs import script

RULE = "-" * 22
TRACE = f"""Job (task=0) failed during processing with trace:
{RULE}
Traceback (most recent call last):
  ...
submitit.core.utils.FailedJobError: {{output}}

{RULE}
You can check full logs with 'job.stderr(0)' and 'job.stdout(0)'or at paths:
  - x_0_log.err"""


class EndedJob:
    """A finished job of submitit, with or without an exception."""

    def __init__(self, exception):
        self.ended_in = exception

    def done(self):
        return True

    def exception(self):
        return self.ended_in


@pytest.fixture
def run(tmp_path):
    base = ROOT / "configs" / "quickstart.json"
    grid = {"variants": {"plain bn": str(base)}, "seeds": [3, 4]}
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    (tmp_path / "own_of_a_job.py").write_text("")
    given = {"overrides": [("name", "a b")], "imports": [str(tmp_path / "own_of_a_job.py")]}
    yield plan(tmp_path / "grid.json", save_dir=tmp_path / "out", **given)[1]
    # Each test has another file of this name
    sys.modules.pop("own_of_a_job", None)
    sys.path.remove(str(tmp_path))
    imports._imported.pop("own_of_a_job", None)


@pytest.mark.parametrize(
    ("output", "error"),
    [
        ("", "its job printed nothing"),
        (
            "Job 7 has not produced any output\nlook at:\n- x.out",
            "Job 7 has not produced any output",
        ),
        (
            TRACE.format(output="warning: x\nerror: grid.json: no such file"),
            "grid.json: no such file",
        ),
        (TRACE.format(output="error: grid.json: no such file"), "grid.json: no such file"),
        (
            TRACE.format(output="error: failed: plain bn seed 4 (exit code 5: epoch 1)"),
            "exit code 5: epoch 1",
        ),
    ],
)
def test_a_failed_job_is_reported_with_its_reason_if_it_has_one(run, output, error):
    job = ClusterJob(EndedJob(RuntimeError(output)), run)
    assert (job.exit_code(), job.error()) == (1, error)


def test_a_job_has_succeeded_only_if_its_run_is_finished(run):
    job = ClusterJob(EndedJob(None), run)
    assert job.exit_code() == 1
    assert "has changed" in job.error()
    run.folder.mkdir(parents=True)
    (run.folder / "result.json").write_text("{}")
    assert (job.exit_code(), job.error()) == (0, None)


def test_a_jobs_command_plans_its_run_alone(run, tmp_path):
    (tmp_path / "own.py").write_text("")
    python, file, *words = command_of_job(replace(run, imports=("own.py",)))
    assert (python, file) == (sys.executable, str(ROOT / "run_ablations.py"))
    done = script("run_ablations.py", *words, "--dry-run", cwd=tmp_path)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1), done.stderr
    # Own code is part of what a run is known by, so here the folder is another one
    assert f"--run_dir {run.folder.parent}/plain-bn_seed4_" in done.stdout
    assert done.stdout.endswith(" --imports own.py --set 'name=a b' --seed 4\n")


def test_a_preempted_job_is_queued_again_with_the_same_command(run):
    helpers = pytest.importorskip("submitit.helpers")
    work = helpers.DelayedSubmission(work_of_job(run))
    for _ in range(2):
        work = pickle.loads(pickle.dumps(work._checkpoint_function()))  # noqa: S301
        assert work.function.command == command_of_job(run)


def test_a_shell_reads_quoted_words_as_they_were():
    for word in ("plain", "two words", "it's", "a\x1b[2J\nb", "\u202e'\\x41\t$HOME", "кот"):
        assert _quoted(word).isprintable()
        done = subprocess.run(
            ["bash", "-c", f"printf %s {_quoted(word)}"], capture_output=True, timeout=20
        )
        assert done.stdout.decode() == word


@pytest.mark.parametrize(
    ("jobs", "config", "asked", "threads"),
    [
        (1, {}, None, None),
        (2, {}, None, "4"),
        (3, {}, None, "2"),
        (9, {}, None, "1"),
        (2, {"n_gpu": 2}, None, "2"),
        (2, {}, "7", "7"),
        (2, {"system": {"num_threads": 3}}, None, None),
    ],
)
def test_runs_at_once_share_the_cores(run, monkeypatch, jobs, config, asked, threads):
    monkeypatch.setattr(launchers, "available_cpus", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    own = replace(run, config=validate(merge(run.config.dump(), config)))
    assert _environment(own, 0, jobs).get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize(
    ("config", "asked", "slot", "visible"),
    [
        ({}, None, 0, "0"),
        ({}, None, 3, "1"),
        ({}, "5,7", 1, "7"),
        ({"n_gpu": 2}, None, 1, None),
        ({"system": {"device": "cuda:1"}}, None, 0, None),
    ],
)
def test_runs_take_one_gpu_each_unless_they_name_it(run, monkeypatch, config, asked, slot, visible):
    monkeypatch.setattr(launchers.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if asked:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", asked)
    own = replace(run, config=validate(merge(run.config.dump(), config)))
    assert _environment(own, slot, 1).get("CUDA_VISIBLE_DEVICES") == visible


def test_a_job_that_the_queue_refuses_is_one_line(run, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    for name, line in (("sbatch", "echo 'error: invalid partition' >&2; exit 1"), ("srun", "")):
        script = tmp_path / "bin" / name
        script.write_text(f"#!/bin/sh\n{line}\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    launch = launchers.launcher("slurm", tmp_path / "jobs", ["slurm_partition=none"])
    with pytest.raises(ConfigError, match="^--launcher slurm: .*invalid partition"):
        launch(run, 0)


def test_a_config_without_a_checkpoint_is_gone_before_the_run_starts(run, monkeypatch):
    """train.py refuses a folder with a config of a run that was killed before it saved."""
    config, seen = run.folder / "config.json", []
    config.parent.mkdir(parents=True)
    config.write_text("{}")
    monkeypatch.setattr(
        launchers.subprocess, "Popen", lambda *_, **__: seen.append(config.exists())
    )
    launchers.LocalJob(run, 0).wait()
    assert seen == [False]
