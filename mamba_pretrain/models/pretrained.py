"""Model folders for others: transformers' (safetensors) and mamba_ssm's formats, written and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from data_tools.errors import UserError
from mamba_pretrain.models import hf, mamba_ssm
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.models.layout import Entry, StateDict, translate_in, translate_out

Format = Literal["transformers", "mamba_ssm"]
_TIED = "lm_head.weight"


def export_pretrained(
    state: StateDict,
    config: ModelConfig,
    tokenizer_dir: Path | None,
    out: Path,
    format: Format = "transformers",
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Writes a model folder: config, weights in ``dtype`` and, with ``tokenizer_dir``, a tokenizer for ``AutoTokenizer``.

    ``state`` holds the weights by our names. ``transformers`` writes sharded safetensors that ``AutoModelForCausalLM`` loads, ``mamba_ssm``
    the ``pytorch_model.bin`` of ``MambaLMHeadModel.from_pretrained``. Raises UserError when the folder holds files (without ``overwrite``)
    or the format has no architecture for the model.
    """
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out} already holds files; choose another folder or pass --overwrite")
    tokens: dict[str, Any] = {}
    writers = {"transformers": _write_transformers, "mamba_ssm": _write_mamba_ssm}
    if format not in writers:
        raise UserError(f"unknown export format {format!r}; known are {', '.join(writers)}")
    prepared = _translated(state, config, format, dtype)
    out.mkdir(parents=True, exist_ok=True)
    if tokenizer_dir is not None:
        from data_tools.tokenizer_export import export_tokenizer

        tokens = export_tokenizer(tokenizer_dir, out)
    writers[format](prepared, config, tokens, out, max_shard_size)


def import_pretrained(folder: Path) -> tuple[ModelConfig, StateDict]:
    """Config and fp32 weights, by our names, of a model folder in either format. Raises UserError for what is missing or not ours."""
    described = _read_config(folder)
    if "model_type" in described:
        from transformers import AutoConfig

        config = hf.from_transformers(AutoConfig.from_pretrained(folder, local_files_only=True), str(folder))
        table = hf.table_for(config)
    elif "d_model" in described:
        config = mamba_ssm.from_mamba_ssm(described, str(folder))
        table = mamba_ssm.table_for(config)
    else:
        raise UserError(f"{folder / 'config.json'} is neither transformers' (model_type) nor mamba_ssm's (d_model); it cannot be imported")
    with torch.device("meta"):
        shapes = LanguageModel(config).parameter_shapes
    return config, translate_in(_usual_names(_read_weights(folder), config, table), table, shapes, str(folder))


def _translated(state: StateDict, config: ModelConfig, format: Format, dtype: torch.dtype) -> StateDict:
    table: list[Entry] = hf.table_for(config) if format == "transformers" else mamba_ssm.table_for(config)
    return {name: tensor.detach().to("cpu", dtype) for name, tensor in translate_out(state, table).items()}


def _write_transformers(state: StateDict, config: ModelConfig, tokens: dict[str, Any], out: Path, max_shard_size: str) -> None:
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoConfig, GenerationConfig

    keys = hf.to_transformers(config, tokens)
    theirs = AutoConfig.for_model(
        hf.family_of(config).model_type, **keys, dtype=str(next(iter(state.values())).dtype).removeprefix("torch.")
    )
    theirs.save_pretrained(out)
    GenerationConfig(**tokens).save_pretrained(out)
    save_torch_state_dict(state, out, max_shard_size=max_shard_size)


def _write_mamba_ssm(state: StateDict, config: ModelConfig, tokens: dict[str, Any], out: Path, max_shard_size: str) -> None:
    (out / "config.json").write_text(json.dumps(mamba_ssm.to_mamba_ssm(config), indent=2) + "\n")
    if config.tie_word_embeddings:  # its state dict lists a tied weight under both names
        state = state | {_TIED: state["backbone.embedding.weight"]}
    torch.save(state, out / "pytorch_model.bin")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no config.json; give the folder of a transformers or mamba_ssm model")
    try:
        described = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); the download may be incomplete") from error
    if not isinstance(described, dict):
        raise UserError(f"{path} is not a JSON object; it describes no model")
    return described


def _read_weights(folder: Path) -> StateDict:
    """All tensors of the folder: safetensors or torch files, sharded or not."""
    for single, index in (("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        if (folder / index).is_file():
            files = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
            missing = [name for name in files if not (folder / name).is_file()]
            if missing:
                raise UserError(f"{folder} lacks {missing[0]}, which its {index} names; the download may be incomplete")
            return {name: tensor for file in files for name, tensor in _read_file(folder / file).items()}
        if (folder / single).is_file():
            return _read_file(folder / single)
    raise UserError(f"{folder} holds neither model.safetensors nor pytorch_model.bin, whole or sharded")


def _read_file(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}); the download may be incomplete") from error


def _usual_names(state: StateDict, config: ModelConfig, table: list[Entry]) -> StateDict:
    """Without a tied head's second copy, and with transformers' current name of the embedding (older public weights have another)."""
    if config.tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if name != _TIED}
    old, new = "backbone.embedding.weight", "backbone.embeddings.weight"
    if old in state and any(new in entry.theirs for entry in table):
        state[new] = state.pop(old)
    return state
