"""What is wrong is said before anything is submitted, and nothing is left behind in the run folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_tools.errors import UserError
from launch.config import ClusterConfig
from launch.preflight import check
from mamba_pretrain.config import RunConfig, parse_config

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    tree = yaml.safe_load((PROJECT / "configs" / "quickstart.yaml").read_text())
    data = tmp_path / "data"
    data.mkdir()
    (data / "manifest.json").write_text("{}")
    return parse_config({**tree, "run_dir": str(tmp_path / "run"), "data": {"path": str(data)}}, "test")


def cluster(**keys: Any) -> ClusterConfig:
    return ClusterConfig.model_validate({"nodes": 2, "ranks_per_node": 1, "network": "local", "health": {"enabled": False}, **keys})


def test_a_good_run_passes(run: RunConfig, tmp_path: Path) -> None:
    check(run, cluster(), tmp_path)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"nodes": 3}, "train.global_batch_size 16 is not a multiple of 24 = 3 nodes x 1 ranks x micro-batch 8"),
        (
            {"nodes": 4, "min_nodes": 1},
            "not a multiple of 24 = 3 nodes x 1 ranks x micro-batch 8; change it, the micro-batch, or min_nodes",
        ),
        ({"environment": {"venv": "missing"}}, "environment.venv missing holds no bin/activate"),
        ({"container": {"runtime": "apptainer", "image": "/none.sif"}}, "container.image /none.sif does not exist"),
    ],
)
def test_cluster_that_does_not_fit_the_run(run: RunConfig, tmp_path: Path, keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as raised:
        check(run, cluster(**keys), tmp_path)
    assert sentence in str(raised.value)


def test_run_that_does_not_fit_the_cluster(run: RunConfig, tmp_path: Path) -> None:
    changes: list[tuple[dict[str, Any], str]] = [
        ({"run_dir": tmp_path / "my run"}, "holds a blank"),
        ({"parallel": run.parallel.model_copy(update={"strategy": "single"})}, "single uses one process"),
        (
            {"data": run.data.model_copy(update={"sources": [run.data.sources[0].model_copy(update={"path": Path("none")})]})},
            "no manifest.json",
        ),
    ]
    for change, sentence in changes:
        with pytest.raises(UserError, match=sentence):
            check(run.model_copy(update=change), cluster(), tmp_path)
    with pytest.raises(UserError, match="ddp needs several processes"):
        check(run.model_copy(update={"parallel": run.parallel.model_copy(update={"strategy": "ddp"})}), cluster(nodes=1), tmp_path)


def test_command_prints_one_sentence_and_exits_with_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mamba_pretrain", "submit", "configs/quickstart.yaml", f"run_dir={tmp_path / 'run'}"]
    for extra in (["--cluster", "configs/cluster/none.yaml"], ["--cluster", "configs/cluster/local.yaml", "data.sources=[{path: /none}]"]):
        result = subprocess.run([*command, *extra], cwd=PROJECT, capture_output=True, text=True)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert not (tmp_path / "run").exists()
