"""Chooses the implementation of an op: the best that the device, dtypes and arguments allow, said aloud once.

An implementation registers under a name with a predicate that answers, in words, why it cannot serve a request. Nothing falls silently to a
slow path: on CUDA the reference is warned about, or refused when the config says so.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data_tools.errors import UserError
from mamba_pretrain.ops.config import OpsConfig

log = logging.getLogger(__name__)

# Modules that register implementations (flops: their FLOP formulas) when imported; each is importable on any machine and loads its libraries
# only when called.
PROVIDERS = (
    "selective_scan",
    "ssd_scan",
    "causal_conv1d",
    "rms_norm",
    "cross_entropy",
    "conv_step",
    "selective_step",
    "ssd_step",
    "official",
    "triton_norm",
    "triton_ssd",
    "triton_step",
    "cuda_scan",
    "cuda_conv",
    "c_scan",
    "c_conv",
    "c_ssd",
    "c_norm",
    "flops",
)


class Request(Mapping[str, Any]):
    """The arguments of one call by name, with what predicates ask most."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.main: Tensor = next(value for value in arguments.values() if isinstance(value, Tensor))

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arguments)

    def __len__(self) -> int:
        return len(self.arguments)

    @property
    def device(self) -> str:
        """Device type of the first tensor."""
        return self.main.device.type

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first tensor."""
        return self.main.dtype

    def has(self, name: str) -> bool:
        """Whether an optional argument is given."""
        return self.arguments.get(name) is not None


Predicate = Callable[[Request], "str | None"]


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op. ``unsupported(request)`` says why it cannot serve, or None; the highest ``priority`` that can is taken."""

    op: str
    name: str
    function: Callable[..., Any]
    priority: int
    unsupported: Predicate
    slow_on_cuda: bool


@dataclass(frozen=True)
class Choice:
    """What serves an op, and why not the ones before it."""

    op: str
    name: str
    device: str
    reason: str


@dataclass
class _Settings:
    required: dict[str, str] = field(default_factory=dict)
    allow_slow: bool = True
    loaded: bool = False


_implementations: dict[str, dict[str, Implementation]] = {}
_choices: dict[tuple[str, str, str], Choice] = {}
_settings = _Settings()


def register(
    op: str, name: str, priority: int, unsupported: Predicate = lambda request: None, slow_on_cuda: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: registers a function with the op's own signature as its implementation ``name``. ``unsupported`` is asked at every call."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        named = {**_implementations.get(op, {}), name: Implementation(op, name, function, priority, unsupported, slow_on_cuda)}
        _implementations[op] = dict(sorted(named.items(), key=lambda item: -item[1].priority))  # in the order in which calls ask
        return function

    return add


def implementations(op: str | None = None) -> list[Implementation]:
    """All registered implementations (of one op), the preferred first."""
    _load_providers()
    found = [i for o, named in _implementations.items() if op in (None, o) for i in named.values()]
    return sorted(found, key=lambda i: (i.op, -i.priority))


def configure(config: OpsConfig) -> None:
    """Applies a run's config to every later call. Raises UserError for an unknown op or implementation."""
    _load_providers()
    _settings.required = _expand(config.require)
    _settings.allow_slow = config.allow_slow


def call(op: str, **arguments: Any) -> Any:
    """Calls the op through the implementation that ``resolve`` picks."""
    return resolve(op, Request(arguments)).function(**arguments)


def resolve(op: str, request: Request) -> Implementation:
    """The best implementation of ``op`` that can serve ``request``; logs a choice when it first occurs.

    Raises UserError if the config requires one that cannot serve, or if only a slow one is left on CUDA and the config refuses that.
    """
    _load_providers()
    required = _settings.required.get(op)
    candidates = _implementations[op]
    if required is not None:
        chosen = candidates[required]
        if (why := chosen.unsupported(request)) is not None:
            others = [i.name for i in candidates.values() if i.name != required and i.unsupported(request) is None]
            raise UserError(
                f"ops.require asks for {op}={required}, which cannot serve this call: {why}; possible here: {', '.join(others)}"
            )
        return _remember(chosen, request, "required")
    refused: list[str] = []
    for candidate in candidates.values():
        if (why := candidate.unsupported(request)) is None:
            return _remember(candidate, request, "; ".join(refused) or "the best there is")
        refused.append(f"{candidate.name}: {why}")
    raise UserError(f"no implementation of {op} can serve this call ({'; '.join(refused)})")


def choices() -> list[Choice]:
    """Every choice made so far in this process, in order."""
    return list(_choices.values())


@contextlib.contextmanager
def using(**names: str) -> Iterator[None]:
    """``with using(selective_scan="reference")``: requires implementations inside the block."""
    _load_providers()
    before = _settings.required
    _settings.required = {**before, **_expand(dict(names))}
    try:
        yield
    finally:
        _settings.required = before


def _remember(chosen: Implementation, request: Request, reason: str) -> Implementation:
    slow = chosen.slow_on_cuda and request.device == "cuda"
    if slow and not _settings.allow_slow and reason != "required":
        raise UserError(
            f"{chosen.op} would run in slow pure PyTorch on the GPU ({reason}); install a fast implementation (mamba-pretrain doctor tells which) "
            f"or set ops.allow_slow=true"
        )
    key = (chosen.op, chosen.name, request.device)
    if key not in _choices and not torch.compiler.is_compiling():
        _choices[key] = Choice(chosen.op, chosen.name, request.device, reason)
        log.log(logging.WARNING if slow else logging.INFO, "%s: %s on %s (%s)", chosen.op, chosen.name, request.device, reason)
    return chosen


def _expand(require: str | dict[str, str]) -> dict[str, str]:
    """``require`` as op -> name, checked."""
    names = sorted({name for named in _implementations.values() for name in named})
    if isinstance(require, str):
        if require not in names:
            raise UserError(f"ops.require={require} is not an implementation of any op;{_nearest(require, names)}")
        return {op: require for op, named in _implementations.items() if require in named}
    for op, name in require.items():
        if op not in _implementations:
            raise UserError(f"ops.require names the unknown op {op};{_nearest(op, sorted(_implementations))}")
        if name not in _implementations[op]:
            raise UserError(f"ops.require: {op} has no implementation {name};{_nearest(name, sorted(_implementations[op]))}")
    return dict(require)


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f" did you mean {near[0]}?" if near else f" known: {', '.join(known)}"


def _load_providers() -> None:
    if not _settings.loaded:
        for module in PROVIDERS:
            importlib.import_module(f"mamba_pretrain.ops.{module}")
        _settings.loaded = True
