"""A training step of one model by each implementation: this project's, mamba_ssm's, flash-linear-attention's, transformers'.

All start from the same weights, read the same tokens and update with fused AdamW under bf16 autocast with fp32 parameters, clipping and a linear
warm-up; matrices decay, and nothing else. Each peer is used as its authors use it, on its fused path. The peers have no notion of a vocabulary's
padding, so their vocabulary is the padded one: an odd number of columns would slow their head down.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from weights import drawn, quick_initialization

Step = Callable[[Tensor], Tensor]  # tokens (batch, length + 1) to the loss, after an update


@dataclass(frozen=True)
class Setting:
    """One comparison: a model and a batch shape."""

    name: str
    config: Any
    batch: int
    length: int
    lr: float = 3e-4
    warmup: int = 100
    device: str = "cuda"

    def rate(self, step: int) -> float:
        """The learning rate of a step (from 0): without warm-up training is unstable, and rounding alone drives losses apart."""
        return self.lr * min(1.0, (step + 1) / self.warmup)

    def tokens(self, steps: int) -> list[Tensor]:
        """(batch, length + 1) tokens per step from a Zipf-like distribution with repetition, so that the loss falls."""
        generator = torch.Generator().manual_seed(7)
        ranks = torch.arange(1, self.config.vocab_size + 1, dtype=torch.float64)
        count = self.batch * (self.length + 1)
        draws = (torch.multinomial(1.0 / ranks, count // 2 + 1, replacement=True, generator=generator) for _ in range(steps))
        return [draw.repeat_interleave(2)[:count].view(self.batch, self.length + 1).to(self.device) for draw in draws]


def build(name: str, setting: Setting) -> Step:
    """The step of an implementation; options follow its name: ``ours+activation_checkpointing=selective``."""
    implementation, *options = name.split("+")
    return IMPLEMENTATIONS[implementation](setting, **dict(option.split("=") for option in options))


def ours(setting: Setting, **options: str) -> Step:
    """Our model through our engine and our step; ``options`` are keys of the configs ``parallel`` and ``precision``."""
    from mamba_pretrain.data.batch import Batch
    from mamba_pretrain.models.language_model import LanguageModel
    from mamba_pretrain.optim.build import optimizer_builder
    from mamba_pretrain.optim.config import OptimConfig
    from mamba_pretrain.parallel import topology
    from mamba_pretrain.parallel.build import build_engine
    from mamba_pretrain.parallel.config import ParallelConfig, PrecisionConfig
    from mamba_pretrain.training.step import train_step

    precision = {key: value for key, value in options.items() if key in PrecisionConfig.model_fields}
    parallel = {"strategy": "single"} | {k: v for k, v in options.items() if k not in precision}
    with torch.device("meta"):
        model = LanguageModel(setting.config)
    config = ParallelConfig.model_validate(parallel)
    engine = build_engine(config, PrecisionConfig.model_validate(precision), topology.initialize(config))
    optim = OptimConfig(lr=setting.lr, schedule={"name": "constant", "warmup_fraction": 0.0})
    with quick_initialization(setting.device):
        engine.prepare(model, optimizer_builder(optim, model.parameter_policies()), seed=1)
    # Pinned, as the loader's batches are: other copies to the GPU wait for the step before.
    seq_idx = _pinned(torch.zeros(setting.batch, setting.length, dtype=torch.int32))
    positions = _pinned(torch.arange(setting.length).repeat(setting.batch, 1))
    steps = itertools.count()

    def step(tokens: Tensor) -> Tensor:
        batch = Batch(tokens[:, :-1], tokens[:, 1:], seq_idx, positions, tokens[:, 1:].numel(), torch.arange(setting.batch))
        return train_step(engine, [batch], setting.rate(next(steps)), 1.0).loss

    step.engine = engine  # type: ignore[attr-defined]
    return step


def _pinned(t: Tensor) -> Tensor:
    return t.pin_memory() if torch.cuda.is_available() else t


def mamba_ssm(setting: Setting) -> Step:
    """mamba_ssm's MambaLMHeadModel on its fused path."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    from mamba_pretrain.models import mamba_ssm as format

    config = padded(setting.config)
    model = MambaLMHeadModel(MambaConfig(**format.to_mamba_ssm(config)), device=setting.device)
    load(model, setting, format.table_for(config))
    return plain_step(model, lambda tokens, targets: cross_entropy(model(tokens).logits, targets), setting)


def fla(setting: Setting, fuse: str = "cross_entropy") -> Step:
    """flash-linear-attention's model, with the loss of its default settings; ``fuse=linear_cross_entropy`` takes its other one."""
    from fla.models import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    from mamba_pretrain.models import hf

    _require_kernels()
    config = padded(setting.config)
    keys = fla_keys(config) | {"fuse_cross_entropy": fuse == "cross_entropy", "fuse_linear_cross_entropy": fuse == "linear_cross_entropy"}
    with torch.device(setting.device):
        model = MambaForCausalLM(MambaConfig(**keys)) if "dt_rank" in keys else Mamba2ForCausalLM(Mamba2Config(**keys))
    load(model, setting, hf.table_for(config))

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        # What its `forward` does, with targets that are shifted already: it would leave out each row's last one.
        hidden = model.backbone(tokens).last_hidden_state
        return model._compute_logits_and_loss(hidden, shift_labels=targets)[0]

    return plain_step(model.train(), loss, setting)


def fla_keys(config: Any) -> dict[str, Any]:
    """Arguments of fla's MambaConfig and Mamba2Config, whose models have the tensors of transformers' under the same names."""
    kind, *others = set(config.layer_mixers)
    if others or kind == "attention" or config.d_intermediate or config.bcdt_rms:
        raise ValueError("fla's Mamba models have layers of one kind, without an MLP and without norms of B, C and dt")
    keys = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "state_size": config.d_state,
        "conv_kernel": config.d_conv,
        "expand": config.expand,
        "norm_eps": config.layer_norm_epsilon,
        "use_bias": config.use_bias,
        "use_conv_bias": config.use_conv_bias,
        "residual_in_fp32": config.residual_in_fp32,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rescale_prenorm_residual": False,
        "use_cache": False,
    }
    if kind == "mamba1":
        return keys | {"dt_rank": config.resolved_dt_rank}
    heads = {"head_dim": config.headdim, "n_groups": config.ngroups, "chunk_size": config.chunk_size, "dt_limit": config.dt_limit}
    return keys | heads


def transformers(setting: Setting) -> Step:
    """transformers' model, which uses mamba_ssm's kernels where they are installed."""
    model = transformers_model(setting)
    return plain_step(model, lambda tokens, targets: cross_entropy(model(tokens, use_cache=False).logits, targets), setting)


def transformers_liger(setting: Setting) -> Step:
    """The same with Liger Kernel's norm and loss put in by hand: it has no patch for Mamba models."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    from liger_kernel.transformers.rms_norm import LigerRMSNorm

    model = transformers_model(setting)
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if type(norm).__name__ in ("MambaRMSNorm", "Mamba2RMSNorm", "BambaRMSNorm"):
                faster = LigerRMSNorm(norm.weight.shape[0], eps=norm.variance_epsilon)
                faster.weight = norm.weight
                setattr(parent, name, faster)
    loss_of = LigerFusedLinearCrossEntropyLoss()

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = model.base_model(tokens, use_cache=False).last_hidden_state
        return loss_of(model.lm_head.weight, hidden.flatten(0, 1), targets.flatten())

    return plain_step(model, loss, setting)


def transformers_model(setting: Any) -> Any:
    """transformers' model of a setting, in fp32."""
    import transformers

    from mamba_pretrain.models import hf

    if setting.device == "cuda":
        _require_kernels()
    config = padded(setting.config)
    # By name, not through the Auto classes: fla puts its own models in there.
    of_model = getattr(transformers, hf.family_of(config).architecture)
    keys = {key: value for key, value in hf.to_transformers(config).items() if key != "padded_vocab_size"}
    with torch.device(setting.device):
        model = of_model._from_config(of_model.config_class(**keys, use_cache=False))
    load(model, setting, hf.table_for(config))
    return model.float().train()


def _require_kernels() -> None:
    """Without these, fla and transformers compute in plain PyTorch, which would be no comparison. Raises ImportError."""
    import causal_conv1d  # noqa: F401
    import mamba_ssm  # noqa: F401


def padded(config: Any) -> Any:
    """A config whose vocabulary has no padding: that of the tables' rows."""
    return config.model_copy(update={"vocab_size": config.padded_vocab_size})


def load(model: Any, setting: Any, table: Any) -> None:
    """Gives a peer's model the drawn weights, translated; ``setting`` has the config and the device."""
    from mamba_pretrain.models.layout import translate_out

    weights = translate_out(drawn(setting.config, setting.device), table)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"weights do not fit: missing {missing[:3]}, unexpected {unexpected[:3]}")


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The usual loss, of fp32 logits."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def plain_step(model: torch.nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], setting: Setting) -> Step:
    """The usual loop: autocast, clipping, fused AdamW with decay on matrices as its authors do it."""
    skip = [p for n, p in model.named_parameters() if p.dim() < 2 or n.endswith(("A_log", "D", "dt_bias", "conv1d.weight"))]
    chosen = {id(p) for p in skip}
    decayed = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": skip, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=setting.lr, betas=(0.9, 0.95), fused=True)
    steps = itertools.count()

    def step(tokens: Tensor) -> Tensor:
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        with torch.autocast(setting.device, torch.bfloat16):
            loss = loss_of(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = setting.rate(next(steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


IMPLEMENTATIONS: dict[str, Callable[..., Step]] = {
    "ours": ours,
    "mamba_ssm": mamba_ssm,
    "fla": fla,
    "transformers": transformers,
    "transformers_liger": transformers_liger,
}


class Fallbacks(logging.Handler):
    """Remembers what transformers and fla say about kernels that they do without; they say it once a process."""

    WORDS = ("falling back", "fast path is not available")

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def about(self, implementation: str) -> str | None:
        """What was said about that implementation's kernels."""
        package = implementation.split("+")[0].split("_")[0]
        return next((message for message in self.messages if message.startswith(package)), None)

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a message about a slow path."""
        message = record.getMessage()
        if any(word in message.lower() for word in self.WORDS):
            self.messages.append(f"{record.name}: {' '.join(message.split())[:200]}")


def watched() -> Fallbacks:
    """The one handler of this process."""
    if not _fallbacks:
        _fallbacks.append(Fallbacks())
        for name in ("transformers", "fla"):
            logging.getLogger(name).addHandler(_fallbacks[0])
    return _fallbacks[0]


_fallbacks: list[Fallbacks] = []
