"""Every shipped run config is complete, valid, and what its header and folder say."""

import re
from pathlib import Path

import pytest
import yaml

from mamba_pretrain.config import load_config
from mamba_pretrain.models.model_flops import describe
from mamba_pretrain.planning.plan import Machine, make_plan

CONFIGS = Path(__file__).parents[1] / "configs"
FOLDERS = ("mamba1", "mamba2", "hybrid", "scaling-law", "long-context")
RUNS = [
    CONFIGS / "quickstart.yaml",
    *sorted(path for folder in FOLDERS for path in (CONFIGS / folder).glob("*.yaml")),
]
# Millions of parameters: the papers' tables; Falcon-Mamba and Bamba as published.
PARAMETERS = {
    "mamba1/130m": 129.1,
    "mamba1/370m": 371.5,
    "mamba1/790m": 793.2,
    "mamba1/1.4b": 1372.2,
    "mamba1/2.8b": 2768.3,
    "mamba1/falcon-mamba-7b": 7272.7,
    "mamba2/130m": 129.0,
    "mamba2/370m": 368.3,
    "mamba2/780m": 780.2,
    "mamba2/1.3b": 1343.8,
    "mamba2/2.7b": 2702.6,
    "hybrid/mamba2-attention-370m": 345.0,
    "hybrid/jamba-like-1.3b": 1293.7,
    "hybrid/bamba-9b": 9780.2,
}


def short(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(""))


@pytest.mark.parametrize("path", RUNS, ids=short)
def test_it_is_valid_and_complete(path):
    config = load_config(path)
    tree = yaml.safe_load(path.read_text())
    assert set(tree) >= {
        "name",
        "run_dir",
        "seed",
        "model",
        "data",
        "optim",
        "train",
        "parallel",
        "precision",
        "checkpoint",
        "evaluation",
        "monitor",
    }
    assert str(config.run_dir) == f"runs/{config.name}"


@pytest.mark.parametrize("path", RUNS, ids=short)
def test_every_key_that_is_not_self_evident_has_a_comment(path):
    bare = [line for line in path.read_text().splitlines() if re.match(r"\s*\S+:\s+\S", line) and "#" not in line]
    evident = {
        "time_step_max",
        "bcdt_rms_eps",
        "betas",
        "eps",
        "every_steps",
        "max_samples",
        "steps",
        "name",
        "start",
        "increment",
        "keep_last",
    }
    evident |= {"prompts", "max_new_tokens", "log_every"}
    assert {line.split(":")[0].strip() for line in bare} <= evident


def test_every_size_has_the_published_number_of_parameters():
    published = [path for path in RUNS if path.parent.name in ("mamba1", "mamba2", "hybrid")]
    found = {short(path): round(describe(load_config(path).model, 2048)["parameters"] / 1e6, 1) for path in published}
    assert found == PARAMETERS


# Tokens of the scaling-law runs (both papers): sizes, and 0.5M tokens a batch.
SCALING_LAW = {"130m": 2.5e9, "370m": 7e9, "790m": 15e9, "780m": 15e9, "1.4b": 26e9, "1.3b": 26e9}


@pytest.mark.parametrize("path", [path for path in RUNS if path.parent.name == "scaling-law"], ids=short)
def test_a_scaling_law_run_is_the_full_recipe_but_for_its_length_and_tokenizer(path):
    mixer, size = path.stem.split("-")
    found, full = load_config(path), load_config(CONFIGS / mixer / f"{size}.yaml")
    assert (found.train.tokens, found.train.global_batch_tokens) == (SCALING_LAW[size], 524288)
    assert found.model.vocab_size == 50257
    for config in (found, full):
        config.name, config.run_dir, config.data.sources = "", Path(), []
        config.train.tokens = config.train.global_batch_tokens = config.model.vocab_size = 1
    assert found == full


def test_scaling_law_has_every_size():
    assert {path.stem for path in (CONFIGS / "scaling-law").glob("*.yaml")} == {
        f"{path.parent.name}-{path.stem}" for path in RUNS if path.parent.name in ("mamba1", "mamba2") and path.stem in SCALING_LAW
    }


@pytest.mark.parametrize("path", [path for path in RUNS if path.parent != CONFIGS], ids=short)
def test_the_plan_has_nothing_against_it(path):
    """On one node of eight H100: it fits, and nothing is warned of."""
    found = make_plan(load_config(path), Machine.of("H100", 8))
    assert found.memory["fits"], found.memory
    ramp = ["the batch ramp is left out of the estimates"] if load_config(path).train.batch_ramp else []
    assert [warning.split(":")[0] for warning in found.warnings] == ramp


@pytest.mark.parametrize("path", [p for p in RUNS if p.parent.name in ("mamba1", "mamba2") and "falcon" not in p.name], ids=short)
def test_the_papers_recipe(path):
    config = load_config(path)
    assert config.model.mixer == path.parent.name
    assert config.optim.betas == (0.9, 0.95)
    assert (config.optim.weight_decay, config.optim.max_grad_norm) == (0.1, 1.0)
    assert (config.optim.schedule.name, config.optim.schedule.warmup_fraction, config.optim.schedule.min_lr) == ("cosine", 0.1, 1e-5)
    assert config.data.sequence_length == 2048
    assert config.train.tokens == 300_000_000_000
    sequences, rest = divmod(config.train.global_batch_tokens, 2048)
    assert (sequences, rest) in ((256, 0), (512, 0))
    assert sequences % (8 * config.train.micro_batch_size) == 0, "fits eight GPUs without a remainder"


def test_a_path_given_on_the_command_line_takes_the_place_of_the_sources():
    config = load_config(CONFIGS / "mamba2" / "130m.yaml", ["data.path=data/corpus"])
    assert [(source.path, source.name, source.weight) for source in config.data.sources] == [("data/corpus", "corpus", 1.0)]
