"""Operators: what PyTorch sees of a kernel, and the short way to it where nothing looks.

torch.compile, fake tensors, FLOP counters, selective checkpointing and every other dispatch mode know a kernel as a custom operator. The way
through PyTorch's dispatcher takes Python longer than the launch of the kernel, and a GPU whose kernels are short waits for it. So a call goes
that way only where something may look; else forward and backward pass call the same functions directly, in the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# An argument of these types is what it seems, and no tensor subclass that answers for itself.
_PLAIN = frozenset({Tensor, nn.Parameter, type(None), bool, int, float, str, torch.dtype})

Function = Callable[..., Any]


def observed(*arguments: Any) -> bool:
    """Whether a call must be an operator's: a compiler, a dispatch mode, a functorch transform or a tensor subclass may look, or there is
    nothing to compute with, on the meta device. ``arguments``: the call's, a tensor or a list of tensors first."""
    if type(arguments[0]) is list:
        arguments = (*arguments[0], *arguments[1:])
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or not _PLAIN.issuperset(map(type, arguments))
        or arguments[0].is_meta
        or torch.jit.is_tracing()
    )


class Operator:
    """The custom operator ``mamba_pretrain::NAME`` of a function on tensors; called like the function, by position.

    Named arguments, which the function has defaults for, are for direct calls: an operator's schema does not have them. A function that writes
    into arguments names them in ``mutates_args``, returns nothing and has no gradient.
    """

    def __init__(self, function: Function, name: str, **options: Any) -> None:
        functools.update_wrapper(self, function)
        self._name = f"mamba_pretrain::{name}"
        self._function = function
        self._definition = torch.library.custom_op(self._name, function, **{"mutates_args": (), **options})
        self._overload = getattr(torch.ops.mamba_pretrain, name).default
        self._differentiable: Function = self._overload  # which says that it has no gradient, should one be asked for

    def __call__(self, *arguments: Any, **direct: Any) -> Any:
        if observed(*arguments):
            return self._overload(*arguments)
        return self._differentiable(*arguments) if torch.is_grad_enabled() else self._function(*arguments, **direct)

    def register_fake(self, function: Function) -> Function:
        """Decorator: what gives results of the right shapes without computing them."""
        return self._definition.register_fake(function)

    def register_autograd(self, backward: Function, *, setup_context: Function) -> None:
        """Makes the operator differentiable: ``setup_context(ctx, inputs, output)`` keeps what ``backward(ctx, *gradients)`` needs."""
        self._definition.register_autograd(backward, setup_context=setup_context)
        function = self._function

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function(*inputs)
            setup_context(ctx, inputs, output)
            return output

        # The name is what a profile shows.
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        direct: Any = type(self._name, (torch.autograd.Function,), methods)
        # What Function.apply calls after it has asked for functorch, as `observed` has.
        self._differentiable = super(torch.autograd.Function, direct).apply  # type: ignore[misc]


def operator(name: str, **options: Any) -> Callable[[Function], Operator]:
    """Decorator: makes a function the operator ``mamba_pretrain::NAME``; ``options`` as of ``torch.library.custom_op``."""
    return lambda function: Operator(function, name, **options)
