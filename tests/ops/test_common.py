import torch

from mamba_pretrain.ops.common import document_bounds, document_numbers


def test_documents_are_numbered_along_each_row():
    seq_idx = torch.tensor([[7, 7, 3, 3, 7], [0, 1, 1, 2, 2]], dtype=torch.int32)
    assert document_numbers(seq_idx).tolist() == [[0, 0, 1, 1, 2], [0, 1, 1, 2, 2]]
    assert document_numbers(None) is None


def test_documents_know_where_they_begin_and_end():
    never = 2**31 - 1
    begins, ends = document_bounds(torch.tensor([[7, 7, 3, 3, 7], [0, 1, 1, 2, 2]], dtype=torch.int32))
    assert begins.tolist() == [[-1, -1, 2, 2, 4], [-1, 1, 1, 3, 3]]
    assert ends.tolist() == [[2, 2, 4, 4, never], [1, 3, 3, never, never]]
    assert (begins.dtype, ends.dtype) == (torch.int32, torch.int32)
    assert document_bounds(None) is None


def test_layers_share_the_numbers_of_a_batch_until_it_changes():
    seq_idx = torch.tensor([[0, 0, 1]], dtype=torch.int32)
    first = document_numbers(seq_idx)
    assert document_numbers(seq_idx) is first
    seq_idx[0, 1] = 5
    assert document_numbers(seq_idx).tolist() == [[0, 1, 2]]
    assert document_numbers(torch.tensor([[0, 0, 0]], dtype=torch.int32)).tolist() == [[0, 0, 0]]


def test_inference_mode_has_numbers_too():
    with torch.inference_mode():
        assert document_numbers(torch.tensor([[3, 3, 5]])).tolist() == [[0, 0, 1]]
