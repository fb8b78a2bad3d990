"""The passes of a model, and of its reference, over the micro-batches of an optimiser step."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from capo_exp.algorithms.protocols import Algorithm
from capo_exp.config.schema import TrainConfig
from capo_exp.core import policy
from capo_exp.core.batch import CutSize, deal_cuts, join_dealt, join_shared
from capo_exp.core.timing import Stopwatch
from capo_exp.core.types import (
    Batch,
    Gradient,
    PolicyOutput,
    Scored,
    Selection,
    StepInput,
    StepRecord,
    TokenLossInput,
)
from capo_exp.distributed.sharding import full, is_sharded
from capo_exp.distributed.world import World
from capo_exp.training.loss import compute_loss
from capo_exp.training.returned import as_tensor
from capo_exp.training.scoring import StepModel, score

SelectRows = Callable[[Tensor, Scored], Selection]
"""Selects tokens of a micro-batch, given its row numbers [b] too."""
Correction = Callable[[Tensor, Tensor], Tensor]
"""Weights [b, t] of tokens, given log-ratios of learner and sampler [b, t] nats and the completions' mask."""


@dataclass(frozen=True)
class Passes:
    """Runs a model over batches, cut into micro-batches; changes gradients and nothing else."""

    model: PreTrainedModel
    reference: PreTrainedModel | None
    algorithm: Algorithm
    correction: Correction
    config: TrainConfig
    settings: policy.ForwardSettings
    world: World

    def gradient(self, given: StepInput, step: StepModel, select: SelectRows, watch: Stopwatch) -> Gradient:
        """Adds up the micro-batches' gradients and clips them."""
        pieces: list[tuple[Tensor, StepRecord]] = []
        outputs: list[tuple[Tensor, PolicyOutput]] = []
        loss = torch.zeros((), dtype=torch.float64, device=given.batch.input_ids.device)
        self.model.train(self.config.model.gradient_checkpointing)
        cuts = self._deal(given.batch)
        silent = [not is_sharded(self.model) and not cut.advantages.any() for _, cut in cuts]
        for (rows, cut), spare in zip(cuts, silent, strict=True):
            if not len(rows):
                outputs.append((rows, self._idle(given, cut)))
                continue
            part, record = self._learn(given, rows, cut, step, select, watch, spare=spare and bool(pieces))
            loss += part  # no number yet: a GPU would wait for it
            outputs.append((rows, record.output))
            pieces.append((rows, record))
        self.model.eval()
        with watch("update"):
            norm = full(clip_grad_norm_(self.model.parameters(), self.config.optimizer.max_grad_norm)).item()
        record = join_shared(pieces, outputs, given.batch, self.world)
        return Gradient(given, record, self.world.sum(loss).item(), norm)

    def score(self, given: StepInput, step: StepModel) -> Scored:
        """Scores all rows of the step, before any gradient."""
        pieces: list[tuple[Tensor, Scored]] = []
        outputs: list[tuple[Tensor, PolicyOutput]] = []
        top_k = self.config.curvature.top_k
        for rows, cut in self._deal(given.batch):
            with torch.no_grad():
                if not len(rows):
                    outputs.append((rows, policy.forward(self.model, cut, self.settings, top_k=top_k)))
                    continue
                *_, scored = self._score(given, rows, cut, step, Stopwatch())
            outputs.append((rows, scored.output))
            pieces.append((rows, scored))
        joined = join_shared(pieces, outputs, given.batch, self.world)
        return replace(joined, optimizer_model=step.moments, world=self.world)

    def log_probs(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Computes [B, T] nats of the model or the reference, without a gradient."""
        pieces = [(rows, policy.log_probs(model, cut, self.settings)) for rows, cut in self._deal(batch)]
        return join_dealt(pieces, batch.completion_mask, self.world)

    def _learn(
        self, given: StepInput, rows: Tensor, cut: Batch, step: StepModel, select: SelectRows,
        watch: Stopwatch, *, spare: bool,
    ) -> tuple[Tensor, StepRecord]:  # fmt: skip
        """Adds a micro-batch's gradient to that of the weights and returns its loss; `spare` does without the
        pass if no log-prob moves the loss."""
        inputs, weights, scored = self._score(given, rows, cut, step, watch)
        with watch("curvature"):
            selection = select(rows, scored)
        with watch("policy"):
            reference = self._reference_of(given, rows, cut, scored.output.log_probs)
            part = compute_loss(self.algorithm, inputs, reference, selection, scored.batch, given.totals)
            (slope,) = torch.autograd.grad(part.value, inputs.log_probs)
            if not spare or slope.any():
                inputs.log_probs.backward(slope)
        seen = (scored.batch, scored.output, inputs.old_log_probs, weights, part.kl, scored.shifts)
        return part.value.detach(), StepRecord(*seen, selection, part.clipped)

    def _score(
        self, given: StepInput, rows: Tensor, cut: Batch, step: StepModel, watch: Stopwatch
    ) -> tuple[TokenLossInput, Tensor, Scored]:
        """Runs a micro-batch forward and predicts its shifts; returns its correction [b, t], too."""
        numbers = self.config.curvature
        with watch("policy"):
            output = policy.forward(
                self.model, cut, self.settings, top_k=numbers.top_k, hidden_shift=numbers.hidden_shift
            )
        seen = output.detached()
        old = seen.log_probs if given.stored is None else given.stored[rows, : seen.log_probs.shape[1]]
        weights = self.correction(old - cut.sampler_log_probs, cut.completion_mask)
        as_tensor(weights, "B T", cut.completion_mask.shape, "rollout.correction", self.correction)
        cut = replace(cut, advantages=cut.advantages * weights)
        with watch("curvature"):
            scored = score(cut, seen, old, step)
        inputs = TokenLossInput(
            output.log_probs, old, cut.sampler_log_probs, cut.advantages, cut.completion_mask, output.entropy,
            given.scored, rows,
        )  # fmt: skip
        return inputs, weights, scored

    def _idle(self, given: StepInput, cut: Batch) -> PolicyOutput:
        """Makes the passes of a micro-batch with an idle one, whose gradient is 0."""
        output = policy.forward(self.model, cut, self.settings, top_k=self.config.curvature.top_k)
        self._reference_of(given, given.batch.group_ids[:0], cut, output.log_probs)
        output.log_probs.sum().backward()
        return output.detached()

    def _reference_of(self, given: StepInput, rows: Tensor, cut: Batch, own: Tensor) -> Tensor:
        """Computes the reference's log-probs of a micro-batch that is this process's alone; without one they
        are the policy's `own`, and what the scoring pass knows is not computed again."""
        if given.scored is not None and given.scored.ref_log_probs is not None:
            return given.scored.ref_log_probs[rows, : own.shape[1]]
        return own if self.reference is None else policy.log_probs(self.reference, cut, self.settings)

    def _deal(self, batch: Batch) -> list[tuple[Tensor, Batch]]:
        return deal_cuts(batch, CutSize.of(self.config.model), self.world)
