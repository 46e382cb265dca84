"""transformers is the oracle: logits and gradients of its CPU path in fp32, on weights exported to it and imported from it."""

import json

import pytest
import torch
from torch.nn import functional as F

from data_tools.errors import UserError
from mamba_pretrain.models import hf
from mamba_pretrain.models.generation import load_model
from mamba_pretrain.models.layout import translate_out
from mamba_pretrain.models.pretrained import export_pretrained, import_pretrained

transformers = pytest.importorskip("transformers")

# Three configurations of each architecture; lengths below are no multiples of the chunks.
VARIANTS = {
    "mamba1-plain": ("mamba1", {}),
    "mamba1-untied-biased": ("mamba1", {"tie_word_embeddings": False, "use_bias": True, "d_conv": 3, "expand": 3}),
    "mamba1-rank": ("mamba1", {"dt_rank": 5, "use_conv_bias": False, "layer_norm_epsilon": 1e-3}),
    "mamba2-grouped": ("mamba2", {}),
    "mamba2-untied-biased": ("mamba2", {"tie_word_embeddings": False, "use_bias": True, "ngroups": 1, "headdim": 8, "d_conv": 3}),
    "mamba2-clamped": ("mamba2", {"ngroups": 4, "time_step_limit": [0.01, 0.5], "use_conv_bias": False, "chunk_size": 7}),
    "falcon-untied": ("falcon", {}),
    "falcon-tied": ("falcon", {"tie_word_embeddings": True, "bcdt_rms_eps": 1e-3}),
    "falcon-biased": ("falcon", {"use_bias": True, "dt_rank": 3}),
    "bamba": ("hybrid", {"pattern": "mamba2 x2, attention", "rotary_dim": 4}),
    "bamba-biased": ("hybrid", {"pattern": "attention, mamba2 x2", "rotary_dim": 4, "use_bias": True, "tie_word_embeddings": False}),
    "bamba-no-attention": ("hybrid", {"pattern": "mamba2"}),
}
LENGTH = 37


def relative_error(actual, expected):
    return float(((actual - expected).norm() / expected.norm()).detach())


def load_theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(params=VARIANTS)
def pair(request, small_config, randomized, tmp_path):
    """Our model and transformers' on the same exported weights."""
    kind, changes = VARIANTS[request.param]
    model = randomized(small_config(kind, **changes))
    export_pretrained(model.state_dict(), model.config, None, tmp_path / "out")
    return model, load_theirs(tmp_path / "out"), tmp_path / "out"


def test_logits_and_gradients_equal_transformers(pair):
    ours, theirs, _ = pair
    tokens = torch.randint(0, 61, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1, 1)
    logits = theirs.train()(tokens, use_cache=False).logits
    assert logits.shape == (2, LENGTH, 61), "padding rows are not exported"
    assert relative_error(ours(tokens), logits) < 1e-4
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    ours(tokens, labels=labels).backward()
    grads = translate_out({name: p.grad for name, p in ours.named_parameters()}, hf.table_for(ours.config))
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert set(grads) == set(expected)
    for name, grad in grads.items():
        assert relative_error(grad, expected[name]) < 1e-4, name


def test_transformers_does_not_rescale_what_it_loads(pair):
    """With rescale_prenorm_residual in config.json, transformers divides loaded out_proj weights by sqrt(n_layer), without a word."""
    ours, theirs, _ = pair
    state = translate_out(ours.state_dict(), hf.table_for(ours.config))
    for name, tensor in theirs.state_dict().items():
        assert name not in state or torch.equal(tensor, state[name]), name


def test_weights_initialised_by_transformers_import(pair, tmp_path):
    folder = pair[-1]
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    fresh = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    fresh.save_pretrained(tmp_path / "fresh", max_shard_size="20kB")
    assert (tmp_path / "fresh" / "model.safetensors.index.json").exists(), "the sharded reader is exercised"
    imported = load_model(*import_pretrained(tmp_path / "fresh"))
    tokens = torch.randint(0, 61, (2, LENGTH))
    with torch.no_grad():
        assert relative_error(imported(tokens), fresh(tokens, use_cache=False).logits) < 1e-4


def test_export_and_import_give_the_same_config_and_weights(pair):
    ours, _, folder = pair
    config, weights = import_pretrained(folder)
    kept = {"A_init_range", "rescale_prenorm_residual", "residual_in_fp32", "time_step_floor", "time_step_max", "time_step_min"}
    assert (config.padded_vocab_size, config.vocab_size) == (64, 61)
    for key, value in config.model_dump(exclude={"mixer", "pattern", "dt_rank", "d_state", *kept}).items():
        if key.startswith(("n_head", "n_kv", "attention", "rot", "rope")) and "attention" not in ours.config.layer_mixers:
            continue
        assert value == getattr(ours.config, key), key
    assert config.layer_mixers == ours.config.layer_mixers
    for name, tensor in ours.state_dict().items():
        rows = 61 if name in ("embedding.weight", "lm_head.weight") else None
        assert torch.equal(weights[name][:rows], tensor[:rows]), name
        assert rows is None or weights[name][rows:].abs().max() == 0


def test_public_checkpoints_old_name_of_the_embedding(small_config, randomized, tmp_path):
    from safetensors.torch import load_file, save_file

    model = randomized(small_config("mamba1"))
    export_pretrained(model.state_dict(), model.config, None, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    state = load_file(path)
    state["backbone.embedding.weight"] = state.pop("backbone.embeddings.weight")
    save_file(state, path)
    assert torch.equal(import_pretrained(tmp_path / "out")[1]["embedding.weight"][:61], model.embedding.weight[:61])


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("attention", {}, "mixes Mamba-2 and attention only"),
        ("hybrid", {}, "mixes Mamba-2 and attention only"),
        ("hybrid", {"pattern": "mamba2 x2, attention"}, "rotates half"),
        ("hybrid", {"pattern": "mamba2 x2, attention", "d_intermediate": 0}, "has an MLP in every layer"),
        ("mamba1", {"d_intermediate": 64}, "has no MLP"),
    ],
)
def test_models_without_an_architecture_there_are_refused(kind, changes, words, small_config):
    with pytest.raises(UserError, match=words):
        hf.family_of(small_config(kind, **changes))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "is not valid JSON"),
        (lambda f: (f / "config.json").write_text("{}"), "neither transformers'"),
        (lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}'), "importable are mamba, falcon_mamba"),
        (lambda f: edit_config(f, hidden_act="gelu"), "activation 'gelu'"),
        (lambda f: edit_config(f, num_hidden_layers=4), "lacks tensor"),
        (lambda f: edit_config(f, num_hidden_layers=2), "has the unknown tensor"),
        (lambda f: edit_config(f, state_size=9), "the shape"),
        (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"short"), "cannot be read"),
    ],
)
def test_spoiled_folders_are_refused(spoil, words, small_config, randomized, tmp_path):
    model = randomized(small_config("mamba1"))
    export_pretrained(model.state_dict(), model.config, None, tmp_path / "out")
    spoil(tmp_path / "out")
    with pytest.raises(UserError, match=words):
        import_pretrained(tmp_path / "out")


def test_a_missing_shard_is_named(small_config, randomized, tmp_path):
    model = randomized(small_config("mamba1"))
    export_pretrained(model.state_dict(), model.config, None, tmp_path / "out", max_shard_size="20kB")
    sorted((tmp_path / "out").glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(UserError, match="lacks model-00002"):
        import_pretrained(tmp_path / "out")


def test_a_folder_with_files_is_not_clobbered(small_config, randomized, tmp_path):
    model = randomized(small_config("mamba1"))
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="already holds files"):
        export_pretrained(model.state_dict(), model.config, None, tmp_path)
    export_pretrained(model.state_dict(), model.config, None, tmp_path, overwrite=True, dtype=torch.bfloat16)
    assert load_theirs(tmp_path).config.dtype in (torch.bfloat16, torch.float32)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
