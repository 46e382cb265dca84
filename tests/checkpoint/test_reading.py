"""Finding, listing, verifying and reading checkpoints."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from data_tools.errors import UserError
from mamba_pretrain.checkpoint.files import write_segments
from mamba_pretrain.checkpoint.reading import FileReader, list_checkpoints, open_checkpoint
from mamba_pretrain.parallel.portable import Segment, whole


def test_the_newest_or_a_given_step(saved, make_engine):
    assert open_checkpoint(saved).step == 30
    assert open_checkpoint(saved.parent).step == 30, "a run folder"
    assert open_checkpoint(saved / "step-00000010").step == 10, "a checkpoint's own folder"
    chosen = open_checkpoint(saved, 20)
    assert torch.equal(whole(chosen.reader, "model.embedding.weight"), make_engine(20)[1]["model.embedding.weight"])


def test_a_step_that_is_not_there(saved):
    with pytest.raises(UserError, match=r"no complete checkpoint of step 25; there are: 10, 20, 30"):
        open_checkpoint(saved, 25)


def test_the_list_tells_everything(saved):
    (saved / ".tmp-step-00000040").mkdir()
    (saved / ".tmp-step-00000040" / "rank-00000.safetensors").write_bytes(b"half")
    entries = list_checkpoints(saved)
    assert [(e.step, e.tokens, e.complete, e.engine, e.world_size) for e in entries] == [
        (10, 1000, True, "stand-in", 1),
        (20, 2000, True, "stand-in", 1),
        (30, 3000, True, "stand-in", 1),
        (40, None, False, "-", None),
    ]
    assert entries[3].size == 4
    assert entries[0].size == sum(f.stat().st_size for f in (saved / "step-00000010").iterdir())
    assert len(entries[0].columns()) == 7


def damage_bit(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_bit, "another checksum"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), "bytes instead of"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_a_damaged_file_is_named(saved, make_store, damage, said):
    damage(saved / "step-00000030" / "rank-00000.safetensors")
    for opened in (lambda: open_checkpoint(saved), make_store().open):
        with pytest.raises(UserError, match=rf"rank-00000.safetensors.*{said}.*remove"):
            opened()
    assert open_checkpoint(saved, 20).step == 20


def test_verification_can_be_left_out(saved, make_store):
    damage_bit(saved / "step-00000030" / "rank-00000.safetensors")
    assert make_store(verify=False).open().step == 30


@pytest.mark.parametrize("text", ["{half", '{"format": 99}'])
def test_a_damaged_manifest(saved, text):
    (saved / "step-00000030" / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"step-00000030/manifest.json"):
        open_checkpoint(saved, 30)


def test_weights_by_name(saved, make_engine):
    weights = open_checkpoint(saved).full_model()
    assert weights.keys() == {"embedding.weight", "layers.0.mixer.A_log"}
    assert torch.equal(weights["embedding.weight"], make_engine(30)[1]["model.embedding.weight"])


def test_files_are_plain_safetensors(saved, make_engine):
    stored = load_file(saved / "step-00000030" / "rank-00000.safetensors")
    assert torch.equal(stored["model.embedding.weight@0"], make_engine(30)[1]["model.embedding.weight"].reshape(-1))


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 50), max_size=6), start=st.integers(0, 50), end=st.integers(0, 50), files=st.integers(1, 3))
def test_any_range_however_it_was_cut(tmp_path_factory, cuts, start, end, files):
    full, folder = torch.arange(50.0), tmp_path_factory.mktemp("cut")
    edges = sorted({0, 50, *cuts})
    pieces = [Segment("model.w", (5, 10), a, full[a:b]) for a, b in itertools.pairwise(edges)]
    records = [write_segments(folder / f"rank-{i:05d}.safetensors", pieces[i::files]) for i in range(files)]
    reader = FileReader(folder, records)
    first, last = min(start, end), max(start, end)
    assert torch.equal(reader.read("model.w", first, last - first), full[first:last])
    shutil.rmtree(folder)


def test_a_range_that_no_file_holds(tmp_path):
    record = write_segments(tmp_path / "rank-00000.safetensors", [Segment("model.w", (10,), 0, torch.zeros(6))])
    with pytest.raises(UserError, match=r"holds 6 of 10 elements of model\.w"):
        whole(FileReader(tmp_path, [record]), "model.w")
