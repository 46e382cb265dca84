"""A real Slurm cluster of a few nodes on this one machine, for tests and for trying out cluster configs.

    python -m launch.local_cluster up [--nodes 4] [--folder DIR]      # about two seconds; prints the SLURM_CONF to use
    python -m launch.local_cluster status | down

Needs Linux, root (Slurm's daemons run as root and the node names go to /etc/hosts) and ``apt-get install slurm-wlm munge``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from data_tools.errors import UserError

DEFAULT_FOLDER = Path("/tmp/mamba-pretrain-slurm")  # configs/cluster/local.yaml names this place
PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo", "scontrol", "sbatch", "scancel")

SLURM_CONF = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
# A lost node is noticed after 5 s here, after 300 s by Slurm's default: tests should not wait.
SlurmdTimeout=5
KillWait=15
MinJobAge=3600
ReturnToService=2
JobRequeue=1
OverTimeLimit=0
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
# Two partitions on the same nodes: a job in "urgent" preempts one in "main", with 20 s to save.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=node[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=8 RealMemory=8000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=120 State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=120 State=UP PriorityTier=2 PreemptMode=OFF
"""
# Terminals stand in for GPUs, so that scripts with --gres or --gpus-per-node are accepted unchanged.
GRES_CONF = "NodeName=node[1-{nodes}] Name=gpu File=/dev/tty[0-1]\n"


class LocalCluster:
    """The cluster of one folder: configuration, logs, state and pid files live there, and only processes named by those are stopped."""

    def __init__(self, folder: Path = DEFAULT_FOLDER, nodes: int = 4) -> None:
        self.folder = Path(folder)
        self.nodes = [f"node{i}" for i in range(1, nodes + 1)]
        self.conf = self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make Slurm's commands talk to this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.conf)}

    def command(self, *arguments: str, check: bool = True) -> str:
        """Runs a Slurm command against this cluster and returns its output, stripped."""
        result = subprocess.run(arguments, env=self.environment, capture_output=True, text=True, timeout=60)
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(arguments)} failed: {result.stderr.strip()}")
        return result.stdout.strip()

    def up(self) -> LocalCluster:
        """Starts munge, the controller and the nodes, and waits until all nodes are idle."""
        check_prerequisites()
        if self.is_up():
            raise UserError(
                f"a cluster already runs in {self.folder}; stop it first: python -m launch.local_cluster down --folder {self.folder}"
            )
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("munge", "state", "spool", "log"):
            (self.folder / name).mkdir(parents=True)
        add_host_names(self.nodes)
        self._write_configuration()
        self._start_munge()
        self._start("slurmctld")
        for node in self.nodes:
            self.start_node(node)
        self.wait_idle()
        return self

    def is_up(self) -> bool:
        """Whether the controller of this folder is alive."""
        pid = _read_pid(self.folder / "slurmctld.pid")
        return pid is not None and Path(f"/proc/{pid}").exists()

    def down(self) -> None:
        """Cancels all jobs and stops the daemons, by their pid files."""
        if self.is_up():
            for job in self.command("squeue", "-h", "-o", "%A", check=False).split():
                self.command("scancel", job, check=False)
                self.command("scancel", "-s", "KILL", "-f", job, check=False)
            _wait(lambda: not self.command("squeue", "-h", "-o", "%A", check=False), 20)
        for node in self.nodes:
            for pid in self.node_processes(node):
                _signal(pid, signal.SIGKILL)
        for name in ("slurmctld", "munged"):
            self._stop_daemon(self.folder / f"{name}.pid")

    @staticmethod
    def _stop_daemon(pid_file: Path) -> None:
        pid = _read_pid(pid_file)
        if pid is not None:
            _signal(pid, signal.SIGTERM)
            _wait(lambda: not Path(f"/proc/{pid}").exists(), 15)

    def start_node(self, node: str) -> None:
        """Starts the node's daemon; also brings a killed node back."""
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        self._start("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """Hard loss of a node: its daemon, step managers and tasks are killed at once, as by a power cut."""
        for pid in self.node_processes(node):
            _signal(pid, signal.SIGKILL)

    def node_processes(self, node: str) -> list[int]:
        """Process ids of a node's daemon, of its step managers and of everything they started."""
        found = [pid for pid in [_read_pid(self.folder / f"slurmd-{node}.pid")] if pid is not None and Path(f"/proc/{pid}").exists()]
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and self._belongs_to(entry, node):
                found.append(int(entry.name))
        return found

    def _belongs_to(self, process: Path, node: str) -> bool:
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            if f"SLURMD_NODENAME={node}".encode() in variables:
                return f"SLURM_CONF={self.conf}".encode() in variables
            # A step manager has no such variable, but it writes to its node's log.
            if not (process / "cmdline").read_bytes().startswith(b"slurmstepd"):
                return False
            return str(self.folder / "log" / f"slurmd-{node}.log") in [os.readlink(link) for link in (process / "fd").iterdir()]
        except OSError:
            return False  # it ended while being looked at

    def hurry(self, job: str) -> None:
        """Spares a requeued job Slurm's two minutes of delay, as an administrator can.

        Not while it is COMPLETING: the change would be lost. And not in the second of the requeue: the nodes refuse a job's credential
        that is as old as the one they just revoked, and the job ends as failed.
        """
        known = dict(pair.split("=", 1) for pair in self.command("scontrol", "show", "job", "-o", job, check=False).split() if "=" in pair)
        if known.get("JobState") != "PENDING" or known.get("Reason") != "BeginTime":
            return
        requeued = time.mktime(time.strptime(known["SubmitTime"], "%Y-%m-%dT%H:%M:%S"))
        if time.time() - requeued > 3.0:
            self.command("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=60", check=False)

    def wait_idle(self, seconds: float = 30.0) -> None:
        """Waits until every node is idle; raises RuntimeError with the controller's view otherwise."""
        expected = set(self.nodes)
        if not _wait(lambda: set(self.command("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).split()) >= expected, seconds):
            raise RuntimeError(f"nodes are not idle after {seconds:.0f} s: {self.command('sinfo', '-N', '-l', check=False)}")

    def _write_configuration(self) -> None:
        first = free_ports(len(self.nodes) + 1)
        values = {"folder": self.folder, "host": socket.gethostname(), "nodes": len(self.nodes)}
        ports = {"port": first, "first": first + 1, "last": first + len(self.nodes)}
        self.conf.write_text(SLURM_CONF.format(**values, **ports))
        (self.folder / "gres.conf").write_text(GRES_CONF.format(**values))

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        key = folder / "key"
        key.write_bytes(os.urandom(256))
        key.chmod(0o600)
        files = {"key-file": key, "socket": folder / "sock", "pid-file": self.folder / "munged.pid"}
        files |= {"log-file": folder / "log", "seed-file": folder / "seed"}
        subprocess.run(["munged", "--force", *(f"--{name}={path}" for name, path in files.items())], check=True, capture_output=True)

    def _start(self, *arguments: str) -> None:
        # A new session: a Ctrl-C in the terminal that started the cluster must not reach the daemons.
        with (self.folder / "log" / "start.log").open("a") as log:
            subprocess.run(arguments, env=self.environment, check=True, stdout=log, stderr=log, start_new_session=True)


def check_prerequisites() -> None:
    """Raises UserError when this machine cannot run the cluster."""
    missing = missing_programs()
    if missing:
        raise UserError(f"the local cluster needs {', '.join(missing)}; install them with: apt-get install -y slurm-wlm munge")
    if os.geteuid() != 0:
        raise UserError("the local cluster needs root (Slurm's daemons switch users); run it in a container or a virtual machine")


def missing_programs() -> list[str]:
    """Slurm programs that are not installed here."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def add_host_names(nodes: list[str], hosts: Path = Path("/etc/hosts")) -> None:
    """Makes the node names resolve to this machine."""
    present = hosts.read_text().split()
    lines = [f"127.0.0.1 {node}\n" for node in nodes if node not in present]
    if lines:
        with hosts.open("a") as file:
            file.writelines(lines)


def free_ports(count: int) -> int:
    """The first of ``count`` consecutive ports nobody listens on."""
    for first in range(17000 + os.getpid() % 200 * 16, 30000, 16):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, each in enumerate(sockets):
                each.bind(("127.0.0.1", first + offset))
            return first
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    raise UserError(f"no {count} free consecutive ports between 17000 and 30000")


def _read_pid(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _wait(condition: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(prog="python -m launch.local_cluster", description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("action", choices=["up", "down", "status"])
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    arguments = parser.parse_args()
    cluster = LocalCluster(arguments.folder, arguments.nodes)
    try:
        if arguments.action == "up":
            cluster.up()
            print(f"{len(cluster.nodes)} nodes are idle; use them with: export SLURM_CONF={cluster.conf}")
        elif arguments.action == "down":
            cluster.down()
        else:
            print(cluster.command("sinfo", "-N", "-l") if cluster.is_up() else f"no cluster runs in {cluster.folder}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
