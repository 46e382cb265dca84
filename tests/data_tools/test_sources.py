"""Which files are taken, and how they are cut."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_tools import sources
from data_tools.errors import UserError
from data_tools.sources import find_files, kind_of, plan_tasks, read_list


@pytest.fixture
def tree(tmp_path) -> Path:
    for name in ("a.py", "pkg/b.py", "pkg/tests/c.py", "tests/d.py", "pkg/deep/e.py", "f.jsonl.gz", "g.png", ".hidden.txt", "README"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return tmp_path


def names(tree: Path, found: list[str]) -> list[str]:
    return [os.path.relpath(path, tree) for path in found]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ([], [], ["README", "a.py", "f.jsonl.gz", "pkg/b.py", "pkg/deep/e.py", "pkg/tests/c.py", "tests/d.py"]),
        (["**/*.py"], [], ["a.py", "pkg/b.py", "pkg/deep/e.py", "pkg/tests/c.py", "tests/d.py"]),
        (["**/*.py"], ["**/tests/**"], ["a.py", "pkg/b.py", "pkg/deep/e.py"]),
        (["*.png"], [], ["g.png"]),
        ([], ["*.py"], ["README", "f.jsonl.gz"]),
    ],
)
def test_patterns(tree, include, exclude, expected):
    assert names(tree, find_files([str(tree)], include, exclude)) == expected


def test_globs_files_and_lists_each_once(tree):
    listed = tree / "list"
    listed.write_text(f"# comment\n{tree}/a.py\n\n{tree}/**/*.py\n")
    found = find_files([*read_list(listed), str(tree / "a.py")], [], [])
    assert names(tree, found) == ["a.py", "pkg/b.py", "pkg/deep/e.py", "pkg/tests/c.py", "tests/d.py"]


def test_a_source_that_gives_nothing_is_an_error(tree):
    with pytest.raises(UserError, match="holds no text"):
        find_files([str(tree)], ["*.none"], [])
    with pytest.raises(UserError, match="does not exist"):
        find_files([str(tree / "a.py"), str(tree / "none")], [], [])


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.jsonl", "jsonl"), ("a.json.zst", "jsonl"), ("a.PARQUET", "parquet"), ("a.txt.gz", "text"), ("Makefile", "text"), ("a.exe", None)],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


def test_large_files_are_cut_and_small_ones_grouped_alike_every_time(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SMALLEST_TASK", 1 << 20)
    monkeypatch.setattr(sources, "HASH_BLOCK", 1 << 18)
    sizes = {"a.txt": 600_000, "b.txt": 600_000, "c.jsonl": 3_500_000, "d.jsonl.gz": 3_000_000, "e.txt": 10, "f.txt": 0}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    files = find_files([str(tmp_path)], [], [])
    tasks = plan_tasks(files)
    assert [[os.path.basename(part.path) for part in task] for task in tasks] == [
        ["a.txt"], ["b.txt"], ["c.jsonl"], ["c.jsonl"], ["c.jsonl"], ["c.jsonl"], ["d.jsonl.gz"], ["e.txt", "f.txt"]
    ]  # fmt: skip
    cut = [task[0] for task in tasks[2:6]]
    assert [part.begin for part in cut] == [0, 1 << 20, 2 << 20, 3 << 20]
    assert [part.end for part in cut] == [1 << 20, 2 << 20, 3 << 20, 3_500_000]
    assert [part.blocks for part in cut] == [(0, 4), (4, 8), (8, 12), (12, 14)]
    assert sum(part.size for task in tasks for part in task) == sum(sizes.values())
    assert plan_tasks(files) == tasks


def test_a_corpus_of_any_size_gives_some_hundred_tasks(tmp_path, monkeypatch):
    """Ten terabytes as one sparse file: tasks of 512 MiB; one gigabyte: of 8 MiB."""
    for size, task in ((10 << 40, 512 << 20), (1 << 30, 8 << 20), (100 << 30, 200 << 20)):
        with (tmp_path / "a.jsonl").open("wb") as file:
            file.truncate(size)
        tasks = plan_tasks([str(tmp_path / "a.jsonl")])
        assert tasks[0][0].size == task
        assert len(tasks) == -(-size // task)
