"""Everything that can be found out to be wrong before a job waits hours in a queue."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.errors import UserError
from launch.config import ClusterConfig

if TYPE_CHECKING:
    from mamba_pretrain.config import RunConfig


def check(run: RunConfig, cluster: ClusterConfig, project_dir: Path) -> None:
    """Raises UserError for the first problem of a run on a cluster."""
    check_environment(cluster, project_dir)
    check_run_dir(run.run_dir)
    check_data(run, project_dir)
    check_batch(run, cluster)
    check_strategy(run, cluster)


def check_environment(cluster: ClusterConfig, project_dir: Path) -> None:
    """The virtual environment exists, and so does a container image that is a file."""
    venv = cluster.environment.venv
    if venv and not (project_dir / venv / "bin" / "activate").is_file():
        raise UserError(f"environment.venv {venv} holds no bin/activate, seen from {project_dir}; make it there, or correct the path")
    container = cluster.container
    if container and container.image.endswith((".sif", ".sqsh")) and not Path(container.image).is_file():
        raise UserError(f"container.image {container.image} does not exist")


def check_run_dir(run_dir: Path) -> None:
    """The batch script, Slurm's options and the history are lines of text: a run folder must be one word of one line."""
    if any(character.isspace() or character in "\"'%\\" for character in str(run_dir)):
        raise UserError(f"run_dir {str(run_dir)!r} holds a blank, quote, backslash or %, which Slurm's log paths cannot; choose another")


def check_data(run: RunConfig, project_dir: Path) -> None:
    """Every dataset is there, and was finished: the manifest is written last."""
    for source in run.data.sources:
        manifest = project_dir / source.path / "manifest.json"
        if not manifest.is_file():
            raise UserError(f"data source {source.path} holds no manifest.json; write it with mamba-data tokenize, or correct data.sources")


def check_batch(run: RunConfig, cluster: ClusterConfig) -> None:
    """The global batch divides by ranks x micro-batch, for every number of nodes the job may start with."""
    size = run.train.global_batch_size
    for nodes in range(cluster.smallest, cluster.nodes + 1) if size else ():
        unit = nodes * cluster.ranks * run.train.micro_batch_size
        if size and size % unit:
            raise UserError(
                f"train.global_batch_size {size} is not a multiple of {unit} = {nodes} nodes x {cluster.ranks} ranks x micro-batch "
                f"{run.train.micro_batch_size}; change it, the micro-batch, or {'min_nodes' if nodes < cluster.nodes else 'nodes'}"
            )


def check_strategy(run: RunConfig, cluster: ClusterConfig) -> None:
    """One process alone cannot share, and several cannot be one."""
    strategy, smallest = run.parallel.strategy, cluster.smallest * cluster.ranks
    if strategy == "single" and cluster.nodes * cluster.ranks > 1:
        raise UserError(
            f"parallel.strategy single uses one process, but {cluster.nodes} nodes x {cluster.ranks} ranks are asked for; "
            "choose auto, ddp, fsdp2, hsdp or zero1-3, or one node with ranks_per_node 1"
        )
    if strategy in ("ddp", "hsdp") and smallest == 1:
        raise UserError(f"parallel.strategy {strategy} needs several processes, but the job may start with one; choose auto or raise nodes")
