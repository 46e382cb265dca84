"""Text generation: recurrent decoding with a state of constant size (attention layers of hybrids keep keys and values)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_tools.errors import UserError
from mamba_pretrain.models.config import ModelConfig
from mamba_pretrain.models.language_model import LanguageModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: greedy at temperature 0; otherwise from the ``top_k`` likeliest and their ``top_p`` nucleus."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature {self.temperature:g} is negative; 0 is greedy, 1 samples from the model's own distribution")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k {self.top_k} leaves no token to choose; give at least 1, or leave it out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p:g} is outside (0, 1]; 1 keeps every token")


GREEDY = Sampling(temperature=0.0)
Pick = Callable[[Tensor], Tensor]


def picker(sampling: Sampling, device: torch.device) -> Pick:
    """A function from logits (b, vocab) to the chosen tokens (b,). Draws come from a seeded generator on the CPU, whatever the device."""
    if sampling.temperature == 0:
        return lambda logits: logits.argmax(-1)
    generator = torch.Generator("cpu").manual_seed(sampling.seed)

    def pick(logits: Tensor) -> Tensor:
        probabilities = torch.softmax(filtered(logits.float() / sampling.temperature, sampling), dim=-1)
        # One uniform number per row against the cumulated distribution.
        threshold = torch.rand(logits.shape[0], 1, generator=generator).to(device)
        cumulated = probabilities.cumsum(-1)
        return torch.searchsorted(cumulated, threshold * cumulated[:, -1:], right=True).clamp(max=logits.shape[-1] - 1).squeeze(-1)

    return pick


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """``logits`` (b, vocab) with -inf outside the top k, and then outside the smallest set that holds ``top_p`` of what is left."""
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        # A token is dropped when those before it already hold top_p; the first always stays.
        dropped = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        logits = logits.masked_fill(dropped.scatter(-1, index, dropped), -torch.inf)
    return logits


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    eos_id: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[list[int]]:
    """Continues each prompt (token ids) by up to ``max_new_tokens`` tokens; returns the new tokens, ``eos_id`` included where it was drawn.

    Prompts of different lengths share a batch without padding: the common length is read at once, and from there on a row takes its own
    prompt's tokens until they end. ``dtype`` is that of cached activations. Under a sharding engine pass no ``eos_id``: the number of
    forward passes is then the same on every rank. Raises UserError for an empty prompt or a token outside the vocabulary.
    """
    check_prompts(prompts, model.config.vocab_size)
    device = torch.device(device)
    lengths = [len(prompt) for prompt in prompts]
    shortest, total = min(lengths), max(lengths) + max_new_tokens
    tokens = torch.zeros(len(prompts), total, dtype=torch.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    tokens, ends = tokens.to(device), torch.tensor(lengths, device=device)
    pick, state = picker(sampling, device), model.new_state(len(prompts), total, device, dtype)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    fed = tokens[:, :shortest]
    for position in range(shortest, total):
        chosen = pick(model(fed, state=state, only_last=True)[:, -1])
        tokens[:, position] = torch.where(position < ends, tokens[:, position], chosen)
        fed = tokens[:, position : position + 1]
        if eos_id is not None:
            done |= (position >= ends) & (fed[:, 0] == eos_id)
            done |= position - ends + 1 >= max_new_tokens
            if bool(done.all()):
                break
    rows = [row[n : n + max_new_tokens] for row, n in zip(tokens.tolist(), lengths, strict=True)]
    return rows if eos_id is None else [_until(row, eos_id) for row in rows]


def _until(row: list[int], eos_id: int) -> list[int]:
    return row[: row.index(eos_id) + 1] if eos_id in row else row


def check_prompts(prompts: list[list[int]], vocab_size: int) -> None:
    """Raises UserError for no prompts, an empty one, or a token outside the vocabulary."""
    if not prompts:
        raise UserError("no prompt was given; give at least one text to continue")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {number} is empty; give at least one token to start from")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise UserError(
                f"prompt {number} holds a token outside the model's vocabulary of {vocab_size}; use the tokenizer of its training data"
            )


def load_model(config: ModelConfig, weights: dict[str, Tensor], device: torch.device | str = "cpu") -> LanguageModel:
    """A model with ``weights`` (by our names) on ``device``, ready for inference."""
    with torch.device("meta"):
        model = LanguageModel(config)
    model.to_empty(device=device)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def continue_texts(
    config: ModelConfig,
    weights: dict[str, Tensor],
    tokenizer_dir: Path,
    prompts: list[str],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    device: torch.device | str = "cpu",
) -> list[str]:
    """Continues texts with a tokenizer folder's tokenizer; returns the continuations without the prompts."""
    from data_tools.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_dir)
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    model = load_model(config, weights, device)
    rows = generate(model, encoded, max_new_tokens, sampling, tokenizer.eos_id, device)
    # Decoded together with the prompt: a continuation alone may lose its leading space.
    texts = [tokenizer.decode(prompt + row) for prompt, row in zip(encoded, rows, strict=True)]
    return [text[len(tokenizer.decode(prompt)) :] for text, prompt in zip(texts, encoded, strict=True)]
