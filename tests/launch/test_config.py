"""Every wrong cluster config is one clear sentence before anything is submitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from data_tools.errors import UserError
from launch.config import ClusterConfig, load_cluster, seconds_of

WELL = {"nodes": 2, "gpus_per_node": 8, "network": "infiniband", "time": "24:00:00"}
CONTAINER = {"runtime": "pyxis", "image": "image"}

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"partiton": "gpu"}, "unknown key partiton; did you mean partition?"),
    ({"restart": {"max_restart": 3}}, "unknown key restart.max_restart; did you mean max_restarts?"),
    ({"network": None}, "network"),
    ({"network": "infinband"}, "network"),
    ({"nodes": 0}, "nodes"),
    ({"nodes": "two"}, "nodes"),
    ({"gpus_per_node": 0}, "ranks_per_node is missing"),
    ({"ranks_per_node": 9}, "ranks_per_node 9 is more than gpus_per_node 8"),
    ({"min_nodes": 3}, "min_nodes 3 is more than nodes 2"),
    ({"time": "1 day"}, "'1 day' is not MINUTES, HH:MM:SS or D-HH:MM:SS"),
    ({"time": "00:00:00"}, "no time at all"),
    ({"time": "5", "signal_lead": 300}, "signal_lead 300 s is not shorter than the time limit 5 (300 s)"),
    ({"launcher": "mpirun"}, "launcher"),
    ({"memory": "900 GB"}, "memory"),
    ({"environment": {"conda": "mamba", "venv": ".venv"}}, "conda and venv are both given"),
    ({"environment": {"variables": {"NCCL-DEBUG": "INFO"}}}, "'NCCL-DEBUG' is not a name of an environment variable"),
    ({"container": CONTAINER, "environment": {"venv": ".venv"}}, "container is given together with conda or venv"),
    ({"container": {"runtime": "docker", "image": "x"}}, "container.runtime"),
    ({"container": {**CONTAINER, "mounts": ["data"]}}, "mount 'data' is not of the form /source:/target"),
    ({"container": CONTAINER, "launcher": "deepspeed", "deepspeed_launcher": "pdsh"}, "pdsh starts ranks outside the container"),
    ({"sbatch_options": ["mail-type=FAIL"]}, "'mail-type=FAIL' is not an option"),
    ({"sbatch_options": ["--comment=a\nrm -rf /"]}, "is not an option"),
    ({"restart": {"mode": "always"}}, "restart.mode"),
    ({"restart": {"mode": "chain", "chain_length": 1}}, "restart.chain_length"),
    ({"health": {"slow_ratio": 1.5}}, "health.slow_ratio"),
]


@pytest.mark.parametrize(("changes", "sentence"), WRONG, ids=[str(index) for index in range(len(WRONG))])
def test_wrong_config_is_one_sentence(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump({**WELL, **changes}))
    with pytest.raises(UserError) as raised:
        load_cluster(path)
    text = str(raised.value)
    assert text.startswith(f"cluster config {path}: ")
    assert sentence in text
    assert "\n" not in text


def test_missing_and_broken_files_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_cluster(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("nodes: [2")
    with pytest.raises(UserError, match="cannot be read"):
        load_cluster(tmp_path / "broken.yaml")


def test_command_line_wins_and_fixes_the_number_of_nodes(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump({**WELL, "nodes": 4, "min_nodes": 2}))
    cluster = load_cluster(path, {"nodes": 1, "time": "30", "launcher": None})
    assert (cluster.nodes, cluster.smallest, cluster.time, cluster.launcher) == (1, 1, "30", "srun")


@pytest.mark.parametrize("profile", sorted(Path(__file__).parents[2].glob("configs/cluster/*.yaml")), ids=lambda path: path.stem)
def test_ready_profiles_load(profile: Path) -> None:
    assert isinstance(load_cluster(profile), ClusterConfig)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("01:00:00", 3600), ("2-00", 172800), ("1-12:30", 131400), ("1-00:00:30", 86430)],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds
