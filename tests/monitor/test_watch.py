"""The live view, in a real terminal (tmux) and frame by frame."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from data_tools.errors import UserError
from mamba_pretrain.monitor.metrics import read_history
from mamba_pretrain.monitor.plot import braille_chart
from mamba_pretrain.monitor.watch import frame, total_steps, warnings, watch

MakeRun = Callable[..., Path]


def text_of(run: Path, width: int = 100) -> str:
    console = Console(width=width, record=True, force_terminal=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(frame(run, read_history(run), width))
    return console.export_text()


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_frame_shows_the_run_and_fits(make_run: MakeRun, width: int) -> None:
    text = text_of(make_run("mamba2-130m"), width)
    for expected in ("mamba2-130m", "finished", "step 400", "1 restart", "loss 2.", "tokens/s", "15.", "27.6 GB", "ppl", "step-00000400"):
        assert expected in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width


def test_ranks_come_from_heartbeats_and_silent_ones_are_warned_of(make_run: MakeRun) -> None:
    run = make_run("ranks")
    (run / "heartbeat").mkdir()
    for rank in range(16):
        beat = {"rank": rank, "node": f"node{rank // 8}", "pid": 1, "step": 400 - (rank == 11), "phase": "backward", "time": time.time()}
        (run / "heartbeat" / f"rank-{rank}.json").write_text(json.dumps(beat))
    text = text_of(run)
    assert "node1" in text
    assert "step 399" in text
    assert "steps 399-400" in text
    assert len(re.findall(r"rank +\d+", text)) == 8


def test_warnings_name_what_is_wrong(make_run: MakeRun) -> None:
    run = make_run("warned")
    assert warnings(run, read_history(run)) == []
    row = {
        "kind": "train",
        "step": 401,
        "tokens": 1,
        "time": 2e9,
        "loss": None,
        "step_time": 1.0,
        "data_wait": 0.5,
        "tokens_per_second": 1e5,
    }
    with (run / "metrics.jsonl").open("a") as file:
        for i in range(60):
            file.write(json.dumps(row | {"step": 401 + i}) + "\n")
        file.write(json.dumps({"kind": "event", "step": 460, "time": 2e9, "event": "spike"}) + "\n")
    found = "\n".join(warnings(run, read_history(run)))
    assert "not finite" in found
    assert "50% of each step waits for data" in found
    assert "throughput is more than 20% under" in found
    assert "spike" in found


def test_total_steps_from_tokens(make_run: MakeRun) -> None:
    history = read_history(make_run("tokens"))
    assert total_steps({"train": {"tokens": 524_288 * 1000}}, history) == 1000
    assert total_steps({"train": {"steps": 77}}, history) == 77
    assert total_steps({}, history) is None


def test_braille_chart_is_a_falling_line() -> None:
    lines = braille_chart([float(10 - i) for i in range(10)], 5, 3)
    assert [len(line) for line in lines] == [5, 5, 5]
    assert lines[0][0] != " "
    assert lines[0][-1] == " "
    assert lines[-1][-1] != " "
    assert braille_chart([None, float("nan")], 4, 2) == ["    ", "    "]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        watch(tmp_path / "absent")


def test_once_prints_one_frame_before_the_first_row(tmp_path: Path) -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    watch(tmp_path, once=True, console=console)
    assert "Waiting for the first train row" in console.export_text()


@pytest.fixture
def tmux(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Runs tmux commands against a server of its own."""
    if shutil.which("tmux") is None:
        pytest.skip("no tmux on this machine (make system-packages installs it)")
    socket = str(tmp_path / "tmux.sock")

    def run(*arguments: str) -> str:
        return subprocess.run(["tmux", "-S", socket, "-f", "/dev/null", *arguments], check=True, capture_output=True, text=True).stdout

    yield run
    subprocess.run(["tmux", "-S", socket, "kill-server"], check=False, capture_output=True)


def wait_for(screen: Callable[[], str], pattern: str, seconds: float = 20.0) -> re.Match[str]:
    deadline = time.monotonic() + seconds
    while True:
        shown = screen()
        match = re.search(pattern, shown)
        if match:
            return match
        assert time.monotonic() < deadline, f"no {pattern!r} on the screen:\n{shown}"
        time.sleep(0.1)


WRITER = """
import sys, time
from pathlib import Path
from mamba_pretrain.monitor.sinks import JsonlSink
first, last = int(sys.argv[2]), int(sys.argv[3])
sink = JsonlSink(Path(sys.argv[1]))
sink.truncate_after(first)
for step in range(first + 1, last + 1):
    row = {"kind": "train", "step": step, "tokens": step * 1000, "time": time.time(), "loss": 9.0 - 0.01 * step, "lr": 1e-3}
    sink.write(row | {"grad_norm": 1.0, "tokens_per_second": 1000.0 * step, "step_time": 0.1, "data_wait": 0.0, "restart": int(first > 0)})
    time.sleep(0.02)
"""


def test_live_view_in_tmux_moves_and_survives_a_restart(tmp_path: Path, tmux: Callable[..., str]) -> None:
    run = tmp_path / "live"
    run.mkdir()
    (run / "config.yaml").write_text("name: live-run\ntrain: {steps: 2000}\n")
    command = f"{sys.executable} -c 'from mamba_pretrain.monitor.watch import watch; watch(\"{run}\", interval=0.2)'"
    tmux("new-session", "-d", "-s", "watch", "-x", "110", "-y", "40", command)

    def screen() -> str:
        return tmux("capture-pane", "-p", "-t", "watch")

    wait_for(screen, "Waiting for the first train row")
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(run), "0", "100000"])
    try:
        first = int(wait_for(screen, r"step (\d+)/2,000")[1])
        deadline = time.monotonic() + 20
        while int(wait_for(screen, r"step (\d+)/2,000")[1]) <= first + 20:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        shown = screen()
        assert "live-run" in shown
        assert "running" in shown
        assert re.search(r"tokens/s +\d", shown)
    finally:
        writer.kill()
        writer.wait()
    reached = read_history(run).train[-1]["step"]
    subprocess.run([sys.executable, "-c", WRITER, str(run), "10", str(reached + 5)], check=True)
    wait_for(screen, rf"step {reached + 5}/2,000")
    wait_for(screen, "1 restart")
    tmux("send-keys", "-t", "watch", "C-c")
