"""Rollouts with transformers and the learner's own weights: for CPUs, and on GPUs for debugging, where every
token is a pass of its own without graphs.

Nothing here imports transformers before it samples: that takes seconds, and a plan needs none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

from capo_exp.config.ranges import AT_LEAST_1
from capo_exp.core.types import Completion, Prompt, RolloutGroup
from capo_exp.rollout import SamplingRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class HFRollout:
    """Samples completions. Shares the model with the learner, so its weights are never stale."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        compute_dtype: torch.dtype,
        *,
        max_sequences_per_call: Annotated[int, AT_LEAST_1],
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._max_sequences = max_sequences_per_call
        self._compute_dtype = compute_dtype
        self._ends = find_end_token_ids(model, tokenizer)

    def generate(self, request: SamplingRequest) -> list[RolloutGroup]:
        """Returns one group per prompt, the same for the same request and weights."""
        generator = torch.Generator(self._model.device).manual_seed(request.seed)
        size = max(1, self._max_sequences // request.group_size)
        groups: list[RolloutGroup] = []
        for start in range(0, len(request.prompts), size):
            cut = slice(start, start + size)
            part = replace(request, prompts=request.prompts[cut], begun=request.begun[cut])
            completions = iter(self._sample(part, generator))
            groups += [
                RolloutGroup(prompt, tuple(islice(completions, request.group_size)), request.weight_version)
                for prompt in part.prompts
            ]
        return groups

    def start(self, directory: Path, prompts: Sequence[Prompt]) -> None:
        """Does nothing, nor do rest and close: no engine runs, and no memory is held between calls."""

    def rest(self) -> None: ...

    def metrics(self) -> dict[str, float]:
        """Returns zeros: weights are not sent, and never stale."""
        return {"time/transfer_seconds": 0.0, "mismatch/probe_difference": 0.0}

    def close(self) -> None: ...

    def _sample(self, request: SamplingRequest, generator: torch.Generator) -> list[Completion]:
        from capo_exp.core import policy
        from capo_exp.rollout.decode import decode

        pairs = zip(request.prompts, request.beginnings(), strict=True)
        known = [[*prompt.token_ids, *begun] for prompt, begun in pairs]
        padded = self._tokenizer.pad({"input_ids": known}, return_tensors="pt", padding_side="left")
        encoded = padded.to(self._model.device)
        with (
            torch.no_grad(),
            policy.autocast(self._model.device, self._compute_dtype),
            torch.compiler.set_stance("force_eager"),  # model.compile is for the learner's passes
        ):
            tokens, log_probs = decode(self._model, encoded, request, self._ends, generator)
        lengths = (tokens >= 0).sum(1).tolist()
        begun = [ids for ids in request.beginnings() for _ in range(request.group_size)]
        rows: list[list[int]] = []
        scores: list[list[float]] = []
        for ids, new, own, length in zip(begun, tokens.tolist(), log_probs.tolist(), lengths, strict=True):
            rows.append([*ids, *new[:length]])
            scores.append([*[nan] * len(ids), *own[:length]])
        texts = self._tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [
            Completion(tuple(ids), tuple(own), text, truncated=ids[-1] not in self._ends)
            for ids, own, text in zip(rows, scores, texts, strict=True)
        ]


def find_end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns all tokens that end a completion: a chat model can have several; its tokenizer names one.

    Of those that the model's files name only special tokens count: no other may end a completion.
    """
    own = model.generation_config.eos_token_id if model.generation_config else None
    named: list[Any] = own if isinstance(own, list) else [own]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    known: Any = tokenizer.eos_token_id
    return sorted({known, *(special & set(named))})
