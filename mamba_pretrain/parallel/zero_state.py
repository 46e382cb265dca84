"""What a process holds of the fp32 weights and moments under ZeRO, as contiguous ranges of each parameter.

Nothing is gathered: a checkpoint copies the ranges where they lie. Stage 1 and 2 cut the concatenation of a parameter group into equal
ranges, stage 3 cuts every parameter by itself.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class ZeroState(Protocol):
    """Access to this process's ranges. ``moment`` None means the weights."""

    def flats(self) -> list[Tensor]:
        """The flat fp32 partitions that torch's optimizer updates; its state is keyed by them."""

    def link(self) -> None:
        """Finds the moments that the optimizer holds now."""

    def extent(self, parameter: nn.Parameter) -> tuple[int, int]:
        """(offset, length) of the range of ``parameter`` that this process owns; length 0 when it owns none."""

    def get(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        """The owned range, 1-D."""

    def set(self, parameter: nn.Parameter, moment: str | None, value: Tensor) -> None:
        """Overwrites the owned range with ``value`` (1-D)."""

    def publish(self) -> None:
        """Shows weights that were set to the model, on every process."""


class GroupPartitions:
    """Stages 1 and 2. Uses the mapping from parameters to partitions that DeepSpeed's universal checkpoints use."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    def flats(self) -> list[Tensor]:
        """See ``ZeroState``."""
        return self._zero.single_partition_of_fp32_groups

    def link(self) -> None:
        """See ``ZeroState``. DeepSpeed does this once, after its first group's first step, when the other groups have no moments yet."""
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def extent(self, parameter: Any) -> tuple[int, int]:
        """See ``ZeroState``."""
        if parameter._hp_mapping is None:
            return 0, 0
        address = parameter._hp_mapping.lp_fragment_address
        return address.start, address.numel

    def get(self, parameter: Any, moment: str | None) -> Tensor:
        """See ``ZeroState``."""
        return parameter._hp_mapping.get_hp_fragment(moment)

    def set(self, parameter: Any, moment: str | None, value: Tensor) -> None:
        """See ``ZeroState``."""
        parameter._hp_mapping.get_hp_fragment(moment).data.copy_(value)

    def publish(self) -> None:
        """See ``ZeroState``."""
        self._zero.update_lp_params()


class ParameterPartitions:
    """Stage 3, through DeepSpeed's public local functions."""

    def __init__(self, zero: Any, rank: int) -> None:
        self._zero = zero
        self._rank = rank

    def flats(self) -> list[Tensor]:
        """See ``ZeroState``."""
        return self._zero.fp32_partitioned_groups_flat

    def link(self) -> None:
        """See ``ZeroState``; the functions look moments up by themselves."""

    def extent(self, parameter: Any) -> tuple[int, int]:
        """See ``ZeroState``."""
        size = parameter.partition_numel()
        offset = min(self._rank * size, parameter.ds_numel)
        return offset, min(size, parameter.ds_numel - offset)

    def get(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        """See ``ZeroState``."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        padded = safe_get_local_fp32_param(parameter) if moment is None else safe_get_local_optimizer_state(parameter, moment)
        return padded[: self.extent(parameter)[1]]

    def set(self, parameter: Any, moment: str | None, value: Tensor) -> None:
        """See ``ZeroState``; the partition's padding is zero."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        padded = torch.zeros(parameter.ds_tensor.numel(), dtype=torch.float32)
        padded[: value.numel()] = value
        if moment is None:
            safe_set_local_fp32_param(parameter, padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, moment)

    def publish(self) -> None:
        """See ``ZeroState``. Small parameters that every process keeps whole are gathered anew."""
        zero = self._zero
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        kept = zero.persistent_parameters
        if kept:
            kept[0].partition(kept)
            kept[0].all_gather(kept)
        zero.invalidate_secondary_tensor()
