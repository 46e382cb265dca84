import pytest
import torch

from data_tools.errors import UserError
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.generation import Decoder, Sampling, filtered, generate, load_model, pick
from mamba_pretrain.models.init import initialize
from mamba_pretrain.models.language_model import LanguageModel
from mamba_pretrain.models.pretrained import export_pretrained

KINDS = ["mamba1", "falcon", "mamba2", "attention", "hybrid"]
PROMPTS = [[5, 9, 2, 7, 11], [3], [8, 8, 1, 30, 2, 6, 40]]


def greedy_by_full_forward(model, prompt, n):
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_the_full_forward_pass_token_by_token(kind, small_config, randomized):
    model = randomized(small_config(kind))
    expected = [greedy_by_full_forward(model, prompt, 20) for prompt in PROMPTS]
    assert generate(model, PROMPTS, 20) == expected, "a batch of prompts of different lengths"
    assert [generate(model, [prompt], 20)[0] for prompt in PROMPTS] == expected, "one by one"


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_carries_on_from_pieces_of_any_length(kind, small_config, randomized):
    model = randomized(small_config(kind))
    tokens = torch.randint(0, 61, (2, 40))
    state = model.new_state(2, 40, "cpu")
    with torch.no_grad():
        pieces = [model(piece, state=state) for piece in tokens.split([1, 17, 1, 1, 3, 17], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mamba1", "falcon", "mamba2"])
def test_the_state_does_not_grow(kind, small_config):
    with torch.device("meta"):
        model = LanguageModel(small_config(kind))
    sizes = [
        sum(t.numel() for layer in model.new_state(1, length, "meta") for t in layer.values() if torch.is_tensor(t))
        for length in (10, 10**6)
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("kind", "changes"), [("mamba1", {}), ("falcon", {}), ("mamba2", {}), ("hybrid", {"pattern": "mamba2 x2, attention", "rotary_dim": 4})]
)
def test_64_greedy_tokens_equal_transformers(kind, changes, small_config, randomized, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = randomized(small_config(kind, **changes))
    export_pretrained(model.state_dict(), model.config, None, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    prompt = [5, 9, 2, 7, 11, 60, 4]
    out = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert generate(model, [prompt], 64)[0] == out[0, len(prompt) :].tolist()


def test_generation_stops_at_the_end_of_text(small_config, randomized):
    model = randomized(small_config("mamba2"))
    free = generate(model, PROMPTS, 20)
    eos = free[0][7]
    stopped = generate(model, PROMPTS, 20, eos_id=eos)
    for row, full in zip(stopped, free, strict=True):
        assert row == (full[: full.index(eos) + 1] if eos in full else full)
    assert len(stopped[0]) <= 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_is_used_again(kind, small_config, randomized):
    model = randomized(small_config(kind))
    decoder = Decoder(model, 3, 40)
    assert decoder(PROMPTS, 20) == generate(model, PROMPTS, 20)
    others = [[1], [2, 3, 4], [7]]
    assert decoder(others, 30) == generate(model, others, 30)
    for wrong, n in (([[1]], 20), (PROMPTS, 34)):
        with pytest.raises(UserError, match="do not fit a decoder of 3 x 40"):
            decoder(wrong, n)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2", "hybrid"])
def test_states_may_be_kept_in_bf16(kind, small_config, randomized):
    model = randomized(small_config(kind))
    tokens = torch.randint(0, 61, (2, 12))
    state = model.new_state(2, 12, "cpu", recurrent=torch.bfloat16)
    assert {layer["ssm"].dtype for layer in state if "ssm" in layer} == {torch.bfloat16}
    with torch.no_grad():
        pieces = [model(piece, state=state) for piece in tokens.split([5, 1, 1, 5], dim=1)]
        found, expected = torch.cat(pieces, 1), model(tokens)
    assert 0 < (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_sampling_is_seeded(small_config, randomized):
    model = randomized(small_config("mamba1"))
    first = generate(model, PROMPTS, 20, Sampling(seed=1))
    assert first == generate(model, PROMPTS, 20, Sampling(seed=1))
    assert first != generate(model, PROMPTS, 20, Sampling(seed=2))
    assert generate(model, PROMPTS, 20, Sampling(temperature=1e-4)) == generate(model, PROMPTS, 20)
    assert generate(model, PROMPTS, 20, Sampling(top_k=1)) == generate(model, PROMPTS, 20)
    assert generate(model, PROMPTS, 20, Sampling(top_p=1e-6)) == generate(model, PROMPTS, 20)


def test_a_model_in_bf16_keeps_what_must_be_fp32(small_config, randomized):
    for kind in KINDS:
        model = randomized(small_config(kind))
        low = load_model(model.config, model.state_dict(), dtype=torch.bfloat16)
        policies = model.parameter_policies()
        for name, parameter in low.named_parameters():
            assert parameter.dtype == (torch.float32 if policies[name].fp32 else torch.bfloat16), name
        tokens = torch.randint(0, 61, (2, 12))
        assert (low(tokens).float() - model(tokens)).abs().max() < 0.1
        assert len(generate(low, PROMPTS, 5)[0]) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_equals_the_plain_one(kind, small_config, randomized):
    model = load_model(small_config(kind), randomized(small_config(kind)).state_dict(), "cuda")
    expected = generate(model, PROMPTS, 40, device="cuda", cuda_graph=False)
    assert generate(model, PROMPTS, 40, device="cuda") == expected
    decoder = Decoder(model, 3, 50, device="cuda")
    assert [decoder(PROMPTS, 40) for _ in range(2)] == [expected, expected]


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    drawn = pick(probabilities.log().expand(20_000, 4), Sampling(), torch.rand(20_000, generator=torch.Generator().manual_seed(3)))
    counts = torch.bincount(drawn, minlength=4) / 20_000
    assert counts[1] == 0
    assert (counts - probabilities).abs().max() < 0.02


def test_top_k_and_top_p_keep_what_they_say():
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log()

    def kept(**settings):
        return filtered(logits, Sampling(**settings)).isfinite()[0].tolist()

    assert kept(top_k=2) == [True, False, True, False]
    assert kept(top_p=0.5) == [True, False, True, False]
    assert kept(top_p=0.39) == [True, False, False, False]
    assert kept(top_k=3, top_p=0.8) == [True, False, True, True]
    assert kept(top_k=9, top_p=1.0) == [True] * 4


@pytest.mark.parametrize(
    ("settings", "words"), [({"temperature": -1.0}, "temperature -1 is negative"), ({"top_k": 0}, "top_k 0"), ({"top_p": 1.5}, "top_p 1.5")]
)
def test_wrong_sampling_settings(settings, words):
    with pytest.raises(UserError, match=words):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("prompts", "words"), [([], "no prompt"), ([[1], []], "prompt 1 is empty"), ([[61]], "outside the model's vocabulary of 61")]
)
def test_wrong_prompts(prompts, words, small_config, randomized):
    with pytest.raises(UserError, match=words):
        generate(randomized(small_config("mamba1")), prompts, 5)


def memorized(config, rows):
    """A model trained on the GPU until it knows the rows by heart, so that no two tokens are nearly as likely."""
    torch.manual_seed(0)
    model = LanguageModel(config)
    initialize(model, 0)
    model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(400):
        logits = model(rows[:, :-1])[..., : config.vocab_size]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.02:
            return {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    raise AssertionError(f"the loss is still {float(loss):.3f}")


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_64_greedy_tokens_on_the_gpu_equal_those_of_the_cpu_transformers_and_mamba_ssm(mixer, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = pytest.importorskip("mamba_ssm.models.mixer_seq_simple")
    config = ModelConfig(mixer=mixer, vocab_size=512, d_model=256, n_layer=4)
    rows = torch.randint(512, (8, 80), generator=torch.Generator().manual_seed(1)).cuda()
    weights = memorized(config, rows)
    prompts = rows[:, :16].tolist()
    expected = generate(load_model(config, weights), prompts, 64)
    assert expected == rows[:, 16:].tolist(), "what was learnt comes out"
    assert generate(load_model(config, weights, "cuda"), prompts, 64, device="cuda") == expected

    export_pretrained(weights, config, None, tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).cuda()
    found = model.generate(rows[:, :16], max_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert found[:, 16:].tolist() == expected

    export_pretrained(weights, config, None, tmp_path / "ssm", format="mamba_ssm")
    model = theirs.MambaLMHeadModel.from_pretrained(str(tmp_path / "ssm"), device="cuda", dtype=torch.float32)
    assert model.generate(rows[:, :16], max_length=80, top_k=1)[:, 16:].tolist() == expected
