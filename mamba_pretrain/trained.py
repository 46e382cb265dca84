"""A trained model, opened from a run folder: what evaluate, sample and export start from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_tools.errors import UserError
from data_tools.looking import token_counts
from data_tools.manifest import Manifest
from mamba_pretrain.checkpoint.reading import open_checkpoint
from mamba_pretrain.config import RunConfig, load_config
from mamba_pretrain.data.batch import IGNORE
from mamba_pretrain.data.config import DataConfig, SourceConfig
from mamba_pretrain.data.loader import find_source, validation_batches, validation_names
from mamba_pretrain.models.boundaries import Boundaries
from mamba_pretrain.models.generation import load_model
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.training.evaluation import Evaluation, unigram_loss


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


@dataclass(frozen=True)
class Score:
    """Evaluation of one dataset; ``unigram`` is the loss of a unigram model of its training tokens, if asked for."""

    name: str
    loss: float
    perplexity: float
    bits_per_byte: float | None
    n_tokens: int
    unigram: float | None


def score_datasets(
    trained: Trained, dataset: Path | None, batch_size: int, max_samples: int | None, device: str, unigram: bool
) -> Iterator[Score]:
    """Evaluates on the validation split of ``dataset``, or of every dataset the run was trained on."""
    config = trained.config
    data = config.data
    if dataset is not None:
        data = DataConfig(sources=[SourceConfig(path=str(dataset))], sequence_length=data.sequence_length, packing=data.packing)
    names = validation_names(data)
    if not names:
        raise UserError("none of the datasets has a validation split; tokenize with --validation-fraction, or give another with --data")
    model = trained.model(device)
    for name in names:
        totals, targets = [0.0, 0.0], []
        for batch in validation_batches(data, name, 0, 1, batch_size, max_samples):
            boundaries = Boundaries(batch.seq_idx.to(device), batch.positions.to(device)) if data.isolate_documents else None
            with torch.no_grad():
                totals[0] += float(model(batch.tokens.to(device), boundaries, batch.labels.to(device)))
            totals[1] += batch.n_valid
            targets.append(batch.labels[batch.labels != IGNORE].numpy())
        result = Evaluation(totals[0] / max(1.0, totals[1]), int(totals[1]))
        folder = Path(find_source(data, name).path)
        base = unigram_loss(token_counts(folder, data.train_split), np.concatenate(targets)) if unigram else None
        bits = result.bits_per_byte(bytes_per_token(folder, data.validation_split))
        yield Score(name, result.loss, result.perplexity, bits, result.n_tokens, base)


def bytes_per_token(folder: Path, split: str) -> float | None:
    """UTF-8 bytes of text per token of a dataset's split; None if they were not counted."""
    found = Manifest.load(folder).splits.get(split)
    return found.text_bytes / found.tokens if found and found.tokens and found.text_bytes else None
