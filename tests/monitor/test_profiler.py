"""The profiler: the right steps, a trace, and times grouped by kind."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from mamba_pretrain.monitor.profiler import Breakdown, Profile, breakdown, kind_of


def run_steps(profile: Profile, begin: int, end: int) -> None:
    model = torch.nn.Linear(256, 256)
    optimizer = torch.optim.AdamW(model.parameters())
    run = SimpleNamespace(engine=SimpleNamespace(watchers=set()), state=SimpleNamespace(step=begin))
    profile.on_start(run)
    for step in range(begin + 1, end + 1):
        hidden = F.rms_norm(model(torch.randn(64, 256)), (256,))
        F.cross_entropy(hidden, torch.zeros(64, dtype=torch.long)).backward()
        optimizer.step()
        run.state.step = step
        profile.on_step(run, SimpleNamespace(step=step))
    profile.on_stop(run, "finished")


@pytest.mark.parametrize(("begin", "end", "steps", "expected"), [(0, 6, "3-4", "3-4"), (2, 6, "3-4", "3-4"), (0, 4, "3-9", "3-4")])
def test_writes_trace_and_table_of_the_given_steps(tmp_path: Path, begin: int, end: int, steps: str, expected: str) -> None:
    run_steps(Profile(tmp_path, steps, SimpleNamespace(rank=0)), begin, end)
    trace = json.loads(gzip.decompress((tmp_path / "profile" / f"trace-steps-{expected}.json.gz").read_bytes()))
    optimizer_steps = [event for event in trace["traceEvents"] if event.get("name") == "Optimizer.step#AdamW.step"]
    assert len(optimizer_steps) == 2
    table = (tmp_path / "profile" / f"kernels-steps-{expected}.txt").read_text()
    for kind in ("matmul", "optimizer", "loss", "norm"):
        assert kind in table


def test_other_ranks_and_steps_already_passed_write_nothing(tmp_path: Path) -> None:
    run_steps(Profile(tmp_path, "3-4", SimpleNamespace(rank=1)), 0, 5)
    run_steps(Profile(tmp_path, "3-4", SimpleNamespace(rank=0)), 4, 8)
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["selective_scan_fwd_kernel"], "scan"),
        (["sm90_xmma_gemm_bf16bf16", "aten::bmm", "mamba_pretrain::ssd_scan_forward"], "scan"),
        (["nvjet_hsh_128x256", "aten::mm", "autograd::engine::evaluate_function: MmBackward0"], "matmul"),
        (["sm90_gemm", "aten::addmm", "mamba_pretrain::linear_cross_entropy"], "loss"),
        (["multi_tensor_apply_kernel", "aten::_fused_adamw_", "Optimizer.step#AdamW.step"], "optimizer"),
        (["ncclDevKernel_AllReduce_Sum_bf16_RING_LL"], "communication"),
        (["causal_conv1d_channellast_fwd_kernel"], "conv"),
        (["_layer_norm_fwd_1pass_kernel"], "norm"),
        (["vectorized_elementwise_kernel", "aten::mul"], "other"),
    ],
)
def test_kind_by_names(names: list[str], kind: str) -> None:
    assert kind_of(names) == kind


def test_device_time_is_attributed_to_the_launching_op() -> None:
    outer = SimpleNamespace(name="mamba_pretrain::selective_scan_forward", cpu_parent=None, kernels=[], self_cpu_time_total=5.0)
    inner = SimpleNamespace(
        name="aten::mul", cpu_parent=outer, kernels=[SimpleNamespace(name="elementwise", duration=40.0)], self_cpu_time_total=1.0
    )
    found = breakdown([outer, inner], steps=2)
    assert found.kinds == {"scan": 40.0}
    assert found.kernels["scan", "elementwise"].calls == 1


def test_table_shows_the_distance_from_the_floor() -> None:
    found = Breakdown(steps=2)
    found.add("matmul", "gemm", 4000.0)
    found.add("other", "add", 1000.0)
    lines = found.lines({"matmul": 0.001})
    assert lines[1].split() == ["matmul", "2.00", "80.0%", "2.0"]
    assert lines[2].split() == ["other", "0.50", "20.0%", "-"]
