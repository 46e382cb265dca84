"""Per-layer statistics equal what one computes by hand, and cost nothing between the steps that ask for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mamba_pretrain.models import init
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.monitor.layers import LayerStatistics


def train(pattern: str, steps: int, every: int, is_main: bool = True) -> tuple[LanguageModel, torch.Tensor, list[dict]]:
    names = pattern.count(",") + 1
    config = ModelConfig(pattern=pattern, d_model=32, n_layer=names, vocab_size=64, d_state=8, headdim=16, n_head=2)
    model = LanguageModel(config)
    init.initialize(model, seed=0)
    rows: list[dict[str, Any]] = []
    engine = SimpleNamespace(watchers=set())
    run = SimpleNamespace(is_main=is_main, engine=engine, state=SimpleNamespace(step=0), tell=lambda hook, row: rows.append(row))
    callback = LayerStatistics(model, every)
    callback.on_start(run)
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    for step in range(1, steps + 1):
        for _ in range(2):  # two micro-batches
            model(tokens, labels=tokens).backward()
        with torch.no_grad():
            model(tokens)
        callback.on_step(run, SimpleNamespace(step=step, tokens=step * 48))
    callback.on_stop(run, "finished")
    return model, tokens, rows


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_values_are_those_computed_by_hand(mixer: str) -> None:
    model, tokens, rows = train(f"{mixer}, {mixer}", steps=4, every=2)
    assert [(row["step"], row["tokens"]) for row in rows] == [(2, 96), (4, 192)]
    stats = rows[0]["stats"]
    assert set(stats) == {"activation_rms", "gradient_rms", "dt_mean", "A_mean", "B_norm", "C_norm"}
    assert all(len(values) == 2 and None not in values for values in stats.values())
    block = model.layers[0]
    with torch.no_grad():
        x, _ = block.norm(model.embedding(tokens), None)
        m = block.mixer
        if mixer == "mamba1":
            u = m.conv1d(m.in_proj(x)[0])
            raw, B, _ = m.x_proj(u)[1].split([m.config.resolved_dt_rank, 8, 8], -1)
            dt = m.dt_proj(raw)
        else:
            _, xBC, dt = m.in_proj(x)
            B = m.conv1d(xBC)[..., 64:72]
        assert stats["dt_mean"][0] == pytest.approx(float(F.softplus(dt + m.dt_bias).mean()), rel=1e-5)
        assert stats["B_norm"][0] == pytest.approx(float(B.norm(dim=-1).mean()), rel=1e-5)
        assert stats["A_mean"][0] == pytest.approx(float(m.A_log.exp().mean()), rel=1e-5)
        assert stats["activation_rms"][0] == pytest.approx(float(m(x).square().mean().sqrt()), rel=1e-5)


def test_attention_layers_have_no_state_space() -> None:
    _, _, rows = train("mamba2, attention", steps=1, every=1)
    stats = rows[0]["stats"]
    assert stats["dt_mean"][1] is None
    assert stats["activation_rms"][1] > 0
    assert stats["gradient_rms"][1] > 0


def test_other_ranks_measure_nothing() -> None:
    assert train("mamba1", steps=2, every=1, is_main=False)[2] == []
