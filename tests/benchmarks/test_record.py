"""Records of benchmarks: none is lost to another."""

from __future__ import annotations

import argparse
import json

import pytest
import record
import torch


def test_two_runs_of_one_minute_keep_their_records(tmp_path):
    one, other = record.Growing("thing", tmp_path), record.Growing("thing", tmp_path)
    for part in range(3):
        one.save({"who": "one", "part": part}, "A GPU")
        other.save({"who": "other", "part": part}, "A GPU")
    found = {body["who"]: body["part"] for body in (json.loads(path.read_text()) for path in tmp_path.iterdir())}
    assert found == {"one": 2, "other": 2}


@pytest.mark.parametrize(("there", "words"), [(0, "this machine has no GPU"), (1, "this machine has 1 of the 2 GPUs that this needs")])
def test_too_few_gpus_are_said_in_a_sentence(there, words, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    with pytest.raises(SystemExit) as end:
        record.require_gpus(argparse.ArgumentParser(), 2)
    assert end.value.code == 2
    assert words in capsys.readouterr().err
