"""Jobs of a cluster: what has become of them."""

import subprocess

import pytest

from studies.launchers import ClusterJob, _quoted


class Job:
    """A finished job of submitit that ended in an exception."""

    def __init__(self, exception):
        self.ended_in = exception

    def done(self):
        return True

    def exception(self):
        return self.ended_in

    def result(self):
        raise self.ended_in


@pytest.mark.parametrize(("exception", "error"), [(RuntimeError(), None), (RuntimeError("traceback\nbusy: x\n"), "busy: x")])
def test_a_job_that_failed_has_failed_whether_or_not_it_says_why(exception, error):
    job = ClusterJob(Job(exception))
    assert (job.exit_code(), job.error()) == (1, error)


def test_words_that_a_terminal_cannot_show_come_back_from_a_shell():
    for word in ("plain", "two words", "it's", "a\x1b[2J\nb", "\u202e'\\x41\t$HOME", "кот"):
        assert _quoted(word).isprintable()
        done = subprocess.run(["bash", "-c", f"printf %s {_quoted(word)}"], capture_output=True, timeout=20)
        assert done.stdout.decode() == word
