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
_EOS_INTERVAL = {"cpu": 1, "cuda": 16}  # steps between looks whether all rows have ended; on a GPU each look waits for it
_STEPS_BEFORE_RECORDING = 3


def pick(logits: Tensor, sampling: Sampling, draw: Tensor) -> Tensor:
    """Tokens (b,) chosen from ``logits`` (b, vocab); ``draw`` (b,) is uniform in [0, 1) and unused when greedy."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    cumulated = torch.softmax(filtered(logits.float() / sampling.temperature, sampling), dim=-1).cumsum(-1)
    # Each row's number is looked up in its own cumulated distribution, whose last entry is 1 up to rounding.
    chosen = torch.searchsorted(cumulated, (draw * cumulated[:, -1]).unsqueeze(-1), right=True)
    return chosen.clamp(max=logits.shape[-1] - 1).squeeze(-1)


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


class Decoder:
    """Continues up to ``max_length`` tokens of ``batch`` prompts at a time, in the same buffers again and again.

    On a GPU a step (model, choice, bookkeeping) is recorded as a CUDA graph once it has run a few times; from then on it is one launch.
    ``recurrent`` is the dtype of the recurrences' states: fp32 loses nothing of what a sequence has summed up; with bf16 they are half as
    large, which a large batch's speed depends on.
    """

    def __init__(
        self,
        model: LanguageModel,
        batch: int,
        max_length: int,
        sampling: Sampling = GREEDY,
        eos_id: int | None = None,
        device: torch.device | str = "cpu",
        cuda_graph: bool = True,
        recurrent: torch.dtype = torch.float32,
    ) -> None:
        self._model, self._sampling, self._eos_id = model, sampling, eos_id
        self._device = torch.device(device)
        self._state = model.new_state(batch, max_length, self._device, model.embedding.weight.dtype, recurrent)
        self._tokens = torch.zeros(batch, max_length, dtype=torch.int64, device=self._device)
        self._draws = torch.zeros(max_length, batch, device=self._device)
        # Of each row: where its prompt ends, where its continuation does, and whether it has ended. The position is that of the next token.
        self._ends, self._limits = (torch.zeros(batch, dtype=torch.int64, device=self._device) for _ in range(2))
        self._done = torch.zeros(batch, dtype=torch.bool, device=self._device)
        self._position = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._records = cuda_graph and self._device.type == "cuda"
        self._advance: Callable[[], None] = self._step
        self._steps = 0

    @torch.no_grad()
    def __call__(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Continues each prompt by up to ``max_new_tokens`` tokens; returns the new ones, with the end of text where it was drawn.

        Raises UserError for an empty prompt, a token outside the vocabulary, or prompts that the buffers do not hold.
        """
        check_prompts(prompts, self._model.config.vocab_size)
        lengths = [len(prompt) for prompt in prompts]
        shortest, total = min(lengths), max(lengths) + max_new_tokens
        batch, room = self._tokens.shape
        if len(prompts) != batch or total > room:
            raise UserError(
                f"{len(prompts)} prompts of up to {total} tokens do not fit a decoder of {batch} x {room}; make one of that size"
            )
        if max_new_tokens < 1:
            return [[] for _ in prompts]
        self._begin(prompts, lengths, max_new_tokens)
        self._place(self._model(self._tokens[:, :shortest], state=self._state, only_last=True)[:, -1])
        for position in range(shortest + 1, total):
            if self._eos_id is not None and position % _EOS_INTERVAL[self._device.type] == 0 and bool(self._done.all()):
                break
            if self._records and self._steps == _STEPS_BEFORE_RECORDING:
                from mamba_pretrain.models.cuda_graph import recorded

                self._advance = recorded(self._step)
            self._advance()
            self._steps += 1
        rows = [row[n : n + max_new_tokens] for row, n in zip(self._tokens.tolist(), lengths, strict=True)]
        return rows if self._eos_id is None else [_until(row, self._eos_id) for row in rows]

    def _begin(self, prompts: list[list[int]], lengths: list[int], max_new_tokens: int) -> None:
        for layer in self._state:
            for name, value in layer.items():
                if torch.is_tensor(value):
                    value.zero_()
                else:
                    layer[name] = False
        tokens = torch.zeros(self._tokens.shape, dtype=torch.int64)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        self._tokens.copy_(tokens)
        total = max(lengths) + max_new_tokens
        draws = torch.rand(total, len(prompts), generator=torch.Generator("cpu").manual_seed(self._sampling.seed))
        self._draws[:total].copy_(draws)
        self._ends.copy_(torch.tensor(lengths))
        self._limits.copy_(self._ends + max_new_tokens)
        self._done.zero_()
        self._position.fill_(min(lengths))

    def _step(self) -> None:
        """Reads the token before the position and writes the one at it; nothing waits for the device."""
        token = self._tokens.index_select(1, self._position - 1)
        self._place(self._model(token, state=self._state, only_last=True)[:, -1])

    def _place(self, logits: Tensor) -> None:
        """The next token of every row: its prompt's, or the one chosen from ``logits`` (b, vocab)."""
        draw = self._draws if self._sampling.temperature == 0 else self._draws.index_select(0, self._position)
        chosen = pick(logits, self._sampling, draw[0])
        given = self._tokens.index_select(1, self._position)[:, 0]
        continues = self._position >= self._ends
        token = torch.where(continues, chosen, given)
        self._tokens.index_copy_(1, self._position, token.unsqueeze(1))
        if self._eos_id is not None:
            self._done |= continues & (token == self._eos_id)
            self._done |= self._position + 1 >= self._limits
        self._position += 1


def generate(
    model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    eos_id: int | None = None,
    device: torch.device | str = "cpu",
    cuda_graph: bool = True,
) -> list[list[int]]:
    """Continues each prompt (token ids) by up to ``max_new_tokens`` tokens; returns the new tokens, ``eos_id`` included where it was drawn.

    Prompts of different lengths share a batch without padding: the common length is read at once, and from there on a row takes its own
    prompt's tokens until they end. Random numbers come from a seeded generator on the CPU, whatever the device. Under a sharding engine
    pass no ``eos_id`` and no ``cuda_graph``: the number of forward passes is then the same on every rank. Raises UserError for an empty
    prompt or a token outside the vocabulary. Whoever generates often keeps a ``Decoder``.
    """
    check_prompts(prompts, model.config.vocab_size)
    total = max(map(len, prompts)) + max_new_tokens
    return Decoder(model, len(prompts), total, sampling, eos_id, device, cuda_graph)(prompts, max_new_tokens)


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


def load_model(
    config: ModelConfig, weights: dict[str, Tensor], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """A model with ``weights`` (by our names) on ``device``, ready for inference.

    ``dtype`` is that of projections, convolutions and the embedding; parameters that must compute in fp32 stay fp32.
    """
    with torch.device("meta"):
        model = LanguageModel(config)
    policies = model.parameter_policies()
    cast = {name: tensor.to(device, torch.float32 if policies[name].fp32 else dtype) for name, tensor in weights.items()}
    model.load_state_dict(cast, assign=True)
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
