"""Real training on the real local cluster: hit by each fault, it ends with the losses of an undisturbed run, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.chaos import newest_attempt, step_of
from launch.faults import Drill, differences, train_rows
from launch.jobs import Ledger
from launch.local_cluster import LocalCluster
from launch.rehearsal import Rehearsal

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]

STEPS = 40
LONG = 1200  # still under way a minute after it began


@pytest.fixture(scope="module")
def rehearsal(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    """A dataset beside the cluster."""
    made = Rehearsal(tmp_path_factory.mktemp("rehearsal"), cluster)
    made.make_data()
    return made


@pytest.fixture(scope="module")
def undisturbed(rehearsal: Rehearsal) -> Drill:
    """The losses to be met; also the plain end-to-end run through ``mamba-pretrain submit``."""
    return rehearsal.undisturbed(STEPS)


@pytest.fixture(scope="module")
def long_undisturbed(rehearsal: Rehearsal) -> Drill:
    """For faults that take a while to arrive: Slurm looks at time limits every half minute, and a signal passes through a launcher."""
    return rehearsal.undisturbed(LONG, name="undisturbed-long")


@pytest.fixture
def hit(rehearsal: Rehearsal, undisturbed: Drill, request: pytest.FixtureRequest) -> Iterator[Callable[..., Drill]]:
    """``hit(fault)`` trains, hits the run with the fault, and compares it with the undisturbed run when it is done."""
    drills: list[Drill] = []

    def run(fault: Callable[[Drill], str], attempts: int = 2, steps: int = STEPS, reference: Drill = undisturbed, **keys: object) -> Drill:
        drill = rehearsal.submit(request.node.name.replace("[", "-").strip("]"), steps, exit_grace=8, **keys)
        drills.append(drill)
        drill.wait("step 13", lambda: drill.last_step() >= 13)
        fault(drill)
        drill.wait("the next attempt", lambda: drill.starts() >= attempts, seconds=150)
        standing = Ledger(drill.run_dir).attempts()[-1]["checkpoint"]
        drill.wait_end()
        assert newest_attempt(drill)[0] == step_of(standing) > 0
        assert differences(drill.rows(), reference.rows()) is None
        return drill

    yield run
    for drill in drills:
        drill.slurm.run("scancel", drill.job, check=False)
        drill.heal()


def test_submitted_run_trains_to_the_end(undisturbed: Drill) -> None:
    assert [step for step, *_ in train_rows(undisturbed.rows())] == list(range(1, STEPS + 1))
    assert {undisturbed.rank(rank)["node"] for rank in (0, 1)} == {"node1", "node2"}


def test_requeue_and_kill_in_save(hit: Callable) -> None:
    """One run for two faults: (b) scontrol requeue, (e) kill -9 of one rank in the middle of a save."""

    def both(drill: Drill) -> str:
        drill.kill_rank_in_save(rank=1)
        drill.wait("the second attempt", lambda: drill.starts() == 2)
        drill.wait_training(2)
        return drill.requeue()

    assert hit(both, attempts=3).starts() == 3


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["requeue", "terminate", "lose_node", "kill_rank_in_save"])
def test_fault_changes_no_loss(hit: Callable, fault: str) -> None:
    hit(getattr(Drill, fault))


@pytest.mark.slow
def test_time_limit_changes_no_loss(long_undisturbed: Drill, hit: Callable) -> None:
    hit(Drill.time_limit, steps=LONG, reference=long_undisturbed, signal_lead=50)


@pytest.mark.slow
def test_sleeping_rank_is_named_and_the_run_goes_on(hit: Callable) -> None:
    moments: list[float] = []

    def sleep(drill: Drill) -> str:
        moments.append(time.time())
        return drill.freeze_rank(1)

    drill = hit(sleep)
    report = json.loads((drill.run_dir / "hang.json").read_text())
    assert (report["rank"], report["node"]) == (1, "node2")
    assert report["time"] - moments[0] < 15 + 10  # train.hang_timeout of the rehearsal, and ten seconds
    said = subprocess.run([sys.executable, "-m", "mamba_pretrain", "diagnose", str(drill.run_dir)], capture_output=True, text=True).stdout
    assert "last hang: rank 1 on node node2" in said
    assert "failed  " in said


@pytest.mark.slow
def test_slow_rank_is_named(rehearsal: Rehearsal) -> None:
    drill = rehearsal.submit("slowed", 2000, settings={"parallel.strategy": "ddp"})
    drill.wait("step 5", lambda: drill.last_step() >= 5)
    with drill.slowed_rank(1):
        drill.wait_training(60)
    said = subprocess.run([sys.executable, "-m", "mamba_pretrain", "diagnose", str(drill.run_dir)], capture_output=True, text=True).stdout
    drill.slurm.run("scancel", drill.job)
    assert "straggler: rank 1 on node node2 computes" in said


@pytest.mark.slow
@pytest.mark.parametrize("style", ["torchrun", "no_ssh", "slurm", "pdsh"])
def test_every_launcher_gives_the_same_losses(rehearsal: Rehearsal, undisturbed: Drill, style: str, ssh: None) -> None:
    keys: dict[str, object] = {"launcher": style} if style == "torchrun" else {"launcher": "deepspeed", "deepspeed_launcher": style}
    drill = rehearsal.submit(f"launcher-{style}", STEPS, **keys)  # type: ignore[arg-type]
    drill.wait_end()
    assert differences(drill.rows(), undisturbed.rows()) is None


@pytest.mark.slow
@pytest.mark.parametrize("style", ["torchrun", "no_ssh"])
def test_warning_reaches_ranks_of_other_launchers(rehearsal: Rehearsal, long_undisturbed: Drill, style: str) -> None:
    keys: dict[str, object] = {"launcher": style} if style == "torchrun" else {"launcher": "deepspeed", "deepspeed_launcher": style}
    drill = rehearsal.submit(f"warning-{style}", LONG, **keys)  # type: ignore[arg-type]
    drill.wait("step 13", lambda: drill.last_step() >= 13)
    drill.warning()
    drill.wait_end()
    assert "saved" in [row["event"] for row in Ledger(drill.run_dir).attempts()]
    assert differences(drill.rows(), long_undisturbed.rows()) is None


@pytest.mark.slow
def test_the_number_of_nodes_may_change(rehearsal: Rehearsal, undisturbed: Drill) -> None:
    """2, then 1, then 2 nodes again. Another world size adds in another order: equal to rounding, on the same samples."""
    for nodes, until in ((2, 10), (1, 22), (2, STEPS)):
        drill = rehearsal.submit("changing", STEPS, nodes=nodes, settings={"parallel.strategy": "single" if nodes == 1 else "fsdp2"})
        drill.wait(f"step {until}", lambda drill=drill, until=until: drill.last_step() >= until)
        if until < STEPS:
            drill.slurm.run("scancel", drill.job)
            drill.wait("an empty queue", lambda drill=drill: not Ledger(drill.run_dir).active_jobs())
    drill.wait_end()
    for mine, theirs in zip(train_rows(drill.rows()), train_rows(undisturbed.rows()), strict=True):
        assert mine[0] == theirs[0]
        assert mine[1] == pytest.approx(theirs[1], rel=1e-4)


@pytest.fixture(scope="module")
def shipped(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    """The quickstart as it is shipped."""
    made = Rehearsal(tmp_path_factory.mktemp("shipped"), cluster, as_shipped=True)
    made.make_data()
    return made


@pytest.mark.slow
def test_the_shipped_quickstart_survives_every_fault(shipped: Rehearsal) -> None:
    """Time limit, requeue, preemption, a lost node and a rank killed in a save, all in one run: its losses are those of an undisturbed one."""
    steps, health = 200, {"health": {"enabled": True, "gemm_size": 256, "memory_gb": 0.05, "bandwidth_mb": 4}}
    reference = shipped.undisturbed(steps, name="shipped-undisturbed")
    drill = shipped.submit("shipped-hit", steps, **health)  # type: ignore[arg-type]
    try:
        for number, fault in enumerate((Drill.requeue, Drill.terminate, Drill.kill_rank_in_save, Drill.lose_node, Drill.time_limit), 2):
            drill.wait_training(3)
            fault(drill)
            drill.wait(f"attempt {number}", lambda number=number: drill.starts() >= number, seconds=240)
            drill.heal()
        drill.wait_end(600)
    finally:
        drill.slurm.run("scancel", drill.job, check=False)
        drill.heal()
    assert differences(drill.rows(), reference.rows()) is None
    assert Ledger(drill.run_dir).ended() == "done"


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An ssh server on this machine's node names that lets this user in, for pdsh; found and left as it was."""
    missing = [name for name in ("pdsh", "sshd", "ssh-keygen") if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (make system-packages)")
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "authorized_keys").write_text((folder / "user.pub").read_text())
    Path("/run/sshd").mkdir(exist_ok=True)
    options = {
        "Port": "2222",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "authorized_keys",
        "PidFile": folder / "pid",
        "StrictModes": "no",
        "PermitRootLogin": "yes",
        "UsePAM": "no",
        "MaxStartups": "100",
    }
    subprocess.run(["/usr/sbin/sshd", "-f", "/dev/null", *(f"-o{key}={value}" for key, value in options.items())], check=True)
    client = f"-p 2222 -i {folder / 'user'} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    before = {key: os.environ.get(key) for key in ("PDSH_SSH_ARGS_APPEND",)}
    os.environ["PDSH_SSH_ARGS_APPEND"] = client
    yield
    for key, value in before.items():
        os.environ.pop(key) if value is None else os.environ.update({key: value})
    os.kill(int((folder / "pid").read_text()), 15)
