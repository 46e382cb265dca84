"""Hugging Face transformers' formats: mamba, mamba2, falcon_mamba, and bamba for hybrids; configs and weights, both ways.

Differences of transformers that matter here (checked against 5.x):

- its models know no padding of the vocabulary, so padding rows are left out on export (else its generation could pick them);
- with ``rescale_prenorm_residual`` set, ``from_pretrained`` divides the *loaded* ``out_proj`` weights by sqrt(n_layer): it stays False in
  exports, since it only means something for a fresh initialisation;
- ``MambaMixer`` keeps dt_bias as ``dt_proj.bias``;
- ``Mamba2Config.time_step_rank`` and Mamba's ``intermediate_size`` are stored but follow from the rest or are unused;
- without CUDA kernels its Mamba-1 prefill with a cache starts from a zero state, whatever the cache holds;
- Bamba always rotates half of each attention head's channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from data_tools.errors import UserError
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.layout import Entry, conv_weight, same, stacked, vocabulary_rows

Attributes = dict[str, Any]

# Our config key: theirs, where both mean the same.
_COMMON = {
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
}
_MAMBA = _COMMON | {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "layer_norm_epsilon": "layer_norm_epsilon",
    "residual_in_fp32": "residual_in_fp32",
    "use_bias": "use_bias",
    "use_conv_bias": "use_conv_bias",
    "time_step_min": "time_step_min",
    "time_step_max": "time_step_max",
    "time_step_floor": "time_step_floor",
}
_MAMBA1 = _MAMBA | {"resolved_dt_rank": "time_step_rank"}
_FALCON = _MAMBA1 | {"bcdt_rms_eps": "mixer_rms_eps"}
_MAMBA2 = _MAMBA | {
    "headdim": "head_dim",
    "ngroups": "n_groups",
    "chunk_size": "chunk_size",
    "n_ssm_head": "num_heads",
    "dt_limit": "time_step_limit",
}
_BAMBA = _COMMON | {
    "layer_norm_epsilon": "rms_norm_eps",
    "d_intermediate": "intermediate_size",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "d_state": "mamba_d_state",
    "d_conv": "mamba_d_conv",
    "expand": "mamba_expand",
    "headdim": "mamba_d_head",
    "ngroups": "mamba_n_groups",
    "chunk_size": "mamba_chunk_size",
    "n_ssm_head": "mamba_n_heads",
    "use_conv_bias": "mamba_conv_bias",
    "use_bias": "mamba_proj_bias",
    "dt_limit": "time_step_limit",
}
# Derived from the rest of our config, so never set from theirs.
_DERIVED = {"n_ssm_head"}
_OUR_NAMES = {"resolved_dt_rank": "dt_rank", "dt_limit": "time_step_limit"}


@dataclass(frozen=True)
class Family:
    """One of transformers' architectures that can hold some of our models."""

    model_type: str
    architecture: str
    keys: dict[str, str]
    table: Callable[[ModelConfig], list[Entry]]
    extra: Callable[[ModelConfig], Attributes]  # their keys that no key of ours gives alone
    back: Callable[[Any], Attributes]  # our keys that no key of theirs gives alone, from their config
    unsupported: Callable[[ModelConfig], str | None]  # why a config cannot be expressed


def family_of(config: ModelConfig) -> Family:
    """The architecture that expresses ``config``. Raises UserError when there is none."""
    mixers = set(config.layer_mixers)
    if mixers == {"mamba1"}:
        family = FAMILIES["falcon_mamba" if config.bcdt_rms else "mamba"]
    elif mixers == {"mamba2"} and not config.d_intermediate:
        family = FAMILIES["mamba2"]
    else:
        family = FAMILIES["bamba"]
    reason = family.unsupported(config)
    if reason is not None:
        raise UserError(f"transformers has no architecture for this model: {family.model_type} {reason}; keep the run's own checkpoints")
    return family


def to_transformers(config: ModelConfig, tokens: Attributes | None = None) -> Attributes:
    """Keyword arguments for transformers' config class; ``tokens`` adds token ids such as eos_token_id.

    Both vocabulary sizes are recorded: ``vocab_size`` is the real one, ``padded_vocab_size`` that of training.
    """
    family = family_of(config)
    values = {theirs: getattr(config, ours) for ours, theirs in family.keys.items()}
    ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None} | (tokens or {})
    sizes = {
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.padded_vocab_size,
        "pad_vocab_size_multiple": config.pad_vocab_size_multiple,
    }
    return values | sizes | ids | family.extra(config) | {"architectures": [family.architecture]}


def from_transformers(theirs: Any, source: str) -> ModelConfig:
    """Our config for a transformers config object. Raises UserError for an architecture or a setting that is not ours."""
    family = FAMILIES.get(theirs.model_type)
    if family is None:
        raise UserError(f"{source} holds a {theirs.model_type!r} model; importable are {', '.join(FAMILIES)} and mamba_ssm's own format")
    if theirs.hidden_act != "silu":
        raise UserError(f"{source} uses the activation {theirs.hidden_act!r}; only silu models can be imported")
    values = {_OUR_NAMES.get(ours, ours): getattr(theirs, key) for ours, key in family.keys.items() if ours not in _DERIVED}
    values |= {"vocab_size": theirs.vocab_size, "pad_vocab_size_multiple": getattr(theirs, "pad_vocab_size_multiple", 0)}
    try:
        return ModelConfig.model_validate(values | family.back(theirs))
    except ValidationError as error:
        raise UserError(f"{source}: config.json describes no model of ours: {error.errors()[0]['msg']}") from error


def table_for(config: ModelConfig) -> list[Entry]:
    """The table between our tensors and transformers'."""
    return family_of(config).table(config)


def mamba_mixer(config: ModelConfig, mixer: str, ours: str, theirs: str) -> list[Entry]:
    """A Mamba mixer in transformers' and mamba_ssm's common layout."""
    names = ["A_log", "D", "in_proj.weight", "out_proj.weight"]
    names += ["x_proj.weight", "dt_proj.weight"] if mixer == "mamba1" else ["dt_bias", "norm.weight"]
    names += ["in_proj.bias", "out_proj.bias"] if config.use_bias else []
    names += ["conv1d.bias"] if config.use_conv_bias else []
    table = [same(f"{ours}.{name}", f"{theirs}.{name}") for name in names]
    if mixer == "mamba1":
        table.append(same(f"{ours}.dt_bias", f"{theirs}.dt_proj.bias"))
    return [*table, conv_weight(f"{ours}.conv1d.weight", f"{theirs}.conv1d.weight")]


def _mamba_table(config: ModelConfig) -> list[Entry]:
    table = [vocabulary_rows("embedding.weight", "backbone.embeddings.weight", config), same("norm_f.weight", "backbone.norm_f.weight")]
    for i, mixer in enumerate(config.layer_mixers):
        table.append(same(f"layers.{i}.norm.weight", f"backbone.layers.{i}.norm.weight"))
        table += mamba_mixer(config, mixer, f"layers.{i}.mixer", f"backbone.layers.{i}.mixer")
    return table + _head(config)


def _bamba_table(config: ModelConfig) -> list[Entry]:
    table = [
        vocabulary_rows("embedding.weight", "model.embed_tokens.weight", config),
        same("norm_f.weight", "model.final_layernorm.weight"),
    ]
    for i, mixer in enumerate(config.layer_mixers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        table.append(same(f"{ours}.norm.weight", f"{theirs}.input_layernorm.weight"))
        table.append(same(f"{ours}.mlp_norm.weight", f"{theirs}.pre_ff_layernorm.weight"))
        halves = tuple(f"{theirs}.feed_forward.{name}_proj.weight" for name in ("gate", "up"))
        table.append(stacked(f"{ours}.mlp.gate_up_proj.weight", halves, (config.d_intermediate,) * 2))
        table.append(same(f"{ours}.mlp.down_proj.weight", f"{theirs}.feed_forward.down_proj.weight"))
        if mixer == "attention":
            table += _bamba_attention(config, f"{ours}.mixer", f"{theirs}.self_attn")
        else:
            table += mamba_mixer(config, mixer, f"{ours}.mixer", f"{theirs}.mamba")
    return table + _head(config)


def _bamba_attention(config: ModelConfig, ours: str, theirs: str) -> list[Entry]:
    sizes = tuple(heads * config.attention_headdim for heads in (config.n_head, config.n_kv_head, config.n_kv_head))
    table = []
    for kind in ("weight", "bias") if config.use_bias else ("weight",):
        parts = tuple(f"{theirs}.{name}_proj.{kind}" for name in ("q", "k", "v"))
        table += [stacked(f"{ours}.qkv_proj.{kind}", parts, sizes), same(f"{ours}.out_proj.{kind}", f"{theirs}.o_proj.{kind}")]
    return table


def _head(config: ModelConfig) -> list[Entry]:
    return [] if config.tie_word_embeddings else [vocabulary_rows("lm_head.weight", "lm_head.weight", config)]


def _mamba_unsupported(config: ModelConfig) -> str | None:
    return "has no MLP (d_intermediate)" if config.d_intermediate else None


def _bamba_unsupported(config: ModelConfig) -> str | None:
    mixers = set(config.layer_mixers)
    if "mamba2" not in mixers or "mamba1" in mixers:
        return "mixes Mamba-2 and attention only"
    if not config.d_intermediate:
        return "has an MLP in every layer, and d_intermediate is 0"
    if "attention" not in mixers:
        return None
    if config.attention_headdim * config.n_head != config.d_model:
        return "has attention heads of d_model / n_head channels"
    if 2 * config.rotated_channels != config.attention_headdim:
        return "rotates half of each head's channels (rotary_dim = head / 2)"
    return None


def _bamba_extra(config: ModelConfig) -> Attributes:
    layers = [i for i, mixer in enumerate(config.layer_mixers) if mixer == "attention"]
    extra: Attributes = {"attn_layer_indices": layers, "attention_bias": config.use_bias}
    extra["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": 0.5}
    if not layers:  # their config insists on a valid attention shape even where no layer uses it
        extra |= {"num_attention_heads": config.n_ssm_head, "num_key_value_heads": config.n_ssm_head}
    return extra


def _bamba_back(theirs: Any) -> Attributes:
    layers = set(theirs.attn_layer_indices or [])
    if theirs.mlp_bias or theirs.attention_bias != theirs.mamba_proj_bias:
        raise UserError("this bamba model has biases in some projections only; such models cannot be imported")
    rope = theirs.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"this bamba model scales its rotary embedding ({rope['rope_type']}); such models cannot be imported")
    head = theirs.hidden_size // theirs.num_attention_heads
    back: Attributes = {"pattern": ["attention" if i in layers else "mamba2" for i in range(theirs.num_hidden_layers)]}
    return back | {"rope_theta": rope["rope_theta"], "rotary_dim": int(head * rope.get("partial_rotary_factor", 1.0))}


def _falcon_back(theirs: Any) -> Attributes:
    return {"mixer": "mamba1", "bcdt_rms": True}


def _mamba_extra(config: ModelConfig) -> Attributes:
    return {"rescale_prenorm_residual": False}


FAMILIES: dict[str, Family] = {
    "mamba": Family(
        "mamba", "MambaForCausalLM", _MAMBA1, _mamba_table, _mamba_extra, lambda theirs: {"mixer": "mamba1"}, _mamba_unsupported
    ),
    "falcon_mamba": Family("falcon_mamba", "FalconMambaForCausalLM", _FALCON, _mamba_table, _mamba_extra, _falcon_back, _mamba_unsupported),
    "mamba2": Family(
        "mamba2", "Mamba2ForCausalLM", _MAMBA2, _mamba_table, _mamba_extra, lambda theirs: {"mixer": "mamba2"}, _mamba_unsupported
    ),
    "bamba": Family("bamba", "BambaForCausalLM", _BAMBA, _bamba_table, _bamba_extra, _bamba_back, _bamba_unsupported),
}
