"""Records of benchmarks: none is lost to another."""

from __future__ import annotations

import json

import record


def test_two_runs_of_one_minute_keep_their_records(tmp_path):
    one, other = record.Growing("thing", tmp_path), record.Growing("thing", tmp_path)
    for part in range(3):
        one.save({"who": "one", "part": part}, "A GPU")
        other.save({"who": "other", "part": part}, "A GPU")
    found = {body["who"]: body["part"] for body in (json.loads(path.read_text()) for path in tmp_path.iterdir())}
    assert found == {"one": 2, "other": 2}
