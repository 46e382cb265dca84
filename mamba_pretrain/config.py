"""The whole run as one typed tree: composes the rooms' configs, reads YAML, applies ``key.path=value`` overrides."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_tools.errors import UserError
from mamba_pretrain.checkpoint.config import CheckpointConfig
from mamba_pretrain.data.config import DataConfig
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.monitor.config import MonitorConfig
from mamba_pretrain.ops.config import OpsConfig
from mamba_pretrain.optim.config import OptimConfig
from mamba_pretrain.parallel.config import ParallelConfig, PrecisionConfig
from mamba_pretrain.training.config import EvaluationConfig, TrainConfig


class RunConfig(BaseModel):
    """One run, from data to tracking. Every key below is described where it lives: ``mamba_pretrain/<room>/config.py``."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, description="name of the run, shown in reports and in W&B")
    run_dir: Path = Field(description="folder that will hold everything the run writes")
    seed: int = Field(1234, ge=0, description="seeds initialisation and data order")
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)
    ops: OpsConfig = Field(default_factory=OpsConfig)

    def to_yaml(self) -> str:
        """The resolved config as YAML, with every default written out; ``load_config`` reads it back to an equal object."""
        import yaml

        return yaml.safe_dump(self.model_dump(mode="json", by_alias=False), sort_keys=False, width=120)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Reads a YAML file, merges ``key.path=value`` overrides into it and validates the result.

    Raises UserError with one sentence for a missing file, broken YAML, an unknown key (naming the nearest known one) or a wrong value.
    """
    return parse_config(read_tree(path, overrides), str(path))


def read_tree(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """The YAML file with overrides merged and ``${...}`` resolved, as plain dicts and lists; not validated yet.

    ``data.path=FOLDER`` takes the place of the file's ``data.sources``: the short form is meant to be typed.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = Path(path)
    if not path.is_file():
        raise UserError(f"config {path} does not exist; the ready ones are under configs/, for example configs/quickstart.yaml")
    for item in overrides:
        if "=" not in item or item.startswith("-"):
            raise UserError(f"override {item!r} is not of the form key.path=value, for example train.steps=100")
    try:
        tree = OmegaConf.load(path)
        for item in overrides:
            key, value = item.split("=", 1)
            if key == "data.path" and (section := OmegaConf.select(tree, "data")):
                section.pop("sources", None)
            # Parsed by the same YAML loader as the file; update, unlike merge, also reaches into lists (data.sources.0.path).
            OmegaConf.update(tree, key, OmegaConf.from_dotlist([f"value={value}"]).value, merge=True, force_add=True)
        plain = OmegaConf.to_container(tree, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"config {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(plain, dict):
        raise UserError(f"config {path} is not a mapping of keys to values; compare it with configs/quickstart.yaml")
    return {str(key): value for key, value in plain.items()}


def parse_config(tree: dict[str, Any], source: str) -> RunConfig:
    """Validates a plain tree; UserError names the first wrong key, what was expected and, for a typo, the nearest key."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"config {source}: {explain(error, RunConfig)}") from error


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem of a validation error, in one sentence."""
    # An unknown key often causes a second complaint about the key it should have been: the typo is the one to tell.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _keys_beside(model, first["loc"])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
        mend = f"did you mean {near[0]}?" if near else f"known keys here: {', '.join(known)}"
        return f"unknown key {where}; {mend}"
    if first["type"] == "missing":
        return f"key {where} is missing"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where or 'the config'}: {message}" + (f" (got {first['input']!r})" if isinstance(first["input"], str | int | float) else "")


def _keys_beside(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The known keys of the (sub)model in which the last part of ``location`` stands."""
    current: type[BaseModel] = model
    for part in location[:-1]:
        field = current.model_fields.get(str(part))
        inner = _submodel(field.annotation) if field else None
        if inner is not None:
            current = inner
    return sorted(current.model_fields)


def _submodel(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside an annotation such as ``X``, ``X | None`` or ``list[X]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (found := _submodel(argument)) is not None:
            return found
    return None
