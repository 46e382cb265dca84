"""FSDP2 groups that keep the precision contract: projections are gathered in bf16, everything delicate in fp32."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from mamba_pretrain.models.block import Block
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.models.mixer import ParameterPolicy
from mamba_pretrain.parallel.config import ParallelConfig, PrecisionConfig


def shard(model: LanguageModel, mesh: DeviceMesh, parallel: ParallelConfig, precision: PrecisionConfig) -> None:
    """Applies ``fully_shard``: one group per block for its projections, and one root group for the rest.

    FSDP2 casts a whole group, so A_log, D, dt_bias and the norms (``fp32=True``) must not share one with projections. What is not a projection
    is small: the root group holds it in fp32, with the embedding, and stays gathered from the first block's forward to the last one's
    backward. A group casts exactly what autocast would, so that every engine computes the same. Gradients are summed in
    ``parallel.reduce_dtype``.
    """
    compute = torch.bfloat16 if precision.compute == "bf16" else None
    reduce = torch.bfloat16 if parallel.reduce_dtype == "bf16" else torch.float32
    pinned = torch.cuda.is_available()
    offload: OffloadPolicy = CPUOffloadPolicy(pin_memory=pinned) if parallel.cpu_offload else OffloadPolicy()
    low = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False)
    full = MixedPrecisionPolicy(cast_forward_inputs=False)
    policies = model.parameter_policies()
    for name, block in model.named_modules():
        if not isinstance(block, Block):
            continue
        group = [module for path, module in block.named_modules() if is_projection(f"{name}.{path}", module, policies)]
        fully_shard(group, mesh=mesh, mp_policy=low, reshard_after_forward=parallel.reshard_after_forward, offload_policy=offload)
    fully_shard(model, mesh=mesh, mp_policy=full, reshard_after_forward=False, offload_policy=offload)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sums, not means: the loss is divided once, by the number of tokens. To divide by the number of processes and multiply again would
            # round bf16 gradients anew wherever that is no power of two.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def is_projection(name: str, module: nn.Module, policies: Mapping[str, ParameterPolicy]) -> bool:
    """Whether ``module`` is a linear layer none of whose parameters must be used in fp32."""
    own = [policies[f"{name}.{attribute}"] for attribute, _ in module.named_parameters(recurse=False)]
    return isinstance(module, nn.Linear) and not any(policy.fp32 for policy in own)


def local_part(tensor: DTensor) -> tuple[Tensor, int]:
    """This process's part of a tensor sharded along dimension 0, and the element of the row-major tensor at which it begins."""
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    row = tensor.shape[1:].numel()
    return tensor.to_local(), (offsets[0] * row if offsets else 0)


def writes_copy(tensor: DTensor) -> bool:
    """Whether this process writes its part: under HSDP only one of the replicas does."""
    mesh = tensor.device_mesh
    return all(mesh.get_local_rank(dim) == 0 for dim, placement in enumerate(tensor.placements) if placement.is_replicate())
