"""DeepSpeed's JSON."""

from __future__ import annotations

import pytest
from torch import nn

from data_tools.errors import UserError
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.parallel.config import ParallelConfig, PrecisionConfig
from mamba_pretrain.parallel.zero_config import ELSEWHERE, merged, zero_config


def config(stage=2, compute="bf16", n_parameters=10**9, **parallel):
    return zero_config(stage, ParallelConfig(**parallel), PrecisionConfig(compute=compute), n_parameters)


def test_bf16_is_torch_autocast_and_never_bf16_enabled():
    made = config()
    assert made["torch_autocast"]["enabled"]
    assert not {"bf16", "fp16"} & made.keys()
    assert not config(compute="fp32")["torch_autocast"]["enabled"]


def test_gradients_are_summed_in_fp32_unless_asked_otherwise():
    assert config()["torch_autocast"]["lower_precision_safe_modules"] == []
    low = config(reduce_dtype="bf16")["torch_autocast"]["lower_precision_safe_modules"]
    assert "mamba_pretrain.models.modules.SplitProjection" in low


def test_every_projection_of_a_model_is_of_a_class_that_is_named():
    low = config(reduce_dtype="bf16")["torch_autocast"]["lower_precision_safe_modules"]
    settings = ModelConfig(
        vocab_size=50, d_model=16, pattern="mamba1, mamba2, attention", n_layer=3, n_head=2, headdim=8, d_state=4, d_intermediate=24
    )
    projections = [module for module in LanguageModel(settings).modules() if isinstance(module, nn.Linear)]
    assert len(projections) == 4 + 2 + 2 + 3 * 2
    # DeepSpeed compares classes themselves: a base class would not do.
    assert {f"{type(p).__module__}.{type(p).__qualname__}" for p in projections} == set(low)


def test_the_override_reaches_every_depth_and_leaves_the_rest():
    made = config(deepspeed={"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": True})
    assert made["zero_optimization"]["reduce_bucket_size"] == 7
    assert made["zero_optimization"]["stage"] == 2
    assert made["wall_clock_breakdown"]


@pytest.mark.parametrize(("n_parameters", "elements"), [(130_000_000, 130_000_000), (2_800_000_000, 500_000_000)])
def test_buckets_hold_no_more_than_the_model(n_parameters, elements):
    assert config(n_parameters=n_parameters)["zero_optimization"]["reduce_bucket_size"] == elements


def test_merged_leaves_its_arguments_alone():
    base = {"a": {"b": 1}}
    assert merged(base, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}
    assert base == {"a": {"b": 1}}


@pytest.mark.parametrize("key", ELSEWHERE)
def test_keys_that_are_decided_elsewhere_are_refused(key):
    with pytest.raises(UserError, match=f"parallel.deepspeed.{key} .* use "):
        config(deepspeed={key: {"enabled": True}})


def test_offload_and_hpz():
    assert config(cpu_offload=True)["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert config(3, zero_hpz_partition_size=4)["zero_optimization"]["zero_hpz_partition_size"] == 4
