"""What autograd does between the forward and the backward operator of a scan: the same for every implementation.

A forward operator takes nine tensors (activations and parameters, some absent; the last says where documents are and has no gradient), an
initial state that may be absent, and options; it gives y, the final state, and what its backward operator starts from. The backward operator takes
the gradients of y and of the final state (which may be absent), the nine tensors, what was kept, and options; it gives a gradient for each of the
first eight tensors and for the initial state, without meaning where that is absent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TENSORS = 9


def register_gradients(forward: Any, backward: Any, forward_only: int = 0) -> None:
    """Makes ``forward`` differentiable by ``backward``. The first ``forward_only`` options are not handed on."""

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
        found = backward(dy, dfinal, *inputs, kept, *ctx.options[forward_only:])
        present = [*(t is not None for t in inputs[:-1]), ctx.has_initial]
        *of_inputs, dinitial = (g if there else None for g, there in zip(found, present, strict=True))
        return *of_inputs, None, dinitial, *(None for _ in ctx.options)

    forward.register_autograd(gradients, setup_context=setup_context)
