"""mamba_ssm's checkpoint format. Its models need CUDA, so their layout is checked by hand-written expectations from its sources."""

import json

import pytest
import torch

from data_tools.errors import UserError
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.mamba_ssm import from_mamba_ssm, to_mamba_ssm
from mamba_pretrain.models.pretrained import export_pretrained, import_pretrained

PUBLIC_130M = {
    "d_model": 768,
    "n_layer": 24,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}
PUBLIC_MAMBA2_ATTENTION = {
    "d_model": 2560,
    "d_intermediate": 0,
    "n_layer": 64,
    "vocab_size": 50277,
    "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [9, 18, 27, 36, 45, 56],
    "attn_cfg": {"causal": True, "d_conv": 4, "head_dim": 128, "num_heads": 30, "out_proj_bias": False, "qkv_proj_bias": False},
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mamba1", {}),
        ("mamba1", {"tie_word_embeddings": False, "use_bias": True, "dt_rank": 3}),
        ("mamba2", {"time_step_limit": [0.0, 0.5], "A_init_range": [2.0, 3.0]}),
        ("hybrid", {"pattern": "mamba2 x2, attention", "d_intermediate": 128}),
        ("hybrid", {"pattern": "mamba1, attention, mamba1", "d_intermediate": 128, "use_bias": True}),
    ],
)
def test_export_and_import_give_everything_back(kind, changes, small_config, randomized, tmp_path):
    model = randomized(small_config(kind, **changes))
    export_pretrained(model.state_dict(), model.config, None, tmp_path / "out", format="mamba_ssm")
    config, weights = import_pretrained(tmp_path / "out")
    attention = set() if "attention" in config.layer_mixers else {"n_head", "n_kv_head", "attention_headdim"}
    other = {"mamba1": {"headdim", "ngroups", "chunk_size"}, "mamba2": set()}[next(m for m in config.layer_mixers if m != "attention")]
    skip = {"pattern", "mixer"} | attention | other
    assert config.model_dump(exclude=skip) == model.config.model_dump(exclude=skip)
    assert config.layer_mixers == model.config.layer_mixers
    assert weights.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor), name


def test_the_layout_is_that_of_MambaLMHeadModel(small_config, randomized, tmp_path):
    model = randomized(small_config("hybrid", pattern="mamba1, attention, mamba1", d_intermediate=128))
    export_pretrained(model.state_dict(), model.config, None, tmp_path / "out", format="mamba_ssm")
    state = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    shapes = {name: tuple(t.shape) for name, t in state.items() if not name.startswith("backbone.layers.2")}
    layer, attention = "backbone.layers.0", "backbone.layers.1"
    assert shapes == {
        "backbone.embedding.weight": (64, 32),
        "lm_head.weight": (64, 32),
        "backbone.norm_f.weight": (32,),
        f"{layer}.norm.weight": (32,),
        f"{layer}.norm2.weight": (32,),
        f"{layer}.mixer.A_log": (64, 16),
        f"{layer}.mixer.D": (64,),
        f"{layer}.mixer.in_proj.weight": (128, 32),
        f"{layer}.mixer.conv1d.weight": (64, 1, 4),
        f"{layer}.mixer.conv1d.bias": (64,),
        f"{layer}.mixer.x_proj.weight": (34, 64),
        f"{layer}.mixer.dt_proj.weight": (64, 2),
        f"{layer}.mixer.dt_proj.bias": (64,),
        f"{layer}.mixer.out_proj.weight": (32, 64),
        f"{layer}.mlp.fc1.weight": (256, 32),
        f"{layer}.mlp.fc2.weight": (32, 128),
        f"{attention}.norm.weight": (32,),
        f"{attention}.norm2.weight": (32,),
        f"{attention}.mixer.in_proj.weight": (64, 32),
        f"{attention}.mixer.out_proj.weight": (32, 32),
        f"{attention}.mlp.fc1.weight": (256, 32),
        f"{attention}.mlp.fc2.weight": (32, 128),
    }
    # mamba_ssm: y, gate = fc1(x).chunk(2); ours: gate, up.
    ours = model.layers[0].mlp.gate_up_proj.weight
    assert torch.equal(state[f"{layer}.mlp.fc1.weight"][:128], ours[128:])
    assert torch.equal(state[f"{layer}.mlp.fc1.weight"][128:], ours[:128])
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["vocab_size"] == 61
    assert described["pad_vocab_size_multiple"] == 16
    assert described["attn_layer_idx"] == [1]


def test_public_configs():
    assert from_mamba_ssm(PUBLIC_130M, "public") == ModelConfig(mixer="mamba1", d_model=768, n_layer=24, vocab_size=50277)
    with pytest.raises(UserError, match="attention layers have a convolution"):
        from_mamba_ssm(PUBLIC_MAMBA2_ATTENTION, "public")
    plain = PUBLIC_MAMBA2_ATTENTION | {"attn_layer_idx": [], "attn_cfg": {}}
    assert from_mamba_ssm(plain, "public") == ModelConfig(mixer="mamba2", d_model=2560, n_layer=64, vocab_size=50277)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ssm_cfg": {"layer": "Mamba3"}}, "layers of kind 'Mamba3'"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "ssm_cfg.D_has_hdim has no counterpart"),
        ({"rms_norm": False}, "uses LayerNorm"),
        ({"d_model": 0}, "describes no model of ours"),
    ],
)
def test_foreign_settings_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        from_mamba_ssm(PUBLIC_130M | changes, "public")


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("falcon", {}, "bcdt_rms"),
        ("attention", {}, "one kind of Mamba"),
        ("hybrid", {}, "one kind of Mamba"),
        ("mamba2", {"d_intermediate": 96}, "width divisible by 128"),
        ("mamba1", {"layer_norm_epsilon": 1e-6}, "epsilon of 1e-05"),
    ],
)
def test_what_it_cannot_express_is_refused(kind, changes, words, small_config):
    with pytest.raises(UserError, match=words):
        to_mamba_ssm(small_config(kind, **changes))
