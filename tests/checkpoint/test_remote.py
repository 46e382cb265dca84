"""Copies in a remote folder."""

from __future__ import annotations

import logging
import shutil
import uuid

import pytest
import torch

from data_tools.errors import UserError
from mamba_pretrain.checkpoint.reading import list_checkpoints
from mamba_pretrain.checkpoint.remote import RemoteFolder
from mamba_pretrain.parallel.portable import whole


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    return f"memory://{uuid.uuid4().hex}/run" if request.param == "memory" else f"file://{tmp_path}/remote"


def test_a_run_that_lost_its_folder_continues_from_the_copy(make_store, make_engine, root, url):
    store = make_store(remote=url, keep_last=2)
    for step in (10, 20, 30):
        engine, full = make_engine(step)
        store.save(engine, step, {"tokens": step})
    store.wait()
    assert RemoteFolder(url).steps() == [20, 30], "pruned like the run's own"
    shutil.rmtree(root)

    checkpoint = make_store(remote=url).open()
    assert (checkpoint.step, checkpoint.meta) == (30, {"tokens": 30})
    assert all(torch.equal(whole(checkpoint.reader, name), tensor) for name, tensor in full.items())
    assert [entry.step for entry in list_checkpoints(root)] == [30]


def test_the_runs_own_checkpoint_comes_first(make_store, make_engine, url):
    copying = make_store(remote=url)
    copying.save(make_engine()[0], 30, {})
    copying.wait()
    alone = make_store()
    alone.save(make_engine()[0], 40, {})
    alone.wait()
    assert make_store(remote=url).open().step == 40


def test_a_copy_without_its_manifest_does_not_count(make_store, make_engine, root, url):
    store = make_store(remote=url)
    store.save(make_engine()[0], 10, {})
    store.wait()
    remote = RemoteFolder(url)
    remote._fs.rm_file(remote._path(10, "manifest.json"))
    shutil.rmtree(root)
    assert remote.steps() == []
    assert make_store(remote=url).open() is None


def test_a_failing_copy_does_not_stop_the_run(make_store, make_engine, url, monkeypatch, caplog):
    store = make_store(remote=url)
    monkeypatch.setattr(store.remote, "put", lambda *arguments: (_ for _ in ()).throw(OSError("unreachable")))
    with caplog.at_level(logging.WARNING):
        store.save(make_engine()[0], 10, {})
        assert store.open().step == 10
    assert "was not copied" in caplog.text
    assert RemoteFolder(url).steps() == []


def test_an_unknown_protocol_is_said_at_once(make_store):
    with pytest.raises(UserError, match=r"checkpoint\.remote=nonsense://x cannot be reached"):
        make_store(remote="nonsense://x")
