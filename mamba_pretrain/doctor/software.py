"""What is installed: versions, compiled kernels and their ABI, GPU support, tokenizers, Slurm, Weights & Biases."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mamba_pretrain.doctor.check import Check, green, grey, red, yellow

if TYPE_CHECKING:
    from mamba_pretrain.config import RunConfig

# package: oldest release that works; training imports these
REQUIRED = {"torch": "2.9", "numpy": "1.26", "omegaconf": "2.3", "orjson": "3.10", "pydantic": "2.8", "rich": "13.7", "safetensors": "0.5"}
REQUIRED |= {"xxhash": "3.4"}
TOKENIZERS = {"sentencepiece": "0.2", "tokenizers": "0.20"}


@dataclass(frozen=True)
class Optional:
    """A package that only some work needs. ``needed``: whether a run with this config does."""

    package: str
    oldest: str
    purpose: str
    needed: Callable[[RunConfig], bool] = lambda config: False


OPTIONAL = (
    Optional("deepspeed", "0.18", "parallel.strategy=zero1, zero2 and zero3", lambda config: config.parallel.strategy.startswith("zero")),
    Optional("wandb", "0.18", "monitor.wandb.mode=offline and online", lambda config: config.monitor.wandb.mode == "online"),
    Optional("transformers", "4.48", "`mamba-pretrain export` and `import`"),
    Optional("matplotlib", "3.8", "the report's PNG files"),
    Optional("jinja2", "3.1", "`mamba-pretrain submit`"),
    Optional("pyarrow", "16", "`mamba-data tokenize` of Parquet and Arrow files"),
    Optional("datasets", "3.0", "`mamba-data tokenize` of datasets from the Hub"),
)
# package, compiled module, what it serves
COMPILED = (("mamba-ssm", "selective_scan_cuda", "Mamba-1's scan"), ("causal-conv1d", "causal_conv1d_cuda", "the convolution"))
WANDB_HOST = "api.wandb.ai"


def versions(config: RunConfig | None = None) -> Iterator[Check]:
    """What every training needs in one line, and a line for each other package that is missing or old."""
    wrong = {package: problem for package, oldest in REQUIRED.items() if (problem := _problem(package, oldest))}
    if wrong:
        yield red("versions", "; ".join(wrong.values()), f"run `make setup`, or pip install -U {' '.join(wrong)}")
    else:
        yield green("versions", ", ".join(f"{package} {importlib.metadata.version(package)}" for package in REQUIRED))
    for package in OPTIONAL:
        if problem := _problem(package.package, package.oldest):
            needed = config is not None and package.needed(config)
            judge, who = (red, "this run needs it for") if needed else (yellow, "without it no")
            yield judge(f"package {package.package}", f"{problem}; {who} {package.purpose}", f"pip install -U {package.package}")


def _problem(package: str, oldest: str) -> str | None:
    """Why an installed package cannot serve, or None."""
    from packaging.version import Version

    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is not installed (>= {oldest} is needed)"
    return f"{package} {version} is older than {oldest}" if Version(version) < Version(oldest) else None


def compiled_kernels() -> Iterator[Check]:
    """Whether compiled extensions that are installed can be loaded by this torch."""
    for package, module, serves in COMPILED:
        name = f"kernel package {package}"
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield grey(name, f"not installed; {serves} runs through other implementations (see the parity lines)")
            continue
        import torch

        yield _loaded(name, package, version, module, torch.__version__)


def _loaded(name: str, package: str, version: str, module: str, torch_version: str) -> Check:
    rebuild = f"pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps {package}=={version}"
    if importlib.util.find_spec(module) is None:
        keep = "MAMBA_KEEP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE " if package == "mamba-ssm" else "CAUSAL_CONV1D_FORCE_BUILD=TRUE "
        return red(name, f"{version} is installed without its kernel {module} (state-spaces/mamba#977)", f"build it: {keep}{rebuild}")
    try:
        importlib.import_module(module)
    except ImportError as error:
        reason = " ".join(str(error).split())[:160]
        if "undefined symbol" in reason or "GLIBC" in reason or "cannot open shared object" in reason:
            return red(
                name, f"{version} was built for another torch than {torch_version}: {reason}", f"rebuild it against this torch: {rebuild}"
            )
        return red(name, f"{version} does not load: {reason}", f"reinstall it: {rebuild}")
    return green(name, f"{version} loads with torch {torch_version}")


def gpu() -> Iterator[Check]:
    """Whether torch sees the GPUs that the driver has."""
    import torch

    driver = _output(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"])
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        free = min(torch.cuda.mem_get_info(i)[0] / torch.cuda.mem_get_info(i)[1] for i in range(len(names)))
        if free < 0.9:
            advice = "another process uses the GPU: see nvidia-smi, and end it or choose another with CUDA_VISIBLE_DEVICES"
            yield red("gpu", f"{len(names)} x {names[0]}, but only {free:.0%} of the memory is free", advice)
        else:
            yield green("gpu", f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}, capability {torch.cuda.get_device_capability()}")
    elif driver:
        why = "this torch is a CPU build" if torch.version.cuda is None else f"torch for CUDA {torch.version.cuda} cannot use the driver"
        advice = "install a CUDA build of torch that the driver supports, and unset CUDA_VISIBLE_DEVICES if it is empty"
        yield red("gpu", f"the driver lists {driver.splitlines()[0].strip()}, but {why}", advice)
    else:
        yield grey("gpu", "none on this machine; everything runs on the CPU")


def tokenizers() -> Iterator[Check]:
    """Tokenizer libraries: the needed ones, and the fast encoders."""
    wrong = {package: problem for package, oldest in TOKENIZERS.items() if (problem := _problem(package, oldest))}
    if wrong:
        yield red("tokenizer libraries", "; ".join(wrong.values()), f"pip install -U {' '.join(wrong)}")
        return
    fast = [name for name in ("gigatoken", "fastokens") if importlib.util.find_spec(name) is not None]
    extra = f"; fast encoders: {', '.join(fast)}" if fast else "; no fast encoder (pip install 'mamba-pretrain[fast]' brings them)"
    yield green("tokenizer libraries", "sentencepiece, tokenizers" + extra)


def slurm() -> Iterator[Check]:
    """Whether this machine can talk to a Slurm controller."""
    if shutil.which("sbatch") is None:
        yield grey("slurm", "no sbatch on this machine: `mamba-pretrain submit` needs a login node")
        return
    try:
        done = subprocess.run(["sinfo", "-h", "-o", "%P %D %t"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        done = subprocess.CompletedProcess([], 1, "", str(error))
    configured = os.environ.get("SLURM_CONF") or Path("/etc/slurm/slurm.conf").is_file()
    if done.returncode and not configured:
        yield grey("slurm", "the client is installed, but there is no slurm.conf: this machine belongs to no cluster")
    elif done.returncode:
        reason = " ".join(done.stderr.split())[:200] or f"exit code {done.returncode}"
        yield red(
            "slurm",
            f"sinfo fails: {reason}",
            "check SLURM_CONF, that slurmctld answers (scontrol ping) and that munge runs (munge -n | unmunge)",
        )
    else:
        yield green("slurm", f"{len(done.stdout.splitlines())} partition lines; the controller answers")


def wandb(mode: str) -> Iterator[Check]:
    """Whether the configured W&B mode can work. ``mode`` as in the config."""
    if mode != "online":
        yield grey("wandb", f"mode {mode}: nothing leaves this machine (`mamba-pretrain sync` uploads an offline run later)")
        return
    if not (os.environ.get("WANDB_API_KEY") or _netrc_has_wandb()):
        yield red("wandb", "mode online, but no API key", "run `wandb login`, set WANDB_API_KEY, or set monitor.wandb.mode=offline")
        return
    host = os.environ.get("WANDB_BASE_URL", WANDB_HOST).removeprefix("https://").removeprefix("http://").split("/")[0]
    address, _, port = host.partition(":")
    try:
        socket.create_connection((address, int(port or 443)), timeout=5).close()
        yield green("wandb", f"{host} answers and a key is set")
    except OSError as error:
        yield red(
            "wandb", f"mode online, but {host} cannot be reached ({error})", "set monitor.wandb.mode=offline and sync from a login node"
        )


def _netrc_has_wandb() -> bool:
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return path.is_file() and "wandb" in path.read_text()


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
