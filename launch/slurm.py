"""From a config to an sbatch script: what it asks Slurm for, which environment it sets up, how it starts the ranks."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import network
from launch.config import ClusterConfig

TEMPLATES = Path(__file__).parent / "templates"
NEXT_LINE = "\\\n    "


@dataclass(frozen=True)
class JobPlace:
    """Where a job runs and writes. ``runs_file`` lists the run folders of a sweep, one a line; then ``run_dir`` is the sweep's folder."""

    name: str
    run_dir: Path
    project_dir: Path
    runs_file: Path | None = None
    sweep_size: int = 0

    @property
    def script(self) -> Path:
        """The rendered script."""
        return self.run_dir / "launch" / "job.sbatch"


def render_job(cluster: ClusterConfig, place: JobPlace) -> str:
    """The script that trains a run (or a sweep's runs) and keeps it alive."""
    patience = max(cluster.signal_lead // 2, cluster.signal_lead - 60)
    return _render(
        "job.sbatch.j2",
        cluster=cluster,
        restart=cluster.restart,
        name=place.name,
        run_dir=str(place.run_dir),
        project_dir=str(place.project_dir),
        script=str(place.script),
        runs_file=str(place.runs_file) if place.runs_file else None,
        sbatch_options=sbatch_options(cluster, place),
        setup_lines=setup_lines(cluster),
        exports=exports(cluster),
        launcher=cluster.launcher,
        forward_signal=cluster.launcher == "srun",
        patience=patience,
        node_cpus=cluster.ranks * cluster.cpus_per_rank,
        gpu_flags=_gpu_flags(cluster),
        srun_options="".join(f" {option}" for option in cluster.srun_options),
        exclude_suffix="".join(f",{node}" for node in cluster.exclude),
        task_prefix=task_prefix(cluster, place),
        python=shlex.quote(interpreter(cluster)),
        health_options=health_options(cluster),
        forwarded_variables=["MAMBA_PRETRAIN_[A-Z_]*|LD_LIBRARY_PATH|PATH", "|".join(exports(cluster))],
    )


def render_data(cluster: ClusterConfig, place: JobPlace, command: str, tasks: int) -> str:
    """A script that runs a ``mamba-data`` command, as an array of ``tasks`` if there are several."""
    options = [*_identity(cluster), "--nodes=1", "--ntasks=1", f"--cpus-per-task={cluster.ranks * cluster.cpus_per_rank}", "--requeue"]
    if tasks > 1:
        options.append(_array(cluster, tasks))
    options += _output(place, array=tasks > 1)
    return _render(
        "tokenize.sbatch.j2",
        name=place.name,
        project_dir=str(place.project_dir),
        sbatch_options=[f"--job-name={_job_name(place.name)}", *options],
        setup_lines=setup_lines(cluster),
        exports=data_exports(cluster),
        task_prefix=f"srun {task_prefix(cluster, place)}",
        command=command,
    )


def sbatch_options(cluster: ClusterConfig, place: JobPlace) -> list[str]:
    """The ``#SBATCH`` lines of a training job."""
    nodes = f"{cluster.smallest}-{cluster.nodes}" if cluster.smallest < cluster.nodes else str(cluster.nodes)
    options = [f"--job-name={_job_name(place.name)}", *_identity(cluster), f"--nodes={nodes}", f"--ntasks-per-node={cluster.ranks}"]
    options.append(f"--cpus-per-task={cluster.cpus_per_rank}")
    if cluster.gpus_per_node and cluster.gpu_request != "none":
        options.append(_gpu_request(cluster))
    if cluster.exclusive:
        options.append("--exclusive")
    if cluster.signal_lead:
        options.append(f"--signal=B:USR1@{cluster.signal_lead}")
    options.append("--requeue" if cluster.restart.mode == "requeue" else "--no-requeue")
    if place.runs_file:
        options.append(_array(cluster, place.sweep_size))
    return [*options, *_output(place, array=place.runs_file is not None), *cluster.sbatch_options]


def _identity(cluster: ClusterConfig) -> list[str]:
    """Where the job may run and who pays: the same for training and data."""
    keys = ("partition", "account", "qos", "reservation", "constraint")
    options = [f"--{key}={shlex.quote(value)}" for key in keys if (value := getattr(cluster, key))]
    options.append(f"--time={cluster.time}")
    if cluster.memory:
        options.append(f"--mem={cluster.memory}")
    if cluster.exclude:
        options.append(f"--exclude={','.join(cluster.exclude)}")
    return options


def _output(place: JobPlace, array: bool) -> list[str]:
    log = place.run_dir / "logs" / ("slurm-%A_%a.out" if array else "slurm-%j.out")
    # Appending, because a requeued job keeps its id and would overwrite the log of its earlier attempts.
    return [f"--output={shlex.quote(str(log))}", "--open-mode=append"]


def _array(cluster: ClusterConfig, tasks: int) -> str:
    return f"--array=0-{tasks - 1}" + (f"%{cluster.array_parallel}" if cluster.array_parallel else "")


def _gpu_request(cluster: ClusterConfig) -> str:
    return f"--gpus-per-node={cluster.gpus_per_node}" if cluster.gpu_request == "gpus-per-node" else f"--gres=gpu:{cluster.gpus_per_node}"


def _gpu_flags(cluster: ClusterConfig) -> str:
    """A step does not inherit every kind of GPU request in every version of Slurm: say it again."""
    return f" {_gpu_request(cluster)}" if cluster.gpus_per_node and cluster.gpu_request != "none" else ""


def _job_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def setup_lines(cluster: ClusterConfig) -> list[str]:
    """Shell lines that bring Python and its libraries."""
    environment = cluster.environment
    lines = list(environment.setup)
    if environment.modules:
        lines += ["module purge", f"module load {' '.join(map(shlex.quote, environment.modules))}"]
    if environment.conda:
        lines += ['eval "$(conda shell.bash hook)"', f"conda activate {shlex.quote(environment.conda)}"]
    if environment.venv:
        lines += ["# shellcheck disable=SC1091", f"source {shlex.quote(environment.venv + '/bin/activate')}"]
    return lines


def exports(cluster: ClusterConfig) -> dict[str, str]:
    """Variables of a training job, quoted for the shell: network, threads, caches on the node's own disk, Hugging Face."""
    found = {key: shlex.quote(value) for key, value in network.variables(cluster).items()}
    # Compiled kernels: on a shared file system every rank would lock and read thousands of small files at once.
    caches = {
        "TRITON_CACHE_DIR": "triton",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "CUDA_CACHE_PATH": "cuda",
        "MAMBA_PRETRAIN_KERNEL_CACHE": "kernels",
    }
    found |= {key: f'"{cluster.cache_dir}/{folder}"' for key, folder in caches.items()}
    if cluster.gpus_per_node:
        found |= dict.fromkeys(network.FLIGHT_RECORDER_FILES, '"$RUN/logs/nccl-trace-rank-"')
    return found | data_exports(cluster)


def data_exports(cluster: ClusterConfig) -> dict[str, str]:
    """Variables of every job: threads, Hugging Face's cache, and the user's own, which win."""
    found = {"OMP_NUM_THREADS": str(cluster.cpus_per_rank)}
    if cluster.hf_home:
        found |= {"HF_HOME": shlex.quote(cluster.hf_home), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return found | {key: shlex.quote(value) for key, value in cluster.environment.variables.items()}


def task_prefix(cluster: ClusterConfig, place: JobPlace) -> str:
    """What stands between srun and the program: nothing, pyxis' options, or apptainer."""
    container = cluster.container
    if container is None:
        return ""
    mounts = ",".join([*container.mounts, f"{place.project_dir}:{place.project_dir}", f"{place.run_dir}:{place.run_dir}"])
    if container.runtime == "pyxis":
        lines = [[f"--container-image={container.image}"], [f"--container-mounts={mounts}"], [f"--container-workdir={place.project_dir}"]]
    else:
        nvidia = ["--nv"] if cluster.gpus_per_node else []
        lines = [["apptainer", "exec", *nvidia, "--pwd", str(place.project_dir)], ["--bind", mounts], [container.image]]
    return "".join(f"{shlex.join(line)} {NEXT_LINE}" for line in lines)


def interpreter(cluster: ClusterConfig) -> str:
    """The Python of the job: an environment's or container's own, else the one that runs submit."""
    environment = cluster.environment
    brought = cluster.container or environment.conda or environment.venv or environment.modules or environment.setup
    return environment.python or ("python" if brought else sys.executable)


def health_options(cluster: ClusterConfig) -> list[str]:
    """Options of ``python -m launch.health``, as two lines of the script."""
    health = cluster.health

    def line(*names: str) -> str:
        return " ".join(f"--{name.replace('_', '-')} {getattr(health, name):g}" for name in names)

    first = line("gemm_size", "memory_gb", "bandwidth_mb", "slow_ratio")
    return [first, line("min_disk_gb", "max_clock_skew", "timeout") + f' --cache-dir "{cluster.cache_dir}"']


def _render(template: str, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["sh"] = shlex.quote
    text = environment.get_template(template).render(**values)
    return re.sub(r"\n{3,}", "\n\n", text)
