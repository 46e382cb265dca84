"""The sinks: the metrics file survives crashes and resumes, the console fits a log, W&B never disturbs training."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mamba_pretrain.monitor.config import MonitorConfig, WandbConfig
from mamba_pretrain.monitor.console import ConsoleSink
from mamba_pretrain.monitor.metrics import Tail, read_history
from mamba_pretrain.monitor.sinks import JsonlSink, WandbSink, build_sinks, flatten, run_id


def train_row(step: int, **more: object) -> dict:
    row = {
        "kind": "train",
        "step": step,
        "tokens": step * 1000,
        "time": 1e9 + step,
        "loss": 5.0 - step * 0.01,
        "lr": 1e-3,
        "grad_norm": 0.5,
    }
    row |= {
        "tokens_per_second": 161876.0,
        "step_time": 1.0,
        "data_wait": 0.01,
        "mfu": 0.127,
        "mfu_6n": 0.12,
        "memory_gb": 27.6,
        "restart": 0,
    }
    return row | more


def steps_of(run_dir: Path) -> list[int]:
    return [row["step"] for row in read_history(run_dir).train]


def test_resume_drops_rows_past_the_checkpoint(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    for step in range(1, 8):
        sink.write(train_row(step))
    sink.close()
    resumed = JsonlSink(tmp_path)
    resumed.truncate_after(5)
    resumed.write(train_row(6, loss=1.0))
    resumed.close()
    history = read_history(tmp_path)
    assert [row["step"] for row in history.train] == [1, 2, 3, 4, 5, 6]
    assert history.train[-1]["loss"] == 1.0


def test_rollback_event_drops_rows_it_makes_void(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    for step in range(1, 6):
        sink.write(train_row(step))
    sink.write({"kind": "event", "step": 3, "time": 0.0, "event": "rollback", "spoiled_step": 5})
    sink.write(train_row(4))
    sink.close()
    assert steps_of(tmp_path) == [1, 2, 3, 4]


def test_torn_last_line_is_dropped(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.write(train_row(1))
    sink.write(train_row(2))
    sink.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind":"train","step":3,"lo')
    again = JsonlSink(tmp_path)
    again.write(train_row(3))
    again.close()
    assert steps_of(tmp_path) == [1, 2, 3]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_rows_are_on_disk_when_the_process_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from mamba_pretrain.monitor.sinks import JsonlSink\n"
        "sink = JsonlSink(Path(sys.argv[1]))\n"
        "for step in range(1, 101): sink.write({'kind': 'train', 'step': step, 'loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    finished = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert finished.returncode == -9
    assert steps_of(tmp_path) == list(range(1, 101))


def test_not_finite_values_become_null(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.write(train_row(1, loss=float("nan"), grad_norm=float("inf")))
    sink.close()
    row = read_history(tmp_path).train[0]
    assert row["loss"] is None
    assert row["grad_norm"] is None


def test_tail_follows_growth_truncation_and_replacement(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "metrics.jsonl")
    assert not tail.poll()
    sink = JsonlSink(tmp_path)
    sink.write(train_row(1))
    sink.write(train_row(2))
    assert tail.poll()
    assert not tail.poll()
    os.write(sink._file, b'{"kind":"train","step":3')
    assert not tail.poll()
    os.write(sink._file, b',"loss":2.0}\n')
    assert tail.poll()
    assert [row["step"] for row in tail.history.train] == [1, 2, 3]
    # A resume cuts and the file grows past its old length before the next poll.
    sink.truncate_after(1)
    for step in (2, 3, 4):
        sink.write(train_row(step, loss=0.25))
    assert tail.poll()
    assert [(row["step"], row["loss"]) for row in tail.history.train] == [(1, 4.99), (2, 0.25), (3, 0.25), (4, 0.25)]
    sink.close()


@pytest.mark.parametrize(
    "row",
    [
        train_row(19073, step_time=1.0, data_wait=0.9, skipped=True),
        {"kind": "eval", "step": 5, "time": 0, "tokens": 9, "name": "a" * 90, "loss": 3.21, "perplexity": 24.8, "bits_per_byte": 1.02},
        {"kind": "event", "step": 5, "time": 0, "event": "resume", "restart": 3, "why": "x" * 120},
        {"kind": "sample", "step": 5, "time": 0, "prompt": "Once\nupon", "text": "a time " * 40},
        train_row(7, loss=None, mfu=None, mfu_6n=None, tokens_per_second=None),
    ],
)
def test_plain_lines_fit_100_columns(row: dict) -> None:
    stream = io.StringIO()
    sink = ConsoleSink(19073, stream=stream)
    sink.write(row)
    sink.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1
    assert 10 < len(lines[0]) <= 100
    assert str(row["step"]) in lines[0]


def test_a_full_train_line_is_not_cut() -> None:
    stream = io.StringIO()
    ConsoleSink(19073, "plain", stream).write(train_row(12000))
    assert stream.getvalue() == ("step 12000/19073  loss -115.0000  lr 1.00e-03  norm 0.50  161.9k tok/s  mfu 12.7%  27.6 GB  eta 44s\n")


def test_live_line_shows_the_newest_row_and_prints_events_above() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(10, "rich", stream)
    sink.write(train_row(3))
    sink.write({"kind": "eval", "step": 3, "time": 0, "tokens": 9, "name": "code", "loss": 3.21, "perplexity": 24.8})
    sink.close()
    assert "4.97" in stream.getvalue()
    assert "eval at step 3: loss 3.2100" in stream.getvalue()


def test_wandb_offline_keeps_one_id_over_restarts_and_steps_are_training_steps(tmp_path: Path) -> None:
    for first in (1, 3):
        sink = WandbSink(tmp_path, WandbConfig(mode="offline"), "name", {"seed": 1})
        assert sink._run is not None
        sink.write(train_row(first))
        sink.write(train_row(first + 1))
        sink.write(train_row(first))  # after a rollback
        assert sink._run.step >= first + 1
        assert sink._run.id == run_id(tmp_path)
        sink.close()
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) >= 1


def test_wandb_failure_never_reaches_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def log(self, *_: object, **__: object) -> None:
            raise OSError("disk full")

    sink = WandbSink(tmp_path, WandbConfig(mode="disabled"), "name", {})
    sink._run = Broken()
    sink.write(train_row(1))
    sink.write(train_row(2))
    sink.close()
    assert caplog.text.count("disk full") == 1


def test_flatten_names_curves_after_their_kind() -> None:
    assert flatten(train_row(1))["train/loss"] == 4.99
    row = {"kind": "eval", "step": 1, "time": 0, "tokens": 5, "name": "pile", "loss": 2.0, "bits_per_byte": None}
    assert flatten(row) == {"eval/pile/tokens": 5, "eval/pile/loss": 2.0}
    row = {"kind": "layers", "step": 1, "time": 0, "tokens": 5, "stats": {"dt_mean": [0.1, None]}}
    assert flatten(row) == {"layers/dt_mean/0": 0.1}


def test_build_sinks_starts_a_new_run_from_an_empty_file(tmp_path: Path) -> None:
    config = MonitorConfig(console="plain", wandb=WandbConfig(mode="disabled"))
    for resume_step, expected in ((None, [1, 2]), (1, [1, 2]), (None, [1, 2])):
        sinks = build_sinks(config, tmp_path, "n", {}, 2, resume_step)
        assert len(sinks) == 2
        for step in range((resume_step or 0) + 1, 3):
            sinks[0].write(train_row(step))
        for sink in sinks:
            sink.close()
        assert steps_of(tmp_path) == expected
