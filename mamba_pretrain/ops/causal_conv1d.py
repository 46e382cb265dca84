"""Depthwise causal convolution over time: signature, reference, choice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from data_tools.errors import UserError
from mamba_pretrain.ops import registry
from mamba_pretrain.ops.common import document_numbers, row_blocks, silu_backward
from mamba_pretrain.ops.operator import operator


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``y_t = activation(bias + sum_k weight[:, k] x_{t-w+1+k})``, summed in fp32.

    Args:
        x: (b, l, d).  weight: (d, w).  bias: (d,).  activation: "silu" or None.
        seq_idx: (b, l) int32; taps never reach across a change of it.
        initial_state: (b, w - 1, d), the inputs before position 0; they belong to the document at position 0.

    Returns:
        y (b, l, d) in ``x.dtype``; with ``return_final_state`` also the inputs that the next token of the last document would reach,
        (b, w - 1, d) in ``x.dtype``, zero where they lie before that document.
    """
    if activation not in (None, "silu"):
        raise UserError(f"causal_conv1d has no activation {activation!r}; use 'silu' or None")
    return registry.call(
        "causal_conv1d",
        x=x,
        weight=weight,
        bias=bias,
        activation=activation,
        seq_idx=seq_idx,
        initial_state=initial_state,
        return_final_state=return_final_state,
    )


@registry.register("causal_conv1d", "reference", priority=0, slow_on_cuda=True)
def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Shifted multiply-adds in fp32, block by block of time; the backward pass recomputes what precedes the activation."""
    history = inputs_before(x, weight, initial_state)
    document = document_numbers(seq_idx)
    y = forward(x, weight, bias, document, history, activation == "silu")
    return (y, final_inputs(x, history, document)) if return_final_state else y


def inputs_before(x: Tensor, weight: Tensor, initial_state: Tensor | None) -> Tensor:
    """The inputs before position 0, (b, w - 1, d) in ``x.dtype``: zero unless a state is continued."""
    if initial_state is not None:
        return initial_state.to(x.dtype)
    return x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])


def final_inputs(x: Tensor, history: Tensor, document: Tensor | None) -> Tensor:
    """The inputs that the next token would reach, (b, w - 1, d), zero where they lie before its document."""
    taps = history.shape[1]
    final = torch.cat([history, x[:, max(0, x.shape[1] - taps) :]], dim=1)[:, -taps:] if taps else history
    if document is None:
        return final
    source = F.pad(document, (taps, 0))[:, document.shape[1] :]
    return final.masked_fill((source != document[:, -1:]).unsqueeze(-1), 0.0)


@dataclass
class _Window:
    """Some steps of one row with the inputs that their taps reach, fp32."""

    inputs: Tensor  # (w - 1 + steps, d)
    weight: Tensor  # (w, d)
    bias: Tensor | None
    document: Tensor | None  # (w - 1 + steps,)

    def __post_init__(self) -> None:
        self.reach = len(self.weight) - 1
        self.steps = len(self.inputs) - self.reach

    def inside(self, seen: Tensor, k: int) -> Tensor:
        """Zeroes the steps (of ``seen``, (steps, d)) at which tap k reaches into another document."""
        if self.document is None or k == self.reach:
            return seen
        return seen.masked_fill((self.document[k : k + self.steps] != self.document[self.reach :]).unsqueeze(1), 0.0)

    def tap(self, k: int) -> Tensor:
        """What tap k sees at every step: (steps, d)."""
        return self.inside(self.inputs[k : k + self.steps], k)

    def sums(self) -> Tensor:
        """The convolution before the activation: (steps, d)."""
        y = self.tap(0) * self.weight[0]
        for k in range(1, self.reach + 1):
            y.addcmul_(self.tap(k), self.weight[k])
        return y if self.bias is None else y.add_(self.bias)

    def backward(self, dsums: Tensor, dweight: Tensor) -> Tensor:
        """Gradient of ``inputs``; adds that of the weight (w, d) to ``dweight``."""
        dinputs = torch.zeros_like(self.inputs)
        for k in range(self.reach + 1):
            dweight[k] += (dsums * self.tap(k)).sum(0)
            dinputs[k : k + self.steps].addcmul_(self.inside(dsums, k), self.weight[k])
        return dinputs


def _windows(
    x: Tensor, weight: Tensor, bias: Tensor | None, document: Tensor | None, history: Tensor
) -> Iterator[tuple[int, slice, _Window]]:
    """(row, time, window) over the whole input."""
    reach = history.shape[1]
    taps, offset = weight.float().t().contiguous(), None if bias is None else bias.float()
    for row in range(x.shape[0]):
        for time in row_blocks(x.shape[1:], x.device):
            first = max(0, time.start - reach)
            missing = reach - (time.start - first)
            inputs = x[row, first : time.stop]
            if missing:
                inputs = torch.cat([history[row, reach - missing :], inputs])
            numbers = None if document is None else F.pad(document[row, first : time.stop], (missing, 0))
            yield row, time, _Window(inputs.float(), taps, offset, numbers)


# -- custom operators: opaque to torch.compile, with gradients ------------------------------------------------------------------------------


@operator("causal_conv1d_forward")
def forward(x: Tensor, weight: Tensor, bias: Tensor | None, document: Tensor | None, history: Tensor, silu: bool) -> Tensor:
    """y (b, l, d) from x, the inputs before it (``history``, (b, w - 1, d)) and document numbers (b, l)."""
    y = torch.empty_like(x)
    for row, time, window in _windows(x, weight, bias, document, history):
        sums = window.sums()
        y[row, time] = F.silu(sums, inplace=True) if silu else sums
    return y


@operator("causal_conv1d_backward")
def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, document: Tensor | None, history: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias (zero where there is none) and history."""
    reach = history.shape[1]
    dpadded = torch.zeros(x.shape[0], reach + x.shape[1], x.shape[2], device=x.device)
    dweight = torch.zeros(weight.shape[1], x.shape[2], device=x.device)
    dbias = torch.zeros(x.shape[2], device=x.device)
    for row, time, window in _windows(x, weight, bias, document, history):
        dsums = dy[row, time].float()
        if silu:
            dsums = silu_backward(dsums, window.sums())
        dbias += dsums.sum(0)
        dpadded[row, time.start : time.stop + reach] += window.backward(dsums, dweight)
    dx, dhistory = dpadded[:, reach:].to(x.dtype, copy=True), dpadded[:, :reach].to(history.dtype, copy=True)
    return dx, dweight.t().to(weight.dtype, copy=True), dbias.to(weight.dtype, copy=True), dhistory


@forward.register_fake
def _(x, weight, bias, document, history, silu):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@backward.register_fake
def _(dy, x, weight, bias, document, history, silu):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(x.shape[2]), torch.empty_like(history)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dy):  # type: ignore[no-untyped-def]
    x, weight, bias, document, history = ctx.saved_tensors
    dx, dweight, dbias, dhistory = backward(dy, x, weight, bias, document, history, ctx.silu)
    return dx, dweight, None if bias is None else dbias, None, dhistory, None


forward.register_autograd(_gradients, setup_context=_setup_context)
