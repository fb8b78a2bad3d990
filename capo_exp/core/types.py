"""One frozen dataclass per stage of the data flow.

Dimension legend (used in every docstring and shape annotation of the package):

    P  prompts of one rollout step           G  completions per prompt (group_size)
    B  rows = completions = P * G            T  completion tokens (longest of the batch)
    S  prompt tokens + T                     V  vocabulary
    K  curvature support (top-K)             H  width of the last hidden state
    N  completion tokens of a batch, packed  U  vocabulary rows the optimiser model has seen

Position t of a [B, T] tensor is the t-th COMPLETION token. The shift by one between a state and the token
that it predicts happens in policy.py and nowhere else.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from jaxtyping import Bool, Float, Int
from torch import Tensor

from capo_exp.distributed.world import SINGLE, World

TokenOrRow = Float[Tensor, " B"] | Float[Tensor, "B T"]
"""One number a completion, or one a token."""


@dataclass(frozen=True)
class Problem:
    """A question with a verifiable answer, before any tokenizer has seen it."""

    id: str  # Unique and stable within its dataset
    problem: str  # The question as text
    answer: str  # The gold answer as text
    family: str = ""  # Task family or subject; stored with sampled completions
    level: str = ""  # Difficulty as the dataset states it
    demonstration: str = ""  # A worked solution that ends in the answer; empty where the dataset has none
    answers_alt: tuple[str, ...] = ()  # The same answer written otherwise; any of them counts

    @property
    def golds(self) -> tuple[str, ...]:
        """Every way of writing the answer, `answer` first."""
        return (self.answer, *self.answers_alt)


@dataclass(frozen=True)
class Prompt:
    """A problem rendered for one model."""

    problem: Problem
    text: str  # What the model reads, template and system prompt included
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """One sampled answer."""

    token_ids: tuple[int, ...]  # At least one token; ends in the end-of-sequence token unless `truncated`
    sampler_log_probs: tuple[float, ...]
    """Log-likelihood [nats] of each token under the full softmax at the sampling temperature, whatever top_k
    or top_p cut off, so that the learner's can be compared; NaN where it was not drawn (demonstrations, what
    a request had `begun`)."""
    text: str  # Decoded without special tokens
    truncated: bool  # True if the length limit came before the end-of-sequence token


@dataclass(frozen=True)
class RolloutGroup:
    """G completions of one prompt, all sampled with the same weights, or begun with them
    (algo.rollout_tokens)."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    weight_version: int  # Number of optimiser steps that the sampling weights had seen
    rewards: tuple[float, ...] | None = None  # What each has earned already; None = it is to be graded


@dataclass(frozen=True)
class UnfinishedGroup:
    """A group of which a completion has not ended, so that it goes on in the next rollout step."""

    visit: int  # Place of its prompt among those of training
    step: int  # Rollout step in which it began
    weight_version: int  # Of the weights that began it
    completions: tuple[Completion, ...]
    """Those that are truncated go on unless they have reached the length limit; each token has the log-prob
    of the weights that sampled it."""


@dataclass(frozen=True)
class Batch:
    """Rows of one or more rollout groups as tensors; prompts padded on the left, completions on the right."""

    input_ids: Int[Tensor, "B S"]  # int64, prompt then completion
    attention_mask: Int[Tensor, "B S"]  # int64, 1 on real tokens
    completion_mask: Bool[Tensor, "B T"]
    """[B, T] bool, True on real completion tokens; they are the last T columns of input_ids."""
    sampler_log_probs: Float[Tensor, "B T"]  # nats; 0 on padding
    advantages: Float[Tensor, "B T"]
    """[B, T] float32, the credit of each token; equal over a completion for most methods, 0 on padding."""
    group_ids: Int[Tensor, " B"]  # int64, which prompt of the rollout step a row belongs to
    truncated: Bool[Tensor, " B"]  # True where the length limit came first
    surprisal: Float[Tensor, " B"]
    """[B] nats, -ln of the share of a prompt's completions that have the completion's reward."""

    @property
    def token_ids(self) -> Tensor:
        """[B, T] completion tokens."""
        return self.input_ids[:, -self.completion_mask.shape[1] :]


@dataclass(frozen=True)
class BatchTotals:
    """Sizes of the whole optimiser step, so that micro-batches can be summed into exactly the batch's
    loss."""

    sequences: int  # B of the whole step
    completion_tokens: int  # N of the whole step
    group_tokens: Int[Tensor, " P"]
    """[P] completion tokens of each prompt of the rollout step; 0 for a prompt without rows."""
    group_sequences: Int[Tensor, " P"]  # Completions of each prompt; 0 for a prompt without rows
    kept_tokens: int | None = None
    """Tokens that the selection kept; counted before the first gradient for parts that declare
    `whole_step`."""


@dataclass(frozen=True)
class PolicyOutput:
    """What one forward pass says about the sampled tokens. Neutral value on padding: 0."""

    log_probs: Float[Tensor, "B T"]  # nats, float32, carries the gradient
    entropy: Float[Tensor, "B T"]  # nats, float32, no gradient
    topk_probs: Float[Tensor, "B T K"]  # float32, renormalised over K
    topk_ids: Int[
        Tensor, "B T K"
    ]  # int64, the K most probable; the sampled token in place of the last if absent
    hidden: Float[Tensor, "B T H"]
    """[B, T, H] float32, no gradient: the last-layer input that produced the token's logits, divided by the
    temperature (so that logits / temperature = W @ hidden exactly)."""
    rows: Int[Tensor, " b"] | None = None
    """[b] int64, ascending: which rows topk_probs, topk_ids and hidden hold, [b, T, ...], where other
    processes have the rest; None = all."""

    def detached(self) -> "PolicyOutput":
        """Returns the same without a graph."""
        return replace(self, log_probs=self.log_probs.detach())


@dataclass(frozen=True)
class TokenShifts:
    """Predicted effect of each token's own update under the last-layer model."""

    policy_shift: Float[Tensor, "B T"]  # m_F [B, T] nats: k2, half the squared change of the token's log-prob
    objective_shift: Float[Tensor, "B T"]  # m_H [B, T] reward units


@dataclass(frozen=True)
class BatchShifts:
    """Predicted effect of the mean update of a whole batch."""

    policy_shift: float  # nats, k2 of the sampled tokens
    objective_shift: float  # Reward units, mean over tokens
    objective_shift_by_row: float  # The authors' number, no prediction: every vocabulary row weighs the same


@dataclass(frozen=True)
class AdamState:
    """Moments of the optimiser model: a table that holds only the vocabulary rows seen so far.

    The real optimiser's moments can be read as such a table, too: they are those of the loss, hence `sign`,
    and already its first step is Adam's, hence `raw_steps`.
    """

    slot_of_id: Int[Tensor, " V"]  # int64: table row of each vocabulary id; 0 for an id not seen yet
    first: Float[Tensor, "rows H"]  # first moments; row 0 is always zero
    second: Float[Tensor, "rows H"]  # second moments; row 0 is always zero
    step: int  # Updates made so far
    betas: tuple[float, float]
    eps: float
    sign: float = 1.0  # 1 for moments of the objective, -1 for those of the loss
    raw_steps: int = 1  # How many first steps follow the raw gradient, before the moments shape the direction
    token_weight: float | None = None
    """What a token's gradient weighs in the gradients that the moments are of; None = each row's mean over
    the tokens that touch it, and 1 for a token alone."""


@dataclass(frozen=True)
class Scored:
    """What a selection decides by, without gradients: a micro-batch, or the whole step if it declares
    `whole_step`."""

    batch: Batch
    output: PolicyOutput
    shifts: TokenShifts
    old_log_probs: Float[Tensor, "B T"]  # nats, of the weights that sampled, by the learner
    learning_rate: float
    optimizer_model: AdamState | None
    seed: int  # A function of the run's seed and of the optimiser step
    world: World = SINGLE
    """The processes that hold the output of the other rows, where it is a whole step that is shared out."""
    ref_log_probs: Float[Tensor, "B T"] | None = None
    """Nats, of the reference, for a token loss that declares `whole_step` and `needs_reference`."""


@dataclass(frozen=True)
class Selection:
    """Which completion tokens take part in the update."""

    keep_mask: Bool[Tensor, "B T"]  # a subset of completion_mask
    rejected_by: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Reason -> [B, T] bool. A token can be rejected for several reasons."""
    weights: Float[Tensor, "B T"] | None = None  # in [0, 1], what a kept token counts; None = 1 each

    def of_rows(self, rows: Tensor, batch: Batch) -> "Selection":
        """Returns the part of a micro-batch that holds these rows [b]."""
        length = batch.completion_mask.shape[1]
        rejected = {why: mask[rows, :length] for why, mask in self.rejected_by.items()}
        weights = None if self.weights is None else self.weights[rows, :length]
        return Selection(self.keep_mask[rows, :length], rejected, weights)

    def weighed(self, values: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Returns values [B, T] times the weights."""
        return values if self.weights is None else values * self.weights


@dataclass(frozen=True)
class StepInput:
    """What an optimiser step starts from."""

    batch: Batch  # All rows of the step
    totals: BatchTotals  # What the loss averages over
    stored: Float[Tensor, "B T"] | None = None
    """[B, T] nats by the weights that sampled; None before the first update on a batch: they are the policy's
    own."""
    scored: Scored | None = None
    """All rows before the first gradient, for a token loss that declares `whole_step`."""


@dataclass(frozen=True)
class TokenLossInput:
    """What a token loss may see of a micro-batch."""

    log_probs: Float[Tensor, "B T"]  # nats, carries the gradient
    old_log_probs: Float[Tensor, "B T"]  # nats, of the weights that sampled, by the learner
    sampler_log_probs: Float[Tensor, "B T"]  # nats, of the same weights, by the engine that sampled
    advantages: Float[Tensor, "B T"]  # the credit of each token, corrected; 0 on padding
    completion_mask: Bool[Tensor, "B T"]  # bool
    entropy: Float[Tensor, "B T"]  # nats, no gradient
    step: Scored | None = None
    """The whole optimiser step, of which these are some rows, for a token loss that declares `whole_step`."""
    rows: Int[Tensor, " B"] | None = None  # int64, which rows of `step` these are
    ref_log_probs: Float[Tensor, "B T"] | None = None
    """Nats, of the reference, without a graph; the policy's own where nothing needs one."""

    def of_step(self, decide: Callable[[Scored], Tensor]) -> Tensor:
        """Returns these rows, [B] or [B, T], of what is decided about the whole step."""
        assert self.step is not None and self.rows is not None, "whole_step has it scored"
        values = decide(self.step)[self.rows]
        return values if values.dim() == 1 else values[:, : self.log_probs.shape[1]]

    @property
    def log_ratio(self) -> Float[Tensor, "B T"]:
        """[B, T] nats, ln(policy / policy that sampled)."""
        return self.log_probs - self.old_log_probs


@dataclass(frozen=True)
class TokenLoss:
    """Loss of each token before any averaging."""

    values: Float[Tensor, "B T"]  # reward units
    clipped: Bool[Tensor, "B T"]  # True where the trust region cut the gradient


@dataclass(frozen=True)
class StepRecord:
    """Everything one optimiser step saw, token by token, without gradients; the source of its metrics."""

    batch: Batch  # Its advantages are corrected: times `weights`
    output: PolicyOutput
    old_log_probs: Float[Tensor, "B T"]  # nats, of the weights at sampling
    weights: Float[Tensor, "B T"]
    """Of the correction for the sampler's log-probs; 1 without one, 0 on padding."""
    kl: Float[Tensor, "B T"]  # nats, kl_k3 to the reference; 0 without one
    shifts: TokenShifts
    selection: Selection
    clipped: Bool[Tensor, "B T"]  # bool


@dataclass(frozen=True)
class Gradient:
    """What a backward pass saw; the gradient itself, clipped, is on the model's parameters."""

    given: StepInput
    record: StepRecord
    loss: float
    norm: float  # Before clipping
