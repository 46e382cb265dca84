"""DeepSpeed ZeRO stages 1, 2 and 3 behind the engine contract.

Parameters stay fp32 and matmuls run in bf16 through DeepSpeed's ``torch_autocast``; ``bf16.enabled`` would cast everything, A_log included, with no
way out per parameter (DeepSpeed#7747). DeepSpeed does the communication and the partitioning; the optimizer, the schedule, the accumulation
and the scale of gradients are the same as in every other engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from data_tools.errors import UserError
from mamba_pretrain.models.init import initialize
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.optim.build import Build, set_learning_rate
from mamba_pretrain.parallel.engine import Engine, SkipIf, StepResult
from mamba_pretrain.parallel.portable import Reader, Segment, check_moments, check_shapes, pieces
from mamba_pretrain.parallel.recompute import recompute
from mamba_pretrain.parallel.zero_config import import_deepspeed, zero_config
from mamba_pretrain.parallel.zero_state import GroupPartitions, ParameterPartitions, ZeroState

if TYPE_CHECKING:
    from mamba_pretrain.data.batch import Batch

# AdamW's state of a partition.
MOMENTS = ("exp_avg", "exp_avg_sq")
COUNTER = "step"


class DeepSpeedEngine(Engine):
    """ZeRO through ``deepspeed.initialize``."""

    def prepare(self, model: LanguageModel, build_optimizer: Build, seed: int) -> None:
        """See ``Engine.prepare``. Under stage 3 no process ever holds more than one whole parameter beside its part."""
        deepspeed = import_deepspeed(self.topology.device.type)
        self.model = model
        self._stage = int(self.name.removeprefix("zero"))
        if self.topology.world_size % self.parallel.zero_hpz_partition_size:
            raise UserError(
                f"parallel.zero_hpz_partition_size {self.parallel.zero_hpz_partition_size} does not divide the {self.topology.world_size} processes; "
                "choose a divisor"
            )
        config = zero_config(self._stage, self.parallel, self.precision, model.n_parameters())
        self.lower_projections(model)
        recompute(model, self.parallel.activation_checkpointing)
        # Takes over the process group that exists; the backend only has to be named.
        backend = "nccl" if self.topology.device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        if self._stage == 3:
            initialize(model, seed, assign=_Partitioner(model, deepspeed, config, self.topology.device))
        else:
            model.to_empty(device=self.topology.device)
            initialize(model, seed)
        # ZeRO averages gradients over the processes. A loss multiplied by their number would make up for it, but change every rounding of a bf16
        # backward pass unless that is a power of two. So the next power of two it is, and what is too much leaves the fp32 gradients in ``step``.
        self._loss_scale = 1 << (self.topology.world_size - 1).bit_length()
        self._excess = self._loss_scale / self.topology.world_size
        self._named: list[tuple[str, nn.Parameter]] = list(model.named_parameters())
        self.optimizer = build_optimizer(self._named)
        if not isinstance(self.optimizer, torch.optim.AdamW):
            raise UserError(
                f"parallel.strategy={self.name} cuts weights into flat ranges, which only optim.name=adamw can update; use fsdp2"
            )
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config, dist_init_required=False)
        self._zero: Any = self._engine.optimizer
        self._state: ZeroState = GroupPartitions(self._zero) if self._stage < 3 else ParameterPartitions(self._zero, self.topology.rank)
        self._watch_norm()

    # -- steps

    def loss(self, batch: Batch, last: bool) -> Tensor:
        """See ``Engine.loss``."""
        self._engine.set_gradient_accumulation_boundary(last)
        tokens, boundaries, labels = self.inputs(batch)
        return self._engine(tokens, boundaries, labels)

    def backward(self, loss: Tensor, divisor: Tensor) -> None:
        """See ``Engine.backward``. ZeRO's gradients are ``_excess`` times too large until ``step``; nothing else scales them."""
        self._engine.backward(loss * (self._loss_scale / divisor), scale_wrt_gas=False)

    def step(self, lr: float, max_norm: float, skip_if: SkipIf | None = None) -> StepResult:
        """See ``Engine.step``. A norm that is not finite always skips the update: ZeRO treats it as an overflow."""
        set_learning_rate(self.optimizer, lr)
        self._zero.clip_grad = max_norm
        self._skip_if = skip_if
        self._norm = torch.full((), torch.inf, device=self.topology.device)
        self.await_copy()
        # ZeRO divides gradients by this in the one multiplication that clips them. Between steps it is 1, or ``backward`` would apply it to the loss.
        self._zero.loss_scale = self._excess
        self._engine.step()
        self._zero.loss_scale = 1.0
        return StepResult(self._norm, bool(self._zero.overflow))

    def _watch_norm(self) -> None:
        """Reads the global norm where ZeRO computes it, between communication and update, and asks ``skip_if`` there.

        ZeRO leaves an update out when the norm is invalid; a skipped step takes the same path, so no state of ZeRO's is touched from outside.
        """
        from deepspeed.runtime.utils import combine_grad_norm_groups

        if self._stage == 3:
            norm_groups: Callable[[], list[Tensor]] = self._zero._get_norm_groups

            def watched_groups() -> list[Tensor]:
                norm = self._judged(combine_grad_norm_groups(norm_groups()))
                return [norm]

            self._zero._get_norm_groups = watched_groups
        else:
            global_norm: Callable[[], Tensor] = self._zero.scaled_global_norm
            self._zero.scaled_global_norm = lambda: self._judged(global_norm())

    def _judged(self, norm: Tensor) -> Tensor:
        """``norm``, which is ``_excess`` times too large, or infinity in its place when the step is to be skipped."""
        self._norm = norm.detach() / self._excess
        skip = self._skip_if is not None and self._skip_if(self._norm)
        return torch.full_like(norm, torch.inf) if skip else norm

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """See ``Engine.evaluate``."""
        tokens, boundaries, labels = self.inputs(batch)
        self._engine.eval()
        loss = self._engine(tokens, boundaries, labels)
        self._engine.train()
        return loss

    # -- state

    def state(self) -> Iterator[Segment]:
        """See ``Engine.state``."""
        # A partition's state is empty before the first step; its counter is the same in all.
        state = self.optimizer.state.get(self._state.flats()[0], {})
        if state:
            self._state.link()
        for name, parameter in self._named:
            shape = self.model.parameter_shapes[name]
            offset, length = self._state.extent(parameter)
            for moment in [None, *(MOMENTS if state else ())] if length else []:
                full = f"model.{name}" if moment is None else f"optim.{name}.{moment}"
                yield Segment(full, shape, offset, self._state.get(parameter, moment))
            if state:
                yield from pieces(f"optim.{name}.{COUNTER}", state[COUNTER], self.topology.rank, self.topology.world_size)

    @torch.no_grad()
    def load(self, reader: Reader, weights_only: bool = False) -> None:
        """See ``Engine.load``."""
        check_shapes(reader, self.model.parameter_shapes)
        expected = {name: (*MOMENTS, COUNTER) for name, _ in self._named}
        moments = MOMENTS if not weights_only and check_moments(reader, expected) else ()
        if moments:
            self._create_moments(reader.read(f"optim.{self._named[0][0]}.{COUNTER}", 0, 1).reshape(()))
        for name, parameter in self._named:
            offset, length = self._state.extent(parameter)
            for moment in [None, *moments] if length else []:
                full = f"model.{name}" if moment is None else f"optim.{name}.{moment}"
                self._state.set(parameter, moment, reader.read(full, offset, length))
        self._state.publish()

    def _create_moments(self, counter: Tensor) -> None:
        """Gives every partition the state that torch's AdamW would create at its first step, with the checkpoint's counter."""
        for flat in self._state.flats():
            created = {moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS}
            self.optimizer.state[flat].update({COUNTER: counter.to(flat.device, copy=True), **created})
        self._state.link()

    def full_state_dict(self) -> dict[str, Tensor]:
        """See ``Engine.full_state_dict``; under stage 3 one parameter at a time is gathered."""
        from deepspeed.utils import safe_get_full_fp32_param

        weights: dict[str, Tensor] = {}
        for name, parameter in self._named:
            full = safe_get_full_fp32_param(parameter) if self._stage == 3 else parameter
            if self.topology.rank == 0:
                weights[name] = full.detach().cpu().view(self.model.parameter_shapes[name]).clone()
        return weights


class _Partitioner:
    """``assign`` of ``initialize`` for stage 3: replaces a parameter of the meta model by a real one and partitions it at once."""

    def __init__(self, model: LanguageModel, deepspeed: Any, config: dict[str, Any], device: torch.device) -> None:
        self._model = model
        self._device = device
        self._first: Any = None
        self._init = lambda module: deepspeed.zero.Init(module=module, config_dict_or_path=config)

    def __call__(self, name: str, parameter: nn.Parameter, full: Tensor) -> None:
        owner, _, attribute = name.rpartition(".")
        real = nn.Parameter(full.to(self._device))
        self._model.get_submodule(owner).register_parameter(attribute, real)
        if self._first is None:
            holder = nn.Module()
            holder.register_parameter(attribute, real)
            self._init(holder)
            self._first = real
        else:
            self._first.convert_to_zero_parameters(param_list=[real])
