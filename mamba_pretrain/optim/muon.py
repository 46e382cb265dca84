"""Muon for the 2-D projections, AdamW for everything else, as one optimizer with one state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mamba_pretrain.optim.config import OptimConfig
from mamba_pretrain.optim.groups import NamedParameters


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's own Muon (arXiv:2502.16982) on hidden 2-D weights; the rest stays with AdamW.

    Both inner optimizers share this object's ``param_groups`` and ``state``: engines, schedules and checkpoints see one optimizer.
    """

    def __init__(self, config: OptimConfig, decayed: NamedParameters, rest: NamedParameters) -> None:
        hidden = [p for name, p in decayed if p.dim() == 2 and not name.startswith(("embedding.", "lm_head."))]
        chosen = {id(p) for p in hidden}
        others = [p for _, p in decayed if id(p) not in chosen]
        self._muon = torch.optim.Muon(hidden, lr=config.muon_lr, weight_decay=config.weight_decay, momentum=config.muon_momentum)
        self._adamw = torch.optim.AdamW(
            [{"params": others, "weight_decay": config.weight_decay}, {"params": [p for _, p in rest], "weight_decay": 0.0}],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        for optimizer, scale in ((self._muon, config.muon_lr / config.lr), (self._adamw, 1.0)):
            for group in optimizer.param_groups:
                group.update(lr_scale=scale, muon=optimizer is self._muon)
        super().__init__([{"params": hidden + others + [p for _, p in rest]}], {})
        self.param_groups = self._muon.param_groups + self._adamw.param_groups

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates both halves; ``closure`` is evaluated once."""
        loss = closure() if closure is not None else None
        for optimizer, muon in ((self._muon, True), (self._adamw, False)):
            # Loading a state dict replaces these containers, so the halves are pointed at the current ones each time.
            optimizer.state = self.state
            optimizer.param_groups = [group for group in self.param_groups if group["muon"] == muon]
            optimizer.step()
        return loss
