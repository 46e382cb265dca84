import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from mamba_pretrain.optim.build import optimizer_builder, set_learning_rate
from mamba_pretrain.optim.config import OptimConfig
from mamba_pretrain.optim.groups import group_table, split_by_decay


@dataclass
class Policy:
    decay: bool


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.in_proj = nn.Linear(8, 8, bias=False)
        self.A_log = nn.Parameter(torch.zeros(8, 4))

    def forward(self, tokens):
        return (self.in_proj(self.embedding(tokens)) * self.A_log.exp().sum(-1)).square().mean()


POLICIES = {"embedding.weight": Policy(True), "in_proj.weight": Policy(True), "A_log": Policy(False)}


def test_decay_is_the_owners_decision_not_the_shapes():
    decayed, rest = split_by_decay(Toy().named_parameters(), POLICIES)
    assert [name for name, _ in decayed] == ["embedding.weight", "in_proj.weight"]
    assert [name for name, _ in rest] == ["A_log"], "A_log is 2-D and must not decay"


def test_an_unclassified_parameter_is_an_error():
    with pytest.raises(KeyError, match="A_log"):
        split_by_decay(Toy().named_parameters(), {k: v for k, v in POLICIES.items() if k != "A_log"})


def test_group_table_folds_layer_numbers():
    policies = {f"layers.{i}.mixer.D": Policy(False) for i in range(3)}
    table = group_table([(name, 8) for name in policies], policies)
    assert table.count("\n") == 0
    assert "layers.*.mixer.D" in table
    assert "3 x" in table


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_decayed_parameters_shrink_without_a_gradient(name):
    model = Toy()
    optimizer = optimizer_builder(OptimConfig(name=name, lr=0.1, weight_decay=0.5), POLICIES)(model.named_parameters())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) != POLICIES[n].decay, n


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_lowers_the_loss_and_state_survives_a_reload(name):
    config = OptimConfig(name=name, lr=0.01)
    model, tokens = Toy(), torch.arange(11)
    optimizer = optimizer_builder(config, POLICIES)(model.named_parameters())
    set_learning_rate(optimizer, 0.005)
    rates = {group["lr"] for group in optimizer.param_groups}
    assert rates == ({0.005} if name == "adamw" else {0.005, 0.005 * config.muon_lr / config.lr})
    first = model(tokens)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens).backward()
        optimizer.step()
    assert model(tokens) < first

    twin = Toy()
    twin.load_state_dict(model.state_dict())
    resumed = optimizer_builder(config, POLICIES)(twin.named_parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (twin, resumed)):
        o.zero_grad()
        m(tokens).backward()
        o.step()
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), n
