"""What a language model is made of: one typed description for Mamba-1, Mamba-2, attention and mixtures of them."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MixerName = Literal["mamba1", "mamba2", "attention"]
MIXERS: tuple[str, ...] = get_args(MixerName)

# Hugging Face's names, accepted for ours; models/hf.py translates with the same table.
HF_NAMES: dict[str, str] = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "time_step_rank": "dt_rank",
    "head_dim": "headdim",
    "n_groups": "ngroups",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "mixer_rms_eps": "bcdt_rms_eps",
}


def parse_pattern(text: str) -> list[str]:
    """Layers of a pattern such as ``mamba2 x5, attention``: five Mamba-2 layers, then one of attention. Raises ValueError."""
    layers: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z]\w*)(?:\s*[x*]\s*(\d+))?\s*", part)
        if match is None or match[1] not in MIXERS or match[2] == "0":
            raise ValueError(
                f"pattern part {part.strip()!r} is not a mixer ({', '.join(MIXERS)}) with an optional count, as in 'mamba2 x5, attention'"
            )
        layers += [match[1]] * int(match[2] or 1)
    return layers


def _pattern_list(value: Any) -> Any:
    return parse_pattern(value) if isinstance(value, str) else value


def _replace_num_heads(data: dict[str, Any]) -> None:
    heads, width = data.pop("num_heads"), data.get("expand", 2) * data.get("d_model", 0)
    if not isinstance(heads, int) or heads < 1 or width % heads or data.get("headdim", width // heads) != width // heads:
        raise ValueError(f"num_heads {heads} does not fit: num_heads * headdim must be expand * d_model = {width}; give headdim alone")
    data["headdim"] = width // heads


class ModelConfig(BaseModel):
    """Shape, initialisation and numerics of a model. Where Hugging Face has another name for a key, that name is accepted too."""

    model_config = ConfigDict(extra="forbid")

    mixer: MixerName = Field("mamba2", description="mixer of every layer, unless `pattern` mixes them")
    pattern: Annotated[list[MixerName] | None, BeforeValidator(_pattern_list)] = Field(
        None, description="layers in order, repeated up to n_layer: 'mamba2 x5, attention' or a list; overrides `mixer`"
    )
    vocab_size: int = Field(ge=2, description="token ids are 0 .. vocab_size - 1")
    pad_vocab_size_multiple: int = Field(
        0, ge=0, description="embedding rows are padded to this multiple for the matmul's sake; 0: the papers' 8 (Mamba-1) or 16"
    )
    d_model: int = Field(ge=1, description="width of the residual stream")
    n_layer: int = Field(ge=1, description="blocks")
    d_intermediate: int = Field(0, ge=0, description="hidden width of the gated MLP behind every mixer; 0: no MLP, as in the Mamba papers")

    d_state: int = Field(0, ge=0, description="SSM state per channel; 0: the papers' 16 (Mamba-1) or 128 (Mamba-2)")
    d_conv: int = Field(4, ge=2, description="taps of the causal convolution")
    expand: int = Field(2, ge=1, description="d_inner = expand * d_model")
    dt_rank: int | Literal["auto"] = Field("auto", description="Mamba-1: rank of the step size's projection; auto: ceil(d_model / 16)")
    bcdt_rms: bool = Field(False, description="Mamba-1: RMS normalisation of B, C and dt without weights, as in Falcon-Mamba")
    bcdt_rms_eps: float = Field(1e-6, gt=0.0, description="epsilon of that normalisation")
    headdim: int = Field(64, ge=1, description="Mamba-2: channels per head")
    ngroups: int = Field(1, ge=1, description="Mamba-2: groups of heads that share B and C; also the groups of its gated norm")
    chunk_size: int = Field(256, ge=1, description="Mamba-2: chunk of the state-space-duality algorithm, in tokens")
    time_step_min: float = Field(1e-3, gt=0.0, description="smallest initial step size")
    time_step_max: float = Field(0.1, gt=0.0, description="largest initial step size")
    time_step_floor: float = Field(1e-4, gt=0.0, description="initial step sizes are at least this")
    time_step_limit: tuple[float, float | None] = Field(
        (0.0, None), description="Mamba-2: the step size is clamped to this range in every forward pass; null: no upper limit"
    )
    A_init_range: tuple[float, float] = Field((1.0, 16.0), description="Mamba-2: -A starts uniform in this range")

    n_head: int = Field(0, ge=0, description="attention: query heads; 0: d_model / 64")
    n_kv_head: int = Field(0, ge=0, description="attention: key and value heads; 0: as many as query heads")
    attention_headdim: int = Field(0, ge=0, description="attention: channels per head; 0: d_model / n_head")
    rope_theta: float = Field(10000.0, gt=0.0, description="attention: base of the rotary embedding's wavelengths")
    rotary_dim: int | None = Field(None, ge=0, description="attention: channels per head that are rotated; null: all, 0: none")

    layer_norm_epsilon: float = Field(1e-5, gt=0.0, description="epsilon of every RMSNorm")
    residual_in_fp32: bool = Field(True, description="keep the residual stream in fp32 under mixed precision")
    tie_word_embeddings: bool = Field(True, description="the output head shares the embedding's weight")
    use_bias: bool = Field(False, description="bias in the mixers' in and out projections")
    use_conv_bias: bool = Field(True, description="bias in the convolution")
    initializer_range: float = Field(0.02, gt=0.0, description="standard deviation of the initial embedding")
    rescale_prenorm_residual: bool = Field(
        True, description="divide initial output projections by sqrt(additions to the residual stream), as in GPT-2"
    )

    @model_validator(mode="before")
    @classmethod
    def _accept_hf_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for theirs, ours in HF_NAMES.items():
            if theirs in data and ours in data:
                raise ValueError(f"{theirs} and {ours} are two names of one setting; give only {ours}")
            if theirs in data:
                data[ours] = data.pop(theirs)
        if "num_heads" in data:  # Mamba-2's, which follows from the width: headdim = d_inner / num_heads
            _replace_num_heads(data)
        return data

    @model_validator(mode="after")
    def _complete(self) -> ModelConfig:
        self._fill_defaults()
        self._check_layers()
        if "mamba2" in self.layer_mixers:
            self._check_mamba2()
        if "attention" in self.layer_mixers:
            self._check_attention()
        if self.time_step_min > self.time_step_max:
            raise ValueError(f"time_step_min {self.time_step_min:g} is above time_step_max {self.time_step_max:g}; swap them")
        low, high = self.time_step_limit
        if high is not None and low >= high:
            raise ValueError(f"time_step_limit [{low:g}, {high:g}] is empty; the first number must be the smaller one")
        return self

    def _fill_defaults(self) -> None:
        mixers = set(self.layer_mixers)
        if self.d_state == 0:
            if {"mamba1", "mamba2"} <= mixers:
                raise ValueError("the pattern mixes mamba1 and mamba2, whose usual d_state differs; give d_state")
            self.d_state = 16 if "mamba1" in mixers else 128
        self.pad_vocab_size_multiple = self.pad_vocab_size_multiple or (16 if "mamba2" in mixers else 8)
        if math.isinf(self.time_step_limit[1] or 0.0):
            self.time_step_limit = (self.time_step_limit[0], None)
        if "attention" in mixers:
            self.n_head = self.n_head or max(1, self.d_model // (self.attention_headdim or 64))
            self.n_kv_head = self.n_kv_head or self.n_head
            if self.attention_headdim == 0 and self.d_model % self.n_head:
                raise ValueError(f"d_model {self.d_model} is not divisible by n_head {self.n_head}; change one or give attention_headdim")
            self.attention_headdim = self.attention_headdim or self.d_model // self.n_head

    def _check_layers(self) -> None:
        if self.pattern is not None and (not self.pattern or self.n_layer % len(self.pattern)):
            raise ValueError(
                f"n_layer {self.n_layer} is not a multiple of the pattern's {len(self.pattern)} layers; "
                "the pattern is repeated whole, so change n_layer or write all layers out"
            )

    def _check_mamba2(self) -> None:
        if self.d_inner % self.headdim:
            raise ValueError(
                f"headdim {self.headdim} does not divide d_inner = expand * d_model = {self.d_inner}; choose a divisor of {self.d_inner}"
            )
        if self.n_ssm_head % self.ngroups:
            raise ValueError(
                f"ngroups {self.ngroups} does not divide the {self.n_ssm_head} heads (d_inner {self.d_inner} / headdim {self.headdim})"
            )

    def _check_attention(self) -> None:
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}; each key head serves equally many queries")
        rotated = self.rotated_channels
        if rotated % 2 or rotated > self.attention_headdim:
            raise ValueError(
                f"rotary_dim {rotated} must be even and at most the head's {self.attention_headdim} channels, since channels turn in pairs"
            )

    @property
    def layer_mixers(self) -> list[MixerName]:
        """The mixer of each layer."""
        if self.pattern:
            return list(self.pattern) * (self.n_layer // len(self.pattern))
        return [self.mixer] * self.n_layer

    @property
    def d_inner(self) -> int:
        """Channels inside a Mamba mixer."""
        return self.expand * self.d_model

    @property
    def n_ssm_head(self) -> int:
        """Heads of a Mamba-2 mixer."""
        return self.d_inner // self.headdim

    @property
    def resolved_dt_rank(self) -> int:
        """Rank of Mamba-1's step size projection."""
        return math.ceil(self.d_model / 16) if self.dt_rank == "auto" else self.dt_rank

    @property
    def dt_limit(self) -> tuple[float, float]:
        """The clamp of Mamba-2's step size."""
        low, high = self.time_step_limit
        return low, math.inf if high is None else high

    @property
    def rotated_channels(self) -> int:
        """Channels of an attention head that the rotary embedding turns."""
        return self.attention_headdim if self.rotary_dim is None else self.rotary_dim

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to pad_vocab_size_multiple. Rows past vocab_size take part in nothing."""
        multiple = self.pad_vocab_size_multiple
        return -(-self.vocab_size // multiple) * multiple

    @property
    def n_residual(self) -> int:
        """Additions to the residual stream over the depth of the model."""
        return self.n_layer * (2 if self.d_intermediate else 1)
