"""One optimiser step from one batch. Owns the model, the optimiser, the schedule and the optimiser model's
state."""

from collections.abc import Callable
from math import isfinite

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel, get_scheduler

from capo_exp import curvature, policy
from capo_exp.algorithm import Algorithm, kl_k3
from capo_exp.collate import join, split, totals
from capo_exp.config import TrainConfig
from capo_exp.step_metrics import summarise
from capo_exp.timing import Stopwatch
from capo_exp.types import Batch, BatchShifts, BatchTotals, PolicyOutput, Selection, StepRecord, TokenShifts


class TrainingDiverged(RuntimeError):
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
        self.optimizer_step = 0
        self.optimizer_model = _optimizer_model(model, config)
        self.optimizer = _optimizer(model, config)
        self.schedule = _schedule(self.optimizer, config)
        self._reference = reference
        self._algorithm = algorithm
        self._config = config
        self._forward_numbers = {
            "temperature": config.rollout.temperature,
            "chunk_tokens": config.model.logits_chunk_tokens,
            "compute_dtype": compute_dtype,
        }

    def step(self, batch: Batch, old_log_probs: Tensor | None = None) -> tuple[dict[str, float], StepRecord]:
        """Forward, select, backward over micro-batches; then the optimiser step and the moments update.

        Args:
            batch: all rows of the step.
            old_log_probs: [B, T] of the weights that sampled; None on the first iteration, when the policy is
                them.

        Returns:
            The step's metrics, and what it saw of each token.

        Raises:
            TrainingDiverged: if the loss or the gradient norm is not finite. The optimiser has not stepped
                then.
        """
        watch = Stopwatch()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        sizes = totals(batch)
        pieces: list[tuple[Tensor, StepRecord]] = []
        loss = 0.0
        self.model.train(self._config.model.gradient_checkpointing)
        for rows, micro_batch in split(batch, self._config.model.micro_batch_size):
            old = (
                None if old_log_probs is None else old_log_probs[rows, : micro_batch.completion_mask.shape[1]]
            )
            piece, part = self._micro_step(micro_batch, old, sizes, learning_rate, watch)
            pieces.append((rows, piece))
            loss += part
        self.model.eval()
        with watch("update"):
            max_norm = self._config.optimizer.max_grad_norm
            grad_norm = clip_grad_norm_(self.model.parameters(), max_norm).item()
        record = _join(pieces, batch)
        metrics = {"loss/total": loss, "policy/grad_norm": grad_norm, **summarise(record)}
        self._check_finite(metrics)
        with watch("curvature"):
            predicted, self.optimizer_model = self._predict_and_remember(record, learning_rate)
        scale = self._algorithm.step_rule(predicted, learning_rate)
        with watch("update"):
            self._apply(scale * learning_rate)
        metrics |= {
            "counter/optimizer_step": self.optimizer_step,
            "optim/learning_rate": learning_rate,
            "optim/step_scale": scale,
            "curvature/batch/policy_shift": predicted.policy_shift,
            "curvature/batch/objective_shift": predicted.objective_shift,
        }
        return metrics | {f"time/{name}_seconds": value for name, value in watch.seconds.items()}, record

    def _micro_step(
        self,
        batch: Batch,
        old_log_probs: Tensor | None,
        sizes: BatchTotals,
        learning_rate: float,
        watch: Stopwatch,
    ) -> tuple[StepRecord, float]:
        """Adds this micro-batch's gradient; returns what it saw and its part of the loss."""
        algorithm = self._algorithm
        with watch("policy"):
            top_k = self._config.curvature.top_k
            output = policy.forward(self.model, batch, top_k=top_k, **self._forward_numbers)
        current = output.log_probs.detach()
        old = current if old_log_probs is None else old_log_probs
        with watch("curvature"):
            shifts = self._token_shifts(batch, output, learning_rate)
            selection = algorithm.selection(shifts, batch, current)
        with watch("policy"):
            token_loss = algorithm.token_loss(output.log_probs, old, batch.advantages)
            kl = self._kl(batch, output.log_probs)
            values = token_loss.values + algorithm.kl_coefficient * kl
            loss = algorithm.aggregation(values, selection.keep_mask, batch.completion_mask, sizes)
            loss.backward()
        output = PolicyOutput(current, output.entropy, output.topk_probs, output.topk_ids, output.hidden)
        return StepRecord(batch, output, old, kl.detach(), shifts, selection, token_loss.clipped), loss.item()

    def _token_shifts(self, batch: Batch, output: PolicyOutput, learning_rate: float) -> TokenShifts:
        mask = batch.completion_mask
        fields = (output.hidden, output.topk_probs, output.topk_ids, batch.token_ids)
        hidden, probs, ids, token_ids = (field[mask][:, None] for field in fields)
        advantages = batch.advantages[:, None].expand_as(mask)[mask]
        shifts = curvature.token_shifts(
            hidden, probs, ids, token_ids, advantages, learning_rate, self.optimizer_model
        )
        return TokenShifts(
            *(policy.unpack(x[:, 0], mask) for x in (shifts.policy_shift, shifts.objective_shift))
        )

    def _kl(self, batch: Batch, log_probs: Tensor) -> Tensor:
        if self._reference is None:
            return torch.zeros_like(log_probs)
        return kl_k3(log_probs, policy.reference_log_probs(self._reference, batch, **self._forward_numbers))

    def _predict_and_remember(
        self, record: StepRecord, learning_rate: float
    ) -> tuple[BatchShifts, curvature.AdamState | None]:
        """The shifts of the kept tokens' mean update, and the optimiser model after it."""
        output, batch = record.output, record.batch
        tokens = (output.hidden, output.topk_probs, output.topk_ids, batch.token_ids, batch.advantages)
        keep = record.selection.keep_mask
        state = self.optimizer_model
        rows = curvature.mean_row_gradients(*tokens, keep)
        predicted = curvature.batch_shifts(
            *tokens, keep, learning_rate=learning_rate, state=state, gradients=rows
        )
        return predicted, None if state is None else curvature.apply_row_gradients(state, rows)

    def _check_finite(self, metrics: dict[str, float]) -> None:
        if isfinite(metrics["loss/total"]) and isfinite(metrics["policy/grad_norm"]):
            return
        self.optimizer.zero_grad(set_to_none=True)
        bad = ", ".join(f"{name}={value}" for name, value in metrics.items() if not isfinite(value))
        raise TrainingDiverged(f"optimizer step {self.optimizer_step + 1}: not finite: {bad}")

    def _apply(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.optimizer_step += 1


def _join(pieces: list[tuple[Tensor, StepRecord]], batch: Batch) -> StepRecord:
    """The micro-batches' records as one, in the rows' own order."""

    def field(get: Callable[[StepRecord], Tensor]) -> Tensor:
        return join([(rows, get(piece)) for rows, piece in pieces], batch.completion_mask)

    reasons = pieces[0][1].selection.rejected_by
    return StepRecord(
        batch=batch,
        output=PolicyOutput(
            log_probs=field(lambda r: r.output.log_probs),
            entropy=field(lambda r: r.output.entropy),
            topk_probs=field(lambda r: r.output.topk_probs),
            topk_ids=field(lambda r: r.output.topk_ids),
            hidden=field(lambda r: r.output.hidden),
        ),
        old_log_probs=field(lambda r: r.old_log_probs),
        kl=field(lambda r: r.kl),
        shifts=TokenShifts(field(lambda r: r.shifts.policy_shift), field(lambda r: r.shifts.objective_shift)),
        selection=Selection(
            keep_mask=field(lambda r: r.selection.keep_mask),
            rejected_by={why: field(lambda r, why=why: r.selection.rejected_by[why]) for why in reasons},
        ),
        clipped=field(lambda r: r.clipped),
    )


def _optimizer_model(model: PreTrainedModel, config: TrainConfig) -> curvature.AdamState | None:
    if config.curvature.optimizer_model == "sgd":
        return None
    beta1, beta2 = config.curvature.betas
    return curvature.init_adam_state(
        config.model.vocab_size,
        policy.last_layer(model).in_features,
        (beta1, beta2),
        config.curvature.eps,
        device=model.device,
    )


def _optimizer(model: PreTrainedModel, config: TrainConfig) -> torch.optim.Optimizer:
    numbers = config.optimizer
    beta1, beta2 = numbers.betas
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.regime.learning_rate,
        betas=(beta1, beta2),
        eps=numbers.eps,
        weight_decay=numbers.weight_decay,
    )


def _schedule(optimizer: torch.optim.Optimizer, config: TrainConfig) -> torch.optim.lr_scheduler.LRScheduler:
    total = config.num_steps * config.algo.num_iterations
    warmup = round(config.optimizer.warmup_ratio * total)
    return get_scheduler(
        config.optimizer.schedule, optimizer, num_warmup_steps=warmup, num_training_steps=total
    )
