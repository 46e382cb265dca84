"""Commands on a trained model: sample, export, import, checkpoints, convert."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from data_tools.errors import UserError

if TYPE_CHECKING:
    from mamba_pretrain.trained import Trained

RUN = typer.Argument(help="Run folder, for example runs/quickstart")
STEP = typer.Option(None, help="Checkpoint's step; default: the last complete one")
DEVICE = typer.Option("auto", help="auto, cpu or cuda")


class Format(str, Enum):
    """Formats of ``export``."""

    transformers = "transformers"
    mamba_ssm = "mamba_ssm"


class Dtype(str, Enum):
    """Number formats of exported weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def sample(
    run: Path = RUN,
    prompt: list[str] = typer.Option(..., "--prompt", help="Text to continue; may be given several times"),
    max_new_tokens: int = typer.Option(64, min=1, help="Tokens to generate"),
    temperature: float = typer.Option(1.0, help="0 is greedy"),
    top_k: int | None = typer.Option(None, help="Draw from the k likeliest tokens"),
    top_p: float | None = typer.Option(None, help="Draw from the smallest set of tokens that holds this probability"),
    seed: int = typer.Option(0, help="Seed of the draws"),
    step: int | None = STEP,
    device: str = DEVICE,
) -> None:
    """Continue texts with a run's model, by recurrent decoding in constant memory per token.

    Example: `mamba-pretrain sample runs/quickstart --prompt "def main(" --temperature 0.7`
    """
    from mamba_pretrain.models.generation import Sampling, continue_texts
    from mamba_pretrain.trained import open_trained

    sampling = Sampling(temperature, top_k, top_p, seed)
    trained = open_trained(run, step)
    texts = continue_texts(
        trained.config.model, trained.weights, trained.tokenizer_dir, prompt, max_new_tokens, sampling, device_name(device)
    )
    for start, text in zip(prompt, texts, strict=True):
        typer.echo(typer.style(start, bold=True) + text)


def export(
    run: Path = RUN,
    output: Path = typer.Argument(help="Folder to write"),
    format: Format = typer.Option(Format.transformers, help="transformers: AutoModelForCausalLM; mamba_ssm: MambaLMHeadModel"),
    dtype: Dtype = typer.Option(Dtype.float32, help="Number format of the weights"),
    max_shard_size: str = typer.Option("5GB", help="Largest weight file"),
    step: int | None = STEP,
    verify: bool = typer.Option(False, help="Load the result with transformers and compare logits"),
    overwrite: bool = typer.Option(False, help="Write into a folder that holds files"),
) -> None:
    """Write a run's model as a Hugging Face or mamba_ssm folder, with its tokenizer.

    Example: `mamba-pretrain export runs/quickstart exported --verify`
    """
    import torch

    from mamba_pretrain.models.pretrained import export_pretrained
    from mamba_pretrain.trained import open_trained

    if verify and (format is not Format.transformers or dtype is not Dtype.float32):
        raise UserError("--verify compares fp32 logits with transformers; use it with --format transformers --dtype float32")
    trained = open_trained(run, step)
    tokenizer = trained.tokenizer_dir if trained.tokenizer_dir.is_dir() else None
    config, torch_dtype = trained.config.model, getattr(torch, dtype.value)
    export_pretrained(trained.weights, config, tokenizer, output, format.value, torch_dtype, max_shard_size, overwrite)
    typer.echo(f"wrote {output} ({format.value}, {dtype.value}, step {trained.step})")
    if verify:
        _verify_export(trained, output)


def _verify_export(trained: Trained, output: Path) -> None:
    """Compares logits on fixed tokens; raises if they differ by more than 1e-4 relative."""
    import torch
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(trained.config.model.vocab_size, (2, 100), generator=generator)
    theirs = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(tokens).logits[..., : trained.config.model.vocab_size]
        ours = trained.model()(tokens)
    difference = float((ours - expected).norm() / expected.norm())
    if difference > 1e-4:
        raise RuntimeError(f"logits of {output} in transformers differ from the run's by {difference:.1e} relative; do not use this export")
    typer.echo(f"transformers gives the same logits (relative difference {difference:.1e})")


def import_(
    source: Path = typer.Argument(help="Folder of a transformers or mamba_ssm model"),
    output: Path = typer.Argument(help="Folder to write; `train.init_from` takes it"),
    tokenizer: Path | None = typer.Option(None, help="Tokenizer folder or file to keep with the weights"),
    overwrite: bool = typer.Option(False, help="Replace an earlier import in that folder"),
) -> None:
    """Turn public weights into a start for training.

    Example: `mamba-pretrain import mamba-130m-hf imported`, then `mamba-pretrain train CONFIG train.init_from=imported`
    """
    from mamba_pretrain.checkpoint.convert import write_weights
    from mamba_pretrain.models.pretrained import import_pretrained

    if output.exists() and any(output.iterdir()) and not overwrite:
        raise UserError(f"{output} already holds files; choose another folder or pass --overwrite")
    config, weights = import_pretrained(source)
    write_weights(output, weights, {"model": config.model_dump(mode="json")})
    typer.echo(f"wrote {output}; train with train.init_from={output} and this model section:")
    import yaml

    typer.echo(yaml.safe_dump({"model": config.model_dump(mode="json")}, sort_keys=False))


def checkpoints(run: Path = RUN) -> None:
    """List a run's checkpoints: step, tokens, size, complete or not, engine, world size.

    Example: `mamba-pretrain checkpoints runs/quickstart`
    """
    from rich.console import Console
    from rich.table import Table

    from mamba_pretrain.checkpoint.reading import list_checkpoints

    found = list_checkpoints(run / "checkpoints")
    if not found:
        raise UserError(f"{run} holds no checkpoints; check the folder, or train with checkpoint.every_steps set")
    table = Table("step", "tokens", "size", "complete", "engine", "world", "saved")
    for entry in found:
        table.add_row(*(str(value) for value in entry.columns()))
    Console().print(table)


def convert(
    run: Path = RUN,
    output: Path = typer.Argument(help="File to write: one safetensors file with the fp32 weights by our names"),
    step: int | None = STEP,
    overwrite: bool = typer.Option(False, help="Replace an existing file"),
) -> None:
    """Merge a sharded checkpoint's weights into one safetensors file.

    Example: `mamba-pretrain convert runs/quickstart weights.safetensors`
    """
    from safetensors.torch import save_file

    from mamba_pretrain.trained import open_trained

    if output.exists() and not overwrite:
        raise UserError(f"{output} exists; choose another name or pass --overwrite")
    trained = open_trained(run, step)
    save_file(trained.weights, output)
    typer.echo(f"wrote {output} ({len(trained.weights)} tensors, step {trained.step})")


def device_name(name: str) -> str:
    """What ``--device`` means on this machine. Raises UserError for a device that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is unknown; give auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch sees no GPU; use --device cpu, or see `mamba-pretrain doctor`")
    return name
