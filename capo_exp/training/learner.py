"""One optimiser step from one batch. Owns the model, the reference, the optimiser, the schedule and the
optimiser model's state."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from capo_exp.algorithms.kl import kl_k1, kl_k3
from capo_exp.algorithms.protocols import Algorithm
from capo_exp.config.build import build_part
from capo_exp.config.errors import RunFailed
from capo_exp.config.schema import TrainConfig
from capo_exp.core import policy
from capo_exp.core.batch import join, split, totals
from capo_exp.core.masked import unpack
from capo_exp.core.records import join_fields, join_records
from capo_exp.core.seeds import CALIBRATION, DIAGNOSIS, SELECTION, STEP_RULE, derive_seed
from capo_exp.core.timing import Stopwatch
from capo_exp.core.types import (
    AdamState,
    Batch,
    BatchShifts,
    BatchTotals,
    PolicyOutput,
    Scored,
    Selection,
    StepRecord,
    TokenShifts,
)
from capo_exp.curvature import calibration, diagnosis
from capo_exp.curvature import model as curvature
from capo_exp.curvature.step_trial import Decision, Proposal, Sample, Trial
from capo_exp.training.optimizer import live_adam_state, make_optimizer, make_optimizer_model, make_schedule
from capo_exp.training.step_metrics import summarise

Cut = tuple[Tensor, Batch]
"""Row numbers of a micro-batch, and the micro-batch."""
COUNTED = ("optimizer_step", "reference_resets", "step_memory")
"""Attributes of a learner that a checkpoint keeps as they are."""


class TrainingDiverged(RunFailed):
    """A loss or gradient that is not finite; the weights are those before the step."""


class Learner:
    """Takes optimiser steps. `optimizer_step` counts them and is the version of the weights."""

    def __init__(
        self,
        model: PreTrainedModel,
        reference: PreTrainedModel | None,
        algorithm: Algorithm,
        config: TrainConfig,
        compute_dtype: torch.dtype,
    ) -> None:
        self.model = model
        self.reference = reference
        self.optimizer_step = 0
        self.reference_resets = 0
        self.step_memory: dict[str, float] = {}
        self.optimizer_model = make_optimizer_model(model, config)
        self.optimizer = make_optimizer(model, config)
        self.schedule = make_schedule(self.optimizer, config)
        self._algorithm = algorithm
        self._correction = build_part(config.rollout.correction, key="rollout.correction")
        self._config = config
        self._forward_numbers = {
            "temperature": config.rollout.temperature,
            "chunk_tokens": config.model.logits_chunk_tokens,
            "compute_dtype": compute_dtype,
        }

    def step(
        self, batch: Batch, old_log_probs: Tensor | None = None, sizes: BatchTotals | None = None
    ) -> tuple[dict[str, float], StepRecord]:
        """Forward, select, backward over micro-batches; then the optimiser step and the moments update.

        Args:
            batch: all rows of the step.
            old_log_probs: [B, T] of the weights that sampled; None on the first update, when the policy is
                them.
            sizes: what the loss averages over; None = the batch itself.

        Returns:
            The step's metrics, and what it saw of each token.

        Raises:
            TrainingDiverged: if the loss or the gradient norm is not finite. The optimiser has not stepped
                then.
        """
        watch = Stopwatch()
        rate = self.optimizer.param_groups[0]["lr"]
        cuts = split(batch, self._config.model.micro_batch_size)
        sizes = sizes or totals(batch)
        ahead: Selection | None = None
        if self._algorithm.scoring_pass:
            with watch("scoring"):
                ahead = self._select_ahead(batch, cuts, old_log_probs, rate)
            sizes = replace(sizes, kept_tokens=int(ahead.keep_mask.sum()))
        backward = partial(self._backward, batch, cuts, old_log_probs)
        loss, record = backward(sizes, ahead, rate, watch)
        with watch("update"):
            grad_norm = self._clip()
        metrics = {"loss/total": loss, "policy/grad_norm": grad_norm, **summarise(record)}
        self._check_finite(metrics)
        keep_everything = partial(self._keep_everything, backward, sizes, batch.completion_mask, rate)
        with self._diagnosed(record, keep_everything, grad_norm, rate, watch) as found:
            with watch("curvature"):
                predicted, self.optimizer_model = self._predict_and_remember(record, rate)
            metrics |= self._update(record, predicted, rate, watch)
        metrics |= found
        metrics |= {
            "counter/optimizer_step": self.optimizer_step,
            "optim/learning_rate": rate,
            "curvature/batch/policy_shift": predicted.policy_shift,
            "curvature/batch/objective_shift": predicted.objective_shift,
        }
        return metrics | {f"time/{name}_seconds": value for name, value in watch.seconds.items()}, record

    def log_probs(self, batch: Batch) -> Tensor:
        """[B, T] nats of the current policy, without a gradient."""
        return self._all_log_probs(self.model, batch)

    def kl_to_reference(self, batch: Batch) -> Tensor:
        """[B, T] kl_k1 of the current policy to the reference; 0 without one."""
        if self.reference is None:
            return torch.zeros_like(batch.sampler_log_probs)
        return kl_k1(self.log_probs(batch), self._all_log_probs(self.reference, batch))

    def reset_reference(self) -> None:
        """Makes the current policy the reference. Source: ProRL, arXiv 2505.24864, section 2.3."""
        assert self.reference is not None
        self.reference.load_state_dict(self.model.state_dict())
        self.reference_resets += 1

    def reset_optimizer(self) -> None:
        """Lets all moments start again, the optimiser model's too; the schedule goes on."""
        self.optimizer.state.clear()
        self.optimizer_model = make_optimizer_model(self.model, self._config)

    def state_dict(self) -> dict[str, Any]:
        """Returns what the next step depends on besides the weights of model and reference."""
        state = {name: getattr(self, name) for name in COUNTED}
        own = self.optimizer_model
        table = None if own is None else {field.name: getattr(own, field.name) for field in fields(own)}
        return state | {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "optimizer_model": table,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned."""
        for name in COUNTED:
            setattr(self, name, state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["optimizer_model"] is not None:
            self.optimizer_model = AdamState(**state["optimizer_model"])

    def _all_log_probs(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        cuts = split(batch, self._config.model.micro_batch_size)
        pieces = [(rows, policy.log_probs(model, cut, **self._forward_numbers)) for rows, cut in cuts]
        return join(pieces, batch.completion_mask)

    def _select_ahead(
        self, batch: Batch, cuts: Sequence[Cut], old_log_probs: Tensor | None, rate: float
    ) -> Selection:
        """The selection of the whole step, before any gradient."""
        pieces: list[tuple[Tensor, Scored]] = []
        for rows, cut in cuts:
            with torch.no_grad():
                output = self._forward(cut)
            corrected, _ = self._corrected(cut, _old(output, old_log_probs, rows))
            pieces.append((rows, self._score(corrected, output, rate, whole_step=False)))
        credit = join([(rows, piece.batch.advantages) for rows, piece in pieces], batch.completion_mask)
        whole = Scored(
            batch=replace(batch, advantages=credit),
            output=join_fields(pieces, batch, PolicyOutput, lambda piece: piece.output),
            shifts=join_fields(pieces, batch, TokenShifts, lambda piece: piece.shifts),
            learning_rate=rate,
            optimizer_model=pieces[0][1].optimizer_model,
            seed=pieces[0][1].seed,
            whole_step=True,
        )
        return self._algorithm.selection(whole)

    def _backward(
        self,
        batch: Batch,
        cuts: Sequence[Cut],
        old_log_probs: Tensor | None,
        sizes: BatchTotals,
        ahead: Selection | None,
        rate: float,
        watch: Stopwatch,
    ) -> tuple[float, StepRecord]:
        """Adds up the micro-batches' gradients; returns the loss and what they saw, rows in order."""
        pieces: list[tuple[Tensor, StepRecord]] = []
        loss = 0.0
        self.model.train(self._config.model.gradient_checkpointing)
        for rows, cut in cuts:
            length = cut.completion_mask.shape[1]
            with watch("policy"):
                output = self._forward(cut)
            seen = output.detached()
            old = _old(seen, old_log_probs, rows)
            corrected, weights = self._corrected(cut, old)
            with watch("curvature"):
                scored = self._score(corrected, seen, rate, whole_step=len(cuts) == 1)
                selection = (
                    self._algorithm.selection(scored) if ahead is None else ahead.of_rows(rows, length)
                )
            with watch("policy"):
                part, kl, clipped = self._loss(corrected, output.log_probs, old, selection, sizes)
                part.backward()
            loss += part.item()
            record = StepRecord(corrected, seen, old, weights, kl, scored.shifts, selection, clipped)
            pieces.append((rows, record))
        self.model.eval()
        return loss, join_records(pieces, batch)

    def _keep_everything(
        self, backward: Callable[..., object], sizes: BatchTotals, mask: Tensor, rate: float
    ) -> float:
        """The gradients as if no token were rejected, clipped; returns their norm before that."""
        backward(replace(sizes, kept_tokens=int(mask.sum())), Selection(mask), rate, Stopwatch())
        return self._clip()

    def _clip(self) -> float:
        """Clips the gradients; returns their norm before that."""
        return clip_grad_norm_(self.model.parameters(), self._config.optimizer.max_grad_norm).item()

    def _loss(
        self, batch: Batch, log_probs: Tensor, old_log_probs: Tensor, selection: Selection, sizes: BatchTotals
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The micro-batch's part of the loss; kl_k3 to the reference [B, T]; where it was clipped [B, T]."""
        algorithm = self._algorithm
        mask = batch.completion_mask
        token_loss = algorithm.token_loss(log_probs, old_log_probs, batch.advantages, mask)
        values, kl = token_loss.values, torch.zeros_like(old_log_probs)
        if self.reference is not None:
            ref = policy.log_probs(self.reference, batch, **self._forward_numbers)
            kl = kl_k3(log_probs.detach(), ref)
            if algorithm.kl_coefficient:  # 0 times an infinite estimate would be NaN
                values = values + algorithm.kl_coefficient * algorithm.kl_estimator(log_probs, ref)
        part = algorithm.aggregation(selection.weighed(values), selection.keep_mask, batch, sizes)
        return part, kl, token_loss.clipped

    def _corrected(self, batch: Batch, old_log_probs: Tensor) -> tuple[Batch, Tensor]:
        """The batch with its credit weighted for what the sampler was off by; and the weights [B, T]."""
        weights = self._correction(old_log_probs - batch.sampler_log_probs, batch.completion_mask)
        return replace(batch, advantages=batch.advantages * weights), weights

    def _forward(self, batch: Batch) -> PolicyOutput:
        numbers = self._config.curvature
        return policy.forward(
            self.model, batch, top_k=numbers.top_k, hidden_shift=numbers.hidden_shift, **self._forward_numbers
        )

    def _score(self, batch: Batch, output: PolicyOutput, rate: float, *, whole_step: bool) -> Scored:
        """The predicted shifts [B, T], computed for completion tokens only."""
        mask, moments = batch.completion_mask, self._moments()
        fields = (output.hidden, output.topk_probs, output.topk_ids, batch.token_ids, batch.advantages)
        hidden, probs, ids, token_ids, advantages = (values[mask][:, None] for values in fields)
        packed = curvature.token_shifts(hidden, probs, ids, token_ids, advantages, rate, moments)
        shifts = TokenShifts(*(unpack(x[:, 0], mask) for x in (packed.policy_shift, packed.objective_shift)))
        seed = derive_seed(self._config.seed, SELECTION, self.optimizer_step)
        return Scored(batch, output, shifts, rate, moments, seed, whole_step)

    def _moments(self) -> AdamState | None:
        """What the optimiser model is at this step: its own table, the real optimiser's, or none (SGD)."""
        if self._config.curvature.optimizer_model == "adam_live":
            return live_adam_state(self.optimizer, policy.last_layer(self.model).weight)
        return self.optimizer_model

    def _predict_and_remember(
        self, record: StepRecord, rate: float
    ) -> tuple[BatchShifts, curvature.AdamState | None]:
        """The shifts of the kept tokens' mean update, and the optimiser model after it."""
        output, batch = record.output, record.batch
        credit = record.selection.weighed(batch.advantages)
        tokens = (output.hidden, output.topk_probs, output.topk_ids, batch.token_ids, credit)
        keep = record.selection.keep_mask
        rows = curvature.mean_row_gradients(*tokens, keep)
        predicted = curvature.batch_shifts(
            *tokens, keep, learning_rate=rate, state=self._moments(), gradients=rows
        )
        own = self.optimizer_model
        return predicted, None if own is None else curvature.apply_row_gradients(own, rows)

    def _update(
        self, record: StepRecord, predicted: BatchShifts, rate: float, watch: Stopwatch
    ) -> dict[str, float]:
        """Steps the optimiser; where calibration is due, measures what that did to the policy."""
        probe = None
        if self._due(self._config.curvature.calibrate_every):
            with watch("calibration"):
                probe = self._probe(record, CALIBRATION)
        with watch("update"):
            decision = self._apply(record, predicted, rate)
        metrics = {"optim/step_scale": decision.share, **decision.metrics}
        if probe is None:
            return metrics
        with watch("calibration"):
            return metrics | calibration.measure(self.model, probe, predicted, **self._forward_numbers)

    @contextmanager
    def _diagnosed(
        self,
        record: StepRecord,
        keep_everything: Callable[[], float],
        grad_norm: float,
        rate: float,
        watch: Stopwatch,
    ) -> Iterator[dict[str, float]]:
        """Yields a place for metrics, which is filled where a diagnosis of the step taken inside is due."""
        metrics: dict[str, float] = {}
        if not self._due(self._config.curvature.diagnose_every):
            yield metrics
            return
        with watch("diagnosis"):
            look = partial(self._look, record.batch, self._probe(record, DIAGNOSIS))
            metrics |= diagnosis.class_metrics(record, learning_rate=rate, moments=self._moments())
            compared, unmasked = diagnosis.compare(
                self.model, self.optimizer, record, norm=grad_norm, keep_everything=keep_everything, look=look
            )
        yield metrics
        with watch("diagnosis"):
            real = look()
            metrics |= compared | diagnosis.effect_metrics(record, real)
            metrics |= diagnosis.effect_metrics(record, unmasked or real, "_unmasked")

    def _look(self, batch: Batch, probe: calibration.Probe) -> diagnosis.Effect:
        shift = calibration.policy_move(self.model, probe, **self._forward_numbers)
        return diagnosis.Effect(self.log_probs(batch), shift)

    def _due(self, every: int) -> bool:
        """Whether this optimiser step is an `every`-th; 0 = never."""
        return every > 0 and (self.optimizer_step + 1) % every == 0

    def _probe(self, record: StepRecord, stream: int) -> calibration.Probe:
        """A sample of the step's tokens as they are now."""
        numbers = self._config.curvature
        return calibration.take_probe(
            self.model,
            record,
            completions=numbers.calibrate_completions,
            tokens=numbers.calibrate_tokens,
            seed=derive_seed(self._config.seed, stream, self.optimizer_step),
            **self._forward_numbers,
        )

    def _check_finite(self, metrics: dict[str, float]) -> None:
        if isfinite(metrics["loss/total"]) and isfinite(metrics["policy/grad_norm"]):
            return
        self.optimizer.zero_grad(set_to_none=True)
        bad = ", ".join(f"{name}={value}" for name, value in metrics.items() if not isfinite(value))
        raise TrainingDiverged(f"optimizer step {self.optimizer_step + 1}: not finite: {bad}")

    def _apply(self, record: StepRecord, predicted: BatchShifts, rate: float) -> Decision:
        """Takes the share of the step that the step rule wants; the rule may make the step to look at it."""
        trials: list[Trial] = []

        def make(sample: Sample, measurable: bool) -> Trial:
            trials.append(
                Trial(
                    self.model,
                    self.optimizer,
                    record,
                    sample,
                    seed=derive_seed(self._config.seed, STEP_RULE, self.optimizer_step),
                    measurable=measurable,
                    states_on_record=self._config.curvature.hidden_shift == 0,
                    forward_numbers=self._forward_numbers,
                )
            )
            return trials[-1]

        decision = self._algorithm.step_rule(Proposal(predicted, rate, self.step_memory, make))
        self.step_memory = dict(decision.memory)
        if trials:
            trials[-1].settle(decision.share)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = decision.share * rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.optimizer_step += 1
        return decision


def _old(output: PolicyOutput, old_log_probs: Tensor | None, rows: Tensor) -> Tensor:
    """[b, t] of the weights that sampled, for the rows of a micro-batch: on the first update its own."""
    own = output.log_probs
    return own if old_log_probs is None else old_log_probs[rows, : own.shape[1]]
