"""DeepSpeed ZeRO stages 1, 2 and 3 behind the engine contract.

Parameters stay fp32 and matmuls run in bf16 through DeepSpeed's ``torch_autocast``; ``bf16.enabled`` would cast everything, A_log included, with no
way out per parameter (DeepSpeed#7747). State goes in and out through ``deepspeed.utils.safe_get_full_*`` and ``safe_set_full_*``, one parameter at
a time, so nothing here depends on how a stage lays out its partitions.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_tools.errors import UserError
from mamba_pretrain.checkpoint.portable import Reader, Segment, check_shapes, pieces, whole
from mamba_pretrain.data.batch import Batch
from mamba_pretrain.models.init import initialize
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.optim.build import Build, set_learning_rate
from mamba_pretrain.parallel.engine import Engine, SkipIf, StepResult
from mamba_pretrain.parallel.recompute import recompute

FIRST_MAX_NORM = 1.0  # the real one arrives with every step; DeepSpeed only wants to know at the start that there is one


class DeepSpeedEngine(Engine):
    """ZeRO through ``deepspeed.initialize``."""

    def prepare(self, model: LanguageModel, build_optimizer: Build, seed: int) -> None:
        """See ``Engine.prepare``. Each process holds the whole fp32 model while it is initialised; ZeRO partitions it afterwards."""
        deepspeed = _import_deepspeed(self.topology.device.type)
        self.model = model
        recompute(model, self.parallel.activation_checkpointing)
        model.to_empty(device=self.topology.device)
        initialize(model, seed)
        self._named: list[tuple[str, nn.Parameter]] = list(model.named_parameters())
        self.optimizer = build_optimizer(self._named)
        self._stage = int(self.name.removeprefix("zero"))
        config = zero_config(
            self._stage, self.parallel.cpu_offload, self.parallel.zero_hpz_partition_size, self.precision.compute == "bf16"
        )
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=merged(config, self.parallel.deepspeed), dist_init_required=False
        )
        self._zero: Any = self._engine.optimizer
        self._update, self.optimizer.step = self.optimizer.step, self._gated_update  # type: ignore[method-assign]
        self._skip_if: SkipIf | None = None
        self._skipped: bool | None = None

    def loss(self, batch: Batch, last: bool) -> Tensor:
        """See ``Engine.loss``."""
        self._engine.set_gradient_accumulation_boundary(last)
        tokens, boundaries, labels = self.inputs(batch)
        return self._engine(tokens, boundaries, labels)

    def backward(self, loss: Tensor, divisor: Tensor) -> None:
        """See ``Engine.backward``. ZeRO averages gradients over the processes, which is undone here; nothing else scales them."""
        self._engine.backward(loss * (self.topology.world_size / divisor), scale_wrt_gas=False)

    def step(self, lr: float, max_norm: float, skip_if: SkipIf | None = None) -> StepResult:
        """See ``Engine.step``."""
        set_learning_rate(self.optimizer, lr)
        self._zero.clip_grad = max_norm
        self._skip_if, self._skipped = skip_if, None
        self._engine.step()
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self.topology.device)
        return StepResult(norm, bool(self._skipped) or bool(self._zero.overflow))

    def _gated_update(self, closure: Any = None) -> Any:
        """Stands before the torch optimizer's own update: ZeRO knows the global norm by then, and calls this once per group."""
        if self._skip_if is not None and self._skipped is None:
            self._skipped = self._skip_if(torch.as_tensor(self._zero._global_grad_norm))
        return None if self._skipped else self._update()

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
        """See ``Engine.state``. Every rank sees each full tensor for a moment and writes its share of it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        rank, world = self.topology.rank, self.topology.world_size
        flat = self._flat_state()
        for name, parameter in self._named:
            yield from pieces(f"model.{name}", safe_get_full_fp32_param(parameter), rank, world)
            for moment, value in flat.items():
                if value.dim() == 0:
                    yield from pieces(f"optim.{name}.{moment}", value, rank, world)
                else:
                    yield from pieces(f"optim.{name}.{moment}", safe_get_full_optimizer_state(parameter, moment), rank, world)

    def _flat_parameters(self) -> list[Tensor]:
        return self._zero.fp32_partitioned_groups_flat if self._stage == 3 else self._zero.single_partition_of_fp32_groups

    def _flat_state(self) -> dict[str, Tensor]:
        """The torch optimizer's state of one partition: its keys and counters hold for all; empty before the first step."""
        return dict(self.optimizer.state.get(self._flat_parameters()[0], {}))

    def load(self, reader: Reader, weights_only: bool = False) -> None:
        """See ``Engine.load``."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        shapes = reader.shapes()
        check_shapes(reader, self.model.parameter_shapes, str(getattr(reader, "source", "the folder")))
        first = self._named[0][0]
        moments = [name.removeprefix(f"optim.{first}.") for name in shapes if name.startswith(f"optim.{first}.")]
        if not weights_only and moments:
            self._create_state(reader, first, moments)
        for name, parameter in self._named:
            full = whole(reader, f"model.{name}").to(self.topology.device)
            self._set_weight(parameter, full)
            safe_set_full_fp32_param(parameter, full)
            for moment in moments if not weights_only else []:
                if shapes[f"optim.{name}.{moment}"] == shapes[f"model.{name}"]:
                    safe_set_full_optimizer_state(parameter, whole(reader, f"optim.{name}.{moment}").to(self.topology.device), moment)

    def _create_state(self, reader: Reader, name: str, moments: list[str]) -> None:
        """Gives every partition the state that torch's optimizer would create at its first step, with the checkpoint's counters."""
        for flat in self._flat_parameters():
            state = self.optimizer.state[flat]
            for moment in moments:
                full = f"optim.{name}.{moment}"
                counter = reader.shapes()[full] != reader.shapes()[f"model.{name}"]
                state[moment] = reader.read(full, 0, 1).reshape(()).to(flat.device) if counter else torch.zeros_like(flat)
        if self._stage != 3:
            # Lets the safe_set_* functions find the new state; the optimizer would do it after its first step.
            self._zero._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def _set_weight(self, parameter: nn.Parameter, full: Tensor) -> None:
        if self._stage != 3:
            parameter.copy_(full)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if self.topology.rank == 0:
                parameter.copy_(full)

    def full_state_dict(self) -> dict[str, Tensor]:
        """See ``Engine.full_state_dict``."""
        from deepspeed.utils import safe_get_full_fp32_param

        weights: dict[str, Tensor] = {}
        for name, parameter in self._named:
            full = safe_get_full_fp32_param(parameter)
            if self.topology.rank == 0:
                weights[name] = full.detach().cpu().view(self.model.parameter_shapes[name]).clone()
        return weights


def zero_config(stage: int, offload: bool, hpz: int, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's JSON for a stage."""
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": torch.cuda.is_available(), "contiguous_gradients": True}
    if stage == 3:
        zero |= {"stage3_gather_16bit_weights_on_model_save": False, **({"zero_hpz_partition_size": hpz} if hpz > 1 else {})}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # batches are ours; DeepSpeed only divides by these
        "gradient_accumulation_steps": 1,
        "gradient_clipping": FIRST_MAX_NORM,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
        "communication_data_type": "fp32",
        "steps_per_print": 10**9,
    }


def merged(config: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """``override`` over ``config``, key by key. Raises UserError for the one key that breaks the precision contract."""
    for key in ("bf16", "fp16"):
        if (override.get(key) or {}).get("enabled"):
            raise UserError(f"parallel.deepspeed.{key}.enabled stores A_log, D and dt_bias in 16 bits; use precision.compute=bf16 instead")
    result = dict(config)
    for key, value in override.items():
        result[key] = merged(result[key], value) if isinstance(value, dict) and isinstance(result.get(key), dict) else value
    return result


def _import_deepspeed(device_type: str) -> Any:
    """DeepSpeed, quiet, on the right accelerator, without the 45 s compilation of a CPU collective that gloo serves as well."""
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(f"parallel.strategy zero1-3 needs DeepSpeed, which cannot be imported ({error}); pip install deepspeed") from error
    if device_type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
