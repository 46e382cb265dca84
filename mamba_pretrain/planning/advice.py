"""What looks wrong about a run before it starts: silent overflow, slow shapes, a batch or learning rate far from the published recipe."""

from __future__ import annotations

from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.monitor.text import si
from mamba_pretrain.ops.cuda_scan_kernels import STATES
from mamba_pretrain.ops.triton_ssd import MAX_HEADDIM, MAX_STATE, MIN_WIDTH, fills_tile

INT32 = 2**31
# Published recipes (arXiv:2312.00752 appendix E.2, arXiv:2405.21060 appendix D): parameters, peak lr of Mamba-1 and Mamba-2, batch.
RECIPES = (
    (130e6, 3e-3, 3e-3, 0.5e6),
    (370e6, 1.5e-3, 1.5e-3, 0.5e6),
    (790e6, 1.25e-3, 1.25e-3, 0.5e6),
    (1.35e9, 1e-3, 1e-3, 1e6),
    (2.75e9, 4.8e-4, 8e-4, 1e6),
    (7.3e9, 6.4e-4, 6.4e-4, 2e6),
)
TOKENS_PER_PARAMETER = 20  # compute-optimal, arXiv:2203.15556
ROUGHLY = 0.9  # the optimum is flat, and published scaling-law runs stop a little before it
MAX_EPOCHS = 4  # repeating data more often helps little, arXiv:2305.16264


def overflow_warnings(config: ModelConfig, micro_batch: int, length: int) -> list[str]:
    """Tensors too large for kernels that index with 32-bit integers (state-spaces/mamba#1015: silently wrong or a crash)."""
    widths = {}
    if "mamba1" in config.layer_mixers:
        widths["Mamba-1's in_proj output"] = 2 * config.d_inner
    if "mamba2" in config.layer_mixers:
        widths["Mamba-2's in_proj output"] = 2 * config.d_inner + 2 * config.ngroups * config.d_state + config.n_ssm_head
        chunks = -(-length // config.chunk_size)
        states = micro_batch * chunks * config.d_inner * config.d_state
        if states >= INT32:
            return [_overflow("Mamba-2's chunk states", states, micro_batch, length)]
    found = [(name, micro_batch * length * width) for name, width in widths.items()]
    return [_overflow(name, size, micro_batch, length) for name, size in found if size >= INT32]


def _overflow(name: str, size: int, micro_batch: int, length: int) -> str:
    return (
        f"{name} holds {si(size, 2)} elements at micro-batch {micro_batch} x length {length}, past 2^31: kernels with 32-bit indices are "
        "silently wrong there; lower train.micro_batch_size"
    )


def shape_warnings(config: ModelConfig, length: int) -> list[str]:
    """Dimensions that kernels refuse or run slowly at."""
    found = []
    if config.padded_vocab_size % 8:
        found.append(f"the vocabulary of {config.padded_vocab_size} rows is no multiple of 8: slow matmuls; set pad_vocab_size_multiple: 8")
    if config.d_model % 8 or config.d_inner % 8:
        found.append(f"d_model {config.d_model} or d_inner {config.d_inner} is no multiple of 8: tensor cores stay unused")
    mixers = set(config.layer_mixers)
    if "mamba1" in mixers and config.d_state > 256:
        found.append(f"d_state {config.d_state} is above 256, which no selective-scan kernel takes; the slow reference would run")
    elif "mamba1" in mixers and config.d_state not in STATES:
        found.append(
            f"d_state {config.d_state} is none of {', '.join(map(str, STATES))}: on GPUs mamba-ssm's selective scan serves it, which is slower "
            "and takes no packed documents, for which only the slow reference would be left"
        )
    if "mamba2" in mixers:
        if (2 * config.d_inner + 2 * config.ngroups * config.d_state + config.n_ssm_head) % 8:
            found.append(
                "Mamba-2's in_proj width 2 d_inner + 2 ngroups d_state + heads is no multiple of 8: its rows are no whole vectors, so matmuls and "
                "convolution are slower, and causal-conv1d refuses them; choose headdim so that the number of heads is a multiple of 8"
            )
        fits = config.headdim <= MAX_HEADDIM and config.d_state <= MAX_STATE
        if not (fits and fills_tile(config.headdim) and fills_tile(config.d_state)):
            found.append(
                f"headdim {config.headdim} or d_state {config.d_state} is no power of two from {MIN_WIDTH} to {MAX_HEADDIM} (d_state: {MAX_STATE}): "
                "on GPUs mamba-ssm's scan serves it, slower than our own and padded to the next one"
            )
        if length % config.chunk_size:
            found.append(f"length {length} is no multiple of chunk_size {config.chunk_size}: the last chunk of each sequence is padding")
    return found


def recipe_warnings(config: ModelConfig, n_parameters: int, batch_tokens: int, total_tokens: int, lr: float) -> list[str]:
    """Where batch, learning rate and length are far from what was published at the nearest size."""
    size, lr1, lr2, batch = min(RECIPES, key=lambda recipe: abs(recipe[0] / n_parameters - 1) + abs(n_parameters / recipe[0] - 1))
    published = lr1 if "mamba1" in config.layer_mixers else lr2
    found = []
    if not 0.25 <= batch_tokens / batch <= 4:
        found.append(
            f"a batch of {si(batch_tokens, 2)} tokens is {'above' if batch_tokens > batch else 'under'} the published {si(batch)} at "
            f"{si(size, 0)} parameters by more than 4x"
        )
    if not 0.33 <= lr / published <= 3:
        found.append(f"lr {lr:g} is more than 3x from the published {published:g} at {si(size, 0)} parameters")
    if total_tokens < ROUGHLY * TOKENS_PER_PARAMETER * n_parameters:
        ratio = total_tokens / n_parameters
        found.append(f"{ratio:.1f} tokens per parameter is under the compute-optimal {TOKENS_PER_PARAMETER} (arXiv:2203.15556)")
    return found


def engine_warnings(strategy: str, step_seconds: float | None, launching_seconds: float) -> list[str]:
    """A GPU that would wait for Python."""
    if not launching_seconds or step_seconds is None or step_seconds > launching_seconds:
        return []
    return [
        f"under {strategy} Python launches every kernel, and a step takes about {launching_seconds:.2g} s however fast the GPUs are; "
        "parallel.strategy=fsdp2 with parallel.cuda_graphs=auto replays CUDA graphs, or raise train.micro_batch_size"
    ]


def batch_warnings(batch_samples: int, micro_batch: int, gpus: int) -> list[str]:
    """A global batch that does not split evenly."""
    if batch_samples % (micro_batch * gpus):
        return [
            f"the global batch of {batch_samples} sequences is no multiple of {gpus} GPUs x micro-batch {micro_batch}: training "
            "refuses it; change train.micro_batch_size, the batch or the number of GPUs"
        ]
    return []


def data_warnings(total_tokens: int, available: int | None) -> list[str]:
    """Too many passes over the data."""
    if not available or total_tokens <= MAX_EPOCHS * available:
        return []
    epochs = total_tokens / available
    return [f"{si(total_tokens, 2)} tokens from {si(available, 2)} at hand are {epochs:.1f} epochs; past {MAX_EPOCHS} they help little"]
