"""The plan: sizes that can be counted by hand, orderings that must hold, warnings that must fire."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from data_tools.errors import UserError
from mamba_pretrain.config import load_config
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.ops.cross_entropy import CHUNK_ELEMENTS
from mamba_pretrain.parallel.config import PrecisionConfig
from mamba_pretrain.parallel.torch_engine import cast_weights
from mamba_pretrain.planning import advice, communication, memory, speed
from mamba_pretrain.planning.activations import Options
from mamba_pretrain.planning.plan import Machine, Plan, Planner, make_plan, strategy_on
from mamba_pretrain.planning.show import show_found, show_plan

MakeConfig = Callable[..., Any]
TABLE = list(speed.PEER_TABLE)
REPOSITORY = Path(__file__).resolve().parents[2]


def shape_of(config: ModelConfig) -> memory.Shape:
    with torch.device("meta"):
        return memory.Shape.of(LanguageModel(config))


def test_plan_of_a_published_size(run_config: MakeConfig) -> None:
    plan = make_plan(run_config(), Machine.of("NVIDIA H100 80GB HBM3", 8))
    assert plan.parameters == pytest.approx(129.0e6, rel=0.003)
    assert sum(plan.parameters_by_kind.values()) == plan.parameters
    assert plan.batch_tokens == 256 * 2048
    assert plan.steps == -(-300 * 10**9 // plan.batch_tokens)
    assert plan.accumulation == 2
    assert plan.checkpoint["bytes"] == 12 * plan.parameters
    assert plan.memory["fits"]
    assert sum(plan.memory["parts"].values()) == pytest.approx(plan.memory["peak"])
    assert plan.time is not None
    assert plan.time["gpu_hours"] == pytest.approx(plan.time["seconds"] * 8 / 3600)
    json.dumps(plan.to_dict())
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show_plan(plan, console)
    text = console.export_text()
    for expected in ("GPU-hours", "mixer projections", "reduce-scatter of gradients", "efficiency", "zero3 +", "fits"):
        assert expected in text


def with_and_without_graphs(config: Any, gpus: int) -> tuple[Plan, Plan]:
    def of(mode: str) -> Plan:
        config.parallel = config.parallel.model_copy(update={"cuda_graphs": mode})
        return make_plan(config, Machine.of("NVIDIA H100 80GB HBM3", gpus), alternatives=False)

    return of("auto"), of("off")


def test_graphs_take_no_more_memory_where_a_step_is_one_micro_batch(run_config: MakeConfig) -> None:
    # Gradients come to be while activations go; a replay writes activations where its gradients will lie.
    replayed, launched = with_and_without_graphs(run_config(batch=16, micro=16, strategy="single"), 1)
    assert replayed.memory == launched.memory


def test_graphs_sum_every_micro_batchs_gradients_over_processes(run_config: MakeConfig) -> None:
    # Four micro-batches a step: launched, a process holds whole gradients until the last of them.
    replayed, launched = with_and_without_graphs(run_config(batch=64, micro=8, strategy="fsdp2"), 2)
    assert replayed.memory["parts"]["gradients"] == pytest.approx(4 * replayed.parameters / 2)
    assert replayed.memory["peak"] < launched.memory["peak"]


def test_state_bytes_of_every_engine(run_config: MakeConfig) -> None:
    config = ModelConfig(mixer="mamba2", n_layer=48, d_model=2048, vocab_size=50277)
    shape, n = shape_of(config), 8
    found = {s: memory.estimate(config, shape, memory.sharding(s, n), 1, 256, accumulation=2) for s in memory.STRATEGIES[1:]}
    total = shape.total
    assert found["ddp"].parts["optimizer"] == 8 * total
    assert found["ddp"].parts["weights"] == 4 * total
    assert found["ddp"].parts["gradients"] == 4 * total
    assert found["zero1"].parts["optimizer"] == total
    assert found["zero1"].parts["gradients"] == 4 * total
    assert found["zero2"].parts["gradients"] == total / 2
    for name in ("fsdp2", "zero3"):
        assert found[name].parts["weights"] == total / 2
        assert found[name].parts["optimizer"] == total
    assert found["fsdp2"].peak < found["zero2"].peak < found["zero1"].peak < found["ddp"].peak


def test_memory_grows_with_the_micro_batch_and_shrinks_with_recomputation() -> None:
    config = ModelConfig(mixer="mamba1", n_layer=24, d_model=768, vocab_size=50277)
    shape = shape_of(config)

    def peak(micro_batch: int, recompute: str) -> float:
        return memory.estimate(config, shape, memory.sharding("single", 1), micro_batch, 2048, options=Options(recompute=recompute)).peak

    assert peak(4, "none") < peak(8, "none") < peak(16, "none")
    assert peak(16, "block") < 0.5 * peak(16, "none")


def test_peak_of_a_tiny_batch_is_the_state_of_the_whole_model() -> None:
    """fp32 weights, gradients and moments; and bf16 weights, which stay where nothing is computed again."""
    config = ModelConfig(mixer="mamba2", n_layer=48, d_model=2048, vocab_size=50277)
    for recompute, bytes_each in (("none", 18), ("selective", 16)):
        found = memory.estimate(config, shape_of(config), memory.sharding("single", 1), 1, 128, options=Options(recompute=recompute))
        assert found.moment in ("optimizer step", "backward pass of block 0")
        assert found.peak == pytest.approx(bytes_each * shape_of(config).total, rel=0.02)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fp8", ["off", "rowwise"])
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_bf16_weights_are_those_that_the_engine_keeps(mixer: str, fp8: str, tied: bool) -> None:
    config = ModelConfig(mixer=mixer, n_layer=2, d_model=512, vocab_size=4096, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = LanguageModel(config)
    kept = 2 * sum(weight.numel() for weight in cast_weights(model, PrecisionConfig(fp8=fp8)))
    for strategy, gpus, planned in (("single", 1, kept), ("ddp", 2, kept), ("fsdp2", 1, kept), ("fsdp2", 2, 0), ("zero3", 2, 0)):
        found = memory.estimate(config, shape_of(config), memory.sharding(strategy, gpus), 1, 128, options=Options(fp8=fp8))
        assert found.parts.get("bf16 weights", 0) == planned, strategy


# Records of training on an H100 with the model's config, micro-batch, accumulation; where the measured peak stands, in GB.
MEASURED: list[tuple[str, str, int, int, Callable[[Any], float]]] = [
    ("gpu_training", "mamba1/130m", 16, 2, lambda found: found["training"]["mamba1-130m"]["memory_gb"]),
    ("gpu_training", "mamba2/130m", 16, 2, lambda found: found["training"]["mamba2-130m"]["memory_gb"]),
    ("train_step", "mamba1/370m", 16, 1, lambda found: found["comparisons"][0]["ours"]["peak_gb"]),
]


@pytest.mark.parametrize(("name", "config", "micro_batch", "accumulation", "peak"), MEASURED, ids=lambda value: str(value)[:12])
def test_peaks_measured_on_an_h100(name: str, config: str, micro_batch: int, accumulation: int, peak: Callable[[Any], float]) -> None:
    """Each training run that recorded its peak before the plan's own benchmark did."""
    first = min((REPOSITORY / "benchmarks" / "results").glob(f"{name}-nvidia-h100-*.json"))
    model = load_config(REPOSITORY / "configs" / f"{config}.yaml").model
    planned = memory.estimate(model, shape_of(model), memory.sharding("single", 1), micro_batch, 2048, accumulation).peak
    assert planned / 1e9 == pytest.approx(peak(json.loads(first.read_text())), rel=0.10)


def replayed() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Models, options and results of our training steps on one H100, from the records since steps are replayed."""
    for path in sorted((REPOSITORY / "benchmarks" / "results").glob("train_step-nvidia-h100-*.json")):
        record = json.loads(path.read_text())
        for row in record["comparisons"] if record["date"] >= "2026-11-28" else ():
            for name, found in row.items():
                if name.startswith("ours") and found.get("graphs") == "replayed":
                    yield row["model"], name.partition("+")[2], found


@pytest.mark.parametrize(("model", "options", "found"), replayed(), ids=lambda value: value if isinstance(value, str) else "")
def test_peaks_of_replayed_steps(model: str, options: str, found: dict[str, Any]) -> None:
    chosen = dict(option.split("=") for option in options.split("+") if option)
    config = load_config(REPOSITORY / "configs" / f"{model.replace('-', '/', 1)}.yaml").model
    run = Options(recompute=chosen.get("activation_checkpointing", "none"), fp8=chosen.get("fp8", "off"))
    planned = memory.estimate(config, shape_of(config), memory.sharding("single", 1), found["batch"], 2048, options=run, replayed=True).peak
    assert planned / 1e9 == pytest.approx(found["peak_gb"], rel=0.035)


def test_there_are_records_of_replayed_steps() -> None:
    assert len(list(replayed())) >= 10


@pytest.mark.parametrize("recompute", ["block", "projections", "selective"])
def test_sharding_takes_nothing_from_what_recomputation_keeps(recompute: str) -> None:
    config = ModelConfig(mixer="mamba1", n_layer=2, d_model=2048, vocab_size=50277)
    options, shape = Options(recompute=recompute), shape_of(config)
    sharded, single = (
        memory.estimate(config, shape, memory.sharding(s, n), 1, 2048, options=options) for s, n in (("fsdp2", 8), ("single", 1))
    )
    assert sharded.by_mixer == single.by_mixer


def test_the_loss_holds_a_chunk_of_logits_once_where_it_is_fused() -> None:
    config = ModelConfig(mixer="mamba1", n_layer=1, d_model=64, vocab_size=50000, pad_vocab_size_multiple=16)
    shape, one = shape_of(config), memory.sharding("single", 1)
    fused, plain = (memory.estimate(config, shape, one, 2, 4096, options=Options(fused=fused)).parts["loss"] for fused in (True, False))
    rows = CHUNK_ELEMENTS["cuda"] // config.padded_vocab_size
    assert plain - fused == 6 * rows * config.padded_vocab_size


def test_find_proposes_what_fits_and_is_fastest(run_config: MakeConfig) -> None:
    big = run_config(mixer="mamba1", n_layer=64, d_model=2560, batch=512)
    found = Planner(big, Machine.of("H100", 8)).best()
    assert found
    assert all(candidate.fits and candidate.needed <= 85e9 for candidate in found)
    assert found[0].recompute == "none"
    alone = Planner(big, Machine.of("A100-SXM4-40GB", 1)).best()
    assert all(candidate.recompute == "block" for candidate in alone)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show_found(found, Machine.of("H100", 8), console)
    show_found([], Machine.of("L4", 1), console)
    text = console.export_text()
    assert f"train.micro_batch_size={found[0].micro_batch}" in text
    assert "nothing fits" in text


def test_zero_waits_for_python_where_steps_are_short(run_config: MakeConfig) -> None:
    small = run_config(mixer="mamba1", n_layer=48, d_model=1024, batch=16, micro=8, strategy="zero3")
    planner = Planner(small, Machine.of("H100", 2))
    assert planner.candidate("zero3", 8, "none").step_seconds == pytest.approx(0.48)
    assert planner.candidate("fsdp2", 8, "none").step_seconds < 0.3
    assert make_plan(small, planner.machine, alternatives=False).scaling[1]["step_seconds"] == pytest.approx(0.48)
    assert any("parallel.strategy=fsdp2 with" in line for line in make_plan(small, planner.machine, alternatives=False).warnings)


def test_fp8_makes_wide_models_faster(run_config: MakeConfig) -> None:
    found = {}
    for width in (768, 2048):
        config = run_config(mixer="mamba1", d_model=width, n_layer=48)
        plain = Planner(config, Machine.of("H100", 1)).compute_seconds("none")
        config.precision = config.precision.model_copy(update={"fp8": "tensorwise"})
        found[width] = plain / Planner(config, Machine.of("H100", 1)).compute_seconds("none")
    assert found == {768: 1.0, 2048: pytest.approx(1.15)}


def test_speed_of_a_measured_model_is_the_measurement(run_config: MakeConfig) -> None:
    planner = Planner(run_config(), Machine.of("H100", 1))
    from mamba_pretrain.planning.plan import _flops_of_measured

    config, flops = planner.config.model, planner.training_flops
    exact = speed.expected_speed(config, flops, _flops_of_measured, "H100", TABLE)
    assert exact is not None
    assert exact.tokens_per_second == pytest.approx(188_608, rel=1e-6)
    assert "carried over" not in exact.source
    scaled = speed.expected_speed(config, flops, _flops_of_measured, "A100-SXM4-80GB", TABLE)
    assert scaled is not None
    assert scaled.tokens_per_second == pytest.approx(188_608 * 311.9 / 989.4, rel=1e-6)
    assert "scaled to A100" in scaled.source
    assert speed.expected_speed(config, flops, _flops_of_measured, "cpu", TABLE) is None


def test_own_records_come_before_the_peers(tmp_path: Any) -> None:
    for date, rate in (("2026-11-20T00:00", 1.0), ("2026-11-22T00:00", 2.0)):
        body = {
            "date": date,
            "device": "NVIDIA H100 80GB HBM3",
            "comparisons": [{"model": "mamba2-370m", "ours": {"tokens_per_second": rate}}],
        }
        (tmp_path / f"train_step-h100-{rate}.json").write_text(json.dumps(body))
    found = speed.own_records(tmp_path)
    assert [(m.mixer, m.n_layer, m.d_model, m.tokens_per_second) for m in found] == [("mamba2", 48, 1024, 2.0)]
    assert "2026-11-22" in found[0].source


def test_traffic_by_hand() -> None:
    n = 1_000_000
    (ddp,) = communication.traffic(memory.sharding("ddp", 4), n, 10, 3, 2)
    assert ddp.bytes == pytest.approx(2 * 3 / 4 * 4 * n)  # once a step, whatever the accumulation
    gather, scatter = communication.traffic(memory.sharding("fsdp2", 4), n, 10, 3, 2)
    assert gather.bytes == pytest.approx(2 * 3 / 4 * 2 * n * 3)
    assert scatter.bytes == pytest.approx(3 / 4 * 4 * n)
    *_, between = communication.traffic(memory.sharding("hsdp", 16), n, 10, 1, 2)
    assert between.ranks == 2
    assert between.bytes == pytest.approx(2 * 1 / 2 * 4 * n / 8)
    assert communication.traffic(memory.sharding("single", 1), n, 10, 1, 2) == []


def test_scaling_falls_with_the_network_and_stops_at_the_batch() -> None:
    fast, slow = communication.Network(), communication.Network(between_nodes=1e9)
    points = {name: communication.scaling("ddp", 10**9, 48, 100.0, 1024, 4, 2, net) for name, net in (("fast", fast), ("slow", slow))}
    assert [point.gpus for point in points["fast"]] == [2**i for i in range(11)]
    assert points["fast"][0].efficiency == pytest.approx(1.0)
    assert points["slow"][-1].efficiency < points["fast"][-1].efficiency <= 1.0
    assert communication.scaling("ddp", 10**9, 48, 100.0, 24, 4, 2, fast)[-1].gpus == 16


def config_with(**keys: Any) -> ModelConfig:
    return ModelConfig(**{"mixer": "mamba2", "n_layer": 2, "d_model": 768, "vocab_size": 50277, **keys})


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (advice.overflow_warnings(config_with(mixer="mamba1", d_model=4096), 4, 40_960), "past 2^31"),
        (advice.overflow_warnings(config_with(d_model=4096), 4, 65_536), "Mamba-2"),
        (advice.shape_warnings(config_with(vocab_size=50277, pad_vocab_size_multiple=1), 2048), "no multiple of 8"),
        (advice.shape_warnings(config_with(headdim=96), 2048), "no power of two"),
        (advice.shape_warnings(config_with(headdim=512), 2048), "no whole vectors"),
        (advice.shape_warnings(config_with(headdim=8), 2048), "no power of two from 16"),
        (advice.shape_warnings(config_with(d_state=512), 2048), "no power of two from 16"),
        (advice.shape_warnings(config_with(mixer="mamba1", d_state=24), 2048), "takes no packed documents"),
        (advice.shape_warnings(config_with(mixer="mamba1", d_state=512), 2048), "the slow reference"),
        (advice.engine_warnings("zero3", 0.5, 0.5), "Python launches every kernel"),
        (advice.shape_warnings(config_with(), 2000), "chunk_size 256"),
        (advice.recipe_warnings(config_with(), 130_000_000, 16_384, 10**12, 3e-3), "under the published 500.0k"),
        (advice.recipe_warnings(config_with(), 130_000_000, 500_000, 10**12, 1e-2), "more than 3x from the published 0.003"),
        (advice.recipe_warnings(config_with(), 130_000_000, 500_000, 10**9, 3e-3), "7.7 tokens per parameter"),
        (advice.batch_warnings(100, 8, 8), "no multiple"),
        (advice.data_warnings(10**9, 10**8), "10.0 epochs"),
    ],
)
def test_warnings(found: list[str], words: str) -> None:
    assert any(words in line for line in found), found


def test_published_shapes_raise_no_warning() -> None:
    config = config_with(n_layer=24)
    assert advice.overflow_warnings(config, 16, 2048) == []
    assert advice.shape_warnings(config, 2048) == []
    assert advice.recipe_warnings(config, 129_000_000, 524_288, 3 * 10**11, 3e-3) == []
    assert advice.shape_warnings(config_with(mixer="mamba1", d_state=16), 2048) == []
    assert advice.engine_warnings("zero3", 0.6, 0.5) == advice.engine_warnings("fsdp2", 0.1, 0.0) == []
    assert advice.batch_warnings(256, 16, 8) == []
    assert advice.data_warnings(10**9, None) == []


def test_too_large_is_said(run_config: MakeConfig) -> None:
    plan = make_plan(run_config(n_layer=64, d_model=2560, micro=64), Machine.of("A100-SXM4-40GB", 4), alternatives=False)
    assert not plan.memory["fits"]
    assert any("out of memory" in warning for warning in plan.warnings)


def test_unknown_device_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="known: cpu, GB200"):
        Machine.of("Voodoo 2", 1)


def test_cpu_has_no_limit_and_no_time(run_config: MakeConfig) -> None:
    plan = make_plan(run_config(n_layer=2, d_model=128, micro=2, batch=4, compute="fp32"), Machine.of("cpu", 1))
    assert plan.time is None
    assert plan.memory["capacity"] is None
    assert plan.memory["fits"]


def test_strategy_that_runs() -> None:
    assert [strategy_on(s, 8) for s in ("auto", "single", "zero3")] == ["fsdp2", "fsdp2", "zero3"]
    assert strategy_on("fsdp2", 1) == "single"
