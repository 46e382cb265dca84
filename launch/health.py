"""Measures every node before training starts and names the bad ones. The batch script runs one of these per node:

    srun --ntasks-per-node=1 python -m launch.health --folder RUN/launch/health/JOB-ATTEMPT --run-dir RUN

Each node writes ``NODE.json`` (matrix product, memory, disk, clock, versions) and then, with the others, ``NODE.bandwidth.json``; the first
task compares them and writes ``verdict.tsv``: a line ``NODE<tab>REASON`` for every bad node, so an empty file means all are well.
``MAMBA_PRETRAIN_HEALTH_FAULT=node2:gemm`` injects a fault for tests and drills: gemm, memory, disk, clock, version, bandwidth or silent.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from launch.node_checks import clock, disk, gemm_gflops, memory_error, usable_devices, versions

FAULT_VARIABLE = "MAMBA_PRETRAIN_HEALTH_FAULT"
# What a fault does to a report; the judgement must find it by itself.
FAULTS: dict[str, dict[str, Any]] = {
    "gemm": {"gemm_gflops": 0.01},
    "memory": {"memory_error": "a word read back differs from the word written (injected)"},
    "disk": {"free_gb": {"cache": 0.0, "run": 1000.0}},
    "clock": {"clock": 1e6},
    "version": {"versions": {"torch": "0.0-injected"}},
    "bandwidth": {"bandwidth_gbs": 0.0},
}

Report = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    """One node's part, as described above."""
    options = _parse(arguments)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    rank, world = int(os.environ.get("SLURM_PROCID", "0")), int(os.environ.get("SLURM_NTASKS", "1"))
    faulty, _, fault = os.environ.get(FAULT_VARIABLE, "").partition(":")
    broken = FAULTS.get(fault, {}) if node == faulty else {}
    if node == faulty and fault == "silent":
        return
    deadline = time.monotonic() + options.timeout
    report = measure(node, options)
    _write(options.folder / f"{node}.json", report | {key: value for key, value in broken.items() if key in report})
    if world > 1 and _wait_for(options.folder, "*.json", world, deadline):
        bandwidth = _bandwidth(rank, world, node, options, deadline)
        _write(options.folder / "bandwidth" / f"{node}.json", bandwidth | {k: v for k, v in broken.items() if k in bandwidth})
        _wait_for(options.folder / "bandwidth", "*.json", world, deadline)
    if rank == 0:
        conclude(options.folder, expected_nodes(node), options)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launch.health")
    parser.add_argument("--folder", type=Path, required=True, help="where the reports go; on the shared disk")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--cache-dir", type=Path, default=Path("/tmp"))
    parser.add_argument("--gemm-size", type=int, default=4096)
    parser.add_argument("--memory-gb", type=float, default=1.0)
    parser.add_argument("--bandwidth-mb", type=int, default=64)
    parser.add_argument("--slow-ratio", type=float, default=0.7)
    parser.add_argument("--min-disk-gb", type=float, default=1.0)
    parser.add_argument("--max-clock-skew", type=float, default=5.0)
    parser.add_argument("--timeout", type=float, default=300.0)
    options = parser.parse_args(arguments)
    (options.folder / "bandwidth").mkdir(parents=True, exist_ok=True)
    return options


def measure(node: str, options: argparse.Namespace) -> Report:
    """What a node can find out alone. A check that raises is a finding, not a crash."""
    report: Report = {
        "node": node,
        "versions": versions(),
        "gemm_gflops": 0.0,
        "memory_error": None,
        "free_gb": {},
        "clock": 0.0,
        "error": None,
    }
    try:
        devices = usable_devices()
        report["versions"]["devices"] = len(devices)
        report["gemm_gflops"] = min(gemm_gflops(device, options.gemm_size) for device in devices)
        report["memory_error"] = next((e for d in devices if (e := memory_error(d, options.memory_gb))), None)
        report["free_gb"] = {"cache": disk(options.cache_dir), "run": disk(options.run_dir)}
        report["clock"] = clock(options.folder)
    except Exception as error:  # a broken driver raises whatever it likes
        report["error"] = f"{type(error).__name__}: {error}".split("\n")[0]
    return report


def _bandwidth(rank: int, world: int, node: str, options: argparse.Namespace, deadline: float) -> Report:
    """GB/s of the best pair this node took part in, and of an all-reduce over all nodes."""
    import torch.distributed as dist

    from launch.node_checks import all_reduce_gbs, pair_gbs, round_robin

    report: Report = {"node": node, "bandwidth_gbs": 0.0, "all_reduce_gbs": 0.0, "pairs": {}, "error": None}
    try:
        backend = "nccl" if str(usable_devices()[0]).startswith("cuda") else "gloo"
        # The port of the training's attempt is taken next: use its neighbour.
        address = f"tcp://{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{int(os.environ.get('MASTER_PORT', '29400')) + 1}"
        timeout = timedelta(seconds=max(5.0, deadline - time.monotonic()))
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=world, timeout=timeout)
        for pairs in round_robin(world):
            partner = pairs.get(rank)
            if partner is not None:
                report["pairs"][str(partner)] = pair_gbs(rank, partner, options.bandwidth_mb)
            dist.barrier()
        report["bandwidth_gbs"] = max(report["pairs"].values())
        report["all_reduce_gbs"] = all_reduce_gbs(world, options.bandwidth_mb)
        dist.destroy_process_group()
    except Exception as error:
        report["error"] = f"{type(error).__name__}: {error}".split("\n")[0]
    return report


def conclude(folder: Path, expected: list[str], options: argparse.Namespace) -> dict[str, str]:
    """Reads all reports, writes ``verdict.tsv`` and prints one line a node; returns the bad nodes with their reasons."""
    reports = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    bandwidth = {path.stem: json.loads(path.read_text()) for path in (folder / "bandwidth").glob("*.json")}
    bad = judge(reports, bandwidth, expected, options.slow_ratio, options.min_disk_gb, options.max_clock_skew)
    for node in expected:
        measured, speed = reports.get(node, {}), bandwidth.get(node, {})
        figures = f"{measured.get('gemm_gflops', 0):.0f} GFLOP/s, {speed.get('bandwidth_gbs', 0):.2f} GB/s to a peer"
        print(f"health: {node}: {figures}, all-reduce {speed.get('all_reduce_gbs', 0):.2f} GB/s: {bad.get(node, 'well')}", flush=True)
    temporary = folder / ".verdict"
    temporary.write_text("".join(f"{node}\t{reason}\n" for node, reason in bad.items()))
    os.replace(temporary, folder / "verdict.tsv")
    return bad


def judge(
    reports: dict[str, Report],
    bandwidth: dict[str, Report],
    expected: list[str],
    slow_ratio: float,
    min_disk_gb: float,
    max_clock_skew: float,
) -> dict[str, str]:
    """Bad nodes with the first reason found. Speeds and clocks are compared with the other nodes, versions with the majority."""
    bad: dict[str, str] = {}

    def blame(node: str, reason: str) -> None:
        bad.setdefault(node, reason)

    for node in expected:
        if node not in reports:
            blame(node, "did not answer the health check in time")
    for node, report in reports.items():
        if report["error"]:
            blame(node, report["error"])
        elif report["memory_error"]:
            blame(node, report["memory_error"])
        for place, free in report["free_gb"].items():
            if free < min_disk_gb:
                blame(node, f"only {free:.1f} GB free in the {place} folder, {min_disk_gb:g} needed")
    measured = {node: report for node, report in reports.items() if node not in bad}
    _blame_slow({node: report["gemm_gflops"] for node, report in measured.items()}, slow_ratio, "matrix products run at", "GFLOP/s", blame)
    clocks = {node: report["clock"] for node, report in measured.items()}
    middle = statistics.median_low(clocks.values()) if clocks else 0.0
    for node, value in clocks.items():
        if abs(value - middle) > max_clock_skew:
            blame(node, f"its clock is off by {value - middle:+.1f} s")
    _blame_odd_versions({node: report["versions"] for node, report in measured.items()}, blame)
    failed = {node: report["error"] for node, report in bandwidth.items() if report["error"]}
    if not failed:  # one node that cannot be reached breaks the measurement of all: then nobody in particular is to blame
        _blame_slow(
            {node: r["bandwidth_gbs"] for node, r in bandwidth.items()}, slow_ratio, "messages to other nodes run at", "GB/s", blame
        )
    elif not bad:
        for node, error in failed.items():
            blame(node, f"communication failed: {error}")
    return bad


def _blame_slow(speeds: dict[str, float], ratio: float, what: str, unit: str, blame: Any) -> None:
    usual = statistics.median_high(speeds.values()) if speeds else 0.0
    for node, speed in speeds.items():
        if speed < ratio * usual:
            blame(node, f"{what} {speed:.3g} {unit}, {usual:.3g} is usual here")


def _blame_odd_versions(found: dict[str, dict[str, Any]], blame: Any) -> None:
    for key in {key for each in found.values() for key in each}:
        values = [each.get(key) for each in found.values()]
        usual = max(values, key=lambda value: (values.count(value), str(value)))
        for node, each in found.items():
            if each.get(key) != usual:
                blame(node, f"{key} is {each.get(key)}, elsewhere {usual}")


def expected_nodes(default: str) -> list[str]:
    """The nodes of the allocation."""
    nodelist = os.environ.get("SLURM_JOB_NODELIST")
    if not nodelist:
        return [default]
    import subprocess

    return subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True).stdout.split()


def _write(path: Path, report: Report) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(report))
    os.replace(temporary, path)


def _wait_for(folder: Path, pattern: str, count: int, deadline: float) -> bool:
    while len(list(folder.glob(pattern))) < count:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


if __name__ == "__main__":
    main()
