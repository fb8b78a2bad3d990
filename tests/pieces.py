"""What several test files build: learners of the small model, and rollouts that nobody sampled."""

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from capo_exp.algorithms.protocols import build_algorithm
from capo_exp.cli import front
from capo_exp.config.build import holds_reference
from capo_exp.config.errors import ConfigError
from capo_exp.core import packing
from capo_exp.core.batch import totals
from capo_exp.core.step import StepDecision
from capo_exp.core.types import (
    Batch,
    Completion,
    PolicyOutput,
    Problem,
    Prompt,
    RolloutGroup,
    Scored,
    StepInput,
    TokenLossInput,
    TokenShifts,
)
from capo_exp.grading.compare import Grade
from capo_exp.grading.terms import RewardTerms
from capo_exp.grading.verifier import RewardResult
from capo_exp.rollout import SamplingRequest
from capo_exp.runs.files import list_checkpoints
from capo_exp.training import loop, rollout_step
from capo_exp.training.learner import Learner
from capo_exp.training.optimizer_step import take_optimizer_step
from capo_exp.training.rollout_step import take_updates
from capo_exp.training.sampler import Sampler

SMALL = (
    "model.vocab_size=40", "curvature.top_k=8", "optimizer.schedule=constant", "num_steps=10",
    "optimizer.max_grad_norm=inf",
)  # fmt: skip
BOUNDS = ("policy_shift_max", "objective_shift_min", "objective_shift_max")
UNBOUNDED = tuple(
    f"algo.selection.{name}={value}" for name, value in zip(BOUNDS, ("inf", "-inf", "inf"), strict=True)
)


class _NoTokenizer:
    def save_pretrained(self, folder): ...


NO_TOKENIZER: Any = _NoTokenizer()
"""As much of a tokenizer as a checkpoint needs."""


def make_learner(config, model, *, distance=0.0):
    """A learner on its own copy of the model, with a reference where the algorithm needs one.

    Args:
        config: of the run.
        model: stays as it is.
        distance: standard deviation of the noise that tells the reference's weights from the model's.
    """
    reference = copy.deepcopy(model).requires_grad_(False) if holds_reference(config.algo) else None
    if reference is not None and distance:
        generator = torch.Generator().manual_seed(0)
        for parameter in reference.parameters():
            parameter.add_(distance * torch.randn(parameter.shape, generator=generator))
    model = packing.prepare_model(copy.deepcopy(model)) if config.model.pack else copy.deepcopy(model)
    return Learner(model, reference, build_algorithm(config.algo), config, torch.float32)


def untied(model):
    """A copy with a last layer of its own."""
    model = copy.deepcopy(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def weights(learner):
    return [parameter.detach().clone() for parameter in learner.model.parameters()]


def same_weights(one, other):
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def take_step(learner, batch, old_log_probs=None):
    """One optimiser step on a batch; the policy sampled it itself unless there are old log-probs."""
    return take_optimizer_step(learner, StepInput(batch, totals(batch), old_log_probs))


def watch_gradients(learner):
    """A list that takes, from now on, the gradient with respect to the weights of each optimiser step."""
    seen: list[list[Tensor]] = []

    def look(trial):
        seen.append([p.grad.clone() for p in learner.model.parameters() if p.grad is not None])
        return StepDecision(1.0)

    learner.algorithm = replace(learner.algorithm, step_rule=look)
    return seen


def gradients(learner, batch, old_log_probs=None):
    """The gradient of one step's loss with respect to the learner's weights; takes the step."""
    seen = watch_gradients(learner)
    take_step(learner, batch, old_log_probs)
    return seen[-1]


def inputs_of(log_probs, old, advantages, mask):
    """What a token loss sees where the sampler's log-probs are the learner's."""
    return TokenLossInput(log_probs, old, old, advantages, mask, torch.zeros_like(old))


def with_step(inputs, group_ids):
    """The same where these rows are the whole optimiser step."""
    mask, log_probs = inputs.completion_mask, inputs.log_probs.detach()
    zeros, rows = torch.zeros_like(log_probs), torch.arange(len(mask))
    batch = Batch(
        mask.long(),
        mask.long(),
        mask,
        inputs.sampler_log_probs,
        inputs.advantages,
        group_ids,
        mask.any(1),
        zeros[:, 0],
    )
    output = PolicyOutput(
        log_probs, inputs.entropy, zeros[..., None], mask.long()[..., None], zeros[..., None]
    )
    step = Scored(
        batch, output, TokenShifts(zeros, zeros), inputs.old_log_probs, 0.0, None, seed=0,
        ref_log_probs=inputs.ref_log_probs,
    )  # fmt: skip
    return replace(inputs, step=step, rows=rows)


def plain_log_probs(model, batch, temperature=1.0):
    """[B, T] by the model's own logits, row by row without padding, and F.cross_entropy; 0 on padding."""
    rows = []
    for ids, real, mask in zip(batch.input_ids, batch.attention_mask, batch.completion_mask, strict=True):
        ids, count = ids[real.bool()], int(mask.sum())
        logits = model(ids[None]).logits[0, -count - 1 : -1] / temperature
        log_probs = -torch.nn.functional.cross_entropy(logits, ids[-count:], reduction="none")
        rows.append(torch.nn.functional.pad(log_probs, (0, len(mask) - count)))
    return torch.stack(rows)


def one_line(call, kind=ConfigError):
    """What the error of a call says, in one line."""
    with pytest.raises(kind) as error:
        call()
    text = str(error.value)
    assert "\n" not in text
    return text


def without_clock(row):
    return {key: value for key, value in row.items() if not key.startswith("time/")}


def logged(path):
    """The rows of a .jsonl file without what the clock wrote."""
    return [without_clock(json.loads(line)) for line in path.read_text().splitlines()]


def assert_same_end(whole, ended):
    """Something is learned in each step, and both runs end in the same rows and weights."""
    rows = logged(whole / "metrics.jsonl")
    assert logged(ended / "metrics.jsonl") == rows and all(row["policy/grad_norm"] > 0 for row in rows)
    one, two = ((list_checkpoints(run)[2] / "model.safetensors").read_bytes() for run in (whole, ended))
    assert one == two


def run_updates(learner, batch, step=1):
    """The metrics of each optimiser step over one batch without those of the clock, and the last record."""
    done = list(take_updates(learner, batch, step=step))
    record = done[-1].record
    assert record is not None
    return [without_clock(update.metrics) for update in done], record


def prompt(number):
    return Prompt(Problem(str(number), "", ""), "", (2 + number % 38, 5))


def completion(token_ids, *, reward=0.0, truncated=False):
    """Tokens that nobody sampled; the text says what they earn."""
    return Completion(tuple(token_ids), (-1.0,) * len(token_ids), str(reward), truncated)


def groups_of(rewards, lengths):
    """One completion for each reward, of random tokens, as long as its length says."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length):
        return torch.randint(2, 40, (length,), generator=generator).tolist()

    return [
        RolloutGroup(
            prompt(p),
            tuple(completion(tokens(n), reward=r) for r, n in zip(*row, strict=True)),
            weight_version=0,
        )
        for p, row in enumerate(zip(rewards, lengths, strict=True))
    ]


def graded(rewards, metrics):
    """What a verifier returns; above a half is correct."""
    grades = [
        [Grade(reward > 0.5, "", "correct" if reward > 0.5 else "wrong") for reward in row] for row in rewards
    ]
    return RewardResult(rewards, metrics, grades)


def even_first(text):
    """1 if the first token is even; the small model's completions are numbers in place of text."""
    return float(int(text.split()[0]) % 2 == 0)


@dataclass
class Made:
    """An engine that makes completion g of a prompt from what has begun; keeps what it was asked."""

    make: Callable[[Prompt, tuple[int, ...], int], Completion]
    calls: list[SamplingRequest] = field(default_factory=list)

    def generate(self, request):
        self.calls.append(request)
        asked, size = zip(request.prompts, request.beginnings(), strict=True), range(request.group_size)
        version = request.weight_version
        return [RolloutGroup(p, tuple(self.make(p, ids, g) for g in size), version) for p, ids in asked]


@dataclass
class Reader:
    """A verifier that reads the reward off the text."""

    read: Callable[[str], float] = float
    calls: list[int] = field(default_factory=list)
    beside_sampling: bool = False

    def score(self, completions, golds, problems=None):
        assert len(completions) == len(golds)
        self.calls.append(len(golds))
        metrics = {"reward/timeouts": 1.0, "reward/no_answer_fraction": 0.25}
        return graded([[self.read(text) for text in group] for group in completions], metrics)

    def gradable(self, golds):
        return [True] * len(golds)

    def close(self): ...

    def __enter__(self):
        return self

    def __exit__(self, *_): ...


def sampler_of(engine, prompts):
    """Of an engine whose texts say what they earn; every token is a sentence."""
    asked = [prompt(i) for i in range(prompts)]
    return Sampler(engine, engine, Reader(), asked, RewardTerms(), spell=lambda ids: [" A."] * len(ids))


def run_one_step(config):
    """Trains until the second step begins, where a Ctrl-C ends the run."""
    genuine = rollout_step.sample_rollout

    def ends(*given, step, **more):
        if step == 2:
            raise KeyboardInterrupt
        return genuine(*given, step=step, **more)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rollout_step, "sample_rollout", ends)
        loop.run(config)


def run_training(*arguments):
    """The exit status of `python -m capo_exp ARGUMENTS`, which is run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["capo_exp", *arguments])
        try:
            return front.run_training()
        except SystemExit as end:
            return int(end.code or 0)
