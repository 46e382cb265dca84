import math

import pytest
import torch
from torch.nn import functional as F

from mamba_pretrain.models import init
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.language_model import LanguageModel

KINDS = ["mamba1", "falcon", "mamba2", "attention", "hybrid"]
# facts: parameters in millions of the papers' models, GPT-NeoX tokenizer.
PAPER = [
    ("mamba1", 24, 768, 129.1),
    ("mamba1", 48, 1024, 371.5),
    ("mamba1", 48, 1536, 793.2),
    ("mamba1", 48, 2048, 1372.2),
    ("mamba1", 64, 2560, 2768.3),
    ("mamba2", 24, 768, 129.0),
    ("mamba2", 48, 1024, 368.3),
    ("mamba2", 48, 1536, 780.2),
    ("mamba2", 48, 2048, 1343.8),
    ("mamba2", 64, 2560, 2702.6),
]


@pytest.mark.parametrize(("mixer", "n_layer", "d_model", "millions"), PAPER)
def test_parameter_counts_of_the_papers(mixer, n_layer, d_model, millions):
    with torch.device("meta"):
        model = LanguageModel(ModelConfig(mixer=mixer, n_layer=n_layer, d_model=d_model, vocab_size=50277))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    assert model.n_parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_policies_follow_the_numerics_contract(kind, small_config):
    model = LanguageModel(small_config(kind, use_bias=True))
    policies = model.parameter_policies()
    assert set(policies) == {name for name, _ in model.named_parameters()}
    for name, policy in policies.items():
        leaf = name.rsplit(".", 1)[-1]
        norm = "norm" in name
        assert policy.fp32 == (leaf in ("A_log", "D", "dt_bias") or norm), name
        projection = leaf == "weight" and not norm and "conv1d" not in name
        assert policy.decay == projection, name


def test_an_unclassified_parameter_is_an_error(small_config):
    model = LanguageModel(small_config("mamba1"))
    model.layers[0].extra = torch.nn.Linear(2, 2)
    model.parameter_shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"layers\.0\.extra\.weight"):
        model.parameter_policies()


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_sum_of_token_losses_over_the_real_vocabulary(kind, small_config, randomized):
    model = randomized(small_config(kind))
    tokens = torch.randint(0, 61, (2, 19))
    labels = torch.randint(0, 61, (2, 19))
    labels[0, :5] = -100
    logits, loss = model(tokens), model(tokens, labels=labels)
    assert logits.shape == (2, 19, 61)
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    loss.backward()
    head = model.embedding if model.config.tie_word_embeddings else model.lm_head
    assert head.weight.grad[61:].abs().max() == 0, "padding rows must not learn"


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_isolated_to_the_bit(kind, small_config, randomized, two_documents):
    model = randomized(small_config(kind))
    length, cut = 41, 18
    boundaries = two_documents(2, length, cut)
    tokens = torch.randint(1, 61, (2, length))
    labels = torch.randint(0, 61, (2, length))
    labels[:, :cut] = -100
    other = tokens.clone()
    other[:, :cut] = torch.randint(1, 61, (2, cut))

    results = []
    for batch in (tokens, other):
        model.zero_grad()
        logits = model(batch, boundaries)
        model(batch, boundaries, labels).backward()
        results.append((logits, {name: p.grad.clone() for name, p in model.named_parameters()}))
    (first, first_grads), (second, second_grads) = results
    assert not torch.equal(first[:, :cut], second[:, :cut])
    assert torch.equal(first[:, cut:], second[:, cut:])
    for name, grad in first_grads.items():
        assert torch.equal(grad, second_grads[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_document_is_what_it_is_alone(kind, small_config, randomized, two_documents):
    model = randomized(small_config(kind))
    tokens = torch.randint(0, 61, (2, 41))
    packed = model(tokens, two_documents(2, 41, 18))
    torch.testing.assert_close(packed[:, :18], model(tokens[:, :18]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed[:, 18:], model(tokens[:, 18:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_causal(kind, small_config, randomized):
    model = randomized(small_config(kind))
    tokens = torch.randint(0, 60, (1, 30))
    changed = tokens.clone()
    changed[:, 20:] += 1
    torch.testing.assert_close(model(tokens)[:, :20], model(changed)[:, :20], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_sensitive_parameters_are_used_in_fp32_under_autocast(kind, small_config, randomized, monkeypatch):
    """Casting A_log, D, dt_bias or a norm weight to bf16 anywhere would change the logits by bf16's rounding of these values."""
    from mamba_pretrain.models import mamba1, mamba2, modules

    seen = []

    def spy(module, name, positions, keywords):
        original = getattr(module, name)

        def wrapped(*args, **kwargs):
            seen.extend(args[i].dtype for i in positions)
            seen.extend(kwargs[k].dtype for k in keywords)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapped)

    spy(mamba1, "selective_scan", [2], ["D", "delta_bias"])
    spy(mamba2, "ssd_scan", [2], ["D", "dt_bias"])
    spy(modules, "rms_norm", [1], [])
    spy(modules, "gated_rms_norm", [2], [])
    model = randomized(small_config(kind))
    tokens = torch.randint(0, 61, (1, 20))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
    assert logits.dtype == torch.bfloat16, "projections run in bf16"
    assert seen
    assert set(seen) == {torch.float32}
    assert (logits.float() - model(tokens)).abs().max() < 0.1


def test_the_residual_stream_follows_its_setting(small_config, randomized):
    tokens = torch.randint(0, 61, (1, 12))
    for fp32, expected in ((True, torch.float32), (False, torch.bfloat16)):
        model = randomized(small_config("mamba2", residual_in_fp32=fp32))
        dtypes = []
        model.norm_f.register_forward_pre_hook(lambda module, args, out=dtypes: out.append(args[1].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            model(tokens)
        assert dtypes == [expected]


def test_state_and_boundaries_exclude_each_other(small_config, two_documents):
    model = LanguageModel(small_config("mamba2"))
    with pytest.raises(ValueError, match="state continues one document"):
        model(torch.zeros(1, 4, dtype=torch.int64), two_documents(1, 4, 2), state=model.new_state(1, 8, "cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_every_owner_fire(kind, small_config, two_documents):
    """Sharding engines gather parameters in module hooks: every module with parameters of its own is called, none read from outside."""
    model = LanguageModel(small_config(kind))
    init.initialize(model, 0)
    called = set()
    owners = [module for module in model.modules() if list(module.parameters(recurse=False))]
    for module in owners:
        module.register_forward_pre_hook(lambda module, args: called.add(module))
    tokens = torch.randint(0, 61, (1, 8))
    model(tokens, two_documents(1, 8, 3), tokens)
    assert called == set(owners)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(kind, small_config):
    """From the recipe's initialisation, a few dozen steps memorise a packed batch: no parameter is dead, no sign is wrong."""
    model = LanguageModel(small_config(kind))
    init.initialize(model, 0)
    tokens = torch.randint(0, 61, (2, 33), generator=torch.Generator().manual_seed(0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(40):
        loss = model(tokens[:, :-1], labels=tokens[:, 1:]) / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert abs(losses[0] - math.log(61)) < 0.5, "the start is close to uniform"
    assert losses[-1] < 0.3 * losses[0]
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
