"""The batch script on a real Slurm cluster: whatever hits the job, it goes on from its checkpoint, or stops with a reason."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.local_cluster import LocalCluster

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]


def test_runs_to_the_end(start: Callable) -> None:
    job = start({"steps": 3})
    assert job.wait_ended() == "done"
    assert job.events == ["submit", "start", "end"]
    ranks = [job.starts(rank)[0] for rank in range(4)]
    assert {rank["node"] for rank in ranks} == {"node1", "node2"}
    assert {rank["MASTER_ADDR"] for rank in ranks} == {"node1"}
    assert len({rank["MASTER_PORT"] for rank in ranks}) == 1


def test_time_limit_saves_and_requeues(start: Callable) -> None:
    # Slurm sends the warning up to a minute early and checks limits every half minute: a lead of 50 s of a minute's limit comes at once.
    job = start({"steps": 100000}, time="1", signal_lead=50)
    first, second = job.wait_started(2, seconds=100)[:2]
    assert second["from"] > first["from"]
    assert second["SLURM_RESTART_COUNT"] == "1"
    assert second["MASTER_PORT"] != first["MASTER_PORT"]
    assert job.events[:5] == ["submit", "start", "saved", "again", "start"]


def test_scontrol_requeue_saves_and_continues(start: Callable) -> None:
    job = start({"steps": 100000})
    job.wait_started(1)
    job.scontrol("requeue", job.ids[0])
    _, second = job.wait_started(2)[:2]
    assert second["from"] > 0
    assert job.events[:4] == ["submit", "start", "saved", "start"]  # Slurm restarts it: the script must not requeue a second time
    assert second["SLURM_RESTART_COUNT"] == "1"


def test_preemption_saves_and_continues(start: Callable, cluster: LocalCluster) -> None:
    job = start({"steps": 100000})
    job.wait_started(1)
    urgent = cluster.command("sbatch", "--parsable", "-p", "urgent", "-N", "3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3")
    assert job.wait_started(2, seconds=90)[1]["from"] > 0
    cluster.command("scancel", urgent)


def test_killed_rank_restarts_inside_the_allocation(start: Callable, cluster: LocalCluster) -> None:
    job = start({"steps": 40, "save_every": 5, "crash_at": 12})
    # All four ranks crash at step 12 of every attempt that starts below it: the checkpoint at 10 makes two such attempts.
    job.wait_saved()
    first = job.wait_started(1)[0]
    second = job.wait_started(2)[1]
    assert second["from"] == 10
    assert second["SLURM_JOB_ID"] == first["SLURM_JOB_ID"]
    assert second["SLURM_RESTART_COUNT"] is None
    assert "failed" in job.events
    assert "again" not in job.events


def test_crash_loop_stops_with_a_reason(start: Callable) -> None:
    job = start({"steps": 40, "seconds": 0.01, "crash_at": 3}, restart={"crash_loop": 3})
    assert job.wait_ended().startswith("crash loop: 3 attempts ended at checkpoint none")
    assert job.events.count("start") == 3


def test_too_many_restarts_stop_with_a_reason(start: Callable) -> None:
    job = start({"steps": 40, "seconds": 0.01, "save_every": 1, "crash_at": 3}, restart={"max_restarts": 1, "crash_loop": 9})
    assert job.wait_ended() == "gave up after 1 restarts"
    assert job.events.count("start") == 2


def test_bad_input_is_not_retried(start: Callable) -> None:
    job = start({"exit_code": 2})
    assert job.wait_ended().startswith("wrong input or config")
    assert job.events == ["submit", "start", "end"]


def test_cancelled_job_stays_cancelled(start: Callable) -> None:
    job = start({"steps": 100000})
    job.wait_started(1)
    job.cancel()
    state = job.wait("the end of the job", lambda: (s := job.slurm.job(job.ids[0])["JobState"]) in ("CANCELLED", "PENDING") and s)
    assert state == "CANCELLED"
    assert (job.run_dir / "checkpoints" / "latest").exists()  # SIGTERM reached the ranks and they saved


@pytest.mark.slow
def test_lost_node_is_replaced(start: Callable, cluster: LocalCluster) -> None:
    job = start({"steps": 100000, "save_every": 1})
    job.wait_started(1)
    job.wait_saved()
    cluster.kill_node("node2")
    try:
        second = job.wait_started(2, seconds=90)[1]
        assert second["from"] > 0
        assert "node2" not in {job.starts(rank)[-1]["node"] for rank in range(4)}
    finally:
        job.cancel()
        cluster.start_node("node2")
        cluster.wait_idle(60)


@pytest.mark.parametrize("mode", ["resubmit", "chain"])
def test_follower_continues_where_requeue_is_forbidden(start: Callable, mode: str) -> None:
    job = start({"steps": 20}, restart={"mode": mode, "chain_length": 2})
    first = job.wait_started(1)[0]
    job.slurm.run("scancel", "--signal=TERM", job.ids[0])
    second = job.wait_started(2)[1]
    assert second["SLURM_JOB_ID"] != first["SLURM_JOB_ID"]
    assert second["from"] > 0
    assert job.wait_ended() == "done"


def test_stopped_rank_does_not_hold_the_job(start: Callable, cluster: LocalCluster) -> None:
    job = start({"steps": 6})
    job.wait_started(1)
    (pid,) = [p for p in cluster.node_processes("node2") if b"SLURM_PROCID=3\0" in Path(f"/proc/{p}/environ").read_bytes()]
    os.kill(pid, signal.SIGSTOP)
    job.wait("the other ranks' end", lambda: "failed" in job.events or "end" in job.events, 60)
