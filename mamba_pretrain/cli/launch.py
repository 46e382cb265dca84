"""``mamba-pretrain submit | submit-data | status | logs | cancel | diagnose | sync``: the run's folder is the handle of its jobs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from launch.config import ClusterConfig
    from launch.submit import Prepared

RUN = typer.Argument(help="Folder of the run")
CLUSTER = typer.Option(..., "--cluster", help="Cluster profile, for example configs/cluster/h100-infiniband.yaml")
DRY_RUN = typer.Option(False, "--dry-run", help="Write and print the script, submit nothing.")


def submit(
    config: Path = typer.Argument(help="YAML config of the run"),
    overrides: list[str] = typer.Argument(None, metavar="[KEY.PATH=VALUE]...", help="Overrides, for example train.steps=100"),
    cluster: Path = CLUSTER,
    nodes: int = typer.Option(None, help="Nodes, instead of the profile's"),
    time: str = typer.Option(None, help="Time limit of a job, instead of the profile's"),
    launcher: str = typer.Option(None, help="srun, torchrun or deepspeed, instead of the profile's"),
    partition: str = typer.Option(None, help="Partition, instead of the profile's"),
    sweep: Path = typer.Option(None, help="File with one line of overrides a run: they are trained as a job array"),
    dry_run: bool = DRY_RUN,
) -> None:
    """Submit a run to Slurm; it saves, requeues and resumes by itself until it is done.

    Everything that can be wrong is looked for first. The script goes to RUN/launch/job.sbatch and is meant to be read.

    Example: `mamba-pretrain submit configs/mamba2/130m.yaml --cluster configs/cluster/h100-infiniband.yaml --nodes 2 --dry-run`
    """
    from launch.config import load_cluster
    from launch.submit import send

    profile = load_cluster(cluster, {"nodes": nodes, "time": time, "launcher": launcher, "partition": partition})
    prepared = _prepare_sweep(config, overrides or [], sweep, profile) if sweep else _prepare_run(config, overrides or [], profile)
    if dry_run:
        typer.echo(prepared.text)
        return
    jobs = send(prepared, profile)
    folder = prepared.place.run_dir
    typer.echo(f"submitted job {', '.join(jobs)} ({len(prepared.run_dirs)} runs)" if sweep else f"submitted job {', '.join(jobs)}")
    typer.echo(f"  script  {prepared.place.script}")
    typer.echo(f"  log     {folder / 'logs'}/slurm-*.out   (mamba-pretrain logs -f {prepared.run_dirs[0]})")
    typer.echo(f"  status  mamba-pretrain status {prepared.run_dirs[0]}")


def _prepare_run(config: Path, overrides: list[str], cluster: ClusterConfig) -> Prepared:
    from launch.submit import prepare_run

    run = _checked(config, overrides, cluster)
    return prepare_run(run.name, run.run_dir, run.to_yaml(), cluster, Path.cwd())


def _prepare_sweep(config: Path, overrides: list[str], sweep: Path, cluster: ClusterConfig) -> Prepared:
    from launch.submit import prepare_sweep, read_sweep

    base = _checked(config, overrides, cluster)
    configs = []
    for index, line in enumerate(read_sweep(sweep)):
        own_folder = [] if any(item.startswith("run_dir=") for item in line) else [f"run_dir={base.run_dir}/{index:03d}"]
        run = _checked(config, [*overrides, *own_folder, *line], cluster)
        configs.append((run.run_dir, run.to_yaml()))
    return prepare_sweep(f"{base.name}-sweep", base.run_dir, configs, cluster, Path.cwd())


def _checked(config: Path, overrides: list[str], cluster: ClusterConfig) -> Any:
    """The run's config after every check that needs no GPU: keys, data on disk, batch, folders."""
    from launch.preflight import check
    from mamba_pretrain.config import load_config

    run = load_config(config, overrides)
    check(run, cluster, Path.cwd())
    return run


def submit_data(
    arguments: list[str] = typer.Argument(help="Arguments of mamba-data tokenize, after --", metavar="-- TOKENIZE_ARGUMENTS..."),
    cluster: Path = CLUSTER,
    output: Path = typer.Option(..., "--output", help="Dataset folder to write; scripts and logs go to OUTPUT.jobs"),
    tasks: int = typer.Option(8, help="Tasks of the array, each with its share of the input"),
    dry_run: bool = DRY_RUN,
) -> None:
    """Tokenize as a job array, and complete the dataset when its tasks have ended.

    Example: `mamba-pretrain submit-data --cluster C --output data/web --tasks 32 -- 'raw/*.jsonl.zst' --tokenizer tokenizer`.
    """
    from launch.config import load_cluster
    from launch.jobs import Slurm
    from launch.submit import prepare_data, send_data

    profile = load_cluster(cluster)
    scripts = prepare_data(f"data-{output.name}", output, ["mamba-data", "tokenize", *arguments], tasks, profile, Path.cwd())
    if dry_run:
        typer.echo("\n".join(script.read_text() for script in scripts))
        return
    jobs = send_data(scripts, Slurm(profile.slurm_conf))
    typer.echo(f"submitted array {jobs[0]} of {tasks} tasks, and job {jobs[1]} that completes the dataset; logs in {output}.jobs/logs")


def status(run: Path = RUN) -> None:
    """Show a run's jobs, its last attempts and where training stands.

    Example: `mamba-pretrain status runs/quickstart`
    """
    from launch.jobs import status_lines

    typer.echo("\n".join(status_lines(_existing(run))))


def logs(
    run: Path = RUN,
    follow: bool = typer.Option(False, "--follow", "-f", help="Go on printing what is added, over requeues."),
    lines: int = typer.Option(50, "--lines", "-n", help="Lines to begin with"),
) -> None:
    """Print the log of a run's newest job.

    Example: `mamba-pretrain logs -f runs/quickstart`
    """
    from launch.jobs import follow_log

    for text in follow_log(_existing(run), lines, follow):
        typer.echo(text, nl=False)


def cancel(run: Path = RUN) -> None:
    """Cancel a run's jobs. The ranks get SIGTERM and save what they have; submit again to go on.

    Example: `mamba-pretrain cancel runs/quickstart`
    """
    from launch.jobs import cancel as cancel_jobs

    jobs = cancel_jobs(_existing(run))
    typer.echo(f"cancelled job {', '.join(jobs)}" if jobs else "no job of this run is in the queue")


def diagnose(run: Path = RUN) -> None:
    """Tell what a run folder knows of hangs, stragglers, silent ranks and restarts.

    Example: `mamba-pretrain diagnose runs/quickstart`
    """
    from launch.jobs import Ledger
    from mamba_pretrain.monitor.diagnose import hang_report, liveness_report, straggler_report

    folder = _existing(run)
    lines = [*hang_report(folder), *liveness_report(folder), *straggler_report(folder)]
    attempts = [row for row in Ledger(folder).attempts() if row["event"] != "submit"]
    lines.append(f"history: {sum(row['event'] == 'start' for row in attempts)} attempts")
    lines += [f"  {row['time']}  {row['event']:7} {row['checkpoint']:15} {row.get('detail', '')}" for row in attempts[-12:]]
    typer.echo("\n".join(lines))


def sync(
    run: Path = RUN,
    project: str = typer.Option(None, help="W&B project, instead of the config's"),
    entity: str = typer.Option(None, help="W&B entity, instead of the config's"),
) -> None:
    """Upload a run's metrics to W&B from a machine with internet. Repeat it as often as you like: no step is sent twice.

    Example: `mamba-pretrain sync runs/quickstart --project mamba`
    """
    from mamba_pretrain.monitor.sync import sync_run

    typer.echo(sync_run(_existing(run), project, entity))


def _existing(run: Path) -> Path:
    from data_tools.errors import UserError

    if not run.is_dir():
        raise UserError(f"run folder {run} does not exist; give the run_dir of a config that was trained or submitted")
    return run.absolute()
