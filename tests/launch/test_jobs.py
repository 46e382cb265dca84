"""The run's folder is the handle of its jobs: status, logs, cancel, sweeps, data jobs; nothing is submitted twice."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.errors import UserError
from launch.config import ClusterConfig
from launch.jobs import Ledger, Slurm, cancel, follow_log, status_lines
from launch.submit import prepare_data, prepare_sweep, read_sweep, refuse_if_active, send, send_data

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]


def toy(steps: int) -> str:
    return f"steps: {steps}\nseconds: 0.1\nsave_every: 1000"


def test_status_logs_and_cancel_by_the_run_folder(start: Callable) -> None:
    job = start({"steps": 100000})
    job.wait_started(1)
    with pytest.raises(UserError, match=f"already has job {job.ids[0]}"):
        refuse_if_active(job.run_dir)
    status = "\n".join(status_lines(job.run_dir))
    assert f"job {job.ids[0]}: RUNNING on node[1-2]" in status
    assert "attempt 0  start" in status
    assert "start (2 nodes: node[1-2])" in "".join(follow_log(job.run_dir, 50, follow=False))
    assert cancel(job.run_dir) == job.ids
    job.wait("an empty queue", lambda: not Ledger(job.run_dir).active_jobs())
    assert "no job in the queue" in "\n".join(status_lines(job.run_dir))
    assert cancel(job.run_dir) == []


def test_following_the_log_ends_with_the_run(start: Callable) -> None:
    job = start({"steps": 5})
    printed: list[str] = []
    reader = threading.Thread(target=lambda: printed.extend(follow_log(job.run_dir, 50, follow=True, poll=0.2)))
    reader.start()
    reader.join(timeout=60)
    assert not reader.is_alive()
    assert "end (done)" in "".join(printed)


def test_an_ended_run_can_be_submitted_again(start: Callable) -> None:
    first = start({"exit_code": 2})
    first.wait_ended()
    first.wait("an empty queue", lambda: not Ledger(first.run_dir).active_jobs())
    again = start({"steps": 2})
    assert again.wait_ended() == "done"
    assert len(Ledger(again.run_dir).rows) == 2


def test_sweep_trains_every_run_once(profile: dict[str, Any], tmp_path: Path, eventually: Callable) -> None:
    config = ClusterConfig.model_validate({**profile, "nodes": 1, "array_parallel": 2})
    runs = [(tmp_path / "sweep" / f"{index:03d}", toy(2 + index)) for index in range(3)]
    prepared = prepare_sweep("sweep", tmp_path / "sweep", runs, config, Path.cwd())
    slurm = Slurm(config.slurm_conf)
    jobs = send(prepared, config)
    eventually(lambda: all(Ledger(run_dir).ended() for run_dir, _ in runs))
    for index, (run_dir, _) in enumerate(runs):
        assert (run_dir / "checkpoints" / "latest").read_text() == f"step-{2 + index:08d}"
        assert Ledger(run_dir).rows[0]["job"] == f"{jobs[0]}_{index}"
        assert [row["event"] for row in Ledger(run_dir).attempts()] == ["submit", "start", "end"]
    slurm.run("scancel", *jobs, check=False)


def test_requeueing_one_task_of_a_sweep_leaves_the_others_alone(profile: dict[str, Any], tmp_path: Path, eventually: Callable) -> None:
    config = ClusterConfig.model_validate({**profile, "nodes": 1})
    runs = [(tmp_path / "sweep" / f"{index:03d}", toy(100000)) for index in range(2)]
    slurm = Slurm(config.slurm_conf)
    jobs = send(prepare_sweep("sweep", tmp_path / "sweep", runs, config, Path.cwd()), config)
    try:
        eventually(lambda: all((run_dir / "started-0.jsonl").exists() for run_dir, _ in runs))
        slurm.run("scancel", "--signal=TERM", f"{jobs[0]}_0")
        eventually(lambda: "again" in [row["event"] for row in Ledger(runs[0][0]).attempts()])
        eventually(lambda: slurm.states(f"{jobs[0]}_0") == ["PENDING"])
        assert slurm.states(f"{jobs[0]}_1") == ["RUNNING"]
    finally:
        slurm.run("scancel", *jobs, check=False)


def test_data_jobs_share_the_work(profile: dict[str, Any], tmp_path: Path, eventually: Callable) -> None:
    files = sorted((Path(__file__).parents[2] / "launch").glob("*.py"))
    text = [str(files[0].parent), "--include", "*.py"]
    commands = Path(sys.executable).parent
    tokenizer = ["train-tokenizer", *text, "--output", str(tmp_path / "tokenizer"), "--vocab-size", "400"]
    subprocess.run([commands / "mamba-data", *tokenizer], check=True, capture_output=True)
    setup = [f"export PATH={commands}:$PATH"]
    config = ClusterConfig.model_validate({**profile, "environment": {"setup": setup}})
    tokenize = ["mamba-data", "tokenize", *text, "--tokenizer", str(tmp_path / "tokenizer"), "--workers", "1"]
    scripts = prepare_data("web", tmp_path / "web", tokenize, 3, config, Path.cwd())
    send_data(scripts, Slurm(config.slurm_conf))
    eventually((tmp_path / "web" / "manifest.json").exists, 60)
    manifest = json.loads((tmp_path / "web" / "manifest.json").read_text())
    assert sum(shard["documents"] for shard in manifest["splits"]["train"]["shards"]) == len(files)
    with pytest.raises(UserError, match="already holds files"):
        prepare_data("web", tmp_path / "web", tokenize, 3, config, Path.cwd())


def test_sweep_files(tmp_path: Path) -> None:
    (tmp_path / "sweep.txt").write_text("# learning rates\noptim.lr=1e-3 seed=1\n\noptim.lr=3e-4  name='a b'\n")
    assert read_sweep(tmp_path / "sweep.txt") == [["optim.lr=1e-3", "seed=1"], ["optim.lr=3e-4", "name=a b"]]
    with pytest.raises(UserError, match="does not exist"):
        read_sweep(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(UserError, match="holds no runs"):
        read_sweep(tmp_path / "empty.txt")


def test_unsubmitted_run_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was never submitted"):
        status_lines(tmp_path)
