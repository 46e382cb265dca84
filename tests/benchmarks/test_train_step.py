"""The training benchmark's parts that need no GPU: weights, steps on a CPU, the search, tables and bars."""

from __future__ import annotations

import pytest
import torch

from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.init import initialize
from mamba_pretrain.models.language_model import LanguageModel

train_step = pytest.importorskip("train_step")
gpu_worker = pytest.importorskip("gpu_worker")
peers = pytest.importorskip("peers")
weights = pytest.importorskip("weights")

SMALL = {
    "mamba1": {"pattern": "mamba1", "d_state": 16},
    "mamba2": {"pattern": "mamba2", "d_state": 16, "headdim": 16},
    "hybrid": {"pattern": "mamba2, attention", "d_state": 16, "headdim": 16, "d_intermediate": 64, "n_head": 2, "rotary_dim": 8},
}


def small(kind: str) -> ModelConfig:
    return ModelConfig(vocab_size=64, d_model=32, n_layer=2, **SMALL[kind])


@pytest.fixture
def setting(monkeypatch):
    """Makes a setting of a small model on the CPU."""
    monkeypatch.setattr(train_step, "MODELS", dict.fromkeys(SMALL, ("", 2)))
    monkeypatch.setattr(train_step, "config_of", small)
    return lambda kind="mamba1": peers.Setting(kind, small(kind), 2, 16, device="cpu")


@pytest.fixture
def run(setting):
    """A run on the CPU, in this process; `saved` holds what was recorded."""
    saved = []

    def call(function, *arguments, seconds):
        return gpu_worker.run(function, *arguments)

    run = train_step.Run(
        call, "NVIDIA H100 80GB HBM3", "cpu", gpu_worker.Budget(600.0), lambda found: saved.append(len(found["comparisons"]))
    )
    run.saved = saved
    return run


def test_drawn_weights_have_the_distributions_of_a_run():
    config = ModelConfig(mixer="mamba1", vocab_size=500, d_model=64, n_layer=2)
    model = LanguageModel(config)
    initialize(model, 3)
    drawn, again = weights.drawn(config, "cpu"), weights.drawn(config, "cpu")
    for name, parameter in model.named_parameters():
        assert drawn[name].shape == parameter.shape
        assert drawn[name].dtype == torch.float32
        assert torch.equal(drawn[name], again[name])
        torch.testing.assert_close(
            drawn[name].mean(), parameter.detach().mean(), atol=0.3 * float(parameter.detach().std() + 1e-3), rtol=0.05
        )
        torch.testing.assert_close(drawn[name].std(), parameter.detach().std(), atol=1e-3, rtol=0.3)


@pytest.mark.parametrize("kind", SMALL)
def test_transformers_takes_the_same_steps(kind, setting):
    setting = setting(kind)
    tokens = setting.tokens(3)
    ours, theirs = (peers.build(name, setting) for name in ("ours", "transformers"))
    for batch in tokens:
        torch.testing.assert_close(ours(batch), theirs(batch), rtol=2e-3, atol=0.0)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_weights_fit_flas_models(kind, setting):
    models = pytest.importorskip("fla.models")
    from mamba_pretrain.models import hf

    setting = setting(kind)
    config = peers.padded(setting.config)
    keys = peers.fla_keys(config)
    model = (
        models.MambaForCausalLM(models.MambaConfig(**keys)) if kind == "mamba1" else models.Mamba2ForCausalLM(models.Mamba2Config(**keys))
    )
    peers.load(model, setting, hf.table_for(config))
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert torch.equal(
        model.backbone.layers[1].mixer.out_proj.weight, weights.drawn(setting.config, "cpu")["layers.1.mixer.out_proj.weight"]
    )


def test_a_comparison_records_after_every_part(run):
    run.compare(["ours", "ours+activation_checkpointing=block", "ours+cuda_graphs=on", "mamba_ssm"], run.setting("mamba1", 16, 2))
    row = run.found["comparisons"][0]
    assert run.saved == [1, 1, 1, 1]
    assert row["ours"]["losses"] == pytest.approx(row["ours+activation_checkpointing=block"]["losses"], rel=1e-3)
    assert len(row["ours"]["losses"]) == train_step.WARM_UP + train_step.STEPS
    assert row["ours"]["mfu"] > 0
    assert "error" in row["ours+cuda_graphs=on"], "there are no CUDA graphs on a CPU"
    assert "mamba_ssm" in row["mamba_ssm"]["error"]
    assert train_step.check(run.found) == [], "a small model has no bars"


def test_the_best_micro_batch_begins_where_the_comparison_was(run):
    settings = run.setting("mamba2", 16, 2)
    run.compare(["ours"], settings)
    run.best(["ours"], settings)
    best = run.found["best"][0]["ours"]
    assert list(best["tried"])[:2] == ["2", "4"]
    assert best["tokens_per_second"] == best["tried"][str(best["batch"])]


def test_nothing_begins_without_time(run):
    run.budget = gpu_worker.Budget(0.0)
    run.compare(["ours"], run.setting("mamba1", 16, 2))
    assert run.found["left_out"] == ["mamba1 length 16 ours"]


@pytest.mark.parametrize(
    ("rates", "begin", "best", "tried"),
    [
        ({1: 10, 2: 20, 4: 30, 8: 30.1}, 2, 4, ["2", "4", "8"]),
        ({1: 10, 2: 20, 4: 30}, 2, 4, ["2", "4", "8"]),
        ({1: 10, 2: 20}, 8, 2, ["2", "4", "8"]),
        ({}, 4, None, ["1", "2", "4"]),
    ],
)
def test_the_search_doubles_and_halves(rates, begin, best, tried):
    def trial(batch):
        return {"tokens_per_second": rates[batch], "batch": batch} if batch in rates else {"error": "out of memory"}

    found = train_step.search(trial, begin, None)
    assert found.get("batch") == best
    assert list(found["tried"]) == tried


def result(rate: float, **changes):
    fields = {"step_ms": 1e6 / rate, "tokens_per_second": rate, "mfu": 0.3, "mfu_6n": 0.3, "peak_gb": 10.0, "losses": [10.0, 9.0]}
    return fields | changes


def row(**found):
    peak = {"peak_gb": 20.0}
    peers = {"mamba_ssm": result(100, **peak), "fla": result(100, **peak), "transformers": result(90, **peak)}
    return {"model": "mamba1-1.4b", "length": 2048, "batch": 8, "ours": result(250), **peers, **found}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({}, None),
        ({"ours": result(239)}, "ours is 2.39x fla, under 2.4x"),
        ({"fla+fuse=linear_cross_entropy": result(120)}, "ours is 2.08x fla+fuse=linear_cross_entropy, under 2.4x"),
        ({"ours": {"error": "out of memory"}}, "ours: out of memory"),
        ({"fla": {"error": "did not finish in 180 s"}}, "fla was not compared: did not finish in 180 s"),
        ({"ours": result(250, peak_gb=14.1)}, "peak memory of ours is 70% of mamba_ssm's"),
        ({"ours": result(250, losses=[10.0, 9.1])}, "losses differ by 1.1e-02 from those of mamba_ssm"),
        ({"ours": result(250, losses=[10.0, float("nan")])}, "losses differ by nan"),
    ],
)
def test_bars(found, words):
    failed = train_step.check({"comparisons": [row(**found)]})
    assert (failed == []) if words is None else any(words in line for line in failed), failed


def test_one_setting_meets_speed_and_memory_together():
    fast, small = result(260, peak_gb=16.0), result(230, peak_gb=9.0)
    both = result(245, peak_gb=13.0)
    assert len(train_step.check({"comparisons": [row(**{"ours": fast, "ours+x=1": small})]})) == 1
    assert train_step.check({"comparisons": [row(**{"ours": fast, "ours+x=1": small, "ours+x=2": both})]}) == []


def test_a_setting_that_did_not_run_is_not_the_one_that_counts():
    slow = result(200, peak_gb=13.0)
    failed = train_step.check({"comparisons": [row(**{"ours": {"error": "out of memory"}, "ours+x=1": slow})]})
    assert failed == ["mamba1-1.4b: ours+x=1 is 2.00x fla, under 2.4x", "mamba1-1.4b: ours+x=1 is 2.22x transformers, under 2.6x"]


def test_a_setting_in_another_precision_is_shown_and_meets_no_bar():
    assert train_step.check({"comparisons": [row(**{"ours": result(200), "ours+fp8=rowwise": result(300, losses=[10.0, 9.5])})]}) == [
        "mamba1-1.4b: ours is 2.00x fla, under 2.4x",
        "mamba1-1.4b: ours is 2.22x transformers, under 2.6x",
    ]


def test_an_implementation_left_out_is_not_beaten():
    without = row()
    del without["transformers"]
    assert train_step.check({"comparisons": [without]}) == ["mamba1-1.4b: transformers was not compared: not measured"]


def test_a_peer_that_fits_only_a_smaller_batch_is_compared_at_its_best():
    equal, best = row(transformers={"error": "out of memory"}), row()
    assert train_step.check({"comparisons": [equal], "best": [best]}) == []
    assert train_step.check({"comparisons": [equal], "best": [row(transformers=result(200))]}) == [
        "mamba1-1.4b at the best micro-batch: ours is 1.25x transformers, under 2.6x"
    ]


@pytest.mark.parametrize(("ours", "fails"), [(1.0, False), (1.03, False), (1.06, True)])
def test_parity_is_judged_by_what_two_runs_of_mamba_ssm_differ_by(ours, fails):
    curve = [10.0 - i / 50 for i in range(100)]
    runs = {name: {"losses": [factor * loss for loss in curve]} | {"step_ms": 1.0} for name, factor in
            (("ours", ours), ("mamba_ssm", 1.0), ("mamba_ssm again", 1.02))}  # fmt: skip
    failed = train_step.check({"parity": [{"model": "mamba1-130m", "length": 2048, "steps": 100, **runs}]})
    assert bool(failed) == fails


def test_a_row_that_compares_less_takes_the_place_of_none():
    good = {"model": "mamba1-370m", "ours": {"step_ms": 1.0}, "mamba_ssm": {"step_ms": 2.0}}
    broken = {"model": "mamba1-370m", "ours": {"step_ms": 1.0}, "mamba_ssm": {"error": "no time was left"}}
    empty = {"model": "mamba1-370m", "ours": {"error": "no time was left"}, "mamba_ssm": {"step_ms": 2.0}}
    assert train_step.merged([{"comparisons": [good]}, {"comparisons": [broken, empty]}])["comparisons"] == [good]
    assert train_step.merged([{"comparisons": [empty]}, {"comparisons": [broken]}])["comparisons"] == [broken]
    assert train_step.merged([{"comparisons": [broken]}, {"comparisons": [empty]}])["comparisons"] == [broken]
    # Alone it stays, so that its error is told.
    assert train_step.merged([{"parity": [broken]}])["parity"] == [broken]


def test_the_newest_row_of_every_model_counts():
    old, new = row(), {**row(), "model": "mamba1-370m"}
    merged = train_step.merged([{"comparisons": [old]}, {"comparisons": [new, {**old, "batch": 4}]}, {"parity": []}])
    assert [(r["model"], r["batch"]) for r in merged["comparisons"]] == [("mamba1-1.4b", 4), ("mamba1-370m", 8)]
    assert "mamba2-1.3b: not measured" in train_step.missing(merged)
