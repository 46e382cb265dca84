"""Tokenizing and packing end to end: mamba-data, Megatron-LM, datatrove and datasets.map on the same text, tokenizer and two processes.

    apt-get download linux-doc-6.1 python3.11-doc perl-doc git-doc && for deb in *.deb; do dpkg -x $deb docs; done
    python benchmarks/tokenizing.py --docs docs --tokenizer neox/ --megatron CHECKOUT --peers VENV/bin/python   # measures, prints, records
    python benchmarks/tokenizing.py --check    # without --docs: the newest record; exit 1 under a bar

The tokenizer is GPT-NeoX's (a folder with tokenizer.json, and tokenizer_config.json for Megatron). ``--megatron`` is a checkout of
NVIDIA/Megatron-LM, whose own tools/preprocess_data.py is run; ``--peers`` a Python that has what it needs (megatron-core's dependencies,
gigatoken), datatrove and datasets. Peers that are not at hand are left out, and their bars count as missed.

Two texts: all plain documentation for the peers; for the bare encoder, which alone is as fast, that and the HTML, four times, each time with the
lines of every document turned by another quarter. Seconds are of the whole command, start and all; the bare encoder's are of encoding alone, of
texts held in memory. Programs take turns, so that whatever else the machine does hits all of them. Memory is the largest sum over a program's
processes of their proportional set sizes, sampled every 50 ms. (Named so because a script called tokenize.py would hide Python's own module of
that name from everything beside it.)
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from record import newest, record

WORKERS = 2
SUFFIXES = (".txt", ".pod", ".rst", ".html", ".1perl", ".3perl", ".yaml")
PEERS = Path(__file__).with_name("tokenizing_peers.py")
# Megatron-LM asks for typing.override, which Python has since 3.12.
MEGATRON = (
    "import runpy, sys, typing; typing.override = getattr(typing, 'override', lambda f: f); sys.path.insert(0, '.'); "
    "runpy.run_path('tools/preprocess_data.py', run_name='__main__')"
)
BARS = {"megatron-gigatoken": 4.0, "datatrove": 20.0, "datasets.map": 20.0}  # ours is at least so many times as fast
BAR_MEMORY_GB = 0.5
BAR_OVER_BARE = 1.5


@dataclass
class Program:
    """A command, and what its runs took. ``own`` programs print their seconds themselves, processor and clock: they time a part of what they do."""

    name: str
    command: list[str]
    text: Path
    rounds: int
    folder: Path | None = None
    own: bool = False
    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    peak_gb: float = 0.0

    def row(self, tokens: int) -> dict[str, Any]:
        """Figures for the record."""
        median = statistics.median(self.seconds)
        return {
            "name": self.name,
            "median_seconds": round(median, 3),
            "tokens_per_second": round(tokens / median),
            "memory_gb": round(self.peak_gb, 3),
            "processor_seconds": round(statistics.median(self.processor_seconds), 3),
            "all_rounds": [round(value, 3) for value in self.seconds],
        }


def documents(docs: Path, html: bool) -> Iterator[str]:
    """The documentation's text files (and HTML), each a document."""
    for path in sorted(docs.rglob("*")):
        name = path.name.removesuffix(".gz")
        if not path.is_file() or not (name.endswith(SUFFIXES) or path.suffix == ".gz") or (name.endswith(".html") and not html):
            continue
        try:
            text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            yield text


def turned(text: str, quarters: int) -> str:
    """The text with its lines turned by so many quarters: other documents, as like to each other as the originals."""
    lines = text.splitlines(keepends=True)
    first = len(lines) * quarters // 4
    return "".join([*lines[first:], *lines[:first]])


def write_corpus(path: Path, docs: Path, html: bool, times: int = 1) -> None:
    """JSONL of the documentation."""
    texts = list(documents(docs, html))
    with path.open("w", encoding="utf-8") as file:
        for quarters in range(times):
            file.writelines(json.dumps({"text": turned(text, quarters)}, ensure_ascii=False) + "\n" for text in texts)


def split_file(path: Path, folder: Path) -> None:
    """The lines of a JSONL dealt out to as many files as there are workers: datatrove gives each worker whole files."""
    folder.mkdir()
    lines = path.read_bytes().splitlines(keepends=True)
    for number in range(WORKERS):
        (folder / f"{number}.jsonl").write_bytes(b"".join(lines[number::WORKERS]))


def look_at(process: Any, processor_seconds: dict[int, float]) -> float:
    """GB in use by a process and its descendants; pages that several share count once (proportional set size). Notes the processor time of each."""
    import psutil

    total = 0
    with contextlib.suppress(psutil.Error):  # it may end at any moment
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += one.memory_full_info().pss
                times = one.cpu_times()
                processor_seconds[one.pid] = times.user + times.system
    return total / 1e9


def children_time() -> float:
    """Processor seconds of all processes that this one has waited for: on a busy machine steadier than what the clock says."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(program: Program, scratch: Path) -> None:
    """One timed run in a fresh output folder."""
    import psutil

    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    command = [part.replace("OUT", str(out)) for part in program.command]
    before = children_time()
    seen: dict[int, float] = {}
    with (scratch / "log").open("w+") as log:
        begin = time.perf_counter()
        process = psutil.Popen(command, stdout=log, stderr=log, cwd=program.folder, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        while process.poll() is None:
            program.peak_gb = max(program.peak_gb, look_at(process, seen))
            time.sleep(0.05)
        seconds = time.perf_counter() - begin
        log.seek(0)
        printed = log.read()
    if process.returncode:
        sys.exit(f"{program.name} failed:\n{printed[-3000:]}")
    program.seconds.append(float(printed.split()[-1]) if program.own else seconds)
    # Some programs never wait for their workers, whose time is then not among the children's: as last seen it is.
    used = max(children_time() - before, sum(seen.values()))
    program.processor_seconds.append(float(printed.split()[-2]) if program.own else used)
    print(f"{program.name}: {program.seconds[-1]:.2f} s  (peak {program.peak_gb:.2f} GB)", flush=True)


def programs(arguments: argparse.Namespace, text: Path, large: Path, scratch: Path) -> list[Program]:
    """Ours, the bare encoder, and the peers that are at hand."""
    tokenizer = str(arguments.tokenizer.resolve())

    def ours(source: Path) -> list[str]:
        base = [sys.executable, "-m", "data_tools", "tokenize", str(source)]
        return [*base, "--tokenizer", tokenizer, "--output", "OUT/data", "--workers", str(WORKERS)]

    bare = [sys.executable, str(PEERS), "bare", str(large), tokenizer]
    found = [
        Program("mamba-data", ours(text), text, arguments.rounds),
        Program("mamba-data, large", ours(large), large, arguments.rounds),
        Program("bare encoder, large", bare, large, arguments.rounds, own=True),
    ]
    if arguments.megatron:
        base = [str(arguments.peers or sys.executable), "-c", MEGATRON, "--input", str(text), "--append-eod", "--workers", str(WORKERS)]
        base += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--output-prefix", "OUT/megatron"]
        found.append(Program("megatron-gigatoken", [*base, "--use-gigatoken"], text, arguments.rounds, arguments.megatron))
        if arguments.slow:
            found.append(Program("megatron-tokenizers", base, text, 1, arguments.megatron))
    if arguments.peers:
        split_file(text, scratch / "split")
        for name in ("datatrove", "datasets.map"):
            found.append(Program(name, [str(arguments.peers), str(PEERS), name, str(scratch / "split"), tokenizer, "OUT/data"], text, 1))
    return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs all programs in turns and gives the record."""
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        scratch = Path(name)
        text, large = scratch / "text.jsonl", scratch / "large.jsonl"
        write_corpus(text, arguments.docs, html=False)
        write_corpus(large, arguments.docs, html=True, times=4)
        tokens = {path: count(path, arguments.tokenizer, scratch) for path in (text, large)}
        found = programs(arguments, text, large, scratch)
        for turn in range(max(program.rounds for program in found)):
            for program in found:
                if turn < program.rounds:
                    run(program, scratch)
        rows = {program.name: program.row(tokens[program.text]) for program in found}
        sizes = {"text_mb": text.stat().st_size / 1e6, "large_mb": large.stat().st_size / 1e6}
    ours = rows["mamba-data"]["tokens_per_second"]
    return {
        "workers": WORKERS,
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "tokens": {"text": tokens[text], "large": tokens[large]},
        **{key: round(value, 1) for key, value in sizes.items()},
        "programs": list(rows.values()),
        "times_as_fast": {
            name: round(ours / row["tokens_per_second"], 2) for name, row in rows.items() if not name.endswith(("data", "large"))
        },
        "times_as_little_processor_time": {
            name: round(row["processor_seconds"] / rows["mamba-data"]["processor_seconds"], 2)
            for name, row in rows.items()
            if not name.endswith(("data", "large"))
        },
        "over_bare_processor_time": round(
            rows["mamba-data, large"]["processor_seconds"] / rows["bare encoder, large"]["processor_seconds"], 3
        ),
        "over_bare": round(rows["bare encoder, large"]["tokens_per_second"] / rows["mamba-data, large"]["tokens_per_second"], 3),
        "peak_memory_gb": max(rows["mamba-data"]["memory_gb"], rows["mamba-data, large"]["memory_gb"]),
    }


def count(text: Path, tokenizer: Path, scratch: Path) -> int:
    """Tokens of the text; also warms the page cache and the compiled bytecode."""
    out = scratch / f"count-{text.stem}"
    subprocess.run(
        [sys.executable, "-m", "data_tools", "tokenize", str(text), "--tokenizer", str(tokenizer), "--output", str(out)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    manifest = json.loads((out / "manifest.json").read_text())
    shutil.rmtree(out)
    return int(manifest["counts"]["tokens"])


def report(found: dict[str, Any]) -> list[str]:
    """Prints the table; returns the bars that were missed."""
    print(
        f"{found['tokens']['text'] / 1e6:.1f}M tokens ({found['text_mb']:.0f} MB), {found['workers']} processes, {found['device']}, {found['date']}"
    )
    for row in found["programs"]:
        factor = found["times_as_fast"].get(row["name"])
        slower = f"  mamba-data is {factor:.1f} times as fast" if factor else ""
        used = f"{row['processor_seconds']:>8.1f} processor-s {row['memory_gb']:>6.2f} GB"
        print(f"{row['name']:<22}{row['median_seconds']:>9.2f} s {row['tokens_per_second'] / 1e6:>8.2f} Mtok/s{used}{slower}")
    print(f"the bare encoder is {found['over_bare']:.2f} times as fast as mamba-data on {found['large_mb']:.0f} MB")
    missed = [
        f"{name}: {found['times_as_fast'].get(name, 'not measured')} instead of {bar}"
        for name, bar in BARS.items()
        if found["times_as_fast"].get(name, 0) < bar
    ]
    if found["peak_memory_gb"] >= BAR_MEMORY_GB:
        missed.append(f"peak memory {found['peak_memory_gb']} GB instead of under {BAR_MEMORY_GB}")
    if found["over_bare"] > BAR_OVER_BARE:
        missed.append(f"over the bare encoder {found['over_bare']} instead of at most {BAR_OVER_BARE}")
    return missed


def main() -> None:
    """Measures where there is text to measure on, else reads the newest record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, help="folder into which the documentation packages were unpacked")
    parser.add_argument("--tokenizer", type=Path, help="folder with GPT-NeoX's tokenizer.json")
    parser.add_argument("--megatron", type=Path, help="checkout of NVIDIA/Megatron-LM")
    parser.add_argument("--peers", type=Path, help="Python interpreter that has datatrove and datasets")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the fast programs; the slow ones run once")
    parser.add_argument("--slow", action="store_true", help="run Megatron-LM with the reference tokenizer too (it has no bar)")
    parser.add_argument("--scratch", type=Path, help="folder for temporary files")
    parser.add_argument("--check", action="store_true", help="exit 1 under a bar")
    arguments = parser.parse_args()
    if arguments.docs:
        record("tokenizing", measure(arguments))
    missed = report(newest("tokenizing"))
    for sentence in missed:
        print(f"under the bar: {sentence}")
    sys.exit(1 if missed and arguments.check else 0)


if __name__ == "__main__":
    main()
