"""What ``mamba-pretrain evaluate`` measures of a trained model: losses per dataset and by context, probes, tasks of the harness."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_tools.errors import UserError
from data_tools.looking import token_counts
from data_tools.tokenizers import load_tokenizer
from mamba_pretrain.data.batch import IGNORE, Batch
from mamba_pretrain.data.config import DataConfig, SourceConfig
from mamba_pretrain.data.loader import bytes_per_token, dataset_folder, validation_batches, validation_names
from mamba_pretrain.models.boundaries import Boundaries
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.trained import Trained
from mamba_pretrain.training.evaluation import Evaluation, unigram_loss
from mamba_pretrain.training.probes import ProbeResult, plain_vocabulary, run_probes, standard_probes
from mamba_pretrain.training.scoring import PositionLoss, score_by_position

HAYSTACK_SEQUENCES = 16  # of validation text, as what needles are hidden in


@dataclass(frozen=True)
class Score:
    """Evaluation of one dataset; ``unigram`` is the loss of a unigram model of its training tokens, if asked for."""

    name: str
    loss: float
    perplexity: float
    bits_per_byte: float | None
    n_tokens: int
    unigram: float | None


class Measures:
    """Measurements of one trained model; the model is loaded once, when the first of them needs it."""

    def __init__(
        self, trained: Trained, device: str, dataset: Path | None, length: int | None, batch_size: int, max_samples: int | None
    ) -> None:
        """``dataset``: measured in place of those the run was trained on. ``length``: tokens of a sequence, in place of the training's."""
        self._trained = trained
        self._device = device
        self._data = _measured_data(trained, dataset, length)
        self._batch_size = batch_size
        self._max_samples = max_samples

    @cached_property
    def _model(self) -> LanguageModel:
        return self._trained.model(self._device)

    @cached_property
    def _names(self) -> list[str]:
        """The datasets that have something to be measured on, all of this model's tokenizer. Raises UserError for none or another."""
        names = validation_names(self._data)
        if not names:
            raise UserError("none of the datasets has a validation split; tokenize with --validation-fraction, or give another with --data")
        for name in names:
            self._check_tokenizer(name)
        return names

    def _check_tokenizer(self, name: str) -> None:
        """Ids of another tokenizer would give a loss without meaning."""
        folder = dataset_folder(self._data, name)
        if self._trained.tokenizer_dir.is_dir() and load_tokenizer(self._trained.tokenizer_dir).hash != folder.manifest.tokenizer.hash:
            raise UserError(
                f"{name} was tokenized with another tokenizer than the model's; tokenize it with --tokenizer {self._trained.tokenizer_dir}"
            )

    def _batches(self, name: str) -> Iterator[Batch]:
        return validation_batches(self._data, name, 0, 1, self._batch_size, self._max_samples)

    def datasets(self, unigram: bool = False) -> Iterator[Score]:
        """Loss on each validation split, beside that of a unigram model if asked for."""
        for name in self._names:
            total, n_tokens, targets = 0.0, 0, []
            for batch in self._batches(name):
                total += self._loss(batch)
                n_tokens += batch.n_valid
                if unigram:
                    targets.append(batch.labels[batch.labels != IGNORE].numpy())
            result = Evaluation(total / max(1, n_tokens), n_tokens)
            base = unigram_loss(self._training_counts(name), np.concatenate(targets)) if unigram else None
            bits = result.bits_per_byte(bytes_per_token(self._data, name))
            yield Score(name, result.loss, result.perplexity, bits, result.n_tokens, base)

    @torch.no_grad()
    def _loss(self, batch: Batch) -> float:
        boundaries = Boundaries(batch.seq_idx.to(self._device), batch.positions.to(self._device)) if self._data.isolate_documents else None
        return float(self._model(batch.tokens.to(self._device), boundaries, batch.labels.to(self._device)))

    def _training_counts(self, name: str) -> np.ndarray:
        return token_counts(Path(dataset_folder(self._data, name).path), self._data.train_split)

    def by_position(self) -> Iterator[tuple[str, list[PositionLoss]]]:
        """Each dataset's loss by the number of tokens before a target."""
        for name in self._names:
            length, isolate = self._data.sequence_length, self._data.isolate_documents
            yield name, score_by_position(self._model, self._batches(name), length, self._device, isolate)

    def probes(self) -> list[ProbeResult]:
        """Induction, associative recall and needles, as long as the measured sequences; needles lie in text of the first dataset."""
        special = set()
        if self._trained.tokenizer_dir.is_dir():
            tokenizer = load_tokenizer(self._trained.tokenizer_dir)
            special = {i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None}
        vocabulary = plain_vocabulary(self._trained.config.model.vocab_size, special)
        probes = standard_probes(vocabulary, self._data.sequence_length, self._haystack())
        return run_probes(self._model, probes, self._device, self._batch_size)

    def _haystack(self) -> Tensor | None:
        """Tokens (m,) of validation text; None where there is less than a sequence of it, and random tokens serve."""
        batches = validation_batches(self._data, self._names[0], 0, 1, 1, HAYSTACK_SEQUENCES)
        tokens = torch.cat([batch.tokens[batch.labels != IGNORE] for batch in batches])
        return tokens if len(tokens) >= self._data.sequence_length else None

    def tasks(
        self, names: Sequence[str], folder: Path | None, num_fewshot: int | None, limit: int | None, max_length: int
    ) -> dict[str, dict[str, Any]]:
        """Metrics of tasks of lm-evaluation-harness; see ``harness.evaluate_tasks``."""
        from mamba_pretrain.training.harness import evaluate_tasks

        tokenizer = load_tokenizer(self._trained.tokenizer_dir)
        return evaluate_tasks(
            self._model, tokenizer, names, num_fewshot, limit, self._batch_size, max_length, device=self._device, task_folder=folder
        )


def _measured_data(trained: Trained, dataset: Path | None, length: int | None) -> DataConfig:
    data = trained.config.data
    if dataset is not None:
        kept = data.model_dump(include={"sequence_length", "packing", "isolate_documents", "mask_cross_document"})
        data = DataConfig(sources=[SourceConfig(path=str(dataset))], **kept)
    return data.model_copy(update={"sequence_length": length}) if length is not None else data
