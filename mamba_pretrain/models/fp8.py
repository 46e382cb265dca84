"""Which projections of a model compute in FP8, and which in autocast's dtype."""

from __future__ import annotations

from torch import nn

from data_tools.errors import UserError
from mamba_pretrain.models.modules import PROJECTIONS, Projection, SplitProjection
from mamba_pretrain.ops.fp8 import ALIGNMENT, RECIPES

# Not Mamba-1's x_proj and dt_proj: they are narrow, and what they compute (B, C and step sizes) is delicate. Not the head either.
NAMES = ("in_proj", "out_proj", "qkv_proj", "gate_up_proj", "down_proj")


def use_fp8(model: nn.Module, scaling: str) -> list[str]:
    """Lets the large projections of ``model`` compute in FP8 (a key of ``RECIPES``); their names. Raises UserError for unfit widths."""
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, Projection | SplitProjection) or not _large(path):
            continue
        if module.in_features % ALIGNMENT or module.out_features % ALIGNMENT:
            raise UserError(
                f"precision.fp8={scaling} needs widths that are multiples of {ALIGNMENT}, and {path} maps {module.in_features} to "
                f"{module.out_features}; change the model's widths or set precision.fp8=off"
            )
        module.recipe = RECIPES[scaling]
        found.append(path)
    return found


def cast_projections(model: nn.Module, fp8: bool) -> list[nn.Linear]:
    """Projections whose weights autocast casts; ``fp8``: beside those that ``use_fp8`` takes."""
    return [module for path, module in model.named_modules() if isinstance(module, PROJECTIONS) and not (fp8 and _large(path))]


def _large(path: str) -> bool:
    return path.rpartition(".")[2] in NAMES
