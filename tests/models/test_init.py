import math

import pytest
import torch
from torch.nn import functional as F

from mamba_pretrain.models import init
from mamba_pretrain.models.language_model import LanguageModel


@pytest.mark.parametrize("kind", ["mamba1", "mamba2", "hybrid"])
def test_the_same_bits_again_and_from_meta(kind, small_config):
    eager = LanguageModel(small_config(kind))
    init.initialize(eager, 7)
    first = {name: p.detach().clone() for name, p in eager.named_parameters()}
    init.initialize(eager, 7)
    with torch.device("meta"):
        late = LanguageModel(small_config(kind))
    late.to_empty(device="cpu")
    init.initialize(late, 7)
    for name, parameter in late.named_parameters():
        assert torch.equal(parameter, first[name]), name
        assert torch.equal(dict(eager.named_parameters())[name], first[name]), name


def test_seeds_and_names_give_different_values(small_config):
    model = LanguageModel(small_config("mamba1"))
    init.initialize(model, 0)
    a, b = (model.layers[i].mixer.in_proj.weight.detach().clone() for i in (0, 1))
    init.initialize(model, 1)
    assert not torch.equal(a, b)
    assert not torch.equal(a, model.layers[0].mixer.in_proj.weight)


def test_assign_receives_full_fp32_tensors(small_config):
    with torch.device("meta"):
        model = LanguageModel(small_config("hybrid"))
    received = {}
    init.initialize(model, 0, assign=lambda name, parameter, full: received.__setitem__(name, full))
    assert {name: tuple(t.shape) for name, t in received.items()} == model.parameter_shapes
    assert {t.dtype for t in received.values()} == {torch.float32}
    assert {t.device.type for t in received.values()} == {"cpu"}


def test_the_papers_recipe(small_config):
    config = small_config("mamba1", d_model=128, n_layer=4)
    model = LanguageModel(config)
    init.initialize(model, 0)
    mixer = model.layers[0].mixer
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 9.0).expand(256, 8))
    dt = F.softplus(mixer.dt_bias)
    assert 9.9e-4 < dt.min() < 2e-3
    assert 0.05 < dt.max() < 0.1001
    assert abs(dt.log().mean() - math.log(1e-2)) < 0.3, "log-uniform"
    assert 0.9 < mixer.dt_proj.weight.abs().max() / config.resolved_dt_rank**-0.5 <= 1
    bound = 256**-0.5 / math.sqrt(4)
    assert 0.9 < mixer.out_proj.weight.abs().max() / bound <= 1
    assert 0.9 < mixer.in_proj.weight.abs().max() / 128**-0.5 <= 1
    assert 0.9 < mixer.conv1d.weight.abs().max() / 0.5 <= 1
    assert abs(model.embedding.weight.std() - 0.02) < 1e-3
    assert set(mixer.D.tolist()) == {1.0}

    two = LanguageModel(small_config("mamba2", d_model=256, d_intermediate=64, n_layer=2))
    init.initialize(two, 0)
    A = two.layers[0].mixer.A_log.exp()
    assert 1 <= A.min() < 4 < 12 < A.max() <= 16
    assert two.layers[0].mlp.down_proj.weight.abs().max() <= 64**-0.5 / math.sqrt(4)


def test_the_step_size_floor(small_config):
    model = LanguageModel(small_config("mamba2", time_step_min=1e-6, time_step_max=1e-5))
    init.initialize(model, 0)
    assert torch.allclose(F.softplus(model.layers[0].mixer.dt_bias), torch.tensor(1e-4), rtol=1e-3)
