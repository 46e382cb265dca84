"""One process, DDP, FSDP2 and HSDP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from data_tools.errors import UserError
from mamba_pretrain.models.fp8 import cast_projections
from mamba_pretrain.models.init import initialize
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.ops import weight_copy
from mamba_pretrain.optim.build import Build, set_learning_rate
from mamba_pretrain.optim.fused import fused_step, local_parts, takes_divisor
from mamba_pretrain.parallel.config import ParallelConfig, PrecisionConfig, graphs_unsupported
from mamba_pretrain.parallel.engine import Engine, SkipIf, StepResult
from mamba_pretrain.parallel.micro_batch_graphs import CudaRecorder, MicroBatchGraphs, Recorder
from mamba_pretrain.parallel.portable import Reader, Segment, check_moments, check_shapes, pieces
from mamba_pretrain.parallel.recompute import recompute
from mamba_pretrain.parallel.replicas import Replicas
from mamba_pretrain.parallel.sharding import local_part, shard, writes_copy
from mamba_pretrain.parallel.topology import close_before_leaving

if TYPE_CHECKING:
    from mamba_pretrain.data.batch import Batch


# Of a training pass's memory: one block's activations and a chunk of logits, where training keeps all blocks'.
EVALUATION_SHARE = 0.125
CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grads_with_norm_ adds to the norm


class TorchEngine(Engine):
    """Engines made of torch's own parts."""

    model: LanguageModel
    optimizer: torch.optim.Optimizer

    def prepare(self, model: LanguageModel, build_optimizer: Build, seed: int) -> None:
        """See ``Engine.prepare``."""
        self.model = model
        self.lower_projections(model)
        recompute(model, self.parallel.activation_checkpointing)
        mesh = self._mesh()
        if mesh is not None:
            shard(model, mesh, self.parallel, self.precision)
        offloaded = mesh is not None and self.parallel.cpu_offload
        model.to_empty(device="cpu" if offloaded else self.topology.device)
        initialize(model, seed, assign=_assign)
        # Kept from here on: while a forward pass has gathered a group, the module shows other tensors under these names.
        self._named: list[tuple[str, nn.Parameter]] = list(model.named_parameters())
        self._sharded = mesh is not None
        self._announced: bool | None = None  # what the sharded model was told last
        parameters = [parameter for _, parameter in self._named]
        self._shards = None if mesh is None else mesh.get_group("shard")  # the processes that hold one copy together
        self._replicas = Replicas(parameters, self.topology.device) if self.name == "ddp" and self.topology.world_size > 1 else None
        self.optimizer = build_optimizer(self._named)
        self._copied = cast_weights(model, self.precision) if keeps_copies(self.parallel, self.precision, self._sharded) else []
        for parameter in self._copied:
            weight_copy.keep(parameter)
        self._graphs: MicroBatchGraphs | None = None
        if self.parallel.cuda_graphs != "off" and graphs_unsupported(self.parallel, self.name, self.topology.device.type) is None:
            self.use_graphs(CudaRecorder(self.topology.device))

    def use_graphs(self, recorder: Recorder) -> None:
        """Replays micro-batches from now on, from what ``recorder`` records of them."""
        parameters = [parameter for _, parameter in self._named]
        alone = self.topology.world_size == 1
        self._graphs = MicroBatchGraphs(self._both_passes, parameters, self.topology.device, recorder, alone)
        close_before_leaving(self._graphs)

    def _mesh(self) -> DeviceMesh | None:
        kind, world = self.topology.device.type, self.topology.world_size
        if self.name == "hsdp":
            inner = self.parallel.hsdp_shard_size or self.topology.local_world_size
            if world % inner:
                raise UserError(f"parallel.hsdp_shard_size {inner} does not divide the {world} processes; choose a divisor")
            return init_device_mesh(kind, (world // inner, inner), mesh_dim_names=("replicate", "shard"))
        if self.name == "fsdp2" and world > 1:
            return init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
        return None

    def loss(self, batch: Batch, last: bool) -> Tensor:
        """See ``Engine.loss``."""
        # A recorded pass of sharded training sums its gradients, whichever it is, and launched ones beside it as well: same numbers, same memory.
        last = last or (self._graphs is not None and self._replicas is None)
        weight_copy.refresh(self._copied)
        if self._graphs is not None and (loss := self._graphs.loss(batch, last, launch=bool(self.watchers))) is not None:
            return loss
        self._announce(last)
        return self._launched_loss(batch)

    def _announce(self, last: bool) -> None:
        """Tells what shards or replicates the model whether gradients are summed over processes after the next backward pass."""
        if self._sharded and last != self._announced:  # each call below walks over all modules
            root, self._announced = cast(Any, self.model), last
            # Until the step's last micro-batch nothing is reduced, and what is gathered from forward to backward stays so in between.
            root.set_requires_gradient_sync(last)
            root.set_is_last_backward(last)
            root.set_reshard_after_backward(last or self.parallel.reshard_after_forward)
            root.set_reshard_after_backward(last, recurse=False)
        elif self._replicas is not None:
            self._replicas.expect(last)

    def _both_passes(self, batch: Batch, divisor: Tensor, last: bool) -> Tensor:
        """What a recording holds."""
        self._announce(last)
        loss = self._launched_loss(batch)
        self._launched_backward(loss, divisor)
        return loss.detach()

    def _launched_loss(self, batch: Batch) -> Tensor:
        tokens, boundaries, labels = self.inputs(batch)
        with self.autocast():
            return self.model(tokens, boundaries, labels)

    def backward(self, loss: Tensor, divisor: Tensor) -> None:
        """See ``Engine.backward``."""
        if self._graphs is None or not self._graphs.backward(loss, divisor):
            self._launched_backward(loss, divisor)

    def _launched_backward(self, loss: Tensor, divisor: Tensor) -> None:
        (loss / divisor).backward()
        if self._replicas is not None:
            self._replicas.finish()

    def step(self, lr: float, max_norm: float, skip_if: SkipIf | None = None) -> StepResult:
        """See ``Engine.step``."""
        norm = self._gradient_norm()
        skipped = skip_if is not None and skip_if(norm)
        if not skipped:
            set_learning_rate(self.optimizer, lr)
            if takes_divisor(self.optimizer):
                divisor = ((norm + CLIP_EPS) / max_norm).clamp_(min=1.0)
                self.await_copy()
                fused_step(self.optimizer, divisor)
            else:
                torch.nn.utils.clip_grads_with_norm_([p for _, p in self._named], max_norm, norm, foreach=True)
                self.await_copy()
                self.optimizer.step()
                # torch's fused optimizers don't raise versions, by which copies of weights are known to be out of date.
                torch.autograd.graph.increment_version(self._copied)
        self.optimizer.zero_grad(set_to_none=True)
        if self._graphs is not None:
            self._graphs.step_done()
        return StepResult(norm, skipped)

    @torch.no_grad()
    def _gradient_norm(self) -> Tensor:
        """The 2-norm of all gradients of all processes."""
        norm = torch.nn.utils.get_total_norm(local_parts([p.grad for _, p in self._named if p.grad is not None]), foreach=True)
        if self._shards is None:
            return norm
        # Every process norms its shards without DTensor's dispatcher, and the few numbers are summed; in fp64, since squares leave fp32's range.
        squares = norm.double().square_()
        torch.distributed.all_reduce(squares, group=self._shards)
        return squares.sqrt_().to(norm.dtype)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """See ``Engine.evaluate``."""
        if self._graphs is not None:
            self._graphs.make_room(EVALUATION_SHARE)
        tokens, boundaries, labels = self.inputs(batch)
        with self.autocast():
            loss = self.model(tokens, boundaries, labels)
        self._reshard()
        return loss

    def _reshard(self) -> None:
        """Without a backward pass groups may stay gathered: names would show the copies, and a later load would not reach these."""
        for module in self.model.modules() if self._sharded else ():
            if isinstance(module, FSDPModule):
                module.reshard()

    # -- state

    def state(self) -> Iterator[Segment]:
        """See ``Engine.state``."""
        for name, parameter in self._named:
            yield from self._segments(f"model.{name}", parameter)
            for moment, value in self.optimizer.state.get(parameter, {}).items():
                yield from self._segments(f"optim.{name}.{moment}", value)

    def _segments(self, name: str, tensor: Tensor) -> Iterator[Segment]:
        if isinstance(tensor, DTensor):
            part, offset = local_part(tensor)
            if writes_copy(tensor) and part.numel():
                yield Segment(name, tuple(tensor.shape), offset, part.detach().reshape(-1))
        else:
            yield from pieces(name, torch.as_tensor(tensor), self.topology.rank, self.topology.world_size)

    def load(self, reader: Reader, weights_only: bool = False) -> None:
        """See ``Engine.load``."""
        check_shapes(reader, self.model.parameter_shapes)
        self._reshard()
        if not weights_only:
            self._create_moments()
            if check_moments(reader, {name: self.optimizer.state[parameter].keys() for name, parameter in self._named}):
                for name, parameter in self._named:
                    for moment, value in self.optimizer.state[parameter].items():
                        _fill(reader, f"optim.{name}.{moment}", value)
            else:
                self.optimizer.state.clear()
        for name, parameter in self._named:
            _fill(reader, f"model.{name}", parameter)

    def _create_moments(self) -> None:
        """Lets the optimizer create its state in its own way: it does so in a first step, here one of size zero on gradients of zero."""
        for _, parameter in self._named:
            parameter.grad = torch.zeros_like(parameter)
        set_learning_rate(self.optimizer, 0.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def full_state_dict(self) -> dict[str, Tensor]:
        """See ``Engine.full_state_dict``."""
        self._reshard()
        weights: dict[str, Tensor] = {}
        for name, parameter in self._named:
            full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if self.topology.rank == 0:
                weights[name] = full.detach().cpu()
        return weights


def keeps_copies(parallel: ParallelConfig, precision: PrecisionConfig, sharded: bool) -> bool:
    """Whether weights keep their bf16 copies from step to step. Without recomputation every copy is there until the backward pass anyway; with it
    copies would be memory that it is meant to save. Sharded training gathers in bf16."""
    return precision.compute == "bf16" and not sharded and parallel.activation_checkpointing == "none"


def cast_weights(model: LanguageModel, precision: PrecisionConfig) -> list[nn.Parameter]:
    """Weights that matmuls use in autocast's dtype: of projections without FP8, and of the head."""
    modules = [*cast_projections(model, precision.fp8 != "off"), model.head]
    return [cast(nn.Parameter, module.weight) for module in modules]


def _assign(name: str, parameter: nn.Parameter, full: Tensor) -> None:
    """Initialisation's full value into a plain or sharded parameter."""
    with torch.no_grad():
        if isinstance(parameter.data, DTensor):
            part, offset = local_part(parameter.data)
            part.copy_(full.reshape(-1)[offset : offset + part.numel()].view(part.shape))
        else:
            parameter.copy_(full)


@torch.no_grad()
def _fill(reader: Reader, name: str, tensor: Tensor) -> None:
    """Reads the range that this process holds of a tensor."""
    part, offset = local_part(tensor) if isinstance(tensor, DTensor) else (tensor, 0)
    part.copy_(reader.read(name, offset, part.numel()).view(part.shape))
