"""A trained model, opened from a run folder: what evaluate, sample and export start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_tools.errors import UserError
from mamba_pretrain.checkpoint.reading import open_checkpoint
from mamba_pretrain.config import RunConfig, load_config
from mamba_pretrain.models.generation import load_model
from mamba_pretrain.models.language_model import LanguageModel


@dataclass
class Trained:
    """Config and fp32 weights (by our names) of one checkpoint of a run."""

    run_dir: Path
    config: RunConfig
    step: int
    weights: dict[str, Tensor]

    @property
    def tokenizer_dir(self) -> Path:
        """The tokenizer's files: the run folder's own copy, so that a run can be used without its data."""
        return self.run_dir / "tokenizer"

    def model(self, device: torch.device | str = "cpu") -> LanguageModel:
        """The model on ``device``, ready for inference."""
        return load_model(self.config.model, self.weights, device)


def open_trained(run_dir: Path, step: int | None = None) -> Trained:
    """The checkpoint of ``step`` (default: the last complete one) of a run folder. Raises UserError when there is none."""
    if not (run_dir / "config.yaml").is_file():
        raise UserError(
            f"{run_dir} is not a run folder: it holds no config.yaml; give the run_dir of a training run, for example runs/quickstart"
        )
    config = load_config(run_dir / "config.yaml")
    checkpoint = open_checkpoint(run_dir / "checkpoints", step)
    return Trained(run_dir, config, checkpoint.step, checkpoint.full_model())
