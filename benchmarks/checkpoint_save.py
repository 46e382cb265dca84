"""How long a save holds the training loop: in the background, against writing while everybody waits.

    python benchmarks/checkpoint_save.py --check            # exits 1 unless the background save holds for less than 10% of the other

One process; a Mamba-1 of some size with AdamW's moments, on the GPU if there is one. The loop is held while a save is
called, and while the next step waits, before its update, for the copy to host memory to end. The first save allocates that memory: it is
reported by itself.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

BAR = 0.10
SIZES = {"cpu": {"d_model": 768, "n_layer": 8}, "cuda": {"d_model": 1024, "n_layer": 48}}


def prepared() -> tuple[Any, Callable[[], None]]:
    """An engine, and a function that trains it for a step."""
    import torch

    from mamba_pretrain.data.batch import Batch
    from mamba_pretrain.models.config import ModelConfig
    from mamba_pretrain.models.language_model import LanguageModel
    from mamba_pretrain.optim.build import optimizer_builder
    from mamba_pretrain.optim.config import OptimConfig
    from mamba_pretrain.parallel import topology as ranks
    from mamba_pretrain.parallel.build import build_engine
    from mamba_pretrain.parallel.config import ParallelConfig, PrecisionConfig
    from mamba_pretrain.training.step import train_step

    topology = ranks.initialize(ParallelConfig(strategy="single"))
    with torch.device("meta"):
        model = LanguageModel(ModelConfig(mixer="mamba1", vocab_size=16384, **SIZES[topology.device.type]))
    engine = build_engine(ParallelConfig(strategy="single"), PrecisionConfig(), topology)
    engine.prepare(model, optimizer_builder(OptimConfig(), model.parameter_policies()), seed=1)
    tokens = torch.arange(128)[None]
    zeros = torch.zeros_like(tokens)
    batch = Batch(tokens, tokens, zeros.int(), tokens, 128, zeros[:, 0])

    def step() -> None:
        train_step(engine, [batch], 1e-4, 1.0)
        if topology.device.type == "cuda":
            torch.cuda.synchronize()

    step()
    return engine, step


def holds(engine: Any, train: Callable[[], None], root: Path, async_save: bool, saves: int) -> list[float]:
    """Seconds for which each save keeps the training loop: in the call, and in the next step before its update."""
    from mamba_pretrain.checkpoint.config import CheckpointConfig
    from mamba_pretrain.checkpoint.store import CheckpointStore

    store = CheckpointStore(root, CheckpointConfig(async_save=async_save, keep_last=1), engine.topology)
    seconds = []
    for step in range(1, saves + 1):
        began = time.perf_counter()
        store.save(engine, step, {})
        seconds.append(time.perf_counter() - began)
        copying = engine.before_update

        def timed(copying: Callable[[], None] = copying) -> None:
            arrived = time.perf_counter()
            copying()
            seconds[-1] += time.perf_counter() - arrived

        engine.before_update = timed
        train()
        store.wait()
    return seconds


def main() -> int:
    """Measures, prints, records; 1 if the bar is missed."""
    from record import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 if the bar is missed")
    parser.add_argument("--saves", type=int, default=5, help="saves of each kind after the first")
    parser.add_argument("--folder", type=Path, help="where to write, for example on the shared file system; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        engine, train = prepared()
        size = sum(4 * segment.data.numel() for segment in engine.state())
        waiting = holds(engine, train, Path(folder) / "waiting", False, arguments.saves + 1)
        background = holds(engine, train, Path(folder) / "background", True, arguments.saves + 1)
    figures = {
        "bytes": size,
        "synchronous_seconds": statistics.median(waiting[1:]),
        "hold_seconds": statistics.median(background[1:]),
        "first_hold_seconds": background[0],
        "written_gb_s": size / 1e9 / statistics.median(waiting[1:]),
    }
    figures["hold_share"] = figures["hold_seconds"] / figures["synchronous_seconds"]
    print("  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    print(
        "recorded", record("checkpoint_save", {"figures": figures, "bar": BAR, "all": {"synchronous": waiting, "background": background}})
    )
    return int(arguments.check and figures["hold_share"] >= BAR)


if __name__ == "__main__":
    sys.exit(main())
