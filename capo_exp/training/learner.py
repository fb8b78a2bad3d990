"""One optimiser step from one batch: `backward` makes the gradient, `apply` takes the step."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from capo_exp.algorithms.protocols import Algorithm, declares_inside
from capo_exp.config.build import build_part
from capo_exp.config.schema import TrainConfig
from capo_exp.core import policy
from capo_exp.core.seeds import SELECTION, STEP_RULE, derive_seed
from capo_exp.core.step import ProposedStep, StepDecision
from capo_exp.core.timing import Stopwatch
from capo_exp.core.types import AdamState, Batch, BatchTotals, Gradient, Scored, Selection, StepInput
from capo_exp.curvature.model import copy_moments
from capo_exp.curvature.step_trial import ModelStepTrial
from capo_exp.distributed.world import SINGLE, World
from capo_exp.training.optimizer import (
    live_adam_state,
    make_optimizer,
    make_optimizer_model,
    make_schedule,
    reset_moments,
)
from capo_exp.training.passes import Passes, SelectRows
from capo_exp.training.returned import as_kind, as_selection
from capo_exp.training.scoring import StepModel, predict_step

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
            return self._gradient(given, lambda _, scored: self._select(scored), watch)
        return self.backward_selected(*self._score(given, watch), watch)

    def backward_selected(self, given: StepInput, selection: Selection, watch: Stopwatch) -> Gradient:
        """Makes the gradient with a selection [B, T] of the whole step in place of the algorithm's."""
        given = replace(given, totals=replace(given.totals, kept_tokens=int(selection.keep_mask.sum())))
        return self._gradient(given, lambda rows, scored: selection.of_rows(rows, scored.batch), watch)

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
            rule = self.algorithm.step_rule
            decision = as_kind(rule(trial), StepDecision, "algo.step_rule", rule)
            trial.settle(decision.step_scale)
            self.optimizer.zero_grad(set_to_none=True)
            self.schedule.step()
        self.step_memory = {name: float(value) for name, value in decision.memory.items()}  # for checkpoints
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
        return self._passes.log_probs(self.model, batch)

    def reference_log_probs(self, batch: Batch, own: Tensor) -> Tensor:
        """Computes [B, T] nats of the reference; without one it is the policy, whose `own` are returned."""
        return own if self.reference is None else self._passes.log_probs(self.reference, batch)

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
        device, kept = self.model.device, (state["optimizer_model"] or {}).items()
        own: Any = {k: v.to(device, copy=True) if isinstance(v, Tensor) else v for k, v in kept}
        self.optimizer_model = AdamState(**own) if own else None

    @property
    def _passes(self) -> Passes:
        how = self.config, self.settings, self.world
        return Passes(self.model, self.reference, self.algorithm, self._correction, *how)

    def _select(self, scored: Scored) -> Selection:
        part = self.algorithm.selection
        return as_selection(part(scored), scored.batch.completion_mask, "algo.selection", part)

    def _score(self, given: StepInput, watch: Stopwatch) -> tuple[StepInput, Selection]:
        """Makes the scoring pass, of which the gradient holds no more than it needs: hidden states are
        large."""
        with watch("scoring"):
            scored = self._passes.score(given, self._step_model(given.totals))
            selection = self._select(scored)
        if declares_inside(self.algorithm.token_loss, "whole_step"):
            if declares_inside(self.algorithm.token_loss, "needs_reference"):
                reference = self.reference_log_probs(given.batch, scored.output.log_probs)
                scored = replace(scored, ref_log_probs=reference)
            given = replace(given, scored=scored)
        return given, selection

    def _gradient(self, given: StepInput, select: SelectRows, watch: Stopwatch) -> Gradient:
        return self._passes.gradient(given, self._step_model(given.totals), select, watch)

    def _step_model(self, totals: BatchTotals) -> StepModel:
        seed = derive_seed(self.config.seed, SELECTION, self.optimizer_step)
        return StepModel(self.learning_rate, self.moments(totals), seed)
