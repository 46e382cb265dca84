"""One step of a fused ``torch.optim.AdamW`` with clipping inside: the gradients' factor is applied by the kernel that reads them anyway.

On a GPU the kernel is our own (``cuda_adamw``), elsewhere torch's, which divides gradients as torch.amp.GradScaler has it done. Sharded parameters
are updated by their local parts: the update is element by element, and DTensor's dispatcher takes longer for the lists of all parameters than the
kernels for a model's shard.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from mamba_pretrain.optim import cuda_adamw


def takes_divisor(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``fused_step`` does what ``optimizer.step()`` does."""
    return type(optimizer) is torch.optim.AdamW and all(
        group["fused"] and not group["amsgrad"] and not group["maximize"] for group in optimizer.param_groups
    )


@torch.no_grad()
def fused_step(optimizer: torch.optim.Optimizer, divisor: Tensor) -> None:
    """Updates parameters and state of a fused ``torch.optim.AdamW`` with gradients divided by ``divisor`` (0-d fp32, on their device)."""
    for number, group in enumerate(optimizer.param_groups):
        lists: list[list[Any]] = [[] for _ in range(6)]  # parameters, gradients, both moments, none of the largest second moments, steps
        cast(Any, optimizer)._init_group(group, *lists)
        parameters, gradients, first, second, _, steps = map(local_parts, lists)
        if not parameters:
            continue
        ours = (parameters, gradients, first, second, steps)
        if (table := cuda_adamw.table_of(optimizer, number, ours)) is not None:
            torch._foreach_add_(steps, 1.0)
            cuda_adamw.step(table, ours, divisor, group)
        else:
            _torch_step(ours, divisor, group)


def _torch_step(lists: cuda_adamw.Lists, divisor: Tensor, group: dict[str, Any]) -> None:
    """torch's own kernels."""
    parameters, gradients, first, second, steps = lists
    beta1, beta2 = group["betas"]
    adamw(
        parameters,
        gradients,
        first,
        second,
        [],
        steps,
        fused=True,
        grad_scale=divisor,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    torch.autograd.graph.increment_version(parameters)  # which torch's kernels leave as they are


def local_parts(tensors: list[Any]) -> list[Tensor]:
    """What this process holds of each; inside ``no_grad``."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
