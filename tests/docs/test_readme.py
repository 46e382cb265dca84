"""README's way through, command by command, on a model and a text small enough for every test run.

The commands run as they stand there, in one folder, with sizes replaced (``SMALLER``, ``TINY``); launchers give way to one process, since
``tests/cli`` runs those, and what needs a cluster is left to ``tests/launch``. The whole guide runs in ``test_docs.py``.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SMALLER = {"32000": "400", "0.005": "0.2", "8": "1"}
TINY = "model.d_model=32 model.n_layer=2 model.d_state=16 model.headdim=16 model.vocab_size=400 data.sequence_length=64 precision.compute=fp32 "
TINY += (
    "train.tokens=null train.steps=4 train.global_batch_tokens=null train.global_batch_size=4 train.micro_batch_size=2 monitor.log_every=1 "
)
TINY += "monitor.wandb.mode=disabled checkpoint.every_steps=2 parallel.strategy=single"
LAUNCHERS = re.compile(r"^(torchrun|deepspeed) .*mamba_pretrain (?=train )")
ELSEWHERE = {"submit"}  # of a cluster


def way_through() -> list[list[str]]:
    """The commands of the section, as words."""
    section = (REPOSITORY / "README.md").read_text().split("## The way through")[1]
    block = re.search(r"```console\n(.*?)```", section, flags=re.DOTALL)
    assert block is not None
    lines = [line.removeprefix("$ ").split("  #")[0].strip() for line in block.group(1).splitlines()]
    return [shlex.split(LAUNCHERS.sub("mamba-pretrain ", line)) for line in lines]


def smaller(words: list[str]) -> list[str]:
    """The command on a tiny scale."""
    found = [SMALLER.get(word, word) for word in words]
    if found[1] in ("train", "doctor"):
        found = [word for word in found if not word.startswith("parallel.strategy=")] + TINY.split()
    return found + (["--once"] if found[1] == "watch" else [])


def run(words: list[str]) -> None:
    """In this process, as the console script would: each exits with 0 or simply ends."""
    import data_tools.cli
    import mamba_pretrain.cli

    main = {"mamba-data": data_tools.cli.main, "mamba-pretrain": mamba_pretrain.cli.main}[words[0]]
    code: object = None
    try:
        main(words[1:])
    except SystemExit as end:
        code = end.code
    assert not code, f"{shlex.join(words)} ended with {code}"


def test_the_way_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mamba_pretrain.doctor import examine

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(examine, "_parity", lambda config: [])  # tests/doctor runs it
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "texts").mkdir()
    for page in (REPOSITORY / "docs").glob("*.md"):
        shutil.copy(page, tmp_path / "texts" / f"{page.stem}.txt")
    commands = way_through()
    assert [words[1] for words in commands if words[0] == "mamba-pretrain"].count("train") == 3
    for words in commands:
        if words[1] not in ELSEWHERE:
            run(smaller(words))
    folder = tmp_path / "runs" / "mamba2-370m"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4]
    assert (folder / "report.html").stat().st_size > 20_000
    assert (tmp_path / "exported" / "config.json").is_file()
