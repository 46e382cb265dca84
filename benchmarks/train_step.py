"""Training step on one GPU against the peers: same weights, data, optimizer and precision policy, in one run.

    python benchmarks/train_step.py [--models mamba1-130m,mamba1-370m] [--peers mamba_ssm,transformers] [--steps 10] [--loss-steps 100]
    python benchmarks/train_step.py --check      # reads the newest record and checks the ratios against the bars

Each implementation starts from the same weights (ours, translated), reads the same tokens and updates with fused AdamW under bf16
autocast with fp32 parameters, clipping and a linear warm-up. Reported: tokens/s (median of the timed steps), model FLOPs and 6N utilisation,
peak memory, and the losses of the first steps, so that nobody wins by computing something else.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS, conclude, newest, record

# model: (config, micro-batch of the equal-batch comparison)
MODELS = {
    "mamba1-130m": ("configs/mamba1/130m.yaml", 16),
    "mamba1-370m": ("configs/mamba1/370m.yaml", 16),
    "mamba1-1.4b": ("configs/mamba1/1.4b.yaml", 8),
    "mamba1-2.8b": ("configs/mamba1/2.8b.yaml", 4),
    "mamba2-130m": ("configs/mamba2/130m.yaml", 16),
    "mamba2-370m": ("configs/mamba2/370m.yaml", 16),
    "mamba2-1.3b": ("configs/mamba2/1.3b.yaml", 8),
}
# model: factor over mamba_ssm's tokens/s that --check asks for
BARS = {
    "mamba1-130m": 2.0,
    "mamba1-370m": 2.0,
    "mamba1-1.4b": 1.8,
    "mamba1-2.8b": 1.8,
    "mamba2-130m": 1.3,
    "mamba2-370m": 1.3,
    "mamba2-1.3b": 1.3,
}
LOSS_TOLERANCE = 1e-3
Step = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Setting:
    """One comparison: a model, a batch shape, a seed."""

    name: str
    config: Any
    batch: int
    length: int
    lr: float = 3e-4
    warmup: int = 100
    cuda_graphs: Any = "auto"  # ours: auto | on | off
    fp8: Any = "off"  # ours: off | tensorwise | rowwise | blockwise

    def rate(self, step: int) -> float:
        """The learning rate of a step (from 0): without warm-up training is unstable, and rounding alone drives losses apart."""
        return self.lr * min(1.0, (step + 1) / self.warmup)

    def tokens(self, steps: int) -> Iterator[torch.Tensor]:
        """(batch, length + 1) tokens per step from a Zipf-like distribution with repetition, so that the loss falls."""
        generator = torch.Generator().manual_seed(7)
        ranks = torch.arange(1, self.config.vocab_size + 1, dtype=torch.float64)
        for _ in range(steps):
            draw = torch.multinomial(1.0 / ranks, self.batch * (self.length + 1) // 2 + 1, replacement=True, generator=generator)
            yield draw.repeat_interleave(2)[: self.batch * (self.length + 1)].view(self.batch, self.length + 1).cuda()


def ours(setting: Setting) -> Step:
    """Our model through our engine and our step."""
    from mamba_pretrain.data.batch import Batch
    from mamba_pretrain.models.language_model import LanguageModel
    from mamba_pretrain.ops import registry
    from mamba_pretrain.optim.build import optimizer_builder
    from mamba_pretrain.optim.config import OptimConfig
    from mamba_pretrain.parallel import topology
    from mamba_pretrain.parallel.build import build_engine
    from mamba_pretrain.parallel.config import ParallelConfig, PrecisionConfig
    from mamba_pretrain.training.step import train_step

    with torch.device("meta"):
        model = LanguageModel(setting.config)
    parallel = ParallelConfig(strategy="single", cuda_graphs=setting.cuda_graphs)
    engine = build_engine(parallel, PrecisionConfig(compute="bf16", fp8=setting.fp8), topology.initialize(parallel))
    optim = OptimConfig(lr=setting.lr, schedule={"name": "constant", "warmup_fraction": 0.0})
    engine.prepare(model, optimizer_builder(optim, model.parameter_policies()), seed=1)
    shape = (setting.batch, setting.length)
    # Pinned, as the loader's batches are: other copies to the GPU wait for the step before.
    seq_idx = torch.zeros(shape, dtype=torch.int32).pin_memory()
    positions = torch.arange(setting.length).expand(shape).contiguous().pin_memory()

    steps = itertools.count()

    def step(tokens: torch.Tensor) -> torch.Tensor:
        batch = Batch(tokens[:, :-1], tokens[:, 1:], seq_idx, positions, tokens[:, 1:].numel(), torch.arange(setting.batch))
        return train_step(engine, [batch], setting.rate(next(steps)), 1.0).loss

    step.choices = registry.choices  # type: ignore[attr-defined]
    step.engine = engine  # type: ignore[attr-defined]
    return step


def initial_weights(setting: Setting) -> dict[str, torch.Tensor]:
    """The weights every implementation starts from."""
    from mamba_pretrain.models.init import initialize
    from mamba_pretrain.models.language_model import LanguageModel

    model = LanguageModel(setting.config)
    initialize(model, seed=1)
    return model.state_dict()


def plain_step(model: torch.nn.Module, logits: Callable[[torch.Tensor], torch.Tensor], setting: Setting) -> Step:
    """The usual loop: autocast, cross entropy on fp32 logits, clipping, fused AdamW with decay on matrices as its authors do it."""
    skip = [p for n, p in model.named_parameters() if p.dim() < 2 or n.endswith(("A_log", "D", "dt_bias", "conv1d.weight"))]
    chosen = {id(p) for p in skip}
    decayed = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": skip, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=setting.lr, betas=(0.9, 0.95), fused=True)
    steps = itertools.count()

    def step(tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            out = logits(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(out.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = setting.rate(next(steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def mamba_ssm(setting: Setting) -> Step:
    """mamba_ssm's MambaLMHeadModel on its fused path."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    from mamba_pretrain.models import mamba_ssm as format
    from mamba_pretrain.models.layout import translate_out

    theirs = MambaConfig(**format.to_mamba_ssm(setting.config))
    model = MambaLMHeadModel(theirs, device="cuda")
    weights = translate_out(initial_weights(setting), format.table_for(setting.config))
    model.load_state_dict(weights | {"lm_head.weight": weights["backbone.embedding.weight"]})
    return plain_step(model, lambda tokens: model(tokens).logits[..., : setting.config.vocab_size], setting)


def transformers(setting: Setting) -> Step:
    """transformers' model, which uses the same kernels where they are installed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from mamba_pretrain.models import hf
    from mamba_pretrain.models.layout import translate_out

    keys = hf.to_transformers(setting.config)
    model = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(hf.family_of(setting.config).model_type, **keys, use_cache=False))
        .cuda()
        .float()
    )
    weights = translate_out(initial_weights(setting), hf.table_for(setting.config))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"weights do not fit: {missing} {unexpected}")
    return plain_step(model, lambda tokens: model(tokens, use_cache=False).logits, setting)


IMPLEMENTATIONS = {"ours": ours, "mamba_ssm": mamba_ssm, "transformers": transformers}


def measure(name: str, setting: Setting, steps: int, loss_steps: int) -> dict[str, Any]:
    """Runs one implementation: ``loss_steps`` steps for the losses, of which the last ``steps`` are timed."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        step = IMPLEMENTATIONS[name](setting)
        total = max(loss_steps, steps + 5)
        losses, events = [], []
        for tokens in setting.tokens(total):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            losses.append(step(tokens))
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    milliseconds = statistics.median(a.elapsed_time(b) for a, b in events[-steps:])
    result = {"step_ms": milliseconds, "tokens_per_second": setting.batch * setting.length / milliseconds * 1e3}
    result |= {
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
        "losses": [round(float(loss), 5) for loss in losses],
    }
    if hasattr(step, "choices"):
        result["implementations"] = [str(choice) for choice in step.choices()]
    return result


def compare(name: str, peers: list[str], steps: int, loss_steps: int, batch: int | None, length: int, cuda_graphs: str) -> dict[str, Any]:
    """All implementations at one setting."""
    from mamba_pretrain.config import load_config
    from mamba_pretrain.models.model_flops import describe
    from mamba_pretrain.monitor.throughput import peak_flops

    path, default_batch = MODELS[name]
    config = load_config(Path(__file__).parents[1] / path).model
    setting = Setting(name, config, batch or default_batch, length, cuda_graphs=cuda_graphs)
    flops, peak = describe(config, length), peak_flops(torch.cuda.get_device_name())
    results: dict[str, Any] = {"model": name, "batch": setting.batch, "length": length, "cuda_graphs": cuda_graphs}
    for implementation in ["ours", *peers]:
        found = measure(implementation, setting, steps, loss_steps)
        if peak and "error" not in found:
            found["mfu"] = found["tokens_per_second"] * flops["training"] / peak
            found["mfu_6n"] = found["tokens_per_second"] * flops["six_n"] / peak
        results[implementation] = found
        print(implementation, {k: v for k, v in found.items() if k not in ("losses", "implementations")}, flush=True)
    return results


def check(result: dict[str, Any]) -> list[str]:
    """Prints the table; returns what is under its bar."""
    failed = []
    for row in result["comparisons"]:
        print(f"{row['model']} batch {row['batch']} length {row['length']}")
        base = row["ours"]
        for name in IMPLEMENTATIONS:
            found = row.get(name)
            if not found:
                continue
            if "error" in found:
                print(f"  {name:13} {found['error']}")
                continue
            ratio = base["tokens_per_second"] / found["tokens_per_second"]
            print(
                f"  {name:13} {found['tokens_per_second']:>10,.0f} tokens/s  {found['step_ms']:7.1f} ms  mfu {found['mfu']:.1%} "
                f"(6N {found['mfu_6n']:.1%})  {found['peak_gb']:5.1f} GB  ours is {ratio:.2f}x"
            )
        peer = row.get("mamba_ssm", {})
        if "error" in base or "tokens_per_second" not in peer:
            continue
        ratio = base["tokens_per_second"] / peer["tokens_per_second"]
        if ratio < BARS[row["model"]]:
            failed.append(f"{row['model']}: {ratio:.2f}x mamba_ssm is under {BARS[row['model']]}x")
        if not base["losses"]:
            failed.append(f"{row['model']}: losses were not recorded")
            continue
        worst = max(abs(a - b) / b for a, b in zip(base["losses"], peer["losses"], strict=True))
        print(f"  losses differ from mamba_ssm's by at most {worst:.1e} relative over {len(peer['losses'])} steps")
        if worst > LOSS_TOLERANCE:
            failed.append(f"{row['model']}: losses differ by {worst:.1e} from mamba_ssm's")
    return failed


def main() -> None:
    """Runs or checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--models", default="mamba1-130m,mamba1-370m,mamba2-130m,mamba2-370m")
    parser.add_argument("--peers", default="mamba_ssm,transformers")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--loss-steps", type=int, default=20)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--cuda-graphs", default="auto", choices=["auto", "on", "off"], help="of ours")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.check:
        result = newest("train_step")
    else:
        if not torch.cuda.is_available():
            parser.error("this machine has no GPU; --check reads the newest record")
        peers = [peer for peer in arguments.peers.split(",") if peer]
        rows = [
            compare(name, peers, arguments.steps, arguments.loss_steps, arguments.batch, arguments.length, arguments.cuda_graphs)
            for name in arguments.models.split(",")
        ]
        result = json.loads(record("train_step", {"comparisons": rows}, folder=arguments.output).read_text())
    conclude(check(result))


if __name__ == "__main__":
    main()
