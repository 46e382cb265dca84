"""CPU training speed of the reference ops against transformers, same shapes, same machine, in one run.

    python benchmarks/cpu_reference.py            # measures, prints, records
    python benchmarks/cpu_reference.py --check    # the same; exit 1 unless ours is at least 3 times as fast for both models

A step is forward, backward and AdamW of d_model 256, 4 layers, batch 4, length 512 in fp32. Rounds alternate between the two programs, so
that whatever else the machine does hits both. transformers' Mamba-1 needs minutes a step on a CPU: it gets one timed step by default.
The vocabulary is small by default because the head's matmuls cost both programs the same and would hide what is compared here.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from record import record

BAR = 3.0
BATCH, LENGTH, D_MODEL, N_LAYER = 4, 512, 256, 4


def our_model(mixer: str, vocab: int) -> torch.nn.Module:
    """Ours, initialised."""
    from mamba_pretrain.models.config import ModelConfig
    from mamba_pretrain.models.init import initialize
    from mamba_pretrain.models.language_model import LanguageModel

    model = LanguageModel(ModelConfig(mixer=mixer, vocab_size=vocab, d_model=D_MODEL, n_layer=N_LAYER))
    initialize(model, seed=0)
    return model


def their_model(mixer: str, vocab: int) -> torch.nn.Module:
    """transformers' with the same shapes."""
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": vocab, "hidden_size": D_MODEL, "num_hidden_layers": N_LAYER, "tie_word_embeddings": True}
    if mixer == "mamba1":
        return MambaForCausalLM(MambaConfig(**sizes, state_size=16)).train()
    heads = 2 * D_MODEL // 64
    return Mamba2ForCausalLM(Mamba2Config(**sizes, num_heads=heads, head_dim=64, n_groups=1, state_size=128, chunk_size=256)).train()


def stepper(model: torch.nn.Module, loss: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor], vocab: int) -> Callable[[], float]:
    """A function that runs one training step on new tokens and returns its seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)

    def step() -> float:
        tokens = torch.randint(0, vocab, (BATCH, LENGTH), generator=generator)
        begin = time.perf_counter()
        loss(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begin

    return step


def our_loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss."""
    labels = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], dim=1)
    return model(tokens, labels=labels) / (BATCH * (LENGTH - 1))


def their_loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss."""
    return model(input_ids=tokens, labels=tokens).loss


def measure(mixer: str, vocab: int, rounds: int) -> dict[str, Any]:
    """Seconds of both, round by round, and the ratio of the medians of tokens per second."""
    ours = stepper(our_model(mixer, vocab), our_loss, vocab)
    theirs = stepper(their_model(mixer, vocab), their_loss, vocab)
    ours()
    if rounds > 1:
        theirs()  # warm-up; for the one-round case the first step is measured: it is minutes long and nothing in it is compiled
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    our_seconds, their_seconds = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "mixer": mixer,
        "vocab_size": vocab,
        "rounds": rounds,
        "tokens_per_second": BATCH * LENGTH / our_seconds,
        "transformers_tokens_per_second": BATCH * LENGTH / their_seconds,
        "ratio": their_seconds / our_seconds,
        "step_seconds": [[round(s, 4) for s in pair] for pair in pairs],
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help=f"exit 1 unless both ratios are at least {BAR}")
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of Mamba-2")
    parser.add_argument("--mamba1-rounds", type=int, default=1, help="timed rounds of Mamba-1 (minutes each)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [measure("mamba2", args.vocab, args.rounds), measure("mamba1", args.vocab, args.mamba1_rounds)]
    for row in rows:
        print(
            f"{row['mixer']}: {row['tokens_per_second']:,.0f} tokens/s, transformers {row['transformers_tokens_per_second']:,.0f}: "
            f"{row['ratio']:.1f}x (bar {BAR:.0f}x)"
        )
    shapes = {"batch": BATCH, "length": LENGTH, "d_model": D_MODEL, "n_layer": N_LAYER, "threads": args.threads}
    print(record("cpu_reference", {"shapes": shapes, "bar": BAR, "results": rows}))
    return 1 if args.check and min(row["ratio"] for row in rows) < BAR else 0


if __name__ == "__main__":
    raise SystemExit(main())
