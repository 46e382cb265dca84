"""The engine contract: whatever spreads the model, the numbers are those of one plain process."""

from __future__ import annotations

import pytest

ENGINES = ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
MODELS = ("mamba1", "mamba2", "hybrid")
CONTRACT = pytest.mark.parametrize(("engine", "model"), [(e, m) for e in ENGINES for m in MODELS])
# fp32 sums in another order; 20 steps stay within 1e-6 in practice.
FP32 = 1e-5
# Gradients are rounded to bf16 (2**-9 relative) per micro-batch, in another order under ZeRO; the loss averages over thousands of them.
BF16 = 2e-4
# After an update: weights that rounding of gradients moved may fall on the other side of a rounding to 8 bits, which is coarser by far.
FP8, FP8_NORM = 5e-4, 2e-2


def close(found, expected, tolerance):
    return found == pytest.approx(expected[: len(found)], rel=tolerance)


@CONTRACT
def test_losses_and_norms_are_those_of_one_process(single, two, engine, model):
    run, reference = two[f"{engine}-{model}"], single[model]
    assert close(run["losses"], reference["losses"], FP32)
    assert close(run["norms"], reference["norms"], FP32)
    assert run["evaluated"] == pytest.approx(reference["evaluated"], rel=FP32)
    assert run["losses"][-1] < run["losses"][0] - 0.2, "the model must learn, or equal losses say little"


@CONTRACT
def test_initial_weights_are_the_same_bits(single, two, engine, model):
    assert two[f"{engine}-{model}"]["init"] == single[model]["init"]


@CONTRACT
def test_bf16_computes_projections_and_spares_the_delicate(single, two, engine, model):
    run = two[f"{engine}-{model}-bf16"]
    assert run["dtypes"] == {"delicate": ["torch.float32"], "projected": ["torch.bfloat16"]}
    assert close(run["losses"], single[f"{model}-bf16"]["losses"], BF16)


@pytest.mark.parametrize("model", MODELS)
def test_bf16_differs_from_fp32(single, model):
    """Otherwise the test above would hold for an engine that ignores the setting."""
    assert single[f"{model}-bf16"]["losses"] != single[model]["losses"][:2]


@pytest.mark.parametrize("fp8", ["tensorwise", "rowwise", "blockwise"])
@pytest.mark.parametrize("engine", ENGINES)
def test_fp8_is_the_same_in_every_engine(single, two, engine, fp8):
    run, reference = two[f"{engine}-{fp8}"], single[f"fp8-{fp8}"]
    assert close(run["losses"], reference["losses"], FP8)
    assert close(run["norms"], reference["norms"], FP8_NORM)
    assert close([run["losses"][0], run["norms"][0]], [reference["losses"][0], reference["norms"][0]], BF16)
    assert run["dtypes"] == {"delicate": ["torch.float32"], "projected": ["torch.bfloat16"]}
    assert reference["losses"] != single["fp8-off"]["losses"]


@pytest.mark.parametrize("model", ["mamba1", "hybrid"])
@pytest.mark.parametrize("engine", ENGINES)
def test_three_processes_with_uneven_shards(single, three, engine, model):
    run = three[f"{engine}-{model}"]
    assert close(run["losses"], single[model]["losses"], FP32)
    assert close(run["norms"], single[model]["norms"], FP32)
    assert run["init"] == single[model]["init"]


@pytest.mark.parametrize("model", ["mamba1", "hybrid"])
@pytest.mark.parametrize("engine", ENGINES)
def test_three_processes_round_to_bf16_where_one_does(single, three, engine, model):
    """A backward pass from a loss times 3 rounds elsewhere: it moves the first norm or the second loss by more than sums in another order may."""
    run, reference = three[f"{engine}-{model}-bf16"], single[f"{model}-bf16"]
    assert close(run["norms"][:1], reference["norms"], FP32)
    assert close(run["losses"], reference["losses"], FP32)


@pytest.mark.parametrize("key", ["zero2-offload", "zero3-offload"])
def test_zero_offloads_on_three_processes(single, three, key):
    """What a mean over three leaves too large is taken out wherever gradients lie."""
    assert close(three[key]["losses"], single["hybrid"]["losses"], FP32)
    assert close(three[key]["norms"], single["hybrid"]["norms"], FP32)


@pytest.mark.parametrize("engine", [*ENGINES, "hpz"])
def test_four_processes(single, four, engine):
    run = four[f"{engine}-hybrid"]
    assert close(run["losses"], single["hybrid"]["losses"], FP32)
    assert close(run["norms"], single["hybrid"]["norms"], FP32)


def test_accumulation_does_not_change_the_loss(single):
    """Sequences hold between 9 and 32 valid tokens: a mean of their means would be another number."""
    one, twelve = single["accumulated-1"], single["accumulated-12"]
    assert close(twelve["losses"], one["losses"], FP32)
    assert close(twelve["norms"], one["norms"], FP32)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_skipped_step_leaves_no_trace(single, two, engine):
    run = two[f"{engine}-skip"]
    assert run["skipped"] == single["skip"]["skipped"] == [True, False, True, False]
    assert close(run["losses"], single["skip"]["losses"], FP32)
    assert close(run["norms"], single["skip"]["norms"], FP32)


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_zero_skips_steps_on_three_processes(single, three, engine):
    run = three[f"{engine}-skip"]
    assert run["skipped"] == single["skip"]["skipped"]
    assert close(run["losses"], single["skip"]["losses"], FP32)
    assert close(run["norms"], single["skip"]["norms"], FP32)


@pytest.mark.parametrize("mode", ["block", "selective", "projections"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_recomputing_changes_nothing(single, two, engine, mode):
    assert close(two[f"{engine}-{mode}"]["losses"], single["hybrid"]["losses"], FP32)


@pytest.mark.parametrize("key", ["fsdp2-offload", "zero2-offload", "zero3-offload", "fsdp2-kept"])
def test_where_state_lies_changes_nothing(single, two, key):
    assert close(two[key]["losses"], single["hybrid"]["losses"], FP32)
    assert close(two[key]["norms"], single["hybrid"]["norms"], FP32)


def test_muon_on_sharded_weights_continues_a_plain_run(single, two):
    """Newton-Schulz iterates in bf16, so sums in another order show earlier than elsewhere."""
    assert two["fsdp2-muon"]["losses"] == pytest.approx(single["muon"]["losses"][3:], rel=1e-4)


# -- a checkpoint of any engine continues under any other ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ENGINES)
def test_from_one_process_to_two(single, two, target):
    run = two[f"{target}-from-single-1"]
    assert run["losses"] == pytest.approx(single["hybrid"]["losses"][3:5], rel=FP32)
    assert run["norms"] == pytest.approx(single["hybrid"]["norms"][3:5], rel=FP32)


@pytest.mark.parametrize(("target", "source"), list(zip(ENGINES, [*ENGINES[1:], ENGINES[0]], strict=True)))
def test_from_two_processes_to_three_under_another_engine(single, three, target, source):
    run = three[f"{target}-from-{source}-2"]
    assert run["losses"] == pytest.approx(single["hybrid"]["losses"][3:5], rel=FP32)
    assert run["norms"] == pytest.approx(single["hybrid"]["norms"][3:5], rel=FP32)


@pytest.mark.parametrize("source", ENGINES)
def test_from_two_processes_to_one(single, single_continued, source):
    run = single_continued[f"from-{source}-2"]
    assert run["losses"] == pytest.approx(single["hybrid"]["losses"][3:5], rel=FP32)
    assert run["norms"] == pytest.approx(single["hybrid"]["norms"][3:5], rel=FP32)
