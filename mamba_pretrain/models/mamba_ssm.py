"""mamba_ssm's own checkpoint format (``config.json`` and ``pytorch_model.bin``), both ways; the format of the papers' public weights."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from data_tools.errors import UserError
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.hf import mamba_mixer
from mamba_pretrain.models.layout import Entry, same

_EPSILON = 1e-5  # fixed in mamba_ssm
_MLP_MULTIPLE = 128  # mamba_ssm rounds an MLP's width up to this
_LAYERS = {"Mamba1": "mamba1", "Mamba2": "mamba2"}
# Arguments of mamba_ssm's mixers: our keys.
_SSM_KEYS = {
    "d_state": "d_state",
    "d_conv": "d_conv",
    "expand": "expand",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_floor": "time_step_floor",
}
_SSM_KEYS_OF = {
    "mamba1": _SSM_KEYS | {"dt_rank": "dt_rank"},
    "mamba2": _SSM_KEYS | {"headdim": "headdim", "ngroups": "ngroups", "chunk_size": "chunk_size", "A_init_range": "A_init_range"},
}


def to_mamba_ssm(config: ModelConfig) -> dict[str, Any]:
    """Contents of mamba_ssm's config.json. Raises UserError for what its models cannot express."""
    reason = _unsupported(config)
    if reason is not None:
        raise UserError(f"mamba_ssm cannot express this model: {reason}; export to transformers' format or keep the run's own checkpoints")
    mixer = next(name for name in config.layer_mixers if name != "attention")
    ssm = {theirs: getattr(config, ours) for theirs, ours in _SSM_KEYS_OF[mixer].items()}
    if mixer == "mamba2" and config.time_step_limit != (0.0, None):
        ssm["dt_limit"] = config.dt_limit
    attention = [i for i, name in enumerate(config.layer_mixers) if name == "attention"]
    return {
        "d_model": config.d_model,
        "d_intermediate": config.d_intermediate,
        "n_layer": config.n_layer,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {"layer": {v: k for k, v in _LAYERS.items()}[mixer], **ssm},
        "attn_layer_idx": attention,
        "attn_cfg": _attention_arguments(config) if attention else {},
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": config.pad_vocab_size_multiple,
        "tie_embeddings": config.tie_word_embeddings,
    }


def _attention_arguments(config: ModelConfig) -> dict[str, Any]:
    return {
        "causal": True,
        "d_conv": 0,
        "head_dim": config.attention_headdim,
        "num_heads": config.n_head,
        "num_heads_kv": config.n_kv_head,
        "out_proj_bias": config.use_bias,
        "qkv_proj_bias": config.use_bias,
        "rotary_emb_dim": config.rotated_channels,
        "rotary_emb_base": config.rope_theta,
    }


def _unsupported(config: ModelConfig) -> str | None:
    mixers = set(config.layer_mixers)
    if {"mamba1", "mamba2"} <= mixers or mixers == {"attention"}:
        return "its layers are one kind of Mamba, with attention in some places"
    if config.bcdt_rms:
        return "it has no normalisation of B, C and dt (bcdt_rms)"
    if config.layer_norm_epsilon != _EPSILON:
        return f"its norms use an epsilon of {_EPSILON:g}, not {config.layer_norm_epsilon:g}"
    if config.d_intermediate % _MLP_MULTIPLE:
        return f"its MLPs have a width divisible by {_MLP_MULTIPLE}, not {config.d_intermediate}"
    return None


def from_mamba_ssm(theirs: dict[str, Any], source: str) -> ModelConfig:
    """Our config for mamba_ssm's config.json. Raises UserError for a setting that is not ours."""
    ssm = dict(theirs.get("ssm_cfg") or {})
    layer = ssm.pop("layer", "Mamba1")
    if layer not in _LAYERS:
        raise UserError(f"{source} holds layers of kind {layer!r}; importable are {', '.join(_LAYERS)}")
    if not theirs.get("rms_norm", True):
        raise UserError(f"{source} uses LayerNorm; only models with RMSNorm can be imported")
    mixer = _LAYERS[layer]
    keys = _SSM_KEYS_OF[mixer] | ({"dt_limit": "time_step_limit"} if mixer == "mamba2" else {})
    unknown = sorted(set(ssm) - set(keys) - {"use_fast_path", "use_mem_eff_path"})
    if unknown:
        raise UserError(f"{source}: ssm_cfg.{unknown[0]} has no counterpart here; such models cannot be imported")
    values: dict[str, Any] = {keys[name]: value for name, value in ssm.items() if name in keys}
    values |= {name: theirs[name] for name in ("d_model", "n_layer", "vocab_size")} | _attention_keys(theirs, mixer, source)
    values |= {
        "d_intermediate": theirs.get("d_intermediate", 0),
        "residual_in_fp32": theirs.get("residual_in_fp32", True),
        "pad_vocab_size_multiple": theirs.get("pad_vocab_size_multiple", 8),
        "tie_word_embeddings": theirs.get("tie_embeddings", True),
        "layer_norm_epsilon": _EPSILON,
    }
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: config.json describes no model of ours: {error.errors()[0]['msg']}") from error


def _attention_keys(theirs: dict[str, Any], mixer: str, source: str) -> dict[str, Any]:
    layers = set(theirs.get("attn_layer_idx") or [])
    if not layers:
        return {"mixer": mixer}
    attention = theirs["attn_cfg"]
    if attention.get("d_conv", 0) or attention.get("mlp_dim", 0) or attention.get("rotary_emb_interleaved", False):
        raise UserError(
            f"{source}: its attention layers have a convolution, an MLP or interleaved rotation; such models cannot be imported"
        )
    bias = (theirs.get("ssm_cfg") or {}).get("bias", False)
    if attention.get("qkv_proj_bias", True) != bias or attention.get("out_proj_bias", True) != bias:
        raise UserError(f"{source}: attention and Mamba layers differ in their biases; such models cannot be imported")
    return {
        "pattern": ["attention" if i in layers else mixer for i in range(theirs["n_layer"])],
        "n_head": attention["num_heads"],
        "n_kv_head": attention.get("num_heads_kv") or attention["num_heads"],
        "attention_headdim": attention.get("head_dim") or 0,
        "rotary_dim": attention.get("rotary_emb_dim", 0),
        "rope_theta": attention.get("rotary_emb_base", 10000.0),
    }


def table_for(config: ModelConfig) -> list[Entry]:
    """The table between our tensors and mamba_ssm's. It knows the vocabulary's padding, so padding rows stay."""
    table = [same("embedding.weight", "backbone.embedding.weight"), same("norm_f.weight", "backbone.norm_f.weight")]
    for i, mixer in enumerate(config.layer_mixers):
        ours, theirs = f"layers.{i}", f"backbone.layers.{i}"
        table.append(same(f"{ours}.norm.weight", f"{theirs}.norm.weight"))
        if mixer == "attention":
            table += _attention_entries(config, f"{ours}.mixer", f"{theirs}.mixer")
        else:
            table += mamba_mixer(config, mixer, f"{ours}.mixer", f"{theirs}.mixer")
        if config.d_intermediate:
            table.append(same(f"{ours}.mlp_norm.weight", f"{theirs}.norm2.weight"))
            table.append(_swapped_halves(f"{ours}.mlp.gate_up_proj.weight", f"{theirs}.mlp.fc1.weight"))
            table.append(same(f"{ours}.mlp.down_proj.weight", f"{theirs}.mlp.fc2.weight"))
    return table if config.tie_word_embeddings else [*table, same("lm_head.weight", "lm_head.weight")]


def _attention_entries(config: ModelConfig, ours: str, theirs: str) -> list[Entry]:
    kinds = ("weight", "bias") if config.use_bias else ("weight",)
    names = (("qkv_proj", "in_proj"), ("out_proj", "out_proj"))
    return [same(f"{ours}.{a}.{kind}", f"{theirs}.{b}.{kind}") for a, b in names for kind in kinds]


def _swapped_halves(ours: str, theirs: str) -> Entry:
    # We stack gate over up, mamba_ssm up over gate; swapping is its own inverse.
    return Entry(ours, (theirs,), lambda t: (t.roll(t.shape[0] // 2, 0),), lambda ts: ts[0].roll(ts[0].shape[0] // 2, 0))
