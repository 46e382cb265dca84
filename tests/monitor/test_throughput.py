"""Throughput columns and the device table."""

from __future__ import annotations

import pytest

from mamba_pretrain.monitor.text import duration, si, sparkline
from mamba_pretrain.monitor.throughput import Throughput, device_entry, peak_flops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 311.9),
        ("NVIDIA A100-SXM4-40GB", 311.9),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA B200", 2250.0),
    ],
)
def test_peak_by_the_names_drivers_report(name: str, tflops: float) -> None:
    assert peak_flops(name) == tflops * 1e12


def test_memory_tells_the_two_a100_apart() -> None:
    entries = [device_entry("NVIDIA A100-SXM4-40GB"), device_entry("NVIDIA A100-SXM4-80GB")]
    assert [entry[2] for entry in entries if entry] == [42.4, 85.0]


def test_unknown_devices_have_no_peak_and_null_mfu() -> None:
    assert peak_flops("Intel(R) Xeon(R)") is None
    row = Throughput(6e8, 10**8, 1, "cpu", None).row(1000, 2.0)
    assert row["tokens_per_second"] == 500.0
    assert row["mfu"] is None
    assert row["mfu_6n"] is None
    assert 0.01 < row["memory_gb"] < 100


def test_mfu_counts_all_ranks_against_all_peaks() -> None:
    # 2 devices of 1e15 FLOP/s, 1e9 FLOPs a token, 1e6 tokens in one second: 1e15 of 2e15.
    row = Throughput(1e9, 10**8, 2, "cpu", 1e15).row(10**6, 1.0)
    assert row["mfu"] == pytest.approx(0.5)
    assert row["mfu_6n"] == pytest.approx(0.3)


def test_rate_is_the_mean_over_the_window() -> None:
    throughput = Throughput(1.0, 1, 1, "cpu", None, window=3)
    for seconds in (100.0, 1.0, 2.0, 3.0):
        row = throughput.row(600, seconds)
    assert row["tokens_per_second"] == pytest.approx(1800 / 6)


def test_numbers_for_people() -> None:
    assert [si(161876), si(1.3722e9), si(12), si(None)] == ["161.9k", "1.4G", "12", "-"]
    assert [duration(s) for s in (45, 725, 33120, 273600, None)] == ["45s", "12m05s", "9h12m", "3d04h", "-"]
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 4) == "█▆▃▁"
    assert sparkline([1.0, None, float("nan")], 10) == "▁"
    assert sparkline([], 10) == ""
