"""``mamba-pretrain train``."""

from __future__ import annotations

from pathlib import Path

import typer


def train(
    config: Path = typer.Argument(help="YAML config, for example configs/quickstart.yaml"),
    overrides: list[str] = typer.Argument(None, metavar="[KEY.PATH=VALUE]...", help="Overrides, for example train.steps=100"),
    # The deepspeed launcher appends --local_rank=N to whatever it starts; ranks are read from the environment instead.
    local_rank: int = typer.Option(-1, "--local_rank", "--local-rank", hidden=True),
) -> None:
    """Train a model, or continue where the run folder's last checkpoint stands.

    One process: `mamba-pretrain train configs/mamba1/130m.yaml`. Several: `torchrun --nproc-per-node 8 -m mamba_pretrain train ...`,
    `deepspeed --module mamba_pretrain train ...`, or `srun python -m mamba_pretrain train ...`.
    """
    from mamba_pretrain.config import load_config
    from mamba_pretrain.run import run_training

    raise typer.Exit(run_training(load_config(config, overrides or [])))
