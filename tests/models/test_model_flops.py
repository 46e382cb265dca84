import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mamba_pretrain.models import model_flops
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.ops import flops, ssd_scan_reference


def counted(model, length):
    """What torch counts in forward and backward, per token: matmuls by itself, ops of ours by the formulas registered for them."""
    tokens = torch.zeros(1, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, labels=tokens).backward()
    return counter.get_total_flops() / length


@pytest.mark.parametrize("kind", ["mamba1", "falcon", "mamba2", "attention", "hybrid"])
@pytest.mark.parametrize("length", [31, 96])
def test_training_flops_are_what_torch_counts(kind, length, small_config, randomized):
    config = small_config(kind)
    model = randomized(config)
    expected = model_flops.training_flops_per_token(model, length)
    # Torch counts every key, seen or masked; ours only those that a token sees.
    n_attention = config.layer_mixers.count("attention")
    visible = 3 * n_attention * flops.attention_flops(length, config.n_head, config.attention_headdim) if n_attention else 0
    assert counted(model, length) == pytest.approx(expected + visible * (2 * length / (length + 1) - 1), rel=2e-3)


def test_the_formula_of_ssd_is_what_torch_counts_in_the_reference():
    """Without its registered formula: the matmuls of the reference, seen one by one. Passing states on is no matmul."""
    b, length, heads, headdim, groups, state, chunk = 2, 96, 4, 16, 2, 32, 16
    x, B, C = torch.randn(b, length, heads, headdim), torch.randn(b, length, groups, state), torch.randn(b, length, groups, state)
    dt, A = torch.randn(b, length, heads), -torch.rand(heads)
    operands = ssd_scan_reference._Operands(x, dt, A, B, C, None, None, None, None, chunk, 0.0, float("inf"))
    with FlopCounterMode(display=False) as counter:
        ssd_scan_reference._forward(operands, None)
    expected = flops.ssd_scan_flops(b * length, length, chunk, heads, headdim, groups, state)
    passing = 2 * b * length * heads * headdim * state // chunk
    assert counter.get_total_flops() == expected - passing


def test_ssd_is_the_papers_formula():
    # arXiv:2405.21060, section 6.3, per token and head with N = P = Q: three matmuls' worth of N^2 inside plus N^2 out of the states.
    n = 64
    assert flops.ssd_scan_flops(1, 4096, n, 1, n, 1, n) == 2 * (4 * n * n + n)
    assert flops.ssd_scan_flops(1, 16, 256, 2, 8, 1, 4) == flops.ssd_scan_flops(1, 16, 16, 2, 8, 1, 4), "a chunk is no longer than the text"


def test_six_n_is_close_to_the_truth_only_without_much_recurrence(small_config):
    for mixer, low, high in (("mamba1", 1.0, 1.02), ("mamba2", 1.1, 1.2)):
        found = model_flops.describe(ModelConfig(mixer=mixer, n_layer=24, d_model=768, vocab_size=50277), 2048)
        assert low < found["training"] / found["six_n"] < high
        assert found["training"] == 3 * found["forward"]
        assert found["six_n"] == 6 * found["parameters"]


def test_an_untied_lookup_costs_nothing(small_config):
    with torch.device("meta"):
        tied = LanguageModel(small_config("mamba1"))
        untied = LanguageModel(small_config("mamba1", tie_word_embeddings=False))
    assert model_flops.six_n_per_token(tied) == model_flops.six_n_per_token(untied)
    assert tied.flops_per_token(32) == untied.flops_per_token(32)


def test_attention_grows_with_length_and_mamba_does_not(small_config):
    with torch.device("meta"):
        attention, mamba = LanguageModel(small_config("attention")), LanguageModel(small_config("mamba1"))
    assert attention.flops_per_token(2048) > attention.flops_per_token(512)
    assert mamba.flops_per_token(2048) == mamba.flops_per_token(512)
