import torch

from mamba_pretrain.models.boundaries import Boundaries


def test_positions_restart_with_each_document():
    boundaries = Boundaries.from_seq_idx(torch.tensor([[0, 0, 1, 1, 1, 0], [3, 3, 3, 3, 3, 3]]))
    assert boundaries.positions.tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
    assert boundaries.seq_idx.dtype == torch.int32


def test_the_mask_is_causal_within_documents_even_when_a_number_returns():
    mask = Boundaries.from_seq_idx(torch.tensor([[0, 1, 1, 0]])).attention_mask
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
