"""Cross-entropy of a linear head without whole logits: signature, reference, choice.

Tokens go through in chunks. Where gradients are wanted, each chunk's gradients are computed while its logits are at hand (the idea of Liger
Kernel, arXiv:2410.10989): three matmuls in all, nothing recomputed, no logits kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mamba_pretrain.ops import cuda_softmax_kernels, registry, weight_copy
from mamba_pretrain.ops.common import triton_unsupported, without_autocast
from mamba_pretrain.ops.kernel_arguments import on_device_of
from mamba_pretrain.ops.matmul import add_matmul, matmul
from mamba_pretrain.ops.operator import operator
from mamba_pretrain.ops.triton_launch import launch

# Elements of a chunk's logits. On a CPU a cache-sized chunk is fastest. A GPU wants few large matmuls, since every chunk but the first reads and
# writes the weight's whole gradient; with the kernels an element takes 2 bytes, with PyTorch's operations about 8.
CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 28}
MIN_ROWS = 64


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100, valid_vocab: int | None = None
) -> Tensor:
    """Sum over labelled tokens of ``-log softmax(hidden @ weight.T)[label]``: fp32 scalar.

    Args:
        hidden: (..., d).  weight: (rows, d).  labels: (...) int64, ``ignore_index`` where there is no target.
        valid_vocab: rows past it are padding: no probability, zero gradient. None: all rows count.

    Matmuls run in autocast's dtype where it is on, else in ``hidden.dtype``; softmax statistics and the sum of ``weight``'s gradient are fp32.
    """
    return registry.call(
        "linear_cross_entropy", hidden=hidden, weight=weight, labels=labels, ignore_index=ignore_index, valid_vocab=valid_vocab
    )


@registry.register("linear_cross_entropy", "reference", priority=0)
def reference(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, valid_vocab: int | None) -> Tensor:
    """Chunked matmuls and softmax in PyTorch."""
    return chunked(hidden, weight, labels, ignore_index, valid_vocab, fused=False)


@registry.register("linear_cross_entropy", "triton", priority=30, unsupported=triton_unsupported)
def triton(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, valid_vocab: int | None) -> Tensor:
    """The same matmuls; a kernel turns a chunk's logits into its gradient in place, so that one low-precision copy is all there is."""
    return chunked(hidden, weight, labels, ignore_index, valid_vocab, fused=True)


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, valid_vocab: int | None, fused: bool) -> Tensor:
    """The op, through the custom operator with or without gradients. ``fused``: the Triton kernel between the matmuls."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    valid = valid_vocab or weight.shape[0]
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return loss_and_gradients(flat, weight, targets, ignore_index, valid, dtype, fused)[0]
    return loss_only(flat, weight, targets, ignore_index, valid, dtype, fused)


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Equal slices of the tokens, as few as the budget allows."""
    tokens = hidden.shape[0]
    budget = CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cpu"])
    n = -(-tokens // max(MIN_ROWS, budget // weight.shape[0]))
    rows = -(-tokens // max(1, n))
    return [slice(i, min(i + rows, tokens)) for i in range(0, tokens, max(1, rows))]


def _losses(logits: Tensor, targets: Tensor, ignore_index: int, valid: int, gradient: bool) -> tuple[Tensor, Tensor]:
    """Losses (rows,) of a chunk, 0 where ignored, and softmax - onehot (rows, vocabulary) in the logits' dtype if ``gradient``."""
    if valid < logits.shape[1]:
        logits[:, valid:] = float("-inf")
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    counts = (targets != ignore_index).unsqueeze(1)
    index = targets.unsqueeze(1).masked_fill(~counts, 0)
    losses = -log_p.gather(1, index).masked_fill(~counts, 0.0)
    if not gradient:
        return losses.squeeze(1), logits
    dlogits = log_p.exp_().scatter_add_(1, index, torch.full_like(losses, -1.0)).mul_(counts)
    return losses.squeeze(1), dlogits.to(logits.dtype)


def _fused_losses(logits: Tensor, targets: Tensor, ignore_index: int, valid: int, gradient: bool) -> tuple[Tensor, Tensor]:
    """The same in one kernel, in place: the one that keeps rows in shared memory where they fit, else Triton's, which reads them twice."""
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if cuda_softmax_kernels.serves(logits):
        with on_device_of(logits):
            cuda_softmax_kernels.softmax_gradient(logits, targets, losses, ignore_index, valid, gradient)
        return losses, logits
    from mamba_pretrain.ops import triton_cross_entropy_kernels

    block = min(8192, 1 << (columns - 1).bit_length())
    align = 8 if columns % 8 == logits.stride(0) % 8 == 0 else 1  # padded vocabularies' rows are whole vectors
    with on_device_of(logits):
        arguments = (logits, targets, losses, logits.stride(0), columns, valid, ignore_index, gradient, align, block)
        launch(triton_cross_entropy_kernels.softmax_gradient, (rows, 1, 1), *arguments, num_warps=block // 256 or 1)
    return losses, logits


@operator("linear_cross_entropy_loss")
def loss_only(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, valid: int, dtype: torch.dtype, fused: bool) -> Tensor:
    """The loss where no gradient is wanted. ``hidden`` (tokens, d), ``targets`` (tokens,)."""
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    losses_of = _fused_losses if fused else _losses
    with without_autocast(hidden):
        cast = weight_copy.cast(weight, dtype)
        for rows in _chunks(hidden, weight):
            total += losses_of(F.linear(hidden[rows].to(dtype), cast), targets[rows], ignore_index, valid, gradient=False)[0].sum()
    return total


@operator("linear_cross_entropy")
def loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, valid: int, dtype: torch.dtype, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients by ``hidden`` and by ``weight`` (fp32)."""
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    dhidden = torch.empty_like(hidden)
    dweight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    chunks = _chunks(hidden, weight)
    if not chunks:
        dweight.zero_()
    losses_of = _fused_losses if fused else _losses
    with without_autocast(hidden):
        cast = weight_copy.cast(weight, dtype)
        for rows in chunks:
            h = hidden[rows].to(dtype)
            losses, dlogits = losses_of(F.linear(h, cast), targets[rows], ignore_index, valid, gradient=True)
            total += losses.sum()
            if dhidden.dtype == dtype:
                torch.mm(dlogits, cast, out=dhidden[rows])
            else:
                dhidden[rows] = torch.mm(dlogits, cast)
            if rows.start == 0:
                matmul(dlogits.t(), h, torch.float32, out=dweight)
            else:
                add_matmul(dweight, dlogits.t(), h)
            del dlogits  # or it would still be there while the next chunk's logits come
    return total, dhidden, dweight


@loss_only.register_fake
def _(hidden, weight, targets, ignore_index, valid, dtype, fused):  # type: ignore[no-untyped-def]
    return hidden.new_empty((), dtype=torch.float32)


@loss_and_gradients.register_fake
def _(hidden, weight, targets, ignore_index, valid, dtype, fused):  # type: ignore[no-untyped-def]
    loss = hidden.new_empty((), dtype=torch.float32)
    return loss, torch.empty_like(hidden), torch.empty_like(weight, dtype=torch.float32)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output[1], output[2])
    ctx.weight_dtype = inputs[1].dtype


def _gradients(ctx, dloss, *_):  # type: ignore[no-untyped-def]
    # In place: all activations are still there, which leaves no room for a second gradient of the vocabulary. Another pass through this graph
    # is refused by autograd, which finds the saved tensors modified.
    dhidden, dweight = ctx.saved_tensors
    return dhidden.mul_(dloss.to(dhidden.dtype)), dweight.mul_(dloss).to(ctx.weight_dtype), None, None, None, None, None


loss_and_gradients.register_autograd(_gradients, setup_context=_setup_context)
