"""Jobs in processes: results, failures, lost workers."""

from __future__ import annotations

import os
import signal

import pytest

from data_tools.errors import UserError
from data_tools.pool import Pool


def open_square(payload):
    def job(number, report):
        report(number)
        return payload + number**2

    return job


def open_failing(payload):
    def job(number, report):
        if number == 2:
            raise payload
        return number

    return job


def open_dying(payload):
    return lambda number, report: os.kill(os.getpid(), payload)


def run_jobs(numbers, open_job, payload, workers, report):
    with Pool(workers) as pool:
        yield from pool.run(numbers, open_job, payload, report)


@pytest.mark.parametrize("workers", [1, 3])
def test_all_jobs_are_done_once_and_reported(workers):
    reports = []
    assert sorted(run_jobs(range(7), open_square, 100, workers, reports.append)) == [(n, 100 + n**2) for n in range(7)]
    assert sorted(reports) == list(range(7))


def test_no_jobs_are_no_processes():
    assert list(run_jobs([], open_square, 0, 4, print)) == []


def test_wrong_input_found_by_a_worker_arrives_as_it_is():
    with pytest.raises(UserError, match="line 7 is wrong"):
        list(run_jobs(range(4), open_failing, UserError("line 7 is wrong"), 2, print))


def test_a_defect_arrives_with_its_trace():
    with pytest.raises(RuntimeError, match=r"(?s)a worker failed.*ZeroDivisionError: a defect"):
        list(run_jobs(range(4), open_failing, ZeroDivisionError("a defect"), 2, print))


def test_a_killed_worker_is_noticed():
    with pytest.raises(UserError, match=r"was killed by signal 9 .SIGKILL.*the same command continues"):
        list(run_jobs(range(4), open_dying, signal.SIGKILL, 2, print))
