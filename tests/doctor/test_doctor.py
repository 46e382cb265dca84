"""The doctor finds planted faults, one by one, and names the remedy; on a healthy machine nothing is red."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from data_tools.indexed import IndexedWriter
from data_tools.manifest import Manifest, Shard, Split, TokenizerInfo, xxh3
from data_tools.tokenizers import load_tokenizer
from mamba_pretrain.cli import app
from mamba_pretrain.config import RunConfig, load_config
from mamba_pretrain.doctor import hardware, inputs, parity_process, software
from mamba_pretrain.doctor.check import Begun, Check, green, guarded
from mamba_pretrain.doctor.examine import COMMON_OPS, MIXER_OPS
from mamba_pretrain.doctor.op_cases import CASES, STEPS
from mamba_pretrain.doctor.parity import parity, serving
from mamba_pretrain.models.config import MIXERS
from mamba_pretrain.ops import cc, registry
from mamba_pretrain.ops.config import OpsConfig

CPU = torch.device("cpu")


def only_red(checks: list[Check]) -> Check:
    found = [check for check in checks if check.status == "red"]
    assert len(found) == 1, checks
    assert found[0].remedy
    return found[0]


def findings(told: Iterator[Check | Begun]) -> list[Check]:
    return [finding for finding in told if isinstance(finding, Check)]


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts packages and modules in front of the installed ones: ``plant(package, version, modules={name: source})``."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def add(package: str, version: str, modules: dict[str, str] | None = None) -> None:
        info = site / f"{package.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        for name, source in (modules or {}).items():
            (site / f"{name}.py").write_text(source)
            monkeypatch.delitem(sys.modules, name, raising=False)

    return add


def command(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


# -- planted faults


def test_fault_kernel_absent(plant: Any) -> None:
    plant("mamba-ssm", "9.9.9")
    found = only_red(list(software.compiled_kernels()))
    assert "without its kernel selective_scan_cuda" in found.detail
    assert "MAMBA_KEEP_CUDA_BUILD=TRUE" in found.remedy


def test_fault_wrong_abi(plant: Any) -> None:
    source = 'raise ImportError("causal_conv1d_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEi")'
    plant("causal-conv1d", "1.0.0", {"causal_conv1d_cuda": source})
    found = only_red(list(software.compiled_kernels()))
    assert "built for another torch" in found.detail
    assert "--no-build-isolation" in found.remedy
    assert "causal-conv1d==1.0.0" in found.remedy


def test_fault_old_package(plant: Any) -> None:
    plant("safetensors", "0.0.1")
    found = only_red(list(software.versions()))
    assert "safetensors 0.0.1 is older than 0.5" in found.detail
    plant("sentencepiece", "0.0.1")
    assert "sentencepiece 0.0.1 is older than 0.2" in only_red(list(software.tokenizers())).detail


@pytest.mark.parametrize(
    ("package", "overrides"),
    [("deepspeed", ["parallel.strategy=zero2"]), ("wandb", ["monitor.wandb.mode=online"]), ("datasets", [])],
)
def test_fault_optional_package_missing_is_red_only_for_a_run_that_needs_it(plant: Any, package: str, overrides: list[str]) -> None:
    plant(package, "0.0.1")
    without, other = (one_about(package, software.versions(config)) for config in (None, quickstart_config()))
    assert without.status == other.status == "yellow"
    assert without.remedy == f"pip install -U {package}"
    if overrides:
        assert one_about(package, software.versions(quickstart_config(*overrides))).status == "red"


def quickstart_config(*overrides: str) -> RunConfig:
    return load_config(Path(__file__).parents[2] / "configs" / "quickstart.yaml", list(overrides))


def one_about(package: str, checks: Iterator[Check]) -> Check:
    (found,) = [check for check in checks if check.name == f"package {package}"]
    return found


def test_fault_cpu_build_of_torch_beside_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(tmp_path / "bin", "nvidia-smi", "echo 'NVIDIA H100 80GB HBM3, 580.1, 81559 MiB'")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = only_red(list(software.gpu()))
    assert "H100" in found.detail
    assert "CUDA build" in found.remedy


@pytest.fixture
def broken_op() -> Iterator[Any]:
    """Registers a faulty implementation of the selective scan for one test."""
    reference = next(i for i in registry.implementations("selective_scan") if i.name == "reference").function

    def add(change: Any) -> None:
        registry.register("selective_scan", "planted", priority=-5)(lambda **named: change(reference, named))

    yield add
    registry._implementations["selective_scan"].pop("planted", None)


def planted(findings: Iterator[Check | Begun]) -> Check:
    return next(finding for finding in findings if isinstance(finding, Check) and finding.name.endswith(": planted"))


def test_fault_wrong_result(broken_op: Any) -> None:
    broken_op(lambda reference, named: reference(**{**named, "seq_idx": None}))  # ignores documents, as mamba_ssm does
    found = planted(parity(CPU))
    assert found.status == "red"
    assert "result differs" in found.detail
    assert "ops.require" in found.remedy


def test_fault_wrong_gradient(broken_op: Any) -> None:
    def detached(reference: Any, named: dict) -> Any:
        B = named["B"]
        return reference(**{**named, "B": B.detach() + 0.5 * (B - B.detach())})

    broken_op(detached)
    found = planted(parity(CPU))
    assert found.status == "red"
    assert "gradient of B" in found.detail


@pytest.mark.parametrize("op", STEPS)
def test_fault_a_step_that_leaves_its_state_as_it_was(op: str) -> None:
    reference = next(i for i in registry.implementations(op) if i.name == "reference").function
    registry.register(op, "planted", priority=-5)(lambda state, **named: reference(state=state.clone(), **named))
    try:
        assert "result differs" in planted(parity(CPU)).detail
        registry.register(op, "planted", priority=-5)(reference)
        assert planted(parity(CPU)).status == "green"
    finally:
        registry._implementations[op].pop("planted")


def test_fault_nan(broken_op: Any) -> None:
    broken_op(lambda reference, named: reference(**named) * float("nan"))
    assert planted(parity(CPU)).status == "red"


def test_fault_implementation_raises(broken_op: Any) -> None:
    def fail(reference: Any, named: dict) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    broken_op(fail)
    found = planted(parity(CPU))
    assert found.status == "red"
    assert "illegal memory access" in found.detail


# A checking process with three implementations of one op: one ends the process, one hangs, one is right.
CRASHING = """
import os, sys, time, json
from mamba_pretrain.doctor import parity_process as process
from mamba_pretrain.ops import registry

reference = next(i for i in registry.implementations("rms_norm") if i.name == "reference").function
planted = {"a-crash": lambda **_: os.abort(), "b-hang": lambda **_: time.sleep(600), "c-right": lambda **named: reference(**named)}
for priority, (name, function) in enumerate(planted.items()):
    registry.register("rms_norm", name, priority=-9 - priority)(function)
known = registry.implementations
registry.implementations = lambda op=None: [i for i in known(op) if i.name in planted or op is not None]
process.main(int(sys.argv[1]), process.Wanted(**json.loads(sys.argv[2])))
"""


def test_fault_a_kernel_that_crashes_or_hangs_costs_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity_process, "COMMAND", [sys.executable, "-c", CRASHING])
    wanted = parity_process.Wanted("cpu", ["rms_norm"], {}, allow_slow=False, isolate_documents=True)
    found = list(parity_process.parity_apart(wanted, case_limit=6.0))
    checks = {check.name: check for check in found if isinstance(check, Check)}
    assert [check.status for check in checks.values()] == ["red", "red", "green", "green"]
    assert "killed by signal 6" in checks["parity rms_norm: a-crash"].detail
    assert checks["parity rms_norm: b-hang"].detail == "did not finish within 6 s"
    assert "ops.require" in checks["parity rms_norm: b-hang"].remedy
    assert checks["op rms_norm"].detail == ("c" if cc.compiler() else "reference")
    names = [finding.name for finding in found]
    assert all(isinstance(found[names.index(name)], Begun) for name in checks if name.startswith("parity")), "each is announced"


def test_fault_required_implementation_cannot_serve() -> None:
    found = list(serving(["selective_scan"], OpsConfig(require={"selective_scan": "cuda"}), CPU, True))
    registry.configure(OpsConfig(allow_slow=True))
    assert "ops.require asks for selective_scan=cuda" in only_red(found).detail
    assert "reference" in only_red(found).remedy


def test_kernels_are_not_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "autotune", lambda configs, key: configs)
    parity_process.use_one_configuration_per_kernel()
    small, large = triton.Config({"BLOCK": 32}, num_warps=2), triton.Config({"BLOCK": 128}, num_warps=8)
    assert triton.autotune(configs=[large, small], key=[]) == [small]


def test_fault_full_disk(tmp_path: Path) -> None:
    (tmp_path / hardware.PROBE).symlink_to("/dev/full")
    found = only_red(list(hardware.disk(tmp_path)))
    assert "No space left on device" in found.detail
    assert "free space" in found.remedy


def test_fault_run_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    assert "cannot be written" in only_red(list(hardware.disk(tmp_path / "run"))).detail


def test_fault_small_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.shutil, "disk_usage", lambda path: SimpleNamespace(total=64 << 20, free=1, used=1))
    found = only_red(list(hardware.limits(tmp_path)))
    assert "--shm-size" in found.remedy


def write_checkpoint(run: Path, step: int) -> Path:
    from mamba_pretrain.checkpoint.files import write_segments
    from mamba_pretrain.parallel.portable import Segment

    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    record = write_segments(folder / "rank-00000.safetensors", [Segment("model.w", (8,), 0, torch.arange(8.0))])
    body = {"format": 1, "step": step, "date": "-", "engine": "single", "world_size": 1, "meta": {}, "files": [record.to_dict()]}
    (folder / "manifest.json").write_text(json.dumps(body))
    return folder


def test_fault_bad_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10)
    assert [check.status for check in inputs.checkpoint(tmp_path)] == ["green"]
    data = write_checkpoint(tmp_path, 20) / "rank-00000.safetensors"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    found = only_red(list(inputs.checkpoint(tmp_path)))
    assert "another checksum" in found.detail
    assert "step-00000020" in found.remedy
    assert "step 10" in found.remedy


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SentencePiece model of 300 ids with byte fallback."""
    import sentencepiece

    prefix = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    lines = [f"def function_{i}(x): return x + {i}" for i in range(200)]
    options = {"vocab_size": 300, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2, "normalization_rule_name": "identity"}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_prefix=str(prefix), **options)
    return prefix.with_suffix(".model")


@pytest.fixture
def dataset(tmp_path: Path, tokenizer_file: Path) -> Any:
    """``dataset(highest, vocab=300)`` writes a dataset whose largest id is ``highest`` and returns its folder."""

    def make(highest: int, vocab: int = 300) -> Path:
        folder = tmp_path / f"dataset-{highest}-{vocab}"
        (folder / "tokenizer").mkdir(parents=True)
        (folder / "tokenizer" / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
        return write_dataset(folder, highest, vocab, load_tokenizer(folder / "tokenizer").hash)

    return make


def write_dataset(folder: Path, highest: int, vocab: int, tokenizer_hash: str) -> Path:
    (folder / "train").mkdir(parents=True)
    with IndexedWriter(folder / "train" / "00000", np.uint16) as writer:
        writer.add(np.array([1, 2, highest], dtype=np.uint16), [2, 1])
    prefix = folder / "train" / "00000"
    shard = Shard("train/00000", 2, 3, "uint16", xxh3(prefix.with_suffix(".bin")), xxh3(prefix.with_suffix(".idx")))
    Manifest(TokenizerInfo("sentencepiece", tokenizer_hash, vocab, 0, 0), {"train": Split([shard])}).save(folder)
    return folder


def test_fault_wrong_ids_in_a_dataset(dataset: Any) -> None:
    assert {check.status for check in inputs.dataset(dataset(299), 300)} == {"green"}
    found = only_red(list(inputs.dataset(dataset(400), 512)))
    assert "holds id 400, but the tokenizer ends at 299" in found.detail
    assert "tokenize again" in found.remedy


def test_fault_another_tokenizer_beside_the_shards(dataset: Any) -> None:
    folder = dataset(299)
    model = folder / "tokenizer" / "tokenizer.model"
    import sentencepiece.sentencepiece_model_pb2 as proto

    changed = proto.ModelProto.FromString(model.read_bytes())
    changed.pieces[-1].piece, changed.pieces[-2].piece = changed.pieces[-2].piece, changed.pieces[-1].piece
    model.write_bytes(changed.SerializeToString())
    found = only_red(list(inputs.dataset(folder, 300)))
    assert "another tokenizer" in found.detail
    assert "put the original tokenizer back" in found.remedy


def test_fault_vocabulary_smaller_than_the_tokenizer(dataset: Any) -> None:
    found = only_red(list(inputs.dataset(dataset(99), 64)))
    assert "model.vocab_size=300" in found.remedy


def test_fault_truncated_shard(dataset: Any) -> None:
    folder = dataset(99)
    path = folder / "train" / "00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    found = only_red(findings(guarded("dataset", lambda: inputs.dataset(folder))))
    assert "truncated or damaged" in found.detail
    assert "tokenize again" in found.remedy


def test_fault_slurm_controller_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(tmp_path / "bin", "sbatch", "exit 0")
    command(tmp_path / "bin", "sinfo", "echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    found = only_red(list(software.slurm()))
    assert "Unable to contact" in found.detail
    assert "munge" in found.remedy


def test_fault_wandb_online_without_key_or_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert "wandb login" in only_red(list(software.wandb("online"))).remedy
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert "offline" in only_red(list(software.wandb("online"))).remedy


def test_fault_collectives_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "ALL_REDUCE", "import sys; sys.exit('connect() timed out')")
    found = only_red(list(hardware.all_reduce()))
    assert "timed out" in found.detail


def test_a_check_that_breaks_is_a_finding() -> None:
    def broken() -> Iterator[Check]:
        raise ValueError("surprise")
        yield

    assert "surprise" in only_red(findings(guarded("x", broken))).detail


def test_a_check_that_hangs_is_a_finding() -> None:
    def hanging() -> Iterator[Check]:
        yield green("first", "well")
        time.sleep(60)

    found = list(guarded("x", hanging, limit=0.3))
    assert found[:2] == [Begun("x"), green("first", "well")]
    assert only_red(found[1:]).detail == "did not finish within 0.3 s"


# -- health


def test_every_op_has_a_case() -> None:
    assert {i.op for i in registry.implementations()} == set(CASES)
    assert {*COMMON_OPS, *STEPS, *(op for ops in MIXER_OPS.values() for op in ops)} == set(CASES)
    assert set(MIXER_OPS) == set(MIXERS)


def test_a_healthy_machine_is_green(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--run-dir", str(tmp_path), "--json"])
    found = json.loads(result.stdout)
    assert [check for check in found if check["status"] == "red"] == []
    assert result.exit_code == 0
    assert {"versions", "speed of the device", "open files", "op selective_scan"} <= {check["name"] for check in found}
    assert any(check["name"].startswith("all-reduce (gloo") or "nccl" in check["name"] for check in found)


def test_red_gives_exit_code_one_and_says_how_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code = "from mamba_pretrain.doctor import examine as e; "
    code += "e.hardware.all_reduce = e.hardware.ceilings = lambda: []; e._parity = lambda config: []; "
    code += "from mamba_pretrain.cli import main; main(['doctor', '--run-dir', sys_argv])"
    code = code.replace("sys_argv", repr(str(tmp_path / "file")))
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "mend: free space" in finished.stdout
    assert "1 to mend" in finished.stdout
    lines = finished.stdout.splitlines()
    disk = next(i for i, line in enumerate(lines) if line.startswith("✗"))
    assert lines[disk - 1] == f"  disk of {tmp_path / 'file'} ...", "a check is announced before it runs"
