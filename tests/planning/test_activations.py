"""What the plan says a block keeps equals what autograd keeps when the block really runs."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from mamba_pretrain.models import init
from mamba_pretrain.models.block import Block
from mamba_pretrain.models.boundaries import Boundaries
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.fp8 import use_fp8
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.ops import registry
from mamba_pretrain.planning.activations import Options, _measure, block_cost, measure_block

BF16 = Options(torch.bfloat16, fused=False)
CASES = [
    ("mamba1", {}),
    ("mamba1", {"d_state": 8, "dt_rank": 4, "bcdt_rms": True}),
    ("mamba2", {"headdim": 32, "d_state": 16, "chunk_size": 32}),
    ("mamba2", {"headdim": 16, "ngroups": 2, "d_state": 8, "d_intermediate": 96}),
    ("attention", {"n_head": 4, "n_kv_head": 2}),
]


def config_of(mixer: str, keys: dict) -> ModelConfig:
    return ModelConfig(mixer=mixer, d_model=64, n_layer=2, vocab_size=256, **keys)


def real_block(config: ModelConfig, mixer: str) -> Block:
    model = LanguageModel(config)
    init.initialize(model, seed=0)
    return model.layers[0]  # type: ignore[return-value]


@pytest.mark.parametrize(("mixer", "keys"), CASES)
@pytest.mark.parametrize(
    ("compute", "fp8"), [(torch.bfloat16, "off"), (None, "off"), (torch.bfloat16, "rowwise"), (torch.bfloat16, "blockwise")]
)
def test_saved_bytes_equal_those_of_a_real_forward_pass(mixer: str, keys: dict, compute: torch.dtype | None, fp8: str) -> None:
    keys = {**keys, "headdim": 8, "ngroups": 1} if mixer == "mamba2" and fp8 != "off" else keys  # widths that are multiples of 16
    config = config_of(mixer, keys)
    block = real_block(config, mixer)
    if fp8 != "off":
        use_fp8(block, fp8)
    batch, length, dtype = 3, 80, compute or torch.float32
    hidden = torch.randn(batch, length, 64, dtype=dtype, requires_grad=True) * 1
    residual = torch.randn(batch, length, 64, requires_grad=True) * 1
    boundaries = Boundaries(torch.zeros(batch, length, dtype=torch.int32), torch.arange(length).expand(batch, length).contiguous())
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", dtype, enabled=compute is not None):
        ended = block(hidden, residual, boundaries)
    own = {p.untyped_storage().data_ptr() for p in block.parameters()} | {boundaries.seq_idx.untyped_storage().data_ptr()}
    own.add(boundaries.attention_mask.untyped_storage().data_ptr())
    assert ended[0].requires_grad
    real = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)
    planned = block_cost(config, mixer, batch, length, Options(compute, fused=False, fp8=fp8)).saved
    assert planned == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize(("mixer", "keys"), CASES[:3])
def test_peaks_on_fake_tensors_equal_those_on_real_ones(mixer: str, keys: dict) -> None:
    config = config_of(mixer, keys)
    planned = block_cost(config, mixer, 2, 96, BF16)
    real = measure_block(real_block(config, mixer), 64, 2, 96, BF16)
    assert planned.saved == pytest.approx(real.saved, rel=0.01)
    # Inside custom ops a real run allocates what a fake one cannot see.
    assert planned.backward <= real.backward * 1.01
    assert planned.forward <= real.forward * 1.01


@pytest.mark.parametrize("d_model", [768, 2048])
def test_mamba1_with_kernels_keeps_what_was_counted_by_hand(d_model: int) -> None:
    config = ModelConfig(mixer="mamba1", d_model=d_model, n_layer=1, vocab_size=256)
    d, e, r, n = d_model, 2 * d_model, config.resolved_dt_rank, 16
    per_token = 4 * d + 2 * d + 2 * 2 * e + 2 * e + 2 * (r + 2 * n) + 2 * e + 4 * n * e // 16 + 2 * e
    weights = 2 * (d * 2 * e + e * (r + 2 * n) + r * e + e * d)  # projections' bf16 copies
    planned = block_cost(config, "mamba1", 4, 2048, Options()).saved
    assert planned == pytest.approx(per_token * 4 * 2048 + weights, rel=0.005)


@pytest.mark.parametrize("fp8", ["tensorwise", "rowwise", "blockwise"])
def test_fp8_keeps_half_of_what_projections_keep(fp8: str) -> None:
    config = ModelConfig(mixer="mamba1", d_model=2048, n_layer=1, vocab_size=256)
    plain, low = (block_cost(config, "mamba1", 4, 2048, Options(fp8=name)).saved for name in ("off", fp8))
    inputs, weights = (2048 + 4096) * 4 * 2048, 2048 * 8192 + 4096 * 2048
    assert plain - low == pytest.approx(inputs + weights, rel=0.05)  # one byte of two, but for the scales


@pytest.mark.parametrize("d_model", [768, 2048])
def test_mamba2_with_kernels_keeps_what_was_counted_by_hand(d_model: int) -> None:
    config = ModelConfig(mixer="mamba2", d_model=d_model, n_layer=1, vocab_size=256)
    d, e, n, h = d_model, 2 * d_model, 128, 2 * d_model // 64
    per_token = 4 * d + 2 * d + 2 * (2 * e + 2 * n + h) + 2 * (e + 2 * n) + 2 * e + 4 * h + 2 * e
    weights = 2 * (d * (2 * e + 2 * n + h) + e * d)
    planned = block_cost(config, "mamba2", 4, 2048, Options()).saved
    assert planned == pytest.approx(per_token * 4 * 2048 + weights, rel=0.005)


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_recomputed_blocks_keep_their_inputs_only(mixer: str) -> None:
    config = ModelConfig(mixer=mixer, d_model=768, n_layer=1, vocab_size=256)
    plain, recomputed = (block_cost(config, mixer, 4, 2048, Options(recompute=r)) for r in ("none", "block"))
    assert recomputed.saved == pytest.approx(6 * 768 * 4 * 2048, rel=1e-3)  # bf16 hidden state and fp32 residual
    assert recomputed.backward > plain.saved  # the block is run again inside its backward pass


def test_cost_is_linear_in_the_batch() -> None:
    config = ModelConfig(mixer="mamba2", d_model=256, n_layer=1, vocab_size=256)
    interpolated = block_cost(config, "mamba2", 5, 512, Options())
    direct = _measure(config.model_dump_json(), "mamba2", 5, 512, Options())
    assert interpolated.saved == pytest.approx(direct.saved, rel=1e-6)
    assert interpolated.backward == pytest.approx(direct.backward, rel=0.01)


def test_stand_ins_leave_no_trace_in_the_registry() -> None:
    before = [(i.op, i.name) for i in registry.implementations()]
    block_cost(ModelConfig(mixer="mamba1", d_model=32, n_layer=1, vocab_size=256), "mamba1", 1, 32, Options())
    assert [(i.op, i.name) for i in registry.implementations()] == before
    assert all(choice.name != "planned" for choice in registry.choices())


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2", "attention"])
def test_selective_recomputation_keeps_more_than_inputs(mixer: str) -> None:
    config = ModelConfig(mixer=mixer, d_model=256, n_layer=1, vocab_size=256)
    modes = ("none", "selective", "projections", "block")
    none, selective, projections, block = (block_cost(config, mixer, 2, 1024, Options(recompute=mode)) for mode in modes)
    assert none.saved > selective.saved > block.saved
    assert none.backward < selective.backward < block.backward
    if mixer == "attention":
        assert projections == selective
    else:
        assert selective.saved > projections.saved > block.saved
