"""A sync sends every step once, over restarts, repeats and interruptions; W&B's real client talks to a stand-in server."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import wandb

from data_tools.errors import UserError
from mamba_pretrain.monitor.sinks import run_id
from mamba_pretrain.monitor.sync import complete_steps, sync_run, upload

pytestmark = pytest.mark.xdist_group("wandb")


class FakeWandb(ThreadingHTTPServer):
    """Keeps the history lines of each run, as W&B's file stream sends them: an offset and the lines from there."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        self.projects: set[str] = set()

    def handle_error(self, *arguments: object) -> None:
        """The client hangs up when it is done: no matter."""

    def rows(self, run: str) -> list[dict[str, Any]]:
        """History rows of a run, by line."""
        lines = self.history.get(run, {})
        return [lines[index] for index in sorted(lines)]

    def graphql(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answers to the queries a run makes."""
        values = request.get("variables", {})
        name, project = values.get("name"), values.get("project", "p")
        where = {"id": "project-id", "name": project, "entity": {"id": "entity-id", "name": "me"}}
        if request["operationName"] == "RunResumeStatus":
            return {"model": {**where, "bucket": self.bucket(name) if name in self.history else None}}
        if request["operationName"] == "UpsertBucket":
            self.projects.add(project)
            inserted = name not in self.history
            self.history.setdefault(name, {})
            return {"upsertBucket": {"bucket": {**self.bucket(name), "project": where, "sweepName": None}, "inserted": inserted}}
        if request["operationName"] == "CreateRunFiles":
            url = f"http://127.0.0.1:{self.server_port}/upload"
            files = [{"name": file, "uploadUrl": url} for file in values["files"]]
            return {"createRunFiles": {"runID": values["run"], "uploadHeaders": [], "files": files}}
        return {"viewer": {"id": "me", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}}

    def bucket(self, name: str) -> dict[str, Any]:
        rows = self.rows(name)
        tail = [json.dumps(row) for row in rows[-1:]]
        counts = {"logLineCount": 0, "historyLineCount": len(rows), "eventsLineCount": 0}
        texts = {"historyTail": json.dumps(tail), "eventsTail": "[]", "summaryMetrics": tail[0] if tail else "{}", "config": "{}"}
        return {"id": name, "name": name, "displayName": name, "tags": [], "notes": "", "wandbConfig": '{"t": 1}', **counts, **texts}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeWandb

    def log_message(self, *arguments: object) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        body = self.body()
        if self.path == "/graphql":
            self.reply({"data": self.server.graphql(json.loads(body))})
            return
        if self.path.endswith("/file_stream"):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            lines = self.server.history.setdefault(self.path.split("/")[-2], {})
            for index, line in enumerate(history["content"] if history else ()):
                lines[history["offset"] + index] = json.loads(line)
        self.reply({})

    def do_PUT(self) -> None:
        self.body()
        self.reply({})

    def body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def reply(self, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    wandb.teardown()  # what earlier tests of this process had the client read from the environment
    fake = FakeWandb()
    threading.Thread(target=fake.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{fake.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield fake
    wandb.teardown()
    fake.shutdown()


def train(step: int) -> dict[str, Any]:
    return {"kind": "train", "step": step, "tokens": step * 100, "time": 1e9 + step, "loss": 10.0 / step}


def evaluation(step: int) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "tokens": step * 100, "time": 1e9 + step, "name": "web", "loss": 9.0 / step}


STOP = {"kind": "event", "step": 30, "time": 2e9, "event": "stop", "reason": "finished"}


def write(run_dir: Path, rows: list[dict[str, Any]], torn: bool = False) -> None:
    run_dir.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run_dir / "metrics.jsonl").write_text(text + ('{"kind": "train", "st' if torn else ""))


def test_repeated_syncs_send_every_step_once(tmp_path: Path, server: FakeWandb) -> None:
    run_dir = tmp_path / "run"
    write(run_dir, [train(step) for step in range(1, 11)], torn=True)
    assert sync_run(run_dir, "p", "me") == "sent 9 steps"
    assert sync_run(run_dir, "p", "me") == "nothing new after step 9"
    # Preempted at 10, resumed from a checkpoint at 8: the file repeats nothing, though step 9 was on the server already.
    write(
        run_dir, [*(train(step) for step in range(1, 21)), evaluation(20), *(train(step) for step in range(21, 31)), evaluation(30), STOP]
    )
    assert sync_run(run_dir, "p", "me") == "sent 21 steps after step 9"
    assert sync_run(run_dir, "p", "me") == "nothing new after step 30"
    assert list(server.history) == [run_id(run_dir)]
    rows = server.rows(run_id(run_dir))
    assert [row["_step"] for row in rows] == list(range(1, 31))
    assert [row["train/loss"] for row in rows] == [10.0 / step for step in range(1, 31)]
    assert [row["_step"] for row in rows if "eval/web/loss" in row] == [20, 30]
    assert rows[4]["_timestamp"] == pytest.approx(1e9 + 5)


class Interrupted(Exception):
    pass


class Recorder:
    """An uploader in memory that may break after some steps."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.steps: list[int] = []
        self.breaks_at = breaks_at

    def last_step(self) -> int:
        return self.steps[-1] if self.steps else -1

    def log(self, step: int, time: float, values: dict[str, Any]) -> None:
        if step == self.breaks_at:
            raise Interrupted
        self.steps.append(step)

    def finish(self) -> None:
        pass


def test_interrupted_sync_is_completed_by_the_next(tmp_path: Path) -> None:
    write(tmp_path, [*(train(step) for step in range(1, 21)), STOP])
    uploader = Recorder(breaks_at=7)
    with pytest.raises(Interrupted):
        upload(tmp_path / "metrics.jsonl", uploader)
    uploader.breaks_at = None
    upload(tmp_path / "metrics.jsonl", uploader)
    assert uploader.steps == list(range(1, 21))


def test_last_step_waits_for_its_evaluation(tmp_path: Path) -> None:
    write(tmp_path, [train(1), train(2)])
    assert [step for step, _, _ in complete_steps(tmp_path / "metrics.jsonl")] == [1]
    write(tmp_path, [train(1), train(2), evaluation(2), STOP])
    steps = list(complete_steps(tmp_path / "metrics.jsonl"))
    assert [step for step, _, _ in steps] == [1, 2]
    assert {"train/loss", "eval/web/loss"} <= set(steps[1][2])


def test_run_without_metrics_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing was trained"):
        sync_run(tmp_path)
