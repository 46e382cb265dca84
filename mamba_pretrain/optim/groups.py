"""Which parameters decay: every parameter falls in exactly one group, decided by its owner's policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import nn


class Policy(Protocol):
    """The part of a parameter's policy that the optimizer needs."""

    @property
    def decay(self) -> bool:
        """Whether weight decay applies."""


NamedParameters = list[tuple[str, nn.Parameter]]


def split_by_decay(named: Iterable[tuple[str, nn.Parameter]], policies: Mapping[str, Policy]) -> tuple[NamedParameters, NamedParameters]:
    """Splits ``named`` into (decayed, not decayed).

    Torch optimizers ignore mamba_ssm's ``_no_weight_decay`` marks (state-spaces/mamba#798), so A_log and D decay in many trainers. Here the
    policy of the module that owns a parameter decides. Raises KeyError for a parameter without one.
    """
    decayed: NamedParameters = []
    rest: NamedParameters = []
    for name, parameter in named:
        if name not in policies:
            raise KeyError(f"parameter {name} has no policy: its module must classify it in parameter_policy()")
        (decayed if policies[name].decay else rest).append((name, parameter))
    return decayed, rest


def group_table(named: Iterable[tuple[str, int]], policies: Mapping[str, Policy]) -> str:
    """A table of (name, numel) pairs by group for the log; layer numbers are folded so that it stays short."""
    rows: dict[tuple[bool, str], list[int]] = {}
    for name, numel in named:
        folded = ".".join("*" if part.isdigit() else part for part in name.split("."))
        rows.setdefault((policies[name].decay, folded), []).append(numel)
    lines = []
    for (decay, name), sizes in sorted(rows.items(), reverse=True):
        lines.append(f"{'decay' if decay else 'no decay':9} {name:40} {len(sizes):5} x {sizes[0]:>12,}")
    return "\n".join(lines)
