"""The report page, opened in a real headless browser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from data_tools.errors import UserError
from mamba_pretrain.monitor.report import MAX_POINTS, TrainingClock, render, train_table, write_report

if TYPE_CHECKING:
    from browser import Browser

# Kept after the tests, for people to look at.
SCREENSHOTS = Path(__file__).resolve().parents[2] / "build" / "screenshots"
MakeRun = Callable[..., Path]
CHART = "[...document.querySelectorAll('article.chart')].find((c) => c.querySelector('h3').textContent === {title!r})"


def chart(title: str) -> str:
    return CHART.format(title=title)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_of_one_run_draws_everything_without_network_or_errors(make_run: MakeRun, browser: Browser, dark: bool) -> None:
    page = write_report([make_run("mamba2-130m")])
    browser.open(page, dark=dark)
    assert browser.problems == []
    assert browser.requests == [page.resolve().as_uri()]
    titles = browser.evaluate("[...document.querySelectorAll('article.chart:not([hidden]) h3')].map((h) => h.textContent)")
    assert titles[:3] == ["Loss", "Validation perplexity", "Bits per byte"]
    assert {"Gradient norm", "Learning rate", "Throughput", "Peak memory", "Step size dt", "Norm of B"} <= set(titles)
    # Every visible chart has a line of some length inside its card.
    lengths = browser.evaluate(
        "[...document.querySelectorAll('article.chart:not([hidden])')].map((c) => Math.max(...[...c.querySelectorAll('path.series')]"
        ".map((p) => p.getTotalLength())))"
    )
    assert min(lengths) > 300
    assert browser.evaluate(f"{chart('Loss')}.querySelectorAll('.restart').length") == 1
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(14, 17, 22)" if dark else "rgb(246, 247, 249)")
    assert browser.screenshot(SCREENSHOTS / f"report-{'dark' if dark else 'light'}.png").stat().st_size > 50_000


def test_hover_shows_the_values_under_the_pointer(make_run: MakeRun, browser: Browser) -> None:
    browser.open(write_report([make_run("hover")], figures=False))
    x, y, width, height = browser.evaluate(
        f"(() => {{ const r = {chart('Learning rate')}.querySelector('svg[role]').getBoundingClientRect(); scrollTo(0, r.y);"
        f"const s = {chart('Learning rate')}.querySelector('svg[role]').getBoundingClientRect(); return [s.x, s.y, s.width, s.height] }})()"
    )
    browser.move_mouse(x + 0.6 * width, y + 0.5 * height)
    assert browser.evaluate("document.getElementById('tooltip').hidden") is False
    text = browser.evaluate("document.getElementById('tooltip').innerText")
    assert "tokens" in text
    assert "hover" in text
    assert "0.00" in text or "e-" in text
    crosses = browser.evaluate("document.querySelectorAll('line.cross').length")
    assert crosses > 5  # one crosshair on all charts


def test_two_runs_are_overlaid_and_their_configs_compared(make_run: MakeRun, browser: Browser, tmp_path: Path) -> None:
    runs = [make_run("base"), make_run("lower-lr", seed=3, lr=1e-3)]
    browser.open(write_report(runs, tmp_path / "both" / "report.html"))
    assert browser.problems == []
    assert browser.evaluate(f"{chart('Learning rate')}.querySelectorAll('path.series').length") == 2
    differing = browser.evaluate("[...document.querySelectorAll('td.differs')].map((cell) => cell.textContent)")
    assert differing == ["base", "lower-lr", "0.003", "0.001"]
    browser.evaluate("document.querySelectorAll('button.run')[1].click()")
    assert browser.evaluate(f"{chart('Learning rate')}.querySelectorAll('path.series').length") == 1
    browser.evaluate("document.querySelectorAll('button.run')[1].click()")
    browser.screenshot(SCREENSHOTS / "report-two-runs.png")
    assert {path.name for path in (tmp_path / "both" / "figures").iterdir()} >= {"loss.png", "throughput.png"}


def test_page_fits_a_phone(make_run: MakeRun, browser: Browser) -> None:
    browser.open(write_report([make_run("phone")], figures=False), width=390, height=844, dark=True)
    assert browser.problems == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    browser.screenshot(SCREENSHOTS / "report-phone.png")


def test_controls_change_axis_and_scale(make_run: MakeRun, browser: Browser) -> None:
    browser.open(write_report([make_run("controls")], figures=False))
    loss_line = f"{chart('Loss')}.querySelector('path.series').getAttribute('d')"
    before = browser.evaluate(loss_line)
    browser.evaluate("document.getElementById('log-loss').click()")
    logarithmic = browser.evaluate(loss_line)
    assert before != logarithmic
    browser.evaluate("[...document.querySelectorAll('#x-axis button')].find((b) => b.textContent === 'Time').click()")
    assert browser.evaluate(f"{chart('Loss')}.querySelector('svg[role]').getAttribute('aria-label')") == "Loss against time"
    assert browser.evaluate(loss_line) != logarithmic
    assert browser.problems == []


def test_text_from_a_run_cannot_break_out_of_the_page(make_run: MakeRun, browser: Browser) -> None:
    run = make_run("hostile")
    row = {
        "kind": "sample",
        "step": 400,
        "time": 0,
        "prompt": "<img src=x onerror=alert(1)>",
        "text": "</script><script>alert(2)</script><!--",
    }
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    browser.open(write_report([run], figures=False))
    assert browser.problems == []
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    assert "<script>alert(2)" in browser.evaluate("document.body.innerText")


def test_report_of_a_run_with_gaps_and_few_rows(tmp_path: Path, browser: Browser) -> None:
    run = tmp_path / "tiny"
    run.mkdir()
    rows = [{"kind": "train", "step": s, "tokens": s * 8, "time": s, "loss": None if s == 2 else 3.0 / s, "lr": 1e-3} for s in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    browser.open(write_report([run]))
    assert browser.problems == []
    assert browser.evaluate("[...document.querySelectorAll('article.chart:not([hidden])')].length") == 2


def test_long_runs_are_thinned_and_peaks_kept() -> None:
    rows = [{"step": s, "tokens": s, "time": float(s), "loss": 1.0, "grad_norm": 9.0 if s == 5001 else 1.0} for s in range(1, 20_001)]
    table = train_table(rows, TrainingClock(rows))
    assert len(table["step"]) <= MAX_POINTS
    assert table["step"][-1] == 20_000
    assert max(value for value in table["grad_norm"] if value is not None) == 9.0


def test_training_time_leaves_out_the_pause_before_a_resume() -> None:
    rows = [{"step": s, "time": 10.0 * s + (5000 if s > 3 else 0), "step_time": 10.0, "restart": int(s > 3)} for s in range(1, 7)]
    assert TrainingClock(rows).total_seconds == pytest.approx(60.0)


def test_wrong_folders_are_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        write_report([tmp_path / "absent"])
    with pytest.raises(UserError, match="is not a run folder"):
        write_report([tmp_path])
    (tmp_path / "metrics.jsonl").write_text('{"kind":"event","step":0,"time":0,"event":"start"}\n')
    with pytest.raises(UserError, match="no train rows yet"):
        write_report([tmp_path])


def test_template_leaves_no_placeholder() -> None:
    assert "@@" not in render([{"name": "n", "layers": {}}])
