"""Statistics of single layers (activations, gradients, step size, decay, B and C): they show where in the depth a run goes wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.models.mamba1 import Mamba1
from mamba_pretrain.models.mamba2 import Mamba2


class LayerStatistics:
    """A callback of the training loop: at every ``every_steps``-th step one ``layers`` row, with a list per statistic, one value a layer.

    Measured on the main rank's micro-batches through hooks that work on the device and are read one step later, so nothing waits. Statistics:
    ``activation_rms`` and ``gradient_rms`` of the mixer's output, ``dt_mean`` = mean softplus(dt + bias), ``A_mean`` = mean of -A, ``B_norm``
    and ``C_norm`` = mean over tokens of the norm. A layer without a state space has null in the latter four.
    """

    def __init__(self, model: LanguageModel, every_steps: int) -> None:
        self._model = model
        self._every = every_steps
        self._active = False
        self._pending: tuple[int, int, dict[str, list[list[Tensor]]]] | None = None
        self._found: dict[str, list[list[Tensor]]] = {}

    def on_start(self, run: Any) -> None:
        """Puts the hooks in place."""
        if not run.is_main:
            return
        for index, block in enumerate(self._model.blocks()):
            self._observe(index, block.mixer)
        self._arm(run, run.state.step + 1)

    def on_step(self, run: Any, record: Any) -> None:
        """Hands out the row of the step before; keeps what this step measured."""
        if not run.is_main:
            return
        self._emit(run)
        if self._active:
            self._pending = record.step, record.tokens, self._found
        self._arm(run, record.step + 1)

    def on_stop(self, run: Any, reason: str) -> None:
        """The last row."""
        self._emit(run)

    def on_row(self, run: Any, row: Any) -> None:
        """Rows do not matter here."""

    def on_save(self, run: Any) -> None:
        """Nor do checkpoints."""

    def _arm(self, run: Any, next_step: int) -> None:
        self._active = next_step % self._every == 0
        (run.engine.watchers.add if self._active else run.engine.watchers.discard)("layers")  # a replay runs no hooks
        self._found = {}

    def _emit(self, run: Any) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        step, tokens, found = pending
        stats = {key: [_mean(values) for values in layers] for key, layers in found.items()}
        run.tell("on_row", {"kind": "layers", "step": step, "tokens": tokens, "time": time.time(), "stats": stats})

    def _observe(self, index: int, mixer: nn.Module) -> None:
        mixer.register_forward_hook(self._hook(lambda module, output: self._outputs(index, module, output)))
        if isinstance(mixer, Mamba1):
            mixer.x_proj.register_forward_hook(self._hook(lambda module, output: self._mamba1_inputs(index, mixer, output[1])))
            mixer.dt_proj.register_forward_hook(self._hook(lambda module, output: self._step_size(index, mixer, output)))
        elif isinstance(mixer, Mamba2):
            mixer.in_proj.register_forward_hook(self._hook(lambda module, output: self._step_size(index, mixer, output[-1])))
            mixer.conv1d.register_forward_hook(self._hook(lambda module, output: self._mamba2_inputs(index, mixer, output)))

    def _hook(self, observe: Callable[[nn.Module, Any], None]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            # Validation runs without gradients between two steps: not what is asked for.
            if self._active and torch.is_grad_enabled():
                observe(module, output)

        return hook

    def _note(self, key: str, index: int, value: Tensor) -> None:
        layers = self._found.setdefault(key, [[] for _ in self._model.layers])
        layers[index].append(value.detach())

    def _outputs(self, index: int, mixer: nn.Module, output: Tensor) -> None:
        self._note("activation_rms", index, _rms(output))
        if output.requires_grad:
            output.register_hook(lambda gradient: self._note("gradient_rms", index, _rms(gradient)))
        if isinstance(mixer, Mamba1 | Mamba2):
            self._note("A_mean", index, mixer.A_log.detach().float().exp().mean())

    def _step_size(self, index: int, mixer: Mamba1 | Mamba2, output: Tensor) -> None:
        raw = output.detach()[..., -mixer.dt_bias.shape[0] :].float() + mixer.dt_bias.detach().float()
        self._note("dt_mean", index, F.softplus(raw).mean())

    def _mamba1_inputs(self, index: int, mixer: Mamba1, output: Tensor) -> None:
        n = mixer.config.d_state
        self._norms(index, output.detach()[..., -2 * n :].float().split(n, dim=-1))

    def _mamba2_inputs(self, index: int, mixer: Mamba2, output: Tensor) -> None:
        width = mixer.config.ngroups * mixer.config.d_state
        self._norms(index, output.detach()[..., -2 * width :].float().split(width, dim=-1))

    def _norms(self, index: int, pair: Any) -> None:
        for key, value in zip(("B_norm", "C_norm"), pair, strict=True):
            self._note(key, index, torch.linalg.vector_norm(value, dim=-1).mean())


def _rms(t: Tensor) -> Tensor:
    return t.detach().float().square().mean().sqrt()


def _mean(values: list[Tensor]) -> float | None:
    return float(torch.stack(values).mean()) if values else None
