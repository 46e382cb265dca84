"""What ``mamba-pretrain submit --cluster FILE`` is told about a cluster. Ready profiles with comments: ``configs/cluster/*.yaml``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from data_tools.errors import UserError

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
KILL_WAIT = 30  # seconds Slurm leaves between SIGTERM and SIGKILL unless the administrator changed KillWait


class EnvironmentConfig(BaseModel):
    """How a node gets Python and its libraries. Give at most one of conda and venv; a container brings its own."""

    model_config = ConfigDict(extra="forbid")

    modules: list[str] = Field(default_factory=list, description="modules to load, after a module purge; for example cuda/12.8")
    conda: str | None = Field(None, description="conda environment to activate (name or path)")
    venv: str | None = Field(None, description="virtual environment to activate (folder; relative to where submit runs)")
    setup: list[str] = Field(default_factory=list, description="further shell lines to run before anything else")
    variables: dict[str, str] = Field(
        default_factory=dict, description="environment variables to export; they win over the network profile"
    )
    python: str | None = Field(None, description="the interpreter; empty: `python` of the environment above, else the one that runs submit")

    @field_validator("variables")
    @classmethod
    def _names(cls, variables: dict[str, str]) -> dict[str, str]:
        for name in variables:
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a name of an environment variable")
        return variables

    @model_validator(mode="after")
    def _one_python(self) -> EnvironmentConfig:
        if self.conda and self.venv:
            raise ValueError("conda and venv are both given; keep the one that holds mamba-pretrain")
        return self


class ContainerConfig(BaseModel):
    """A container in which each task runs."""

    model_config = ConfigDict(extra="forbid")

    runtime: Literal["pyxis", "apptainer"] = Field(description="pyxis: srun --container-image (enroot); apptainer: apptainer exec")
    image: str = Field(min_length=1, description="image: a registry reference or .sqsh for pyxis, a .sif for apptainer")
    mounts: list[str] = Field(
        default_factory=list, description="SOURCE:TARGET folders; the working folder and the run folder are always mounted"
    )

    @field_validator("mounts")
    @classmethod
    def _pairs(cls, mounts: list[str]) -> list[str]:
        for mount in mounts:
            if ":" not in mount or not mount.startswith("/"):
                raise ValueError(f"mount {mount!r} is not of the form /source:/target")
        return mounts


class RestartConfig(BaseModel):
    """What happens when a run is interrupted."""

    model_config = ConfigDict(extra="forbid")

    mode: Literal["requeue", "resubmit", "chain", "never"] = Field(
        "requeue",
        description="requeue: the job requeues itself and keeps its id. resubmit: it submits a follower, for clusters that forbid requeue. "
        "chain: followers are submitted beforehand, for clusters that also forbid sbatch on compute nodes. never: one attempt",
    )
    chain_length: int = Field(4, ge=2, description="mode chain: jobs to submit, each waiting for the one before (afterany)")
    max_restarts: int = Field(100, ge=0, description="attempts after the first, over all requeues; then the run stops with a reason")
    crash_loop: int = Field(4, ge=2, description="so many attempts that end by a fault at the same checkpoint stop the run with a reason")
    in_place: bool = Field(
        True, description="after a crash or hang with all nodes well, start again inside the allocation instead of waiting in the queue"
    )
    exclude_bad_nodes: bool = Field(False, description="nodes that fail the health check are excluded and the job is requeued without them")


class HealthConfig(BaseModel):
    """The check of every node before training starts."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool = Field(True, description="run launch.health on every node before each attempt")
    gemm_size: int = Field(4096, ge=64, description="side of the square matrices whose product is timed and verified")
    memory_gb: float = Field(8.0, gt=0, description="device (or host) memory that is written and read back")
    bandwidth_mb: int = Field(256, ge=1, description="message size of the bandwidth measurements")
    slow_ratio: float = Field(0.7, gt=0, lt=1, description="a node under this fraction of the median speed or bandwidth is bad")
    min_disk_gb: float = Field(5.0, ge=0, description="free space that the local cache folder and the run folder must have")
    max_clock_skew: float = Field(5.0, gt=0, description="seconds by which a node's clock may differ from the median")
    timeout: int = Field(300, ge=10, description="seconds until a node that does not answer counts as bad")


class ClusterConfig(BaseModel):
    """A cluster and how a run uses it."""

    model_config = ConfigDict(extra="forbid")

    # what to ask Slurm for
    partition: str | None = Field(None, description="partition; empty: the cluster's default")
    account: str | None = Field(None, description="account to charge")
    qos: str | None = Field(None, description="quality of service")
    reservation: str | None = Field(None, description="reservation")
    constraint: str | None = Field(None, description="node features, for example h100&ib")
    nodes: int = Field(1, ge=1, description="nodes")
    min_nodes: int | None = Field(
        None, ge=1, description="start (again) with as few as this many nodes if no more are free; empty: exactly nodes"
    )
    gpus_per_node: int = Field(0, ge=0, description="GPUs per node; 0: CPU only")
    gpu_request: Literal["gpus-per-node", "gres", "none"] = Field(
        "gpus-per-node", description="how GPUs are asked for: --gpus-per-node=N, --gres=gpu:N, or not at all (whole-node clusters)"
    )
    ranks_per_node: int | None = Field(None, ge=1, description="processes per node; empty: one per GPU")
    cpus_per_rank: int = Field(1, ge=1, description="CPU cores per process; also sets OMP_NUM_THREADS")
    memory: str | None = Field(None, pattern=r"^\d+[KMGT]?$", description="memory per node, such as 900G; 0: all of it; empty: the default")
    exclusive: bool = Field(False, description="do not share nodes with other jobs")
    time: str = Field("24:00:00", description="time limit: MINUTES, HH:MM:SS or D-HH:MM:SS")
    exclude: list[str] = Field(default_factory=list, description="nodes never to use")
    sbatch_options: list[str] = Field(default_factory=list, description="further #SBATCH options, for example --mail-type=FAIL")
    srun_options: list[str] = Field(
        default_factory=list, description="further options of the srun that starts the ranks, for example --cpu-bind=cores"
    )
    array_parallel: int | None = Field(None, ge=1, description="tasks of a sweep or of data jobs that run at once; empty: no limit")

    # how ranks are started
    launcher: Literal["srun", "torchrun", "deepspeed"] = Field(
        "srun", description="srun: one task per rank, keeps exit codes and signals; prefer it"
    )
    deepspeed_launcher: Literal["no_ssh", "pdsh", "slurm"] = Field(
        "no_ssh", description="launcher deepspeed: no_ssh: one launcher per node under srun; pdsh: over ssh; slurm: deepspeed calls srun"
    )
    environment: EnvironmentConfig = Field(default_factory=EnvironmentConfig)
    container: ContainerConfig | None = Field(None, description="run every task in a container")
    network: Literal["infiniband", "efa", "ethernet", "local"] = Field(
        description="which NCCL and gloo settings to export: see launch/network.py"
    )
    interface: str | None = Field(
        None, description="network interface for bootstrap and gloo, for example eth0; empty: left to NCCL and gloo"
    )
    cache_dir: str = Field(
        "/tmp/$USER/mamba-pretrain",
        description="folder on each node's own disk for Triton, Inductor and kernel caches; may hold $VARIABLES",
    )
    hf_home: str | None = Field(
        None, description="Hugging Face cache on the shared disk; the job then runs with HF_HUB_OFFLINE=1. Empty: as is"
    )

    # how a run survives
    signal_lead: int = Field(
        300, ge=0, description="seconds before the time limit at which the run saves and leaves; longer than a step and a save"
    )
    exit_grace: int = Field(60, ge=5, description="seconds the other ranks get to finish once one rank has left")
    restart: RestartConfig = Field(default_factory=RestartConfig)
    health: HealthConfig = Field(default_factory=HealthConfig)
    slurm_conf: Path | None = Field(None, description="SLURM_CONF of a cluster that is not the machine's default (the local test cluster)")

    @property
    def ranks(self) -> int:
        """Processes per node."""
        return self.ranks_per_node or self.gpus_per_node

    @property
    def smallest(self) -> int:
        """The fewest nodes the job may start with."""
        return self.min_nodes or self.nodes

    @field_validator("time")
    @classmethod
    def _time(cls, text: str) -> str:
        seconds_of(text)
        return text

    @field_validator("sbatch_options", "srun_options")
    @classmethod
    def _options(cls, options: list[str]) -> list[str]:
        for option in options:
            if not re.fullmatch(r"-{1,2}[A-Za-z][^\n]*", option):
                raise ValueError(f"{option!r} is not an option such as --mail-type=FAIL")
        return options

    @model_validator(mode="after")
    def _consistent(self) -> ClusterConfig:
        if not self.ranks:
            raise ValueError("ranks_per_node is missing: with gpus_per_node 0 it says how many processes a node runs")
        if self.gpus_per_node and self.ranks > self.gpus_per_node:
            raise ValueError(f"ranks_per_node {self.ranks} is more than gpus_per_node {self.gpus_per_node}; a rank needs a GPU of its own")
        if self.smallest > self.nodes:
            raise ValueError(f"min_nodes {self.min_nodes} is more than nodes {self.nodes}")
        limit = seconds_of(self.time)
        if self.signal_lead >= limit:
            raise ValueError(f"signal_lead {self.signal_lead} s is not shorter than the time limit {self.time} ({limit} s)")
        if self.container and (self.environment.conda or self.environment.venv):
            raise ValueError("container is given together with conda or venv; the container's own Python is used, so leave those empty")
        if self.container and self.launcher == "deepspeed" and self.deepspeed_launcher != "no_ssh":
            raise ValueError(f"deepspeed_launcher {self.deepspeed_launcher} starts ranks outside the container; use no_ssh")
        return self


def seconds_of(text: str) -> int:
    """A Slurm time limit in seconds: ``MINUTES``, ``MINUTES:SECONDS``, ``HH:MM:SS``, ``D-HH``, ``D-HH:MM`` or ``D-HH:MM:SS``."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ValueError(f"time {text!r} is not MINUTES, HH:MM:SS or D-HH:MM:SS")
    days, *parts = [None if group is None else int(group) for group in match.groups()]
    given = [part for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = [*given, 0, 0][:3]
    elif len(given) == 3:
        hours, minutes, seconds = given
    else:
        hours, (minutes, seconds) = 0, [*given, 0][:2]
    total = ((days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds
    if total <= 0:
        raise ValueError(f"time {text!r} is no time at all")
    return total


def load_cluster(path: str | Path, overrides: dict[str, object] | None = None) -> ClusterConfig:
    """Reads a profile; ``overrides`` replace top-level keys (None values are ignored). UserError says in one sentence what is wrong."""
    from pydantic import ValidationError

    from mamba_pretrain.config import explain

    tree = _read(Path(path)) | {key: value for key, value in (overrides or {}).items() if value is not None}
    # --nodes on the command line means exactly that many, whatever range the profile allows.
    if overrides and overrides.get("nodes") is not None:
        tree.pop("min_nodes", None)
    try:
        return ClusterConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"cluster config {path}: {explain(error, ClusterConfig)}") from error


def _read(path: Path) -> dict[str, object]:
    """Plain YAML: ``${NAME}`` in setup lines belongs to the shell, so OmegaConf must not read these files."""
    import yaml

    if not path.is_file():
        raise UserError(f"cluster config {path} does not exist; the ready ones are under configs/cluster/")
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"cluster config {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"cluster config {path} is not a mapping of keys to values; compare it with configs/cluster/local.yaml")
    return tree
