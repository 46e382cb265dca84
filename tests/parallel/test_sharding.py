"""What may share an FSDP2 group with bf16 projections, and where a shard lies in its tensor."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.parallel.sharding import is_projection, local_part

CONFIGS = {
    "mamba1": {"mixer": "mamba1"},
    "mamba2": {"mixer": "mamba2", "headdim": 8},
    "hybrid": {"pattern": "mamba2, attention", "headdim": 8, "n_head": 2, "d_intermediate": 24},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_matrix_of_a_block_is_a_projection_and_nothing_delicate_is(name):
    with torch.device("meta"):
        model = LanguageModel(ModelConfig(vocab_size=50, d_model=16, n_layer=2, d_state=4, **CONFIGS[name]))
    policies = model.parameter_policies()
    low = {
        f"{path}.{attribute}"
        for path, module in model.named_modules()
        if path.startswith("layers.") and is_projection(path, module, policies)
        for attribute, _ in module.named_parameters(recurse=False)
    }
    assert low == {n for n in policies if n.endswith("_proj.weight") and n.startswith("layers.")}
    assert not any(policies[n].fp32 for n in low)


@pytest.fixture
def group():
    """A process group that only pretends: this is rank 2 of 3."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=3)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("rows", "offset", "length"), [(7, 12, 2), (4, 8, 0), (9, 12, 6)])
def test_the_part_of_an_uneven_shard(group, rows, offset, length):
    full = torch.arange(rows * 2.0).view(rows, 2)
    mesh = DeviceMesh("cpu", [0, 1, 2])
    chunks = full.chunk(3)
    mine = chunks[2] if len(chunks) > 2 else full[:0]
    sharded = DTensor.from_local(mine, mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride())
    part, first = local_part(sharded)
    assert (first, part.numel()) == (offset, length)
    assert torch.equal(part.reshape(-1), full.reshape(-1)[first : first + length])
