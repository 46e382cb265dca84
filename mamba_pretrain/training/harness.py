"""lm-evaluation-harness on a checkpoint as it is: no export, no conversion.

The extra ``eval`` brings the harness (Gao et al., https://github.com/EleutherAI/lm-evaluation-harness). Requests are scored as the harness's
own adapter for transformers scores them, so that results of the same weights are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_tools.errors import UserError
from data_tools.tokenizers import Tokenizer
from mamba_pretrain.models.generation import GREEDY, Sampling, generate
from mamba_pretrain.models.language_model import LanguageModel

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError("lm-evaluation-harness is not installed; install it with `pip install 'mamba-pretrain[eval]'`") from error

MAX_NEW_TOKENS = 256  # the harness's default where a task does not say
BOOTSTRAP = 100  # draws for the error of a metric that is no mean

# What the harness scores: (the two texts, tokens of the context, tokens of the continuation).
TokenRequest = tuple[Any, list[int], list[int]]


class HarnessModel(TemplateLM):
    """A language model and its tokenizer, as the harness wants them.

    ``max_length``: tokens that are read at most; longer requests lose their beginning, as a request of the harness does everywhere. It is no
    limit of a Mamba: it should be the length that results are compared at.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        batch_size: int = 8,
        max_length: int = 2048,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        if tokenizer.eos_id is None and tokenizer.bos_id is None:
            raise UserError(
                "the tokenizer has neither an end-of-text nor a begin-of-text token, and the harness needs one to score first words"
            )
        self.model = model
        self.text_tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length
        self._torch_device = torch.device(device)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        eos = self.text_tokenizer.eos_id
        return self.prefix_token_id if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: begin of text, or else end of the one before."""
        bos, eos = self.text_tokenizer.bos_id, self.text_tokenizer.eos_id
        found = eos if bos is None else bos
        assert found is not None
        return found

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's cache of requests."""
        return self.text_tokenizer.hash

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, never with special tokens: the training data has none inside documents either."""
        return self.text_tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in disjoint windows of ``max_length``."""
        windows: list[TokenRequest] = []
        owner: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, (score, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += score
        return totals

    def _loglikelihood_tokens(self, requests: list[TokenRequest], **_: Any) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of each continuation."""
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for numbers in self._batches([len(context) + len(continuation) for _, context, continuation in requests]):
            rows = [(requests[i][1] + requests[i][2])[-(self.max_length + 1) :] for i in numbers]
            scores = self._log_probabilities([row[:-1] for row in rows])
            for i, row, score in zip(numbers, rows, scores, strict=True):
                asked = min(len(requests[i][2]), len(row) - 1)
                found[i] = _continuation_score(score[len(row) - 1 - asked : len(row) - 1], row[-asked:])
        return found

    @torch.no_grad()
    def _log_probabilities(self, rows: Sequence[list[int]]) -> Tensor:
        """(b, l, vocab) fp32 for rows of tokens, padded at the end: what follows a token never changes what is before."""
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for line, row in zip(tokens, rows, strict=True):
            line[: len(row)] = torch.tensor(row)
        return self.model(tokens.to(self._torch_device)).float().log_softmax(-1)

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Numbers of requests, the longest first: rows of a batch are of like length, and what does not fit into memory fails at once."""
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        return (order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, cut before the first of the texts that end them."""
        found = [""] * len(requests)
        by_settings: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_settings.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for group in by_settings.values():
            settings = dict(requests[group[0]].args[1])
            prompts = {i: self._prompt(requests[i].args[0], settings) for i in group}
            for places in self._batches([len(prompts[i]) for i in group]):
                numbers = [group[place] for place in places]
                for i, text in zip(numbers, self._continuations([prompts[i] for i in numbers], settings), strict=True):
                    found[i] = text
        return found

    def _prompt(self, text: str, settings: dict[str, Any]) -> list[int]:
        room = self.max_length - _max_new_tokens(settings)
        if room < 1:
            raise UserError(
                f"a task generates {_max_new_tokens(settings)} tokens, and max_length is {self.max_length}; give a larger max_length"
            )
        return self.tok_encode(text)[-room:] or [self.prefix_token_id]

    def _continuations(self, prompts: list[list[int]], settings: dict[str, Any]) -> list[str]:
        rows = generate(self.model, prompts, _max_new_tokens(settings), _sampling(settings), self.text_tokenizer.eos_id, self._torch_device)
        stops = settings.get("until") or []
        # Decoded without the prompt, though that may lose a leading space: the harness does so everywhere.
        return [_cut(self.text_tokenizer.decode(row), [stops] if isinstance(stops, str) else stops) for row in rows]


def _continuation_score(scores: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """From log-probabilities (c, vocab) at the places before the c tokens of the continuation."""
    targets = torch.tensor(continuation, device=scores.device)
    return float(scores.gather(1, targets.unsqueeze(1)).sum()), bool((scores.argmax(-1) == targets).all())


def _max_new_tokens(settings: dict[str, Any]) -> int:
    return int(settings.get("max_gen_toks", settings.get("max_new_tokens", MAX_NEW_TOKENS)))


def _sampling(settings: dict[str, Any]) -> Sampling:
    if not settings.get("do_sample"):
        return GREEDY
    return Sampling(float(settings.get("temperature", 1.0)), settings.get("top_k"), settings.get("top_p"))


def _cut(text: str, stops: Sequence[str]) -> str:
    return text[: min([text.find(stop) for stop in stops if stop and stop in text], default=len(text))]


def evaluate_tasks(
    model: LanguageModel,
    tokenizer: Tokenizer,
    tasks: Sequence[str | dict[str, Any]],
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int = 2048,
    device: torch.device | str = "cpu",
    task_folder: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Metrics of each task (a name known to the harness or to ``task_folder``'s YAML files, or a task's own description).

    Raises UserError for an unknown task. Tasks of the harness download their data with ``datasets``.
    """
    from lm_eval import simple_evaluate

    harness_model, manager = HarnessModel(model, tokenizer, batch_size, max_length, device), _task_manager(tasks, task_folder)
    try:
        found = simple_evaluate(
            harness_model, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, bootstrap_iters=BOOTSTRAP, task_manager=manager
        )
    except OSError as error:  # what `datasets` raises for data that is not there, and without a network
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the data of {', '.join(map(str, tasks))} cannot be read ({reason}); run it once where there is a network, "
            "or give tasks of local files with --task-folder"
        ) from error
    return found["results"]


def _task_manager(tasks: Sequence[str | dict[str, Any]], folder: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    names, include = [task for task in tasks if isinstance(task, str)], str(folder) if folder else None
    # The harness reads thousands of files to list its own tasks: only where a name is not found in the folder.
    for defaults in (False, True):
        manager = TaskManager(include_path=include, include_defaults=defaults)
        unknown = [name for name in names if not manager.match_tasks([name])]
        if not unknown:
            return manager
    raise UserError(f"the harness knows no task {unknown[0]!r}; see `lm-eval ls tasks`, or give a folder of task files")
