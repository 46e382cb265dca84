"""``mamba-pretrain evaluate``: losses, probes and tasks of a trained model, as lines or as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from data_tools.errors import UserError
from mamba_pretrain.cli.model import DEVICE, RUN, STEP, device_name

if TYPE_CHECKING:
    from mamba_pretrain.measures import Score
    from mamba_pretrain.training.probes import ProbeResult
    from mamba_pretrain.training.scoring import PositionLoss


def evaluate(
    run: Path = RUN,
    data: Path | None = typer.Option(None, help="Dataset folder; default: those the run was trained on"),
    step: int | None = STEP,
    length: int | None = typer.Option(None, min=16, help="Tokens per sequence; default: as in training. A Mamba can be asked for more"),
    batch_size: int = typer.Option(8, min=1, help="Sequences at once"),
    max_samples: int | None = typer.Option(None, min=1, help="Sequences per dataset; default: the whole validation split"),
    datasets: bool = typer.Option(True, help="Measure the loss per dataset"),
    unigram: bool = typer.Option(False, help="Compare with a unigram model of the training tokens"),
    by_position: bool = typer.Option(False, help="Also the loss by the number of tokens before: does it keep falling with more context?"),
    probes: bool = typer.Option(False, help="Also made-up sequences of induction, associative recall and needles in a haystack"),
    task: list[str] = typer.Option(
        [], "--task", help="Task of lm-evaluation-harness, for example lambada_openai; may be given several times"
    ),
    task_folder: Path | None = typer.Option(None, exists=True, file_okay=False, help="Folder of your own task files (YAML)"),
    fewshot: int | None = typer.Option(None, min=0, help="Examples before each question; default: the task's own number"),
    limit: int | None = typer.Option(None, min=1, help="Questions per task; default: all"),
    task_length: int = typer.Option(2048, min=2, help="Tokens of a question that are read at most"),
    device: str = DEVICE,
    json_output: bool = typer.Option(False, "--json", help="Print everything as JSON"),
) -> None:
    """Measure a run's model: validation loss, perplexity and bits per byte per dataset, and on request more.

    Examples: `mamba-pretrain evaluate runs/quickstart --unigram`, `mamba-pretrain evaluate runs/quickstart --by-position --probes`,
    `mamba-pretrain evaluate runs/quickstart --no-datasets --task lambada_openai --task hellaswag`
    """
    import orjson

    from mamba_pretrain.measures import Measures
    from mamba_pretrain.trained import open_trained

    if not (datasets or by_position or probes or task):
        raise UserError("--no-datasets leaves nothing to measure; add --by-position, --probes or --task")
    if unigram and not datasets:
        raise UserError("--unigram compares losses per dataset; leave --no-datasets out")
    trained = open_trained(run, step)
    measures = Measures(trained, device_name(device), data, length, batch_size, max_samples)
    found: dict[str, Any] = {"run": str(run), "step": trained.step}
    say = (lambda line: None) if json_output else typer.echo
    if datasets:
        found["datasets"] = []
        for score in measures.datasets(unigram):
            found["datasets"].append(asdict(score))
            say("\n".join(_score_lines(score)))
    if by_position:
        found["by_position"] = {}
        for name, buckets in measures.by_position():
            found["by_position"][name] = [asdict(bucket) for bucket in buckets]
            say("\n".join(_position_lines(name, buckets)))
    if probes:
        results = measures.probes()
        found["probes"] = [asdict(result) for result in results]
        say("\n".join(_probe_lines(results)))
    if task:
        found["tasks"] = measures.tasks(task, task_folder, fewshot, limit, task_length)
        say("\n".join(_task_lines(found["tasks"])))
    if json_output:
        typer.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2, default=str).decode())


def _score_lines(score: Score) -> Iterator[str]:
    bits = "" if score.bits_per_byte is None else f"  {score.bits_per_byte:.4f} bits/byte"
    yield f"{score.name}: loss {score.loss:.4f} nats/token  perplexity {score.perplexity:.3f}{bits}  ({score.n_tokens:,} tokens)"
    if score.unigram is not None:
        gain = score.unigram - score.loss
        yield f"{score.name}: a unigram model has {score.unigram:.4f}; the model is {abs(gain):.4f} nats {'under' if gain > 0 else 'above'} it"


def _position_lines(name: str, buckets: list[PositionLoss]) -> Iterator[str]:
    yield f"\n{name}: loss by the number of tokens before in the same document, and its change"
    before = None
    for bucket in buckets:
        change = "" if before is None else f"{bucket.loss - before:+.4f}"
        yield f"{bucket.first:>9,} - {bucket.last:<9,} {bucket.loss:8.4f}  {change:>8}   ({bucket.n_tokens:,} tokens)"
        before = bucket.loss


def _probe_lines(results: list[ProbeResult]) -> Iterator[str]:
    yield "\nprobes: share of answers that are right (an untrained model answers by chance)"
    for result in results:
        setting = ", ".join(f"{key} {value:g}" for key, value in result.setting.items())
        yield f"  {result.name:<20} {setting:<28} {result.accuracy:7.1%}   loss {result.loss:.3f}   ({result.n_answers:,} answers)"


def _task_lines(tasks: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The harness names a metric ``acc,none``: metric and filter."""
    yield "\ntasks of lm-evaluation-harness"
    for name, metrics in tasks.items():
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{chosen}")
                spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                yield f"  {name:<28} {metric + ('' if chosen in ('', 'none') else f' ({chosen})'):<20} {value:.4f}{spread}"
