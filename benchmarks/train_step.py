"""Training step on one GPU against the peers: same weights, data, optimizer and precision policy, in one run.

    python benchmarks/train_step.py --seconds 540                                        # all models at the same micro-batch
    python benchmarks/train_step.py --best --models mamba1-370m,mamba2-370m              # and each one's best micro-batch
    python benchmarks/train_step.py --parity --models mamba1-130m,mamba2-130m            # losses over 300 steps, with mamba_ssm's own spread
    python benchmarks/train_step.py --implementations ours,ours+activation_checkpointing=selective,fla,fla+fuse=linear_cross_entropy
    python benchmarks/train_step.py --check      # exit code 1 under a bar; of every model and length the newest record counts

Reported for each implementation: tokens/s (median of the timed steps, from the beginning of one to that of the next on the GPU's clock), what
the host needs to queue a step, model FLOPs and 6N utilisation, peak memory, and the losses of the first steps, so that nobody wins by
computing something else. One setting of ours must meet the bars of speed and memory together. Implementations run in a process of their own, one
after another; one that fails, hangs or falls to a slow path is told with its error and counts as not beaten. What is measured is recorded after
every part. Needs a GPU, but for --check.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from gpu_worker import Budget, Worker
from record import RESULTS, Growing, conclude, every

# model: (config, micro-batch of the equal-batch comparison at LENGTH)
MODELS = {
    "mamba1-130m": ("configs/mamba1/130m.yaml", 16),
    "mamba1-370m": ("configs/mamba1/370m.yaml", 16),
    "mamba1-1.4b": ("configs/mamba1/1.4b.yaml", 8),
    "mamba1-2.8b": ("configs/mamba1/2.8b.yaml", 4),
    "mamba2-130m": ("configs/mamba2/130m.yaml", 16),
    "mamba2-370m": ("configs/mamba2/370m.yaml", 16),
    "mamba2-1.3b": ("configs/mamba2/1.3b.yaml", 8),
    "hybrid-345m": ("configs/hybrid/mamba2-attention-370m.yaml", 16),
}
LENGTH = 2048
# What --check asks for at LENGTH: ours over a peer's tokens/s, by the beginning of the peer's name. A hybrid has no bar.
MAMBA1 = {"mamba_ssm": 2.0, "fla": 2.4, "transformers": 2.6}
BARS: dict[str, dict[str, float]] = {
    "mamba1-130m": MAMBA1,
    "mamba1-370m": MAMBA1,
    "mamba1-1.4b": MAMBA1 | {"mamba_ssm": 1.8},
    "mamba1-2.8b": MAMBA1 | {"mamba_ssm": 1.8},
    **dict.fromkeys(("mamba2-130m", "mamba2-370m", "mamba2-1.3b"), dict.fromkeys(MAMBA1, 1.3)),
}
MOST_MEMORY = 0.70  # of mamba_ssm's peak at the same micro-batch
LOSS_TOLERANCE = 1e-3  # relative, of any of the first steps, and of any window of a parity run
WINDOW = 20  # steps that a parity run averages over
# A parity run's learning rate. At 3e-4 trainings on two sequences a step spiked, each at a step of its own: mamba_ssm's at 93 and 176, ours at 255.
PARITY_LR = 1e-4
BAND_FACTOR = 2.0  # a parity run may differ from mamba_ssm by so many times what two runs of mamba_ssm differ by
WARM_UP, STEPS = 4, 8
GAIN = 1.01  # a larger micro-batch must be so much faster to be tried further
LONGEST = 180.0  # seconds for one part: compiling, tuning, running
IMPLEMENTATIONS = "ours,mamba_ssm,fla,transformers"


def measure(name: str, setting: Any, warm_up: int, steps: int) -> dict[str, Any]:
    """Runs one implementation: ``warm_up`` steps and then ``steps`` that are timed; all losses are kept."""
    import torch
    from peers import build, watched

    from mamba_pretrain.ops import registry

    fallbacks, on_gpu, began = watched(), setting.device == "cuda", time.perf_counter()
    step = build(name, setting)
    *data, last = setting.tokens(warm_up + steps + 1)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    clock, losses, built = Clock(on_gpu), [], time.perf_counter()
    for number, tokens in enumerate(data):
        if number == warm_up:
            clock.wait()
            ready = time.perf_counter()
        if number >= warm_up:
            clock.mark()
        losses.append(step(tokens))
    clock.mark()
    milliseconds = clock.intervals()
    queued = time.perf_counter()
    step(last)  # behind a wait: a host that is ahead waits for the GPU at some launch or other
    queued = time.perf_counter() - queued
    if slow := fallbacks.about(name):
        return {"error": f"it runs without its kernels: {slow}"}
    middle = statistics.median(milliseconds)
    result = {
        "batch": setting.batch,
        "step_ms": middle,
        "spread": (max(milliseconds) - min(milliseconds)) / middle,
        "tokens_per_second": setting.batch * setting.length / middle * 1e3,
        "queue_ms": 1e3 * queued,
        "built_after": built - began,
        "ready_after": ready - began,
        "losses": [round(float(loss), 5) for loss in losses],
    }
    if on_gpu:
        result |= {"peak_gb": torch.cuda.max_memory_allocated() / 1e9, "reserved_gb": torch.cuda.max_memory_reserved() / 1e9}
    if hasattr(step, "engine"):
        result["choices"] = {choice.op: choice.name for choice in registry.choices()}
        graphs = getattr(step.engine, "_graphs", None)
        result["graphs"] = "none" if graphs is None else getattr(graphs, "failed", None) or "replayed"
    return result


class Clock:
    """Marks on the GPU's own time line, or on the host's without one."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._marks: list[Any] = []

    def wait(self) -> None:
        """Until everything that is queued has run."""
        import torch

        if self._on_gpu:
            torch.cuda.synchronize()

    def mark(self) -> None:
        """Without waiting."""
        import torch

        if self._on_gpu:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def intervals(self) -> list[float]:
        """Milliseconds between neighbouring marks."""
        self.wait()
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        return [a.elapsed_time(b) for a, b in pairs] if self._on_gpu else [1e3 * (b - a) for a, b in pairs]


def gpu_name() -> str:
    """The device of the worker's process."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


class Run:
    """Measures parts within a budget and records after each."""

    def __init__(
        self, call: Callable[..., Any], device: str, device_type: str, budget: Budget, save: Callable[[dict[str, Any]], Any]
    ) -> None:
        self.call, self.device, self.device_type, self.budget, self.save = call, device, device_type, budget, save
        self.found: dict[str, Any] = {"comparisons": [], "best": [], "parity": [], "left_out": []}

    def setting(self, model: str, length: int, batch: int | None) -> Any:
        """A model at a length; without a given micro-batch, as many tokens as the model's usual one has."""
        from peers import Setting

        return Setting(model, config_of(model), batch or max(1, MODELS[model][1] * LENGTH // length), length, device=self.device_type)

    def part(self, title: str, name: str, setting: Any, warm_up: int, steps: int) -> dict[str, Any]:
        """One implementation at one setting."""
        if self.budget.left() < 5.0:
            self.found["left_out"].append(f"{title} {name}")
            return {"error": "no time was left"}
        found = self.call(measure, name, setting, warm_up, steps, seconds=min(LONGEST, self.budget.left()))
        if "error" not in found:
            found |= utilisation(setting.config, setting.length, found["tokens_per_second"], self.device)
        brief = {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items() if k not in ("losses", "choices")}
        print(f"{self.budget.left():5.0f} s left: {title} batch {setting.batch} {name} {brief}", flush=True)
        return found

    def compare(self, names: list[str], setting: Any) -> None:
        """All implementations at the same micro-batch."""
        row: dict[str, Any] = {"model": setting.name, "length": setting.length, "batch": setting.batch}
        self.found["comparisons"].append(row)
        for name in names:
            row[name] = self.part(f"{setting.name} length {setting.length}", name, setting, WARM_UP, STEPS)
            self.save(self.found)

    def best(self, names: list[str], setting: Any) -> None:
        """Each implementation at the micro-batch that suits it best."""
        rows = [row for row in self.found["comparisons"] if (row["model"], row["length"]) == (setting.name, setting.length)]
        best: dict[str, Any] = {"model": setting.name, "length": setting.length}
        self.found["best"].append(best)
        for name in names:

            def trial(batch: int, name: str = name) -> dict[str, Any]:
                title = f"{setting.name} length {setting.length} best"
                return self.part(title, name, replace(setting, batch=batch), WARM_UP - 1, STEPS // 2)

            best[name] = search(trial, setting.batch, rows[0].get(name) if rows else None)
            self.save(self.found)

    def parity(self, names: list[str], setting: Any, steps: int) -> None:
        """Losses over many steps; mamba_ssm twice, since its backward pass adds in no fixed order."""
        row: dict[str, Any] = {"model": setting.name, "length": setting.length, "batch": setting.batch, "steps": steps, "lr": PARITY_LR}
        self.found["parity"].append(row)
        for name in [*names, "mamba_ssm"]:
            key = "mamba_ssm again" if name in row else name
            row[key] = self.part(f"{setting.name} parity", name, replace(setting, lr=PARITY_LR), WARM_UP, steps - WARM_UP)
            self.save(self.found)


@functools.cache
def config_of(model: str) -> Any:
    """The model of a shipped config."""
    from mamba_pretrain.config import load_config

    return load_config(Path(__file__).parents[1] / MODELS[model][0]).model


def utilisation(config: Any, length: int, rate: float, device: str) -> dict[str, float]:
    """Model FLOPs and 6N utilisation, where the device's peak is known."""
    from mamba_pretrain.models.model_flops import describe
    from mamba_pretrain.monitor.throughput import peak_flops

    peak = peak_flops(device)
    if peak is None:
        return {}
    flops = describe(config, length)
    return {"mfu": rate * flops["training"] / peak, "mfu_6n": rate * flops["six_n"] / peak}


def search(trial: Callable[[int], dict[str, Any]], begin: int, known: dict[str, Any] | None) -> dict[str, Any]:
    """The fastest micro-batch: doubled while that pays, halved while it does not fit. ``known``: what ``begin`` gave, if measured.

    The result is that of the best trial with ``tried``: the tokens/s or the error of each micro-batch.
    """
    found = trial(begin) if known is None else known
    tried, batch = {begin: rate_or_error(found)}, begin
    while found.get("error") == "out of memory" and batch > 1:
        batch //= 2
        found = trial(batch)
        tried[batch] = rate_or_error(found)
    while "error" not in found and 2 * batch not in tried:
        larger = trial(2 * batch)
        tried[2 * batch] = rate_or_error(larger)
        if "error" in larger or larger["tokens_per_second"] < GAIN * found["tokens_per_second"]:
            break
        found, batch = larger, 2 * batch
    return found | {"tried": {str(size): rate for size, rate in sorted(tried.items())}}


def rate_or_error(found: dict[str, Any]) -> Any:
    """For the list of trials."""
    return found.get("error") or found["tokens_per_second"]


# -- judging --------------------------------------------------------------------------------------------------------------------------------


def implementations(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The row's results by implementation."""
    return {name: found for name, found in row.items() if isinstance(found, dict) and ("error" in found or "step_ms" in found)}


def bar_of(model: str, peer: str) -> float | None:
    """How many times a peer's tokens/s are asked for."""
    return next((bar for name, bar in BARS.get(model, {}).items() if peer.startswith(name)), None)


def show(row: dict[str, Any], kind: str) -> None:
    """One row's table."""
    batch = f" batch {row['batch']}" if "batch" in row else ""
    print(f"{row['model']} length {row['length']}{batch}{kind}")
    base = row.get("ours", {})
    for name, found in implementations(row).items():
        if "error" in found:
            print(f"  {name:36} {found['error']}")
            continue
        mfu = f"  mfu {found['mfu']:.1%} (6N {found['mfu_6n']:.1%})" if "mfu" in found else ""
        memory = f"  {found['peak_gb']:5.1f} GB" if "peak_gb" in found else ""
        ratio = f"  ours is {base['tokens_per_second'] / found['tokens_per_second']:.2f}x" if "tokens_per_second" in base else ""
        own = f" batch {found['batch']:3}" if "batch" in found and "batch" not in row else ""
        print(f"  {name:36}{own} {found['tokens_per_second']:>10,.0f} tokens/s  {found['step_ms']:7.1f} ms{mfu}{memory}{ratio}")


def check_bars(row: dict[str, Any], kind: str, excused: bool = False) -> list[str]:
    """What the setting of ours that comes nearest to its bars is missing: one setting must meet all of them, in the peers' precision; of those
    that ran, if any did."""
    ours = [name for name in implementations(row) if name.startswith("ours") and not other_precision(name)] or ["ours"]
    ours = [name for name in ours if "step_ms" in row.get(name, {})] or ours
    return min(([*check_speed(row, name, kind, excused), *check_memory(row, name)] for name in ours), key=len)


def other_precision(name: str) -> bool:
    """Whether a setting computes in another precision than the peers do."""
    return "+fp8=" in name or "+compute=" in name


def check_memory(row: dict[str, Any], ours: str) -> Iterator[str]:
    """Peak memory at the same micro-batch."""
    base, peer = row.get(ours, {}), row.get("mamba_ssm", {})
    if "batch" not in row or row["model"] not in BARS or "peak_gb" not in base or "peak_gb" not in peer:
        return
    share = base["peak_gb"] / peer["peak_gb"]
    print(f"  peak memory of {ours} is {share:.0%} of mamba_ssm's")
    if share > MOST_MEMORY:
        yield f"{row['model']}: peak memory of {ours} is {share:.0%} of mamba_ssm's, {MOST_MEMORY:.0%} wanted"


def check_speed(row: dict[str, Any], ours: str, kind: str, excused: bool) -> Iterator[str]:
    """Which peers are not beaten by their bar. ``excused``: a peer without a result here has one elsewhere."""
    title, base = f"{row['model']}{kind}", row.get(ours, {"error": "not measured"})
    if "error" in base:
        yield f"{title}: {ours}: {base['error']}"
        return
    measured = implementations(row)
    for name in BARS.get(row["model"], {}):
        if not any(other.startswith(name) for other in measured):
            measured[name] = {"error": "not measured"}
    for name, found in measured.items():
        bar = None if name.startswith("ours") else bar_of(row["model"], name)
        if bar is None:
            continue
        if "error" in found:
            if not excused:
                yield f"{title}: {name} was not compared: {found['error']}"
        elif (ratio := base["tokens_per_second"] / found["tokens_per_second"]) < bar:
            yield f"{title}: {ours} is {ratio:.2f}x {name}, under {bar}x"


def check_losses(row: dict[str, Any]) -> Iterator[str]:
    """Losses of the first steps."""
    found = implementations(row)
    base = found.get("ours", {})
    for name, other in found.items():
        if name == "ours" or "error" in base or "error" in other:
            continue
        if not (base.get("losses") and other.get("losses")):
            yield f"{row['model']}: losses were not recorded"
            continue
        worst = largest_difference(base["losses"], other["losses"])
        print(f"  losses differ from those of {name} by at most {worst:.1e} relative over {len(other['losses'])} steps")
        if not worst <= LOSS_TOLERANCE and not other_precision(name):
            yield f"{row['model']}: losses differ by {worst:.1e} from those of {name}"


def largest_difference(curve: list[float], other: list[float]) -> float:
    """Relative, of two curves as far as both go; not a number if any of theirs is not."""
    return max((abs(a - b) / b for a, b in zip(curve, other, strict=False)), key=lambda difference: (difference != difference, difference))


def windows(losses: list[float]) -> list[float]:
    """Means of neighbouring steps."""
    return [statistics.fmean(losses[i : i + WINDOW]) for i in range(0, len(losses) - WINDOW + 1, WINDOW)]


def check_parity(row: dict[str, Any]) -> Iterator[str]:
    """Whether losses over many steps stay as near to mamba_ssm's as its own second run does."""
    found = implementations(row)
    curves = {name: windows(run["losses"]) for name, run in found.items() if "losses" in run}
    title, peer = f"{row['model']} over {row['steps']} steps", curves.get("mamba_ssm")
    if peer is None or "mamba_ssm again" not in curves or "ours" not in curves:
        missing = ", ".join(f"{name}: {run['error']}" for name, run in found.items() if "error" in run)
        yield f"{title}: was not compared ({missing})"
        return

    def differs(name: str) -> float:
        return largest_difference(curves[name], peer)

    band = differs("mamba_ssm again")
    allowed = max(LOSS_TOLERANCE, BAND_FACTOR * band)
    print(f"{title}: last losses {', '.join(f'{name} {curve[-1]:.4f}' for name, curve in curves.items())}; two runs differ by {band:.1e}")
    for name in curves:
        if not name.startswith("mamba_ssm"):
            print(f"  {name} differs by {differs(name):.1e} relative on means of {WINDOW} steps, {allowed:.1e} allowed")
    if not differs("ours") <= allowed:
        yield f"{title}: losses differ by {differs('ours'):.1e} from mamba_ssm's"


def check(result: dict[str, Any]) -> list[str]:
    """Prints the tables; returns what is under its bar."""
    failed: list[str] = []
    best = {(row["model"], row["length"]): row for row in result.get("best", [])}
    for row in result.get("comparisons", []):
        row = {"length": LENGTH, **row}
        show(row, "")
        if row["length"] == LENGTH:
            failed += check_bars(row, "", excused=(row["model"], LENGTH) in best)
        failed += check_losses(row)
    for row in best.values():
        show(row, ", each at its best micro-batch")
        if row["length"] == LENGTH:
            failed += check_bars(row, " at the best micro-batch")
    for row in result.get("parity", []):
        failed += check_parity(row)
    return failed


def compared(row: dict[str, Any]) -> int:
    """How much of a comparison a row is: 2 if ours and a peer were both measured, 1 if ours was, else 0."""
    measured = [name for name, found in implementations(row).items() if "error" not in found]
    ours = any(name.startswith("ours") for name in measured)
    return ours + (ours and any(not name.startswith("ours") for name in measured))


def merged(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Of every model and length the newest row, from records in order of time; one that compares less takes the place of none."""
    parts: dict[str, dict[Any, dict[str, Any]]] = {"comparisons": {}, "best": {}, "parity": {}}
    for record in records:
        for part, rows in parts.items():
            for row in record.get(part, []):
                key = row["model"], row.get("length", LENGTH)
                if key not in rows or compared(row) >= compared(rows[key]):
                    rows[key] = row
    return {part: list(rows.values()) for part, rows in parts.items()}


def missing(result: dict[str, Any]) -> list[str]:
    """Models that have a bar and no row."""
    measured = {row["model"] for row in result["comparisons"] if row.get("length", LENGTH) == LENGTH}
    return [f"{model}: not measured" for model in BARS if model not in measured]


def main() -> None:
    """Runs or checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="read the records instead of measuring")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--implementations", default=IMPLEMENTATIONS, help="with options of ours: ours+cuda_graphs=off")
    parser.add_argument("--lengths", default=str(LENGTH), help="tokens of a sequence; the tokens of a micro-batch stay the same")
    parser.add_argument("--batch", type=int, help="instead of the models' own")
    parser.add_argument("--best", action="store_true", help="search each implementation's best micro-batch as well")
    parser.add_argument("--parity", action="store_true", help="instead, compare the losses of many steps")
    parser.add_argument("--parity-steps", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=540.0, help="begin no further part after so many")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.check:
        result = merged(every("train_step"))
        conclude(check(result) + missing(result))
    worker, budget = Worker(), Budget(arguments.seconds)
    device = worker.call(gpu_name)
    if not device or isinstance(device, dict):
        parser.error("this machine has no GPU; --check reads the records")
    growing = Growing("train_step", arguments.output)
    run = Run(worker.call, device, "cuda", budget, functools.partial(growing.save, device=device))
    names = arguments.implementations.split(",")
    settings = [
        run.setting(model, int(length), arguments.batch) for length in arguments.lengths.split(",") for model in arguments.models.split(",")
    ]
    for setting in settings:
        if arguments.parity:
            run.parity(names, setting, arguments.parity_steps)
        else:
            run.compare(names, setting)
    for setting in settings if arguments.best else ():
        run.best(names, setting)
    worker.stop()
    conclude(check(run.found))


if __name__ == "__main__":
    main()
