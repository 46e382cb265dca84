"""What benchmarks/tokenizing.py runs beside mamba-data: the bare encoder, datatrove, datasets.map. Runs under the Python that has them."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

WORKERS = 2


def bare_half(path: str, tokenizer: str, index: int, barrier: Any, results: Any) -> None:
    """Encodes one worker's documents, held in memory, one after another."""
    import gigatoken

    with open(path, "rb") as file:
        texts = [json.loads(line)["text"] for number, line in enumerate(file) if number % WORKERS == index]
    encode = gigatoken.Tokenizer(Path(tokenizer) / "tokenizer.json").backend.encode
    encode("warm up")
    barrier.wait()
    begin, worked = time.perf_counter(), time.process_time()
    for text in texts:
        encode(text)
    results.put((time.perf_counter() - begin, time.process_time() - worked))


def bare(path: str, tokenizer: str) -> None:
    """Prints the processor and clock seconds that encoding alone takes in two processes: no reading, parsing or writing."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(WORKERS), context.Queue()
    processes = [context.Process(target=bare_half, args=(path, tokenizer, index, barrier, results)) for index in range(WORKERS)]
    for process in processes:
        process.start()
    seconds = [results.get() for _ in processes]
    for process in processes:
        process.join()
    print(sum(worked for _, worked in seconds), max(wall for wall, _ in seconds))


def datatrove(folder: str, tokenizer: str, out: str) -> None:
    """Reader and DocumentTokenizer under the local executor."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    name = str(Path(tokenizer) / "tokenizer.json")
    pipeline = [
        JsonlReader(folder),
        DocumentTokenizer(out, tokenizer_name_or_path=name, eos_token="<|endoftext|>", shuffle_documents=False),
    ]
    LocalPipelineExecutor(pipeline=pipeline, tasks=WORKERS, workers=WORKERS, logging_dir=f"{out}-logs").run()


def datasets_map(folder: str, tokenizer: str, out: str) -> None:
    """Batched map with two processes, then save_to_disk."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    encoder = PreTrainedTokenizerFast(tokenizer_file=str(Path(tokenizer) / "tokenizer.json"), eos_token="<|endoftext|>")

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"input_ids": [[*ids, encoder.eos_token_id] for ids in encoder(batch["text"])["input_ids"]]}

    files = sorted(str(path) for path in Path(folder).glob("*.jsonl"))
    rows = datasets.load_dataset("json", data_files=files, split="train", cache_dir=f"{out}-cache")
    rows.map(encode, batched=True, num_proc=WORKERS, remove_columns=["text"]).save_to_disk(out)


if __name__ == "__main__":
    {"bare": bare, "datatrove": datatrove, "datasets.map": datasets_map}[sys.argv[1]](*sys.argv[2:])
