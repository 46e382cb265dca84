"""Host memory for copies of the state."""

from __future__ import annotations

import torch

from mamba_pretrain.checkpoint import staging
from mamba_pretrain.checkpoint.staging import StagingBuffers, allocate
from mamba_pretrain.parallel.portable import Segment


def segments(*sizes):
    return [Segment(f"w{i}", (size,), 0, torch.randn(size)) for i, size in enumerate(sizes)]


def test_memory_is_kept_while_the_layout_stays():
    buffers = StagingBuffers()
    first = buffers.begin(segments(3, 5)).finish()
    again = segments(3, 5)
    second = buffers.begin(again).finish()
    assert [s.data.data_ptr() for s in first] == [s.data.data_ptr() for s in second]
    assert all(torch.equal(copy.data, original.data) for copy, original in zip(second, again, strict=True))
    other = segments(3, 6)
    assert torch.equal(buffers.begin(other).finish()[1].data, other[1].data)


def test_moments_that_appear_later_get_memory():
    """Before the first step an optimizer has none."""
    buffers = StagingBuffers()
    buffers.begin(segments(3)).finish()
    grown = segments(3, 3)
    assert all(torch.equal(copy.data, original.data) for copy, original in zip(buffers.begin(grown).finish(), grown, strict=True))


def test_allocations_are_few_and_do_not_overlap(monkeypatch):
    monkeypatch.setattr(staging, "CHUNK", 8)
    sizes = [3, 4, 2, 20, 0, 1, 5]
    tensors = list(allocate(sizes, pinned=False))
    assert [t.numel() for t in tensors] == sizes
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(tensors))
    assert len({t.untyped_storage().data_ptr() for t in tensors if t.numel()}) < len(sizes) - 1


def test_moments_in_another_precision_are_stored_in_fp32():
    narrow = [Segment("w", (4,), 0, torch.randn(4).bfloat16())]
    copy = StagingBuffers().begin(narrow).finish()[0].data
    assert copy.dtype == torch.float32
    assert torch.equal(copy, narrow[0].data.float())
