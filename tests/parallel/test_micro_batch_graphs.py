"""Replayed micro-batches give what launched ones give, to the bit, whatever happens between them.

On a CPU a stand-in records: it holds on to memory as a CUDA graph does (what is not computed by a replay is NaN, what a replay computes lands
where the recording put it), so the bookkeeping around graphs is tested on any machine, and the graphs themselves on a GPU.
"""

from __future__ import annotations

import logging
import math

import pytest
import torch

from data_tools.errors import UserError
from mamba_pretrain.checkpoint.config import CheckpointConfig
from mamba_pretrain.checkpoint.reading import open_checkpoint
from mamba_pretrain.checkpoint.store import CheckpointStore
from mamba_pretrain.parallel import topology
from mamba_pretrain.parallel.build import check_cuda_graphs
from mamba_pretrain.parallel.config import ParallelConfig
from mamba_pretrain.parallel.micro_batch_graphs import MAX_SHAPES
from mamba_pretrain.parallel.topology import Topology
from mamba_pretrain.training.step import train_step

ALONE = Topology(0, 0, 1, 1, 0, "python", torch.device("cpu"))
MODELS = ("mamba1", "mamba2", "hybrid")


class StandIn:
    """Records on a CPU. ``replays`` and ``recorded`` count; ``fail_at`` makes that recording fail halfway."""

    def __init__(self, engine, fail_at=None, room=True):
        self.parameters = [p for _, p in engine._named]
        self.recorded = self.replays = self.forgotten = 0
        self.fail_at, self.room = fail_at, room

    def record(self, work):
        self.recorded += 1
        before = [None if p.grad is None else (p.grad, p.grad.clone()) for p in self.parameters]
        work()
        if self.recorded == self.fail_at:
            for known in before:
                if known is not None:
                    known[0].copy_(known[1])
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        buffers = [p.grad for p in self.parameters]
        for known, buffer in zip(before, buffers, strict=True):
            if known is not None:
                assert known[0] is buffer, "an accumulating pass must add in place"
                buffer.copy_(known[1])
            elif buffer is not None:
                buffer.fill_(float("nan"))
        adds = before[0] is not None

        def replay():
            self.replays += 1
            now = [p.grad for p in self.parameters]
            if adds:
                assert all(g is buffer for g, buffer in zip(now, buffers, strict=True)) or buffers[0] is None
                work()
                return
            for p in self.parameters:
                p.grad = None
            work()
            made = [p.grad for p in self.parameters]
            for p, gradient, buffer, old in zip(self.parameters, made, buffers, now, strict=True):
                if buffer is not None:
                    buffer.copy_(gradient)
                p.grad = old

        return replay

    def has_room(self, share):
        return share <= self.room

    def forget(self):
        self.forgotten += 1


@pytest.fixture
def make(worker):
    """An engine of one process, with or without recordings."""

    def make(model="mamba1", graphs=True, parallel=None, **stand_in):
        job = worker.Job("x", "single", model, parallel=parallel or {})
        engine, _, _ = worker.build(job, ALONE)
        if graphs:
            engine.recorder = StandIn(engine, **stand_in)
            engine.use_graphs(engine.recorder)
        return engine

    return make


def train(engine, worker, step, micro=6, skip=False):
    found = train_step(engine, worker.my_batches(step, ALONE, micro), 1e-2, 0.5, lambda norm: skip)
    return float(found.loss), float(found.grad_norm)


def weights_of(engine):
    return {name: tensor.clone() for name, tensor in engine.full_state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("model", MODELS)
def test_five_steps_with_accumulation_a_skip_and_an_evaluation(make, worker, model):
    graphed, launched = make(model), make(model, graphs=False)
    for engine in (graphed, launched):
        engine.seen = []
        for step in range(5):
            engine.seen.append(train(engine, worker, step, skip=step == 2))
            if step == 3:
                engine.seen.append(float(sum(engine.evaluate(batch) for batch in worker.my_batches(99, ALONE, 6))))
    assert graphed.seen == launched.seen
    assert_equal(weights_of(graphed), weights_of(launched))
    # Two recordings: the first micro-batch overwrites, the others add; the first step was launched.
    assert (graphed.recorder.recorded, graphed.recorder.replays) == (2, 4 * 2)


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_activation_checkpointing(make, worker, mode):
    graphed, launched = (make("hybrid", graphs, {"activation_checkpointing": mode}) for graphs in (True, False))
    assert [train(graphed, worker, step) for step in range(3)] == [train(launched, worker, step) for step in range(3)]
    assert graphed.recorder.replays == 2 * 2


def test_accumulation_may_change_from_step_to_step(make, worker):
    # Batches of 12, 6, 4 and 3 sequences: other shapes come and go, and each is launched once before it is recorded.
    graphed, launched = make(), make(graphs=False)
    micros = [12, 6, 4, 12, 6, 4, 12, 6]
    for step, micro in enumerate(micros):
        assert train(graphed, worker, step, micro) == train(launched, worker, step, micro)
    assert_equal(weights_of(graphed), weights_of(launched))
    assert graphed.recorder.replays == 1 + 2 + 3 + 1 + 2


def test_shapes_that_mix_within_a_step(make, worker):
    graphed, launched = make(), make(graphs=False)
    for step in range(4):
        # 5, 5 and 2 sequences; in odd steps the odd one comes first.
        for engine in (graphed, launched):
            batches = worker.my_batches(step, ALONE, 5)
            train_step(engine, batches if step % 2 == 0 else batches[::-1], 1e-2, 0.5)
    assert_equal(weights_of(graphed), weights_of(launched))
    assert graphed.recorder.replays == 3 * 3


def test_a_step_that_begins_launched_is_launched_to_its_end(make, worker):
    graphed, launched = make(), make(graphs=False)
    for engine in (graphed, launched):
        train(engine, worker, 0)
        # A shape never seen, then one that could be replayed: its recording would not know the gradients that are there.
        train_step(engine, worker.my_batches(1, ALONE, 12) + worker.my_batches(2, ALONE, 6), 1e-2, 0.5)
        train(engine, worker, 3)
    assert_equal(weights_of(graphed), weights_of(launched))
    assert graphed.recorder.replays == 2


def test_too_many_shapes_end_the_use_of_graphs(make, worker, caplog):
    graphed, launched = make(), make(graphs=False)
    for _ in range(2):
        for micro in (12, 6, 4, 3, 2):
            assert train(graphed, worker, micro, micro) == train(launched, worker, micro, micro)
    assert f"more than {MAX_SHAPES} shapes" in caplog.text
    assert_equal(weights_of(graphed), weights_of(launched))


@pytest.mark.parametrize("fail_at", [1, 2])
def test_a_recording_that_fails_leaves_no_trace(make, worker, caplog, fail_at):
    # 1: of a step's first micro-batch; 2: of its second, whose first was replayed.
    graphed, launched = make(fail_at=fail_at), make(graphs=False)
    for step in range(4):
        assert train(graphed, worker, step) == train(launched, worker, step)
    assert_equal(weights_of(graphed), weights_of(launched))
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "operation not permitted when stream is capturing" in warnings[0]
    assert graphed.recorder.recorded == fail_at


def test_loading_a_checkpoint_goes_on_with_the_same_recordings(make, worker, tmp_path):
    graphed = make()
    for step in range(3):
        train(graphed, worker, step)
    CheckpointStore(tmp_path / "checkpoints", CheckpointConfig(async_save=False), ALONE).save(graphed, 3, {})
    expected = [train(graphed, worker, step) for step in (3, 4)]
    graphed.load(open_checkpoint(tmp_path).reader)
    recorded = graphed.recorder.recorded
    assert [train(graphed, worker, step) for step in (3, 4)] == expected
    assert graphed.recorder.recorded == recorded


def test_an_evaluation_that_finds_no_room_has_the_recordings_made_again(make, worker):
    graphed, launched = make(room=0.05), make(graphs=False)
    for engine in (graphed, launched):
        engine.seen = []
        for step in range(4):
            engine.seen.append(train(engine, worker, step))
            if step == 2:
                engine.seen.append(float(engine.evaluate(worker.my_batches(99, ALONE, 6)[0])))
    assert graphed.seen == launched.seen
    assert (graphed.recorder.forgotten, graphed.recorder.recorded, graphed.recorder.replays) == (1, 4, 3 * 2)


@pytest.mark.parametrize("room", [True, False])
def test_a_step_that_is_watched_is_launched(make, worker, room):
    graphed, launched = make(room=room), make(graphs=False)
    seen = []
    graphed.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    for step in range(5):
        if step == 3:
            graphed.watchers.add("test")
            seen.clear()
            before = graphed.recorder.replays
        assert train(graphed, worker, step) == train(launched, worker, step)
        if step == 3:
            assert len(seen) == 2
            assert graphed.recorder.replays == before
            graphed.watchers.clear()
    assert graphed.recorder.replays == 3 * 2
    # Without room for both, recordings make way for the step, and are made again.
    assert (graphed.recorder.forgotten, graphed.recorder.recorded) == ((0, 2) if room else (1, 4))


def test_a_loss_is_the_callers_own(make, worker):
    engine = make()
    train(engine, worker, 0)
    first, second = worker.my_batches(1, ALONE, 6)
    one = torch.ones(())
    kept = engine.loss(first, last=False)
    assert math.isnan(float(kept)), "a recorded loss is not known before its backward pass has run"
    engine.backward(kept, one)
    value = float(kept)
    assert math.isfinite(value)
    engine.backward(engine.loss(second, last=True), one)
    assert float(kept) == value


def test_passes_out_of_order_are_refused(make, worker):
    engine = make()
    train(engine, worker, 0)
    first, second = worker.my_batches(1, ALONE, 6)
    early = engine.loss(first, last=False)
    engine.loss(second, last=True)
    with pytest.raises(RuntimeError, match="must follow its forward pass at once"):
        engine.backward(early, torch.ones(()))


@pytest.mark.parametrize(
    ("strategy", "device", "words"),
    [
        ("zero3", "cuda", "not zero3"),
        ("zero1", "cuda", "not zero1"),
        ("single", "cpu", "not cpu"),
    ],
)
def test_where_graphs_are_refused(strategy, device, words):
    place = Topology(0, 0, 1, 1, 0, "python", torch.device(device))
    with pytest.raises(UserError, match=f"parallel.cuda_graphs=on needs .*{words}"):
        check_cuda_graphs(ParallelConfig(cuda_graphs="on"), strategy, place)
    check_cuda_graphs(ParallelConfig(), strategy, place)


def test_offloaded_gradients_are_refused():
    place = Topology(0, 0, 2, 2, 0, "torchrun", torch.device("cuda"))
    with pytest.raises(UserError, match="needs gradients that stay on the GPU"):
        check_cuda_graphs(ParallelConfig(cuda_graphs="on", cpu_offload=True), "fsdp2", place)
    check_cuda_graphs(ParallelConfig(cuda_graphs="on"), "fsdp2", place)
    check_cuda_graphs(ParallelConfig(cuda_graphs="on"), "hsdp", place)


def test_a_recording_that_fails_beside_other_processes_ends_the_run(make, worker):
    engine = make(fail_at=1)
    engine._graphs._alone = False
    train(engine, worker, 0)
    with pytest.raises(UserError, match=r"parallel\.cuda_graphs=off"):
        train(engine, worker, 1)


def test_recordings_are_given_up_before_the_process_group_is_left(make, worker):
    # NCCL's communicators are not destroyed while a graph holds them: leaving the group would hang.
    engine, other = make(), make()
    for step in range(2):
        train(engine, worker, step)
    assert engine._graphs._recordings
    del other  # an engine that is gone is not kept for this
    topology.shutdown()
    assert not engine._graphs._recordings
    replays = engine.recorder.replays
    train(engine, worker, 2)
    assert engine.recorder.replays == replays, "what comes afterwards is launched"


def test_an_engine_that_cannot_refuses_before_anything_is_built(worker):
    with pytest.raises(UserError, match="cuda_graphs=on needs a CUDA device"):
        worker.build(worker.Job("x", "single", parallel={"cuda_graphs": "on"}), ALONE)


@pytest.mark.parametrize(("value", "word"), [(True, "on"), (False, "off"), ("on", "on"), ("auto", "auto")])
def test_words_that_yaml_takes_for_truth_values(value, word):
    assert ParallelConfig(cuda_graphs=value).cuda_graphs == word


# -- on a GPU -------------------------------------------------------------------------------------------------------------------------------

HERE = Topology(0, 0, 1, 1, 0, "python", torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("compute", ["bf16", "fp32"])
@pytest.mark.parametrize("mode", ["none", "block", "selective"])
@pytest.mark.parametrize("model", MODELS)
def test_graphs_equal_launches_on_a_gpu(worker, model, mode, compute, caplog):
    engines = {}
    for graphs in ("on", "off"):
        parallel = {"cuda_graphs": graphs, "activation_checkpointing": mode}
        engine, _, _ = worker.build(worker.Job("x", "single", model, compute, parallel=parallel), HERE)
        seen = []
        for step in range(6):
            found = train_step(engine, worker.my_batches(step, ALONE, 6), 1e-3, 0.5, lambda norm, step=step: step == 2)
            seen += [float(found.loss), float(found.grad_norm)]
            if step == 3:
                seen.append(float(sum(engine.evaluate(batch) for batch in worker.my_batches(99, ALONE, 6))))
        engines[graphs] = seen, weights_of(engine), engine
    assert "CUDA graphs cannot be used" not in caplog.text
    graphs = engines["on"][2]._graphs
    assert graphs.failed is None
    assert len(graphs._recordings) == 2
    # Equal to the bit with our kernels. Others' (attention, mamba_ssm, causal-conv1d) add atomically: two launched runs differ as much, and AdamW's
    # first steps turn the sign of a gradient near zero into a whole step.
    assert engines["on"][0] == pytest.approx(engines["off"][0], rel=1e-5)
    for name, value in engines["off"][1].items():
        assert float((engines["on"][1][name] - value).norm()) <= 1e-3 * float(value.norm()), name


@pytest.mark.gpu
def test_documents_of_the_moment_count_on_a_gpu(worker):
    """The same tokens with other boundaries have another loss in a replay, and the one that launching gives."""
    parallel = {"cuda_graphs": "on"}
    engine, _, _ = worker.build(worker.Job("x", "single", "hybrid", parallel=parallel), HERE)
    train_step(engine, worker.my_batches(0, ALONE, 12), 1e-3, 0.5)
    (batch,) = worker.my_batches(1, ALONE, 12)
    joined = type(batch)(
        batch.tokens,
        batch.labels,
        torch.zeros_like(batch.seq_idx),
        torch.arange(32).expand(12, 32).contiguous(),
        batch.n_valid,
        batch.sample_ids,
    )
    losses, kept = {}, {}
    for name, given in (("cut", batch), ("joined", joined), ("cut again", batch)):
        loss = engine.loss(given, last=True)
        assert not loss.requires_grad, "this was launched, not replayed"
        engine.backward(loss, torch.ones(()))
        losses[name], kept[name] = float(loss), loss
        assert losses[name] == pytest.approx(float(engine.evaluate(given)), rel=1e-5)
    assert losses["cut"] == losses["cut again"] != losses["joined"]
    assert {name: float(loss) for name, loss in kept.items()} == losses, "a replay overwrote a loss that was handed out"


@pytest.mark.gpu
def test_a_recording_that_fails_leaves_no_trace_on_a_gpu(worker, caplog):
    engines = [worker.build(worker.Job("x", "single", "mamba1", parallel={"cuda_graphs": graphs}), HERE)[0] for graphs in ("on", "off")]

    def read(module, inputs, output):
        output[0].sum().item()  # waits for the device, which no recording may do

    engines[0].model.layers[1].register_forward_hook(read)
    for step in range(3):
        found = [float(train_step(engine, worker.my_batches(step, ALONE, 6), 1e-3, 0.5).loss) for engine in engines]
        assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert caplog.text.count("CUDA graphs cannot be used") == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(4, device="cuda").isfinite().all()


@pytest.mark.gpu
def test_another_threads_work_does_not_disturb_a_recording(worker):
    """The loader pins memory, a save copies weights: from threads of their own, while a step is recorded."""
    import threading

    stop = threading.Event()

    def disturb():
        while not stop.is_set():
            torch.zeros(1 << 16).pin_memory().to("cuda", non_blocking=True).sum().item()

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        engine, _, _ = worker.build(worker.Job("x", "single", "mamba1", parallel={"cuda_graphs": "on"}), HERE)
        for step in range(3):
            train_step(engine, worker.my_batches(step, ALONE, 6), 1e-3, 0.5)
    finally:
        stop.set()
        thread.join()
    assert engine._graphs.failed is None
    assert len(engine._graphs._recordings) == 2
