"""Saving: atomic, asynchronous, pruned; and what a save interrupted at any point leaves behind."""

from __future__ import annotations

import json
import os
import threading

import pytest
import torch

from data_tools.errors import UserError
from mamba_pretrain.checkpoint import store as store_module
from mamba_pretrain.checkpoint.reading import latest_step, list_checkpoints, open_checkpoint
from mamba_pretrain.checkpoint.staging import StagedCopy, StagingBuffers
from mamba_pretrain.checkpoint.store import SaveError
from mamba_pretrain.parallel.portable import whole


def same(checkpoint, full):
    return all(torch.equal(whole(checkpoint.reader, name), tensor) for name, tensor in full.items())


@pytest.mark.parametrize("async_save", [True, False])
def test_what_is_saved_is_opened(make_store, make_engine, async_save):
    store = make_store(async_save=async_save)
    engine, full = make_engine(1)
    store.save(engine, 5, {"tokens": 640, "state": {"losses": [1.5]}})
    checkpoint = store.open()
    assert (checkpoint.step, checkpoint.meta["tokens"], checkpoint.meta["state"]) == (5, 640, {"losses": [1.5]})
    assert same(checkpoint, full)


def test_no_checkpoint(make_store, root):
    assert make_store().open() is None
    with pytest.raises(UserError, match="no complete checkpoint"):
        open_checkpoint(root)


def test_training_may_change_the_state_while_it_is_written(make_store, make_engine, monkeypatch):
    go = threading.Event()
    write = store_module.write_segments

    def slow(path, segments):
        assert go.wait(10)
        return write(path, segments)

    monkeypatch.setattr(store_module, "write_segments", slow)
    store = make_store()
    engine, full = make_engine(1)
    before = {name: tensor.clone() for name, tensor in full.items()}
    store.save(engine, 5, {})
    engine.before_update()
    for tensor in full.values():
        tensor.zero_()
    go.set()
    assert same(store.open(), before)


def test_latest_names_the_newest(saved):
    assert (saved / "latest").read_text().strip() == "step-00000030"
    assert sorted(p.name for p in saved.iterdir()) == ["latest", "step-00000010", "step-00000020", "step-00000030"]


def test_pruning(make_store, make_engine, root):
    store = make_store(keep_last=2, keep_every=30)
    for step in range(10, 110, 10):
        store.save(make_engine()[0], step, {})
    store.wait()
    assert [entry.step for entry in list_checkpoints(root)] == [30, 60, 90, 100]


def test_a_step_saved_again_replaces_the_first(make_store, make_engine):
    store = make_store()
    store.save(make_engine(1)[0], 5, {})
    engine, full = make_engine(2)
    store.save(engine, 5, {})
    assert same(store.open(), full)


def test_an_update_waits_for_the_copy(make_store, make_engine, monkeypatch):
    go, copy = threading.Event(), StagedCopy._copy

    def slow(self):
        assert go.wait(10)
        copy(self)

    monkeypatch.setattr(StagedCopy, "_copy", slow)
    store, (engine, full) = make_store(), make_engine(1)
    before = {name: tensor.clone() for name, tensor in full.items()}
    store.save(engine, 5, {})

    def update():
        engine.before_update()
        for tensor in full.values():
            tensor.zero_()

    updating = threading.Thread(target=update)
    updating.start()
    updating.join(0.2)
    assert updating.is_alive(), "the update did not wait"
    go.set()
    updating.join(10)
    assert same(store.open(), before)


def test_a_copy_that_fails_does_not_hold_the_update(make_store, make_engine, monkeypatch):
    def failing(self):
        raise MemoryError("no memory")

    monkeypatch.setattr(StagedCopy, "_copy", failing)
    store, (engine, _) = make_store(), make_engine(1)
    store.save(engine, 5, {})
    engine.before_update()
    with pytest.raises(SaveError, match="no memory"):
        store.wait()


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs."""


# Every call by which a save changes the disk; a kill can come before any of them.
POINTS = [
    ("write_segments", 0), ("write_json", 0), ("write_json", 1), ("publish", 0), ("sync_folder", 0), ("os.replace", 0), ("os.replace", 1),
    ("os.replace", 2), ("os.replace", 3), ("discard", 0), ("shutil.rmtree", 0),
]  # fmt: skip


@pytest.mark.parametrize(("call", "nth"), POINTS)
def test_killed_at_any_point_a_complete_checkpoint_stands(make_store, make_engine, root, monkeypatch, call, nth):
    first = make_store(keep_last=1)
    old_engine, old = make_engine(1)
    first.save(old_engine, 10, {})
    first.wait()

    owner = getattr(store_module, call.split(".")[0]) if "." in call else store_module
    name = call.split(".")[-1]
    real, calls = getattr(owner, name), []

    def killing(*arguments, **named):
        calls.append(arguments)
        if len(calls) > nth:
            raise Killed
        return real(*arguments, **named)

    new_engine, new = make_engine(2)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killing)
        first.save(new_engine, 20, {})
        with pytest.raises(SaveError):
            first.wait()
    assert len(calls) > nth, "the point was never reached"

    survivor = make_store(keep_last=1)
    checkpoint = survivor.open()
    assert same(checkpoint, {10: old, 20: new}[checkpoint.step])
    survivor.save(new_engine, 30, {})
    assert survivor.open().step == 30
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step-00000030"], "leftovers are gone"


def test_an_error_shows_at_the_next_save_and_is_told_once(make_store, make_engine, root, monkeypatch):
    store = make_store()
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_segments", lambda *arguments: (_ for _ in ()).throw(OSError("disk full")))
        store.save(make_engine()[0], 10, {})
        store._thread.join()
    with pytest.raises(SaveError, match="disk full"):
        store.save(make_engine()[0], 20, {})
    store.save(make_engine()[0], 30, {})
    assert store.open().step == 30


def test_a_folder_that_cannot_be_written_is_an_error(make_store, make_engine, root):
    root.write_text("a file where the folder should be")
    with pytest.raises(SaveError, match="could not be saved"):
        make_store().save(make_engine()[0], 10, {})


def test_missing_parts_end_in_an_error_not_a_hang(make_engine, root):
    from mamba_pretrain.checkpoint.config import CheckpointConfig
    from mamba_pretrain.parallel.topology import Topology

    peerless = store_module.CheckpointStore(root, CheckpointConfig(timeout=0.3), Topology(0, 0, 2, 2, 0, "python", torch.device("cpu")))
    root.mkdir()
    (root / ".tmp-step-00000005").mkdir()
    with pytest.raises(SaveError, match=r"rank-00001\.json did not appear within 0\.3 s"):
        peerless._write(root / ".tmp-step-00000005", StagingBuffers().begin(list(make_engine()[0].state())), 5, {})
    assert latest_step(root) is None


def test_waiting_is_bounded(make_store, make_engine, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(store_module, "write_segments", lambda *arguments: go.wait(10))
    store = make_store()
    store.save(make_engine()[0], 5, {})
    with pytest.raises(SaveError, match=r"within 0\.1 s"):
        store.wait(0.1)
    go.set()


def test_everything_is_forced_to_disk_before_it_gets_its_name(make_store, make_engine, root, monkeypatch):
    """Without that order a power cut could leave a named checkpoint with empty files."""
    events = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        events.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def noted_replace(source, target):
        events.append(("rename", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    store = make_store()
    store.save(make_engine()[0], 5, {})
    store.wait()
    named = events.index(("rename", "step-00000005"))
    before = events[:named]
    assert ("sync", "rank-00000.safetensors") in before
    assert ("sync", ".tmp-manifest.json") in before
    assert before[-1] == ("sync", ".tmp-step-00000005")
    assert events.index(("rename", "latest")) > named
    assert events[-1] == ("sync", "checkpoints")


def test_the_manifest_is_plain_json(saved):
    manifest = json.loads((saved / "step-00000010" / "manifest.json").read_text())
    assert (manifest["step"], manifest["engine"], manifest["world_size"], manifest["meta"]) == (10, "stand-in", 1, {"tokens": 1000})
