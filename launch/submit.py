"""Prepares run folders and scripts, and hands them to Slurm: one run, a sweep of runs, or data jobs."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from data_tools.errors import UserError
from launch.config import ClusterConfig
from launch.jobs import Ledger, Slurm, submit
from launch.slurm import JobPlace, render_data, render_job


@dataclass(frozen=True)
class Prepared:
    """A script in its place, ready to be submitted."""

    place: JobPlace
    run_dirs: list[Path]

    @property
    def text(self) -> str:
        """The script."""
        return self.place.script.read_text()


def prepare_run(name: str, run_dir: Path, config_yaml: str, cluster: ClusterConfig, project_dir: Path) -> Prepared:
    """Writes ``launch/config.yaml`` (the job trains this copy: later edits of the original do not reach it) and ``launch/job.sbatch``."""
    place = JobPlace(name, run_dir.absolute(), project_dir.absolute())
    refuse_if_active(place.run_dir)
    _freeze(place.run_dir, config_yaml)
    place.script.write_text(render_job(cluster, place))
    return Prepared(place, [place.run_dir])


def prepare_sweep(name: str, folder: Path, configs: list[tuple[Path, str]], cluster: ClusterConfig, project_dir: Path) -> Prepared:
    """Like ``prepare_run`` for ``(run_dir, config)`` pairs that one array trains, a task a run."""
    folder = folder.absolute()
    run_dirs = [run_dir.absolute() for run_dir, _ in configs]
    for run_dir, (_, config_yaml) in zip(run_dirs, configs, strict=True):
        refuse_if_active(run_dir)
        _freeze(run_dir, config_yaml)
    for part in ("launch", "logs"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    runs_file = folder / "launch" / "runs.txt"
    runs_file.write_text("".join(f"{run_dir}\n" for run_dir in run_dirs))
    place = JobPlace(name, folder, project_dir.absolute(), runs_file, len(run_dirs))
    place.script.write_text(render_job(cluster, place))
    return Prepared(place, run_dirs)


def send(prepared: Prepared, cluster: ClusterConfig) -> list[str]:
    """Submits; returns the job ids (several for a chain)."""
    chain = cluster.restart.chain_length if cluster.restart.mode == "chain" else 1
    return submit(Slurm(cluster.slurm_conf), prepared.place.script, prepared.run_dirs, chain)


def prepare_data(name: str, output: Path, tokenize: list[str], tasks: int, cluster: ClusterConfig, project_dir: Path) -> list[Path]:
    """Writes ``tokenize.sbatch``, an array whose tasks share the work, and ``finish.sbatch`` into ``OUTPUT.jobs/launch``; returns both.

    ``tokenize`` is the whole ``mamba-data tokenize`` command; the array adds ``--task-index`` and ``--task-count``. The last job is the command
    as it stands: it does what a failed task left undone, and publishes the dataset.
    """
    if tasks < 2:
        raise UserError(f"--tasks {tasks} makes no array; run mamba-data tokenize itself, or give 2 or more")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} already holds files; choose another --output, or remove it")
    place = JobPlace(name, output.absolute().with_name(f"{output.name}.jobs"), project_dir.absolute())
    for folder in ("launch", "logs"):
        (place.run_dir / folder).mkdir(parents=True, exist_ok=True)
    whole = shlex.join([*tokenize, "--output", str(output.absolute())])
    share = f'{whole} --task-index "$SLURM_ARRAY_TASK_ID" --task-count {tasks}'
    scripts = []
    for kind, command, size in (("tokenize", share, tasks), ("finish", whole, 1)):
        script = place.run_dir / "launch" / f"{kind}.sbatch"
        script.write_text(render_data(cluster, replace(place, name=f"{name}-{kind}"), command, size))
        scripts.append(script)
    return scripts


def send_data(scripts: list[Path], slurm: Slurm) -> list[str]:
    """Submits the array, and the job that completes it when all its tasks have ended."""
    jobs: list[str] = []
    for script in scripts:
        jobs.append(slurm.sbatch(script, *([f"--dependency=afterany:{jobs[-1]}"] if jobs else [])))
    return jobs


def read_sweep(path: Path) -> list[list[str]]:
    """A sweep file: one run a line, each a list of ``key.path=value`` overrides; ``#`` starts a comment."""
    if not path.is_file():
        raise UserError(f"sweep file {path} does not exist; it holds one line of key.path=value overrides a run")
    lines = [shlex.split(line, comments=True) for line in path.read_text().splitlines()]
    sweep = [line for line in lines if line]
    if not sweep:
        raise UserError(f"sweep file {path} holds no runs; write one line of key.path=value overrides for each")
    return sweep


def refuse_if_active(run_dir: Path) -> None:
    """Two jobs in one run folder would overwrite each other's checkpoints."""
    active = Ledger(run_dir).active_jobs()
    if active:
        raise UserError(f"{run_dir} already has job {', '.join(active)} in the queue; mamba-pretrain cancel {run_dir} removes it")


def _freeze(run_dir: Path, config_yaml: str) -> None:
    for part in ("launch", "logs"):
        (run_dir / part).mkdir(parents=True, exist_ok=True)
    (run_dir / "launch" / "config.yaml").write_text(config_yaml)
