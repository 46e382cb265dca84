"""A node with a fault is found, named and left out; well nodes are left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launch.health import FAULT_VARIABLE, FAULTS, judge
from launch.node_checks import round_robin

THRESHOLDS = {"slow_ratio": 0.7, "min_disk_gb": 5.0, "max_clock_skew": 5.0}


def node_report(**changes: object) -> dict:
    well = {"versions": {"torch": "2.9"}, "gemm_gflops": 100.0, "memory_error": None, "free_gb": {"cache": 50.0, "run": 50.0}, "clock": 0.1}
    return {**well, "error": None, **changes}


def judge_with(fault: str | None, nodes: int = 4) -> dict[str, str]:
    broken = FAULTS.get(fault or "", {})
    names = [f"node{i}" for i in range(nodes)]
    reports = {name: node_report() for name in names}
    bandwidth = {name: {"bandwidth_gbs": 10.0 + i, "error": None} for i, name in enumerate(names)}
    for target in (reports["node1"], bandwidth["node1"]):
        target.update({key: value for key, value in broken.items() if key in target})
    if fault == "silent":
        del reports["node1"], bandwidth["node1"]
    return judge(reports, bandwidth, names, **THRESHOLDS)


@pytest.mark.parametrize("fault", [*FAULTS, "silent"])
def test_each_fault_names_its_node(fault: str) -> None:
    assert list(judge_with(fault)) == ["node1"]


def test_well_nodes_are_well() -> None:
    assert judge_with(None) == {}


def test_an_error_is_the_reason() -> None:
    reports = {"a": node_report(error="CUDA error: device lost"), "b": node_report()}
    assert judge(reports, {}, ["a", "b"], **THRESHOLDS) == {"a": "CUDA error: device lost"}


@pytest.mark.parametrize("world", [2, 3, 4, 7])
def test_everyone_meets_everyone_once(world: int) -> None:
    met = [frozenset(pair) for pairs in round_robin(world) for pair in pairs.items() if pair[0] < pair[1]]
    assert len(met) == len(set(met)) == world * (world - 1) // 2
    for pairs in round_robin(world):
        assert all(pairs[partner] == rank for rank, partner in pairs.items())


CHECK = {"enabled": True, "gemm_size": 128, "memory_gb": 0.01, "bandwidth_mb": 1, "slow_ratio": 0.02, "min_disk_gb": 0.1, "timeout": 60}


@pytest.mark.slurm
@pytest.mark.xdist_group("slurm")
def test_faulty_node_is_excluded_and_the_run_goes_on(start: Callable, profile: dict) -> None:
    environment = {**profile["environment"], "variables": {FAULT_VARIABLE: "node2:gemm"}}
    job = start({"steps": 3}, health=CHECK, restart={"exclude_bad_nodes": True}, environment=environment)
    assert job.wait_ended(seconds=120) == "done"
    assert "bad nodes: node2" in job.log
    assert {job.starts(rank)[0]["node"] for rank in range(4)} == {"node1", "node3"}
    assert job.slurm.job(job.ids[0])["ExcNodeList"] == "node2"


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.xdist_group("slurm")
def test_faulty_node_stops_the_run_when_exclusion_is_not_allowed(start: Callable, profile: dict, tmp_path: Path) -> None:
    environment = {**profile["environment"], "variables": {FAULT_VARIABLE: "node1:silent"}}
    job = start({"steps": 3}, health={**CHECK, "timeout": 15}, environment=environment)
    assert job.wait_ended(seconds=120).startswith("bad nodes: node1")
    assert job.starts() == []
