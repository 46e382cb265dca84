"""What a run reads: datasets, their shares, and how documents become sequences."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class EvaluatedSource(BaseModel):
    """A dataset folder whose validation split is evaluated."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(
        min_length=1, description="folder written by `mamba-data tokenize`; a URL such as s3://bucket/folder is read through fsspec"
    )
    name: str = Field("", description="name in metrics and reports; empty: the folder's name")

    @model_validator(mode="after")
    def _name_it(self) -> EvaluatedSource:
        self.name = self.name or PurePosixPath(self.path.rstrip("/")).name or self.path
        return self


class SourceConfig(EvaluatedSource):
    """A dataset folder and its share of the blend."""

    weight: float = Field(1.0, gt=0.0, description="share of the training samples, relative to the other sources' weights")


class DataConfig(BaseModel):
    """Training and validation data. ``path: FOLDER`` is short for one source of weight 1."""

    model_config = ConfigDict(extra="forbid")

    sources: list[SourceConfig] = Field(min_length=1, description="datasets to blend; all must be made with the same tokenizer")
    sequence_length: int = Field(2048, ge=2, description="tokens per sequence")
    packing: Literal["concat", "best-fit"] = Field(
        "concat",
        description="concat: documents one after another, cut every sequence_length tokens. best-fit: documents stay whole where they fit, and "
        "what remains free is padding. Documents never see each other in either",
    )
    isolate_documents: bool = Field(
        True,
        description="keep state, convolution and attention inside documents; false lets them run on, as mamba_ssm's own Mamba-1 kernels require",
    )
    mask_cross_document: bool = Field(
        True, description="leave the target that would cross from one document into the next out of the loss (always so in best-fit)"
    )
    shuffle: bool = Field(True, description="a new random order in every epoch; false: the order of the dataset")
    train_split: str = Field("train", description="split to train on")
    validation_split: str = Field("validation", description="split to evaluate on")
    validation_sources: list[EvaluatedSource] = Field(
        default_factory=list, description="datasets to evaluate besides the sources' own validation splits"
    )
    read_ahead: int = Field(
        256, ge=1, description="sequences that are read as a group; the next group's bytes are asked of the disk before, to keep it busy"
    )
    workers: int = Field(
        1,
        ge=1,
        description="background threads that read and assemble batches; one is fastest on local disks, several fetch at once from object storage. "
        "The batches do not depend on it",
    )
    cache_dir: str | None = Field(
        None, description="where the small files of datasets behind URLs are kept; empty: ~/.cache/mamba-pretrain/datasets"
    )

    @model_validator(mode="before")
    @classmethod
    def _path_shortcut(cls, data: Any) -> Any:
        if isinstance(data, dict) and "path" in data:
            if data.get("sources"):
                raise ValueError("give sources or path, not both")
            data = {**{key: value for key, value in data.items() if key != "path"}, "sources": [{"path": data["path"]}]}
        return data

    @model_validator(mode="after")
    def _distinct_names(self) -> DataConfig:
        names = [source.name for source in self.evaluated_sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are named {name}; give each a name of its own")
        return self

    @property
    def evaluated_sources(self) -> list[EvaluatedSource]:
        """All datasets that may be evaluated: the blend's and the extra ones."""
        return [*self.sources, *self.validation_sources]
