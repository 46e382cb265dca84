"""Greedy decoding in bf16 on one GPU against the peers: a prompt of 128 tokens and 128 new ones, at batch 1, 16 and 128.

    python benchmarks/generation.py --seconds 300            # measures and records; needs a GPU
    python benchmarks/generation.py --profile --models mamba1-370m --batches 1      # the kernels of a step, by time; records nothing
    python benchmarks/generation.py --check                  # exit code 1 under a bar

All start from the same weights, in bf16. mamba_ssm replays a CUDA graph (``cg=True``) and keeps its states in bf16; transformers generates with
its cache. Ours is measured with states in fp32, which it keeps by default, and in bf16. Reported: new tokens/s with the prompt's time and
without, the memory that a step must move, and the share of tokens that equal ours. Bar: the faster of ours at least equals every peer at each
batch size. A peer that fails counts as not beaten.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from gpu_worker import Budget, Worker
from record import RESULTS, Growing, conclude, newest
from train_step import config_of, gpu_name

MODELS = "mamba1-370m,mamba2-370m,mamba2-130m"
IMPLEMENTATIONS = "ours,ours+recurrent=bf16,mamba_ssm,transformers"
PEERS = ("mamba_ssm", "transformers")
PROMPT, NEW = 128, 128
RUNS, ENOUGH = 3, 3.0  # runs of each length, or as many as fit into so many seconds
LONGEST = 120.0  # seconds for one part
BYTES_PER_SECOND = 3.0e12  # what an H100 copies
Generate = Callable[[int], Any]  # a number of new tokens to the tokens (batch, new)


@dataclass(frozen=True)
class Setting:
    """What is continued."""

    config: Any
    batch: int
    prompt: int = PROMPT
    new: int = NEW
    device: str = "cuda"

    def prompts(self) -> Any:
        """(batch, prompt) tokens."""
        import torch

        generator = torch.Generator().manual_seed(3)
        return torch.randint(self.config.vocab_size, (self.batch, self.prompt), generator=generator).to(self.device)


def ours(setting: Setting, recurrent: str = "fp32") -> Generate:
    """Our decoder."""
    import torch
    from weights import drawn

    from mamba_pretrain.models.generation import Decoder, load_model

    model = load_model(setting.config, drawn(setting.config, setting.device), setting.device, torch.bfloat16)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[recurrent]
    decoder = Decoder(model, setting.batch, setting.prompt + setting.new, device=setting.device, recurrent=dtype)
    prompts = setting.prompts().tolist()
    return lambda new: torch.tensor(decoder(prompts, new))


def mamba_ssm(setting: Setting) -> Generate:
    """mamba_ssm's own generation."""
    import torch
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    from peers import load, padded

    from mamba_pretrain.models import mamba_ssm as format

    config = padded(setting.config)
    model = MambaLMHeadModel(MambaConfig(**format.to_mamba_ssm(config)), device=setting.device, dtype=torch.bfloat16).eval()
    load(model, setting, format.table_for(config))
    prompts = setting.prompts()

    def generate(new: int) -> Any:
        return model.generate(prompts, max_length=setting.prompt + new, top_k=1, cg=True)[:, setting.prompt :]

    generate(setting.new)  # records for the longest text, or it would record again
    return generate


def transformers(setting: Setting) -> Generate:
    """transformers' generation."""
    import torch
    from peers import transformers_model

    model = transformers_model(setting).to(torch.bfloat16).eval()
    model.config.use_cache = True
    prompts = setting.prompts()
    settings = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}

    def generate(new: int) -> Any:
        with torch.no_grad():
            return model.generate(prompts, max_new_tokens=new, **settings)[:, setting.prompt :]

    return generate


def build(name: str, setting: Setting) -> Generate:
    """An implementation with its options."""
    implementation, *options = name.split("+")
    return {"ours": ours, "mamba_ssm": mamba_ssm, "transformers": transformers}[implementation](
        setting, **dict(option.split("=") for option in options)
    )


def measure(name: str, setting: Setting) -> dict[str, Any]:
    """Times of one implementation, and its tokens."""
    import torch
    from peers import watched

    fallbacks, on_gpu = watched(), setting.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    generate = build(name, setting)
    generate(8)  # compiles and tunes

    def timed(new: int) -> tuple[float, Any]:
        found: list[float] = []
        while len(found) < RUNS and sum(found) < ENOUGH:
            began = time.perf_counter()
            tokens = generate(new)
            if on_gpu:
                torch.cuda.synchronize()
            found.append(time.perf_counter() - began)
        return statistics.median(found), tokens

    (start, _), (whole, tokens) = timed(1), timed(setting.new)
    if slow := fallbacks.about(name):
        return {"error": f"it runs without its kernels: {slow}"}
    if tuple(tokens.shape) != (setting.batch, setting.new):
        return {"error": f"it generated {tuple(tokens.shape)} tokens"}
    return {
        "tokens_per_second": setting.batch * setting.new / whole,
        "prompt_ms": 1e3 * start,
        "step_ms": 1e3 * (whole - start) / (setting.new - 1),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0,
        "tokens": tokens[:4].tolist(),
    }


def profile(name: str, setting: Setting) -> str:
    """The kernels of 32 steps by time."""
    import torch

    generate = build(name, setting)
    for _ in range(2):
        generate(40)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        generate(33)
        torch.cuda.synchronize()
    return found.key_averages().table(sort_by="cuda_time_total", row_limit=16, max_name_column_width=70)


def moved(config: Any, batch: int, recurrent_bytes: int = 4) -> dict[str, float]:
    """Bytes of weights and states that a step reads and writes, and the milliseconds that this takes at the least."""
    import torch

    from mamba_pretrain.models.language_model import LanguageModel

    with torch.device("meta"):
        model = LanguageModel(config)
    policies = model.parameter_policies()
    weights = sum(p.numel() * (4 if policies[name].fp32 else 2) for name, p in model.named_parameters())
    states = sum(
        value.numel() * (recurrent_bytes if key == "ssm" else 2)
        for layer in model.new_state(batch, 1, "meta")
        for key, value in layer.items()
        if key in ("ssm", "conv")
    )
    total = weights + 2 * states
    return {"weight_bytes": weights, "state_bytes": states, "floor_ms": 1e3 * total / BYTES_PER_SECOND}


def compare(
    call: Callable[..., Any], names: list[str], model: str, setting: Setting, budget: Budget, save: Callable[[], Any], rows: list[Any]
) -> None:
    """All implementations of one model at one batch size; the row is in ``rows`` from the beginning."""
    row: dict[str, Any] = {"model": model, "batch": setting.batch, "prompt": setting.prompt, "new": setting.new}
    row["moved"] = moved(setting.config, setting.batch)
    rows.append(row)
    for name in names:
        if budget.left() < 5.0:
            row[name] = {"error": "no time was left"}
            continue
        row[name] = found = call(measure, name, setting, seconds=min(LONGEST, budget.left()))
        if "error" not in found and "tokens" in row.get("ours", {}):
            found["equal_tokens"] = share_equal(found["tokens"], row["ours"]["tokens"])
        brief = {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items() if k != "tokens"}
        print(f"{budget.left():5.0f} s left: {model} batch {setting.batch} {name} {brief}", flush=True)
        save()


def share_equal(found: list[list[int]], others: list[list[int]]) -> float:
    """Of all tokens; after a first difference two texts have little in common."""
    pairs = [a == b for row, other in zip(found, others, strict=True) for a, b in zip(row, other, strict=True)]
    return sum(pairs) / len(pairs)


def judge(row: dict[str, Any]) -> Iterator[str]:
    """Prints a row; yields the peers that are not beaten."""
    title = f"{row['model']} batch {row['batch']}"
    print(f"{title}: {row['prompt']} tokens and {row['new']} new; a step moves at least {row['moved']['floor_ms']:.2f} ms of memory")
    found = {name: value for name, value in row.items() if isinstance(value, dict) and name != "moved"}
    rates = {name: value["tokens_per_second"] for name, value in found.items() if "error" not in value}
    best = max((name for name in rates if name.startswith("ours")), key=lambda name: rates[name], default=None)
    for name, value in found.items():
        if "error" in value:
            print(f"  {name:22} {value['error']}")
            continue
        ratio = f"  ours is {rates[best] / rates[name]:.2f}x" if best is not None and name != best else ""
        equal = f"  {value['equal_tokens']:4.0%} of tokens equal" if "equal_tokens" in value else ""
        print(
            f"  {name:22} {rates[name]:>9,.0f} tokens/s  prompt {value['prompt_ms']:6.1f} ms  step {value['step_ms']:7.3f} ms{equal}{ratio}"
        )
    if best is None:
        yield f"{title}: ours was not measured"
        return
    for name in PEERS:
        if name not in rates:
            yield f"{title}: {name} was not compared: {found.get(name, {}).get('error', 'not measured')}"
        elif rates[best] < rates[name]:
            yield f"{title}: {rates[best]:,.0f} tokens/s are under {name}'s {rates[name]:,.0f}"


def main() -> None:
    """Runs or checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="read the newest record instead of measuring")
    parser.add_argument("--profile", action="store_true", help="show a step's kernels and record nothing")
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--implementations", default=IMPLEMENTATIONS)
    parser.add_argument("--batches", default="1,16,128")
    parser.add_argument("--new", type=int, default=NEW, help="new tokens")
    parser.add_argument("--seconds", type=float, default=300.0, help="begin no further part after so many")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.check:
        conclude([line for row in newest("generation")["rows"] for line in judge(row)])
    worker, budget = Worker(), Budget(arguments.seconds)
    device = worker.call(gpu_name)
    if not device or isinstance(device, dict):
        parser.error("this machine has no GPU; --check reads the newest record")
    names, rows = arguments.implementations.split(","), []
    save = functools.partial(Growing("generation", arguments.output).save, {"rows": rows}, device)
    for model in arguments.models.split(","):
        for batch in map(int, arguments.batches.split(",")):
            setting = Setting(config_of(model), batch, new=arguments.new)
            if arguments.profile:
                for name in names:
                    print(f"{model} batch {batch} {name}\n{worker.call(profile, name, setting, seconds=LONGEST)}")
            else:
                compare(worker.call, names, model, setting, budget, save, rows)
    worker.stop()
    if not arguments.profile:
        conclude([line for row in rows for line in judge(row)])


if __name__ == "__main__":
    main()
