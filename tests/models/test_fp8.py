"""Which projections compute in FP8."""

from __future__ import annotations

import pytest
import torch

from data_tools.errors import UserError
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.fp8 import use_fp8
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.models.modules import PROJECTIONS
from mamba_pretrain.ops.fp8 import RECIPES

MIXED = {"pattern": "mamba1, mamba2, attention", "n_layer": 3, "d_state": 8, "headdim": 4, "n_head": 2, "d_intermediate": 48}


def build(**keys):
    with torch.device("meta"):
        return LanguageModel(ModelConfig(vocab_size=301, d_model=32, **keys))


def recipes(model):
    return {path: getattr(module, "recipe", None) for path, module in model.named_modules() if isinstance(module, PROJECTIONS)}


def test_large_projections_do_and_delicate_ones_do_not():
    model = build(**MIXED)
    assert set(recipes(model).values()) == {None}
    names = use_fp8(model, "rowwise")
    found = {path: recipe for path, recipe in recipes(model).items() if recipe is not None}
    assert set(found.values()) == {RECIPES["rowwise"]}
    assert sorted(found) == sorted(names)
    assert {path.rpartition(".")[2] for path in set(recipes(model)) - set(names)} == {"x_proj", "dt_proj"}
    assert len(names) == 3 * 4


def test_other_models_are_left_alone():
    use_fp8(build(**MIXED), "tensorwise")
    assert set(recipes(build(**MIXED)).values()) == {None}


def test_widths_that_do_not_fit():
    with pytest.raises(UserError, match=r"multiples of 16, and layers.0.mixer.in_proj maps 32 to 148"):
        use_fp8(build(mixer="mamba2", n_layer=1, d_state=8, headdim=16), "rowwise")
