"""Which datasets are read, in which shares, and how they are cut into sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class SourceConfig(BaseModel):
    """One dataset of the blend."""

    model_config = ConfigDict(extra="forbid")

    path: Path = Field(description="folder written by `mamba-data tokenize`")
    weight: float = Field(1.0, gt=0.0, description="share of the samples, relative to the other sources")
    name: str = Field("", description="name in logs and checkpoints; empty: the folder's name")

    @model_validator(mode="after")
    def _name_it(self) -> SourceConfig:
        self.name = self.name or self.path.name
        return self


class DataConfig(BaseModel):
    """The training data. ``path: FOLDER`` is short for one source."""

    model_config = ConfigDict(extra="forbid")

    sources: list[SourceConfig] = Field(min_length=1, description="datasets and their weights")
    sequence_length: int = Field(2048, ge=2, description="tokens per sequence")
    packing: Literal["concat", "best-fit"] = Field(
        "concat", description="concat: one stream cut at every length, nothing wasted; best-fit: documents kept whole where they fit"
    )
    mask_cross_document: bool = Field(True, description="take no loss for predicting a document's first token from the one before")
    shuffle: bool = Field(True, description="visit samples in a new random order each epoch; false: in the order of the files")
    train_split: str = Field("train", description="split of the datasets to train on")
    validation_split: str = Field("validation", description="split to evaluate on; sources without it are not evaluated")

    @model_validator(mode="before")
    @classmethod
    def _accept_one_path(cls, data: Any) -> Any:
        if isinstance(data, dict) and "path" in data:
            if data.get("sources"):
                raise ValueError("give either path or sources, not both")
            data = {key: value for key, value in data.items() if key != "path"} | {"sources": [{"path": data["path"]}]}
        return data

    @model_validator(mode="after")
    def _names_differ(self) -> DataConfig:
        names = [source.name for source in self.sources]
        doubled = next((name for name in names if names.count(name) > 1), None)
        if doubled is not None:
            raise ValueError(f"two sources are called {doubled}; give them different names with the key name")
        return self
