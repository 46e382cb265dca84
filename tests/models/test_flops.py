import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mamba_pretrain.models import flops
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.language_model import LanguageModel


def counted(model, length):
    """What torch counts (matmuls, convolutions, attention) in a forward pass, per token."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, length, dtype=torch.int64))
    return counter.get_total_flops() / length


@pytest.mark.parametrize("kind", ["attention", "mamba1"])
def test_matmuls_equal_torchs_count(kind, small_config, randomized, monkeypatch):
    """Recurrence and convolution, which torch does not see as matmuls, are taken out on both sides; attention counts only visible keys."""
    from mamba_pretrain.models import mamba1, modules

    monkeypatch.setattr(mamba1, "selective_scan", lambda u, *args, **kwargs: u)
    monkeypatch.setattr(modules, "causal_conv1d", lambda x, *args, **kwargs: x)
    config = small_config(kind)
    model, length = randomized(config), 31
    expected = flops.forward_flops_per_token(model, length)
    if kind == "mamba1":
        expected -= 3 * (flops.selective_scan_flops(config.d_inner, config.d_state) + flops.conv_flops(config.d_inner, config.d_conv))
    else:
        visible = flops.attention_flops(length, config.n_head, config.attention_headdim)
        expected += 3 * visible * (2 * length / (length + 1) - 1)  # torch counts every key, seen or masked
    assert counted(model, length) == pytest.approx(expected)


def test_ssd_is_the_papers_formula():
    # arXiv:2405.21060, section 6.3, per token and head with N = P = Q: three matmuls' worth of N^2 inside plus N^2 out of the states.
    n = 64
    assert flops.ssd_flops(4096, n, 1, n, 1, n) == pytest.approx(2 * (4 * n * n + n))
    assert flops.ssd_flops(16, 256, 2, 8, 1, 4) == flops.ssd_flops(16, 16, 2, 8, 1, 4), "a chunk is no longer than the sequence"


def test_six_n_is_close_to_the_truth_only_without_much_recurrence(small_config):
    for mixer, low, high in (("mamba1", 1.0, 1.02), ("mamba2", 1.1, 1.2)):
        found = flops.describe(ModelConfig(mixer=mixer, n_layer=24, d_model=768, vocab_size=50277), 2048)
        assert low < found["training"] / found["six_n"] < high
        assert found["training"] == 3 * found["forward"]
        assert found["six_n"] == 6 * found["parameters"]


def test_an_untied_lookup_costs_nothing(small_config):
    with torch.device("meta"):
        tied = LanguageModel(small_config("mamba1"))
        untied = LanguageModel(small_config("mamba1", tie_word_embeddings=False))
    assert flops.six_n_per_token(tied) == flops.six_n_per_token(untied)
    assert tied.flops_per_token(32) == untied.flops_per_token(32)


def test_attention_grows_with_length_and_mamba_does_not(small_config):
    with torch.device("meta"):
        attention, mamba = LanguageModel(small_config("attention")), LanguageModel(small_config("mamba1"))
    assert attention.flops_per_token(2048) > attention.flops_per_token(512)
    assert mamba.flops_per_token(2048) == mamba.flops_per_token(512)
