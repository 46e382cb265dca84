"""What autograd does between the forward and the backward operator of a scan: the same for every implementation.

A forward operator takes nine tensors (activations and parameters, some absent; the last says where documents are and has no gradient), an
initial state that may be absent, and options; it gives y, the final state, and what its backward operator starts from. The backward operator takes
the gradients of y and of the final state (which may be absent), the nine tensors, what was kept, and options; it gives a gradient for each of the
first eight tensors and for the initial state, without meaning where that is absent.

In Mamba-2 the tensors x, B and C are parts of the convolution's output. Their gradients are ``beside`` each other: the backward operator gives one
tensor (b, l, channels of x, B and C) first, and autograd gets views of it, which ``split`` hands on without a copy. The views are made here because
an operator may not return tensors that share memory; and always, whatever the inputs are views of, so that what an operator returns depends on
shapes alone, as compilers expect.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mamba_pretrain.ops.split import parts

TENSORS = 9


def new_dxBC(x: Tensor, B: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for the gradients of x, B and C: (b, l, h p + 2 g n), in x's dtype if no other is given."""
    (batch, length, heads, headdim), (groups, states) = x.shape, B.shape[2:]
    return x.new_empty((batch, length, heads * headdim + 2 * groups * states), dtype=dtype)


def parts_of_xBC(xBC: Tensor, x: Tensor, B: Tensor) -> tuple[Tensor, ...]:
    """Its parts in the shapes of x, B and C, views."""
    of_head, of_group = x.shape[2:], B.shape[2:]
    return parts(xBC, (of_head, of_group, of_group))


def register_gradients(forward: Any, backward: Any, forward_only: int = 0, beside: bool = False, **direct: Any) -> None:
    """Makes ``forward`` differentiable by ``backward``. The first ``forward_only`` options are not handed on; ``beside``: see above; ``direct``:
    what ``backward`` takes besides where it is called directly."""

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        initial_state, *options = inputs[TENSORS:]
        ctx.save_for_backward(*inputs[:TENSORS], output[2])
        ctx.has_initial = initial_state is not None
        ctx.options = options
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    def gradients(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        *inputs, kept = ctx.saved_tensors
        dy = torch.zeros_like(inputs[0]) if dy is None else dy
        found = backward(dy, dfinal, *inputs, kept, *ctx.options[forward_only:], **direct)
        if beside:
            dxBC, ddt, dA, *others = found
            dx, dB, dC = parts_of_xBC(dxBC, inputs[0], inputs[3])
            found = dx, ddt, dA, dB, dC, *others
        present = [*(t is not None for t in inputs[:-1]), ctx.has_initial]
        *of_inputs, dinitial = (g if there else None for g, there in zip(found, present, strict=True))
        return *of_inputs, None, dinitial, *(None for _ in ctx.options)

    forward.register_autograd(gradients, setup_context=setup_context)
