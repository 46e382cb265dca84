import pytest
from pydantic import ValidationError

from mamba_pretrain.models.config import ModelConfig, parse_pattern


def config(**changes):
    return ModelConfig.model_validate({"vocab_size": 100, "d_model": 64, "n_layer": 6} | changes)


def test_defaults_are_the_papers():
    one, two = config(mixer="mamba1"), config(mixer="mamba2")
    assert (one.d_state, one.pad_vocab_size_multiple, one.resolved_dt_rank, one.padded_vocab_size) == (16, 8, 4, 104)
    assert (two.d_state, two.pad_vocab_size_multiple, two.n_ssm_head, two.padded_vocab_size) == (128, 16, 2, 112)


def test_a_resolved_config_reads_back_as_itself():
    for original in (config(mixer="mamba1"), config(pattern="mamba2 x2, attention", time_step_limit=[0.0, float("inf")])):
        assert ModelConfig.model_validate(original.model_dump(mode="json")) == original
        assert original.dt_limit == (0.0, float("inf"))


def test_patterns():
    assert parse_pattern("mamba2 x2, attention") == ["mamba2", "mamba2", "attention"]
    assert config(pattern="mamba2 x2,attention").layer_mixers == ["mamba2", "mamba2", "attention"] * 2
    assert config(pattern=["mamba1"]).layer_mixers == ["mamba1"] * 6


def test_hugging_face_names_are_accepted():
    theirs = {"hidden_size": 64, "num_hidden_layers": 6, "state_size": 32, "conv_kernel": 3, "n_groups": 2, "head_dim": 32, "num_heads": 4}
    read = ModelConfig.model_validate({"vocab_size": 100, "mixer": "mamba2"} | theirs)
    assert read == config(d_state=32, d_conv=3, ngroups=2, headdim=32)
    assert ModelConfig.model_validate({"vocab_size": 100, "d_model": 64, "n_layer": 6, "num_heads": 8}).headdim == 16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pattern": "mamba2 x5"}, "multiple of the pattern's 5 layers"),
        ({"pattern": "mamba3, attention"}, "'mamba3' is not a mixer"),
        ({"pattern": "mamba2 x0"}, "'mamba2 x0' is not a mixer"),
        ({"pattern": "mamba1, mamba2"}, "give d_state"),
        ({"headdim": 48}, "headdim 48 does not divide d_inner"),
        ({"headdim": 32, "ngroups": 3}, "ngroups 3 does not divide the 4 heads"),
        ({"mixer": "attention", "n_head": 5}, "d_model 64 is not divisible by n_head 5"),
        ({"mixer": "attention", "n_head": 4, "n_kv_head": 3}, "n_kv_head 3 does not divide n_head 4"),
        ({"mixer": "attention", "n_head": 4, "rotary_dim": 5}, "rotary_dim 5 must be even"),
        ({"mixer": "attention", "n_head": 4, "rotary_dim": 32}, "rotary_dim 32 must be even and at most"),
        ({"time_step_min": 1.0}, "time_step_min 1 is above time_step_max 0.1"),
        ({"time_step_limit": [0.2, 0.1]}, "time_step_limit \\[0.2, 0.1\\] is empty"),
        ({"hidden_size": 64}, "hidden_size and d_model are two names"),
        ({"num_heads": 3}, "num_heads 3 does not fit"),
        ({"d_sate": 16}, "Extra inputs"),
    ],
)
def test_wrong_settings_are_named(changes, words):
    with pytest.raises(ValidationError, match=words):
        config(**changes)
