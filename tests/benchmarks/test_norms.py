"""What the benchmark of the norms makes of its times."""

from __future__ import annotations

import norms
import pytest
import timing


def row(**changes: object) -> dict[str, object]:
    times = {"forward_ms": 1.0, "backward_ms": 2.0, "both_ms": 3.0}
    return {
        "shape": "rms_norm 130m",
        "floor": times,
        "ours": times,
        "mamba_ssm": times,
        "speedup": 1.0,
        "bit_equal": True,
        "error": 1e-3,
        **changes,
    }


def test_the_backward_pass_is_both_less_forward(monkeypatch):
    monkeypatch.setattr(timing, "replayed_ms", lambda run: run())
    assert timing.both_passes_ms(lambda: 1.0, lambda: 3.5) == {"forward_ms": 1.0, "backward_ms": 2.5, "both_ms": 3.5}


def test_what_is_under_a_bar_is_said_in_words(monkeypatch):
    assert norms.failures([row()])[-1] == "gated_rms_norm 1.3b: not measured"
    monkeypatch.setattr(norms, "SHAPES", {"rms_norm 130m": norms.SHAPES["rms_norm 130m"]})
    assert norms.failures([row()]) == []
    for changes, words in (
        ({"ours": {"both_ms": 5.0}}, "1.67 times what its bytes take"),
        ({"mamba_ssm": None, "why": "no module"}, "not compared with mamba_ssm (no module)"),
        ({"speedup": 0.5}, "0.50 times as fast"),
        ({"bit_equal": False}, "two runs differ"),
        ({"error": float("nan")}, "error nan"),
    ):
        (failure,) = norms.failures([row(**changes)])
        assert failure.startswith("rms_norm 130m: ")
        assert words in failure


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rms_norm 130m", "gated_rms_norm 370m"])
def test_both_passes_can_be_recorded(name, monkeypatch):
    monkeypatch.setitem(norms.SHAPES, name, (2, 64, 256))
    found = norms.measure_one(name)
    assert 0 < found["ours"]["forward_ms"] < found["ours"]["both_ms"]
    assert found["bit_equal"]
