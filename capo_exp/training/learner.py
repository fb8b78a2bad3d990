"""One optimiser step from one batch: `backward` makes the gradient, `apply` takes the step."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from capo_exp.algorithms.protocols import Algorithm, declares_inside
from capo_exp.config.build import build_part
from capo_exp.config.schema import TrainConfig
from capo_exp.core import policy
from capo_exp.core.batch import CutSize, deal_cuts, join_dealt, join_shared
from capo_exp.core.seeds import SELECTION, STEP_RULE, derive_seed
from capo_exp.core.step import ProposedStep
from capo_exp.core.timing import Stopwatch
from capo_exp.core.types import (
    AdamState,
    Batch,
    BatchTotals,
    Gradient,
    PolicyOutput,
    Scored,
    Selection,
    StepInput,
    StepRecord,
    TokenLossInput,
)
from capo_exp.curvature.model import copy_moments
from capo_exp.curvature.step_trial import ModelStepTrial
from capo_exp.distributed.sharding import full, is_sharded
from capo_exp.distributed.world import SINGLE, World
from capo_exp.training.loss import compute_loss
from capo_exp.training.optimizer import (
    live_adam_state,
    make_optimizer,
    make_optimizer_model,
    make_schedule,
    reset_moments,
)
from capo_exp.training.scoring import predict_step, score

PLAIN_STATE = ("optimizer_step", "reference_resets", "step_memory")
"""Attributes of a learner that a checkpoint keeps as they are."""


class Learner:
    """Owns the model, the reference, the optimiser, the schedule and the optimiser model's moments."""

    def __init__(
        self,
        model: PreTrainedModel,
        reference: PreTrainedModel | None,
        algorithm: Algorithm,
        config: TrainConfig,
        compute_dtype: torch.dtype,
        world: World = SINGLE,
    ) -> None:
        self.world = world
        self.model = model
        self.reference = reference
        self.algorithm = algorithm
        self.config = config
        self.settings = policy.ForwardSettings.of(config, compute_dtype)
        self.optimizer_step, self.reference_resets = 0, 0  # the first is the version of the weights
        self.step_memory: dict[str, float] = {}
        self.optimizer_model = make_optimizer_model(model, config)
        self.optimizer = make_optimizer(model, config)
        self.schedule = make_schedule(self.optimizer, config, algorithm)
        self._correction = build_part(config.rollout.correction, key="rollout.correction")

    @property
    def learning_rate(self) -> float:
        """The rate of the next optimiser step, before a step rule scales it."""
        return self.optimizer.param_groups[0]["lr"]

    def moments(self, totals: BatchTotals) -> AdamState | None:
        """Returns the optimiser model for a step of this size: its own table, the real optimiser's, or none
        (SGD)."""
        if self.config.curvature.optimizer_model == "adam_live":
            head = policy.last_layer(self.model).weight
            return live_adam_state(self.optimizer, head, totals.completion_tokens)
        return self.optimizer_model

    def backward(self, given: StepInput, watch: Stopwatch) -> Gradient:
        """Makes the gradient of the tokens that the algorithm selects; the optimiser has not stepped then."""
        if not self.algorithm.scoring_pass:
            return self._accumulate(given, lambda _, scored: self.algorithm.selection(scored), watch)
        with watch("scoring"):
            scored = self._score_whole_step(given)
            selection = self.algorithm.selection(scored)
        if declares_inside(self.algorithm.token_loss, "whole_step"):
            if declares_inside(self.algorithm.token_loss, "needs_reference"):
                reference = self.reference_log_probs(given.batch, scored.output.log_probs)
                scored = replace(scored, ref_log_probs=reference)
            given = replace(given, scored=scored)
        return self.backward_selected(given, selection, watch)

    def backward_selected(self, given: StepInput, selection: Selection, watch: Stopwatch) -> Gradient:
        """Makes the gradient with a selection [B, T] of the whole step in place of the algorithm's."""
        given = replace(given, totals=replace(given.totals, kept_tokens=int(selection.keep_mask.sum())))
        return self._accumulate(given, lambda rows, scored: selection.of_rows(rows, scored.batch), watch)

    def apply(self, gradient: Gradient, watch: Stopwatch) -> dict[str, float]:
        """Takes as much of the step as the step rule wants; returns its metrics."""
        record, rate, moments = gradient.record, self.learning_rate, self.moments(gradient.given.totals)
        with watch("curvature"):
            predicted, self.optimizer_model = predict_step(
                record, self.optimizer_model, rate, moments, self.world
            )
        with watch("update"):
            seed = derive_seed(self.config.seed, STEP_RULE, self.optimizer_step)
            on_record = self.config.curvature.hidden_shift == 0
            step = ProposedStep(record, predicted, rate, self.step_memory)
            where = self.model, self.optimizer, step, self.settings, self.world
            trial = ModelStepTrial(*where, states_on_record=on_record, seed=seed)
            decision = self.algorithm.step_rule(trial)
            trial.settle(decision.step_scale)
            self.optimizer.zero_grad(set_to_none=True)
            self.schedule.step()
        self.step_memory = dict(decision.memory)
        self.optimizer_step += 1
        return {
            "optim/step_scale": decision.step_scale,
            **decision.metrics,
            "counter/optimizer_step": self.optimizer_step,
            "optim/learning_rate": rate,
            "curvature/batch/policy_shift": predicted.policy_shift,
            "curvature/batch/objective_shift": predicted.objective_shift,
            "curvature/batch/objective_shift_by_row": predicted.objective_shift_by_row,
        }

    def log_probs(self, batch: Batch) -> Tensor:
        """Computes [B, T] nats of the current policy, without a gradient."""
        return self._log_probs_by(self.model, batch)

    def reference_log_probs(self, batch: Batch, own: Tensor) -> Tensor:
        """Computes [B, T] nats of the reference; without one it is the policy, whose `own` are returned."""
        return own if self.reference is None else self._log_probs_by(self.reference, batch)

    def reset_reference(self) -> None:
        """Makes the current policy the reference. Source: ProRL, arXiv 2505.24864, section 2.3."""
        assert self.reference is not None
        self.reference.load_state_dict(self.model.state_dict())
        self.reference_resets += 1

    def reset_optimizer(self) -> None:
        """Lets all moments start again, the optimiser model's too; the schedule goes on."""
        reset_moments(self.optimizer)
        self.optimizer_model = make_optimizer_model(self.model, self.config)

    def state_dict(self) -> dict[str, Any]:
        """Returns what the next step depends on besides the weights of model and reference."""
        return {name: getattr(self, name) for name in PLAIN_STATE} | {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "optimizer_model": self.optimizer_model and dict(vars(copy_moments(self.optimizer_model))),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned."""
        for name in PLAIN_STATE:
            setattr(self, name, state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        moments = state["optimizer_model"]
        self.optimizer_model = moments and copy_moments(AdamState(**moments))

    def _accumulate(
        self, given: StepInput, select: Callable[[Tensor, Scored], Selection], watch: Stopwatch
    ) -> Gradient:
        """Adds up the micro-batches' gradients and clips them; `select` gets the rows, too."""
        pieces: list[tuple[Tensor, StepRecord]] = []
        outputs: list[tuple[Tensor, PolicyOutput]] = []
        moments = self.moments(given.totals)
        loss = torch.zeros((), dtype=torch.float64, device=given.batch.input_ids.device)
        self.model.train(self.config.model.gradient_checkpointing)
        cuts = self._deal(given.batch)
        silent = [not is_sharded(self.model) and not cut.advantages.any() for _, cut in cuts]
        for (rows, cut), spare in zip(cuts, silent, strict=True):
            if not len(rows):
                outputs.append((rows, self._idle(given, cut)))
                continue
            part, record = self._learn(given, rows, cut, moments, select, watch, spare=spare and bool(pieces))
            loss += part  # no number yet: a GPU would wait for it
            outputs.append((rows, record.output))
            pieces.append((rows, record))
        self.model.eval()
        with watch("update"):
            norm = full(clip_grad_norm_(self.model.parameters(), self.config.optimizer.max_grad_norm)).item()
        record = join_shared(pieces, outputs, given.batch, self.world)
        return Gradient(given, record, self.world.sum(loss).item(), norm)

    def _learn(
        self, given: StepInput, rows: Tensor, cut: Batch, moments: AdamState | None,
        select: Callable[[Tensor, Scored], Selection], watch: Stopwatch, *, spare: bool,
    ) -> tuple[Tensor, StepRecord]:  # fmt: skip
        """Adds a micro-batch's gradient to that of the weights and returns its loss; `spare` does without the
        pass if no log-prob moves the loss."""
        inputs, weights, scored = self._score(given, rows, cut, moments, watch)
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

    def _deal(self, batch: Batch) -> list[tuple[Tensor, Batch]]:
        return deal_cuts(batch, CutSize.of(self.config.model), self.world)

    def _idle(self, given: StepInput, cut: Batch) -> PolicyOutput:
        """Makes the passes of a micro-batch with an idle one, whose gradient is 0."""
        output = policy.forward(self.model, cut, self.settings, top_k=self.config.curvature.top_k)
        self._reference_of(given, given.batch.group_ids[:0], cut, output.log_probs)
        output.log_probs.sum().backward()
        return output.detached()

    def _log_probs_by(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        pieces = [(rows, policy.log_probs(model, cut, self.settings)) for rows, cut in self._deal(batch)]
        return join_dealt(pieces, batch.completion_mask, self.world)

    def _reference_of(self, given: StepInput, rows: Tensor, cut: Batch, own: Tensor) -> Tensor:
        """Does as `reference_log_probs`, of a micro-batch that is this process's alone; what the scoring pass
        knows is not computed again."""
        if given.scored is not None and given.scored.ref_log_probs is not None:
            return given.scored.ref_log_probs[rows, : own.shape[1]]
        return own if self.reference is None else policy.log_probs(self.reference, cut, self.settings)

    def _score_whole_step(self, given: StepInput) -> Scored:
        """Scores all rows of the step, before any gradient."""
        pieces: list[tuple[Tensor, Scored]] = []
        outputs: list[tuple[Tensor, PolicyOutput]] = []
        moments, top_k = self.moments(given.totals), self.config.curvature.top_k
        for rows, cut in self._deal(given.batch):
            with torch.no_grad():
                if not len(rows):
                    outputs.append((rows, policy.forward(self.model, cut, self.settings, top_k=top_k)))
                    continue
                *_, scored = self._score(given, rows, cut, moments, Stopwatch())
            outputs.append((rows, scored.output))
            pieces.append((rows, scored))
        joined = join_shared(pieces, outputs, given.batch, self.world)
        return replace(joined, optimizer_model=moments, world=self.world)

    def _score(
        self, given: StepInput, rows: Tensor, cut: Batch, moments: AdamState | None, watch: Stopwatch
    ) -> tuple[TokenLossInput, Tensor, Scored]:
        """Runs a micro-batch forward and predicts its shifts; returns its correction [b, t], too."""
        numbers = self.config.curvature
        with watch("policy"):
            output = policy.forward(
                self.model, cut, self.settings, top_k=numbers.top_k, hidden_shift=numbers.hidden_shift
            )
        seen = output.detached()
        old = given.old_log_probs(seen.log_probs, rows)
        weights = self._correction(old - cut.sampler_log_probs, cut.completion_mask)
        cut = replace(cut, advantages=cut.advantages * weights)
        with watch("curvature"):
            seed = derive_seed(self.config.seed, SELECTION, self.optimizer_step)
            scored = score(cut, seen, old, self.learning_rate, moments, seed)
        return replace(TokenLossInput.of(cut, output, old), step=given.scored, rows=rows), weights, scored
