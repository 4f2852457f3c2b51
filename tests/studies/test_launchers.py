"""Jobs of a cluster: what has become of them."""

import pytest

from studies.launchers import ClusterJob


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
