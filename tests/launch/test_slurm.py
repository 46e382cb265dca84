"""What ``submit --dry-run`` prints, kept as golden files for every profile and launcher, and clean under shellcheck.

After a deliberate change of the templates: ``UPDATE_GOLDEN=1 pytest tests/launch/test_slurm.py``, and read the diff.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.config import ClusterConfig
from launch.slurm import JobPlace, exports, render_data, render_job, sbatch_options
from mamba_pretrain.ops import kernel_cache

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
PROFILES = sorted((HERE.parents[1] / "configs" / "cluster").glob("*.yaml"))
PLACE = JobPlace("quickstart", Path("/shared/runs/quickstart"), Path("/home/me/mamba-pretrain"))
SWEEP = JobPlace("sweep", Path("/shared/runs/sweep"), Path("/home/me/mamba-pretrain"), Path("/shared/runs/sweep/launch/runs.txt"), 12)

PYXIS = {"runtime": "pyxis", "image": "nvcr.io#nvidia/pytorch:25.10-py3", "mounts": ["/data:/data"]}
APPTAINER = {"runtime": "apptainer", "image": "/images/mamba.sif", "mounts": ["/data:/data"]}
NO_ENVIRONMENT = {"venv": None}
VARIANTS: dict[str, tuple[str, JobPlace, dict[str, Any]]] = {
    f"{profile.stem}-{launcher}": (profile.stem, PLACE, {"launcher": launcher})
    for profile in PROFILES
    for launcher in ("srun", "torchrun", "deepspeed")
}
VARIANTS |= {
    "local-deepspeed-pdsh": ("local", PLACE, {"launcher": "deepspeed", "deepspeed_launcher": "pdsh"}),
    "local-deepspeed-slurm": ("local", PLACE, {"launcher": "deepspeed", "deepspeed_launcher": "slurm"}),
    "pyxis": ("h100-infiniband", PLACE, {"container": PYXIS, "environment": NO_ENVIRONMENT}),
    "apptainer-torchrun": ("h100-infiniband", PLACE, {"container": APPTAINER, "environment": NO_ENVIRONMENT, "launcher": "torchrun"}),
    "sweep": ("ethernet", SWEEP, {"array_parallel": 4}),
    "chain": ("local", PLACE, {"restart": {"mode": "chain"}}),
    "never": ("local", PLACE, {"restart": {"mode": "never"}, "min_nodes": 1, "exclude": ["node3"]}),
}


def cluster_of(profile: str, changes: dict[str, Any]) -> ClusterConfig:
    tree = yaml.safe_load((HERE.parents[1] / "configs" / "cluster" / f"{profile}.yaml").read_text())
    return ClusterConfig.model_validate({**tree, **changes})


def rendered(name: str) -> str:
    profile, place, changes = VARIANTS[name]
    return render_job(cluster_of(profile, changes), place)


def data_script() -> str:
    command = 'mamba-data tokenize --output /shared/data --task-index "$SLURM_ARRAY_TASK_ID" --task-count 32'
    return render_data(cluster_of("h100-infiniband", {}), PLACE, command, 32)


@pytest.fixture(autouse=True)
def _fixed_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.slurm.sys.executable", "/home/me/mamba-pretrain/.venv/bin/python")


@pytest.mark.parametrize("name", [*VARIANTS, "data"])
def test_golden(name: str) -> None:
    text = data_script() if name == "data" else rendered(name)
    golden = GOLDEN / f"{name}.sbatch"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.sbatch")} == {*VARIANTS, "data"}


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (make system-packages)")
def test_scripts_are_shellcheck_clean() -> None:
    result = subprocess.run(["shellcheck", *map(str, sorted(GOLDEN.glob("*.sbatch")))], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_profiles_name_and_explain_every_key(profile: Path) -> None:
    tree = yaml.safe_load(profile.read_text())
    complete = cluster_of(profile.stem, {}).model_dump()
    assert list(tree) == list(complete)
    for key in ("environment", "restart", "health"):
        assert list(tree[key]) == list(complete[key])
    for line in profile.read_text().splitlines():
        assert not line.strip() or "#" in line or line.endswith(("restart:", "health:")), f"no comment: {line}"


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"min_nodes": 1}, "--nodes=1-2"),
        ({"gpu_request": "gres"}, "--gres=gpu:8"),
        ({"gpu_request": "gpus-per-node"}, "--gpus-per-node=8"),
        ({"constraint": "h100&ib"}, "--constraint='h100&ib'"),
        ({"exclude": ["a1", "a2"]}, "--exclude=a1,a2"),
        ({"signal_lead": 120}, "--signal=B:USR1@120"),
        ({"sbatch_options": ["--mail-type=FAIL"]}, "--mail-type=FAIL"),
        ({"restart": {"mode": "resubmit"}}, "--no-requeue"),
    ],
)
def test_keys_become_options(changes: dict[str, Any], option: str) -> None:
    assert option in sbatch_options(cluster_of("h100-infiniband", changes), PLACE)


def test_own_variables_win_over_the_network() -> None:
    text = render_job(cluster_of("h100-infiniband", {"environment": {"variables": {"NCCL_IB_HCA": "mlx5_0,mlx5_1"}}}), PLACE)
    assert [line for line in text.splitlines() if "NCCL_IB_HCA" in line] == ["export NCCL_IB_HCA=mlx5_0,mlx5_1"]


def test_kernels_are_kept_on_the_nodes_own_disk() -> None:
    """Under the very name that the kernels' cache looks for."""
    cluster = ClusterConfig.model_validate({"network": "ethernet", "gpus_per_node": 8, "cache_dir": "/scratch/me"})
    assert exports(cluster)[kernel_cache.VARIABLE] == '"/scratch/me/kernels"'
