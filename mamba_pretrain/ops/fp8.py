"""A linear map whose three matmuls run in 8-bit floating point: result, gradient of the input, gradient of the weight.

FP8 tensor cores of Hopper multiply rows by rows: both operands must be contiguous along the dimension that is summed over. Every operand of
the backward pass is therefore a transpose, and is written as such when the tensor is cast: once for the forward pass as it lies, once turned
for the backward pass, which is also what autograd keeps, in half the bytes of bf16.

    y  (rows, out) = x  (rows, in)   W  (out, in)'
    dx (rows, in)  = dy (rows, out)  W' (in, out)'
    dW (out, in)   = dy'(out, rows)  x' (in, rows)'

Recipes are torchao's, and DeepSeek-V3's (arXiv:2412.19437, section 3.3) as ``blockwise``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_tools.errors import UserError
from mamba_pretrain.ops.common import without_autocast
from mamba_pretrain.ops.fp8_cast import Scaled, Scaling, cast_both, cast_columns, cast_rows, triton_missing
from mamba_pretrain.ops.operator import operator

ALIGNMENT = 16  # of every dimension of the matmuls: 16 bytes
ACTIVATION = torch.float8_e4m3fn


@dataclass(frozen=True)
class Recipe:
    """``gradient``: dtype of gradients. ``fast``: accumulation with fewer bits, in the forward pass and in the backward pass."""

    scaling: Scaling
    gradient: torch.dtype
    fast: tuple[bool, bool]


RECIPES: dict[str, Recipe] = {
    "tensorwise": Recipe("tensorwise", torch.float8_e5m2, (True, False)),
    # With a scale of its own for every row, gradients need digits rather than range.
    "rowwise": Recipe("rowwise", torch.float8_e4m3fn, (True, False)),
    # The matmul adds blocks up in fp32 anyway, as each has another scale.
    "blockwise": Recipe("blockwise", torch.float8_e4m3fn, (False, False)),
}
# What autograd keeps: the input's transpose with its scale, and the weight's, or the weight itself and None.
Saved = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def unsupported(scaling: Scaling, device: torch.device) -> str | None:
    """Why ``device`` cannot compute in FP8 in this way. A CPU emulates it."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    found = f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
    if capability < (8, 9):
        return f"it needs a GPU of compute capability 8.9 or newer, and {found}"
    if scaling == "blockwise" and capability != (9, 0):
        return f"matmuls with a scale per block exist for compute capability 9.0 only, and {found}; use rowwise"
    if scaling == "blockwise" and _cuda() < (12, 9):
        return f"matmuls with a scale per block need CUDA 12.9 or newer, and this PyTorch was built with {torch.version.cuda}; use rowwise"
    return "triton is not installed" if triton_missing() else None


def product(x: Tensor, weight: Tensor, dtype: torch.dtype, recipe: Recipe, needs: tuple[bool, bool]) -> tuple[Tensor, Saved]:
    """``x @ weight.T`` (rows, out) in ``dtype`` of x (rows, in), weight (out, in); what its gradients need.

    ``needs``: whether x and weight want gradients. A weight in ``dtype`` already is kept as it is: an engine frees and gathers its storage,
    and a copy of every layer's would undo that.
    """
    _check(x.shape[0], *weight.shape)
    needs_x, needs_weight = needs
    a, a_turned = cast_both([x], recipe.scaling, ACTIVATION) if needs_weight else (cast_rows([x], recipe.scaling, ACTIVATION), None)
    keeps_copy = needs_x and weight.dtype != dtype
    b, b_turned = cast_both([weight], recipe.scaling, ACTIVATION) if keeps_copy else (cast_rows([weight], recipe.scaling, ACTIVATION), None)
    of_x = (None, None) if a_turned is None else a_turned
    of_weight = b_turned or ((weight, None) if needs_x else (None, None))
    return matmul(a, b, dtype, recipe.fast[0]), (*of_x, *of_weight)


def gradients(
    parts: Sequence[Tensor | None], widths: Sequence[int], saved: Saved, dtypes: tuple[torch.dtype, torch.dtype], recipe: Recipe
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x (rows, in) and of the weight (out, in) in ``dtypes``, of ``parts`` (rows, width) of the result's gradient."""
    x, x_scale, weight, weight_scale = saved
    needs = (weight is not None, x is not None)
    present = next((part for part in parts if part is not None), None)
    if present is None or not any(needs):
        return None, None
    dy = [present.new_zeros(present.shape[0], width) if part is None else part for part, width in zip(parts, widths, strict=True)]
    if all(needs):
        rows, columns = cast_both(dy, recipe.scaling, recipe.gradient)
    else:
        rows = columns = (cast_rows if needs[0] else cast_columns)(dy, recipe.scaling, recipe.gradient)
    dx = dweight = None
    if weight is not None:
        turned = cast_columns([weight], recipe.scaling, ACTIVATION) if weight_scale is None else Scaled(weight, weight_scale)
        dx = matmul(rows, turned, dtypes[0], recipe.fast[1])
    if x is not None and x_scale is not None:
        dweight = matmul(columns, Scaled(x, x_scale), dtypes[1], recipe.fast[1])
    return dx, dweight


def _check(rows: int, n_out: int, n_in: int) -> None:
    if n_out % ALIGNMENT or n_in % ALIGNMENT:
        raise UserError(f"precision.fp8 needs projections whose widths are multiples of {ALIGNMENT}, not {n_in} to {n_out}; set it to off")
    if rows % ALIGNMENT:
        raise UserError(
            f"precision.fp8 needs micro-batches of a multiple of {ALIGNMENT} tokens, not {rows}; change data.sequence_length or "
            "train.micro_batch_size"
        )


def matmul(a: Scaled, b: Scaled, dtype: torch.dtype, fast: bool) -> Tensor:
    """``a @ b.T`` (n, m) in ``dtype``, of (n, k) and (m, k)."""
    if not a.values.is_cuda:
        return emulated_matmul(*a, *b, dtype)
    direct = dtype != torch.float32 or a.scale.numel() == 1 or _writes_fp32(a.values.device)
    y = torch._scaled_mm(a.values, b.values.t(), a.scale, b.scale.t(), out_dtype=dtype if direct else torch.bfloat16, use_fast_accum=fast)
    return y if direct else y.to(dtype)


@functools.cache
def _writes_fp32(device: torch.device) -> bool:
    """Whether rowwise results can be fp32: cuBLAS writes them so on Hopper, CUTLASS's kernels, which serve elsewhere, do not."""
    return torch.cuda.get_device_capability(device) == (9, 0) and _cuda() >= (12, 9)


def _cuda() -> tuple[int, ...]:
    return tuple(int(number) for number in (torch.version.cuda or "0").split("."))


@operator("fp8_matmul")
def emulated_matmul(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The product by an fp32 matmul of what the operands stand for: exact products, summed in fp32."""
    with without_autocast(a):
        return torch.mm(Scaled(a, a_scale).restored(), Scaled(b, b_scale).restored().t()).to(dtype)


@emulated_matmul.register_fake
def _(a, a_scale, b, b_scale, dtype):  # type: ignore[no-untyped-def]
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)
