"""The loop. Reads top to bottom: set up, then sample -> score -> credit -> learn -> log, step by step."""

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from capo_exp.algorithms.protocols import Algorithm, build_algorithm
from capo_exp.config.build import build_part
from capo_exp.config.errors import ConfigError, RunFailed
from capo_exp.config.schema import TrainConfig
from capo_exp.core import policy
from capo_exp.core.batch import join
from capo_exp.core.seeds import EVALUATION, derive_seed
from capo_exp.core.timing import Stopwatch
from capo_exp.core.types import Batch, Prompt, StepRecord
from capo_exp.data.prepare import Data, prepare
from capo_exp.data.prompts import fingerprint, preview
from capo_exp.evaluation.draw import evaluate
from capo_exp.grading.terms import build_terms
from capo_exp.grading.verifier import Verifier
from capo_exp.rollout import EngineFailed, RolloutEngine
from capo_exp.runs.checkpoint import Checkpointer
from capo_exp.runs.console import Progress
from capo_exp.runs.files import stops_cleanly
from capo_exp.runs.logger import RunLogger
from capo_exp.runs.record import RunRecord, clear, locked, read, run_dir, run_id, status
from capo_exp.runs.signals import stop_signal
from capo_exp.training.learner import Learner, TrainingDiverged
from capo_exp.training.rollout_step import Sample, Sampler, credited, sample
from capo_exp.training.updates import Update, updates


@dataclass(frozen=True)
class Inputs:
    """What can be checked and read before a run directory exists."""

    tokenizer: PreTrainedTokenizerBase
    data: Data
    verifier: Verifier
    """Has graded nothing but golds; whoever reads inputs closes it."""
    fingerprint: str
    """Of the problems, so that a run cannot go on with others."""
    algorithm: Algorithm
    device: torch.device
    compute_dtype: torch.dtype

    @property
    def train(self) -> list[Prompt]:
        return self.data.train

    @property
    def held_out(self) -> list[Prompt]:
        return self.data.held_out

    @property
    def dropped(self) -> int:
        """Training prompts that are too long."""
        return self.data.counts["training"].too_long


@dataclass
class Run:
    """One run in progress."""

    config: TrainConfig
    inputs: Inputs
    learner: Learner
    engine: RolloutEngine
    verifier: Verifier
    checkpointer: Checkpointer
    logger: RunLogger
    record: RunRecord
    progress: Progress
    sampler: Sampler
    step: int
    prompts: int
    completions: int
    generated_tokens: int
    unrewarded_steps: int
    """In a row, up to the last one."""

    def counters(self) -> dict[str, int]:
        return {
            "counter/rollout_step": self.step,
            "counter/optimizer_step": self.learner.optimizer_step,
            "counter/prompts": self.prompts,
            "counter/completions": self.completions,
            "counter/generated_tokens": self.generated_tokens,
            "counter/unrewarded_steps": self.unrewarded_steps,
            "counter/reference_resets": self.learner.reference_resets,
        }


def run(config: TrainConfig) -> Path:
    """Trains, or goes on from the last checkpoint; does nothing if this configuration has already finished.

    Returns:
        The run directory.

    Raises:
        ConfigError: before anything is written, if an input is missing or wrong.
        TrainingDiverged: if a loss is not finite; names the last good checkpoint.
        RunFailed: if the disk takes no more; says where the same command goes on.
        KeyboardInterrupt: after a signal, once the step is done and saved.
    """
    directory = run_dir(config)
    if status(directory) == "finished" and not config.overwrite:
        return directory
    disable_progress_bar()  # transformers' bars for weights of a second would tear the live line
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries end in one ConfigError
    inputs = read_inputs(config)
    with stops_cleanly(directory), ExitStack() as stack:
        stack.enter_context(inputs.verifier)
        stack.enter_context(locked(directory))
        if config.overwrite:
            clear(directory)
        session = start(config, inputs, directory, stack)
        stopped = stack.enter_context(stop_signal(session.progress.message))
        with stops_cleanly(directory):  # inside, too, so that run.json has the reason
            _loop(session, stopped)
    return directory


def read_inputs(config: TrainConfig) -> Inputs:
    algorithm = build_algorithm(config.algo)
    device = policy.choose_device(config.device)
    policy.check_architecture(config.model)
    policy.check_length(config.model, config.dataset.max_prompt_tokens + config.dataset.max_completion_tokens)
    tokenizer = policy.load_tokenizer(config.model)
    verifier = build_part(config.reward.verifier, key="reward.verifier")()
    try:
        data = prepare(config, tokenizer, verifier.gradable)
    except BaseException:  # a signal, too: its workers must not stay
        verifier.close()
        raise
    problems = fingerprint([*data.train, *data.held_out])
    dtype = policy.choose_dtype(config.model.compute_dtype, device)
    return Inputs(tokenizer, data, verifier, problems, algorithm, device, dtype)


def start(config: TrainConfig, inputs: Inputs, directory: Path, stack: ExitStack) -> Run:
    checkpointer = Checkpointer(directory, keep=config.checkpoint.keep)
    latest = checkpointer.latest()
    model = policy.load_model(config.model, inputs.device, weights=latest)
    reference = None
    if config.algo.needs_reference:
        kept = checkpointer.latest_reference()
        reference = policy.load_model(config.model, inputs.device, weights=kept).requires_grad_(False)
    learner = Learner(model, reference, inputs.algorithm, config, inputs.compute_dtype)
    before = (read(directory) or {}).get("data", inputs.fingerprint)
    if latest is not None and before != inputs.fingerprint:
        raise ConfigError(
            f"{directory} began with other problems ({before}): expected those, or overwrite=true"
        )
    state = {} if latest is None else checkpointer.restore(latest, inputs.device)
    step, counters = state.get("rollout_step", 0), state.get("counters", {})
    if state:
        learner.load_state_dict(state)
    engine = build_part(config.rollout.engine, key="rollout.engine")(
        model, inputs.tokenizer, inputs.compute_dtype
    )
    stack.callback(engine.close)
    stack.callback(inputs.verifier.close)
    record = stack.enter_context(RunRecord(directory, config, device_name=policy.device_name(inputs.device)))
    logger = stack.enter_context(RunLogger(directory, config, run_id=run_id(config), resume_step=step))
    record.fields |= {"wandb": logger.wandb_location, "model_origin": policy.read_origin(config.model)}
    record.fields |= _data_on_record(inputs)
    record.update({})
    logger.describe(record.fields)
    progress = stack.enter_context(Progress(total_steps=config.num_steps, first_step=step))
    for line in (*inputs.data.lines(), f"first prompt: {preview(inputs.train[0].text)}"):
        progress.message(line)
    engine.start(directory, inputs.train)
    if latest is not None:
        progress.message(f"goes on after step {step}, from {latest}")
    return Run(
        config=config,
        inputs=inputs,
        learner=learner,
        engine=engine,
        verifier=inputs.verifier,
        checkpointer=checkpointer,
        logger=logger,
        record=record,
        progress=progress,
        sampler=Sampler(
            config,
            inputs.algorithm,
            _train_engine(config, inputs, engine),
            inputs.verifier,
            inputs.train,
            build_terms(config.reward),
        ),
        step=step,
        prompts=counters.get("counter/prompts", 0),
        completions=counters.get("counter/completions", 0),
        generated_tokens=counters.get("counter/generated_tokens", 0),
        unrewarded_steps=counters.get("counter/unrewarded_steps", 0),
    )


def _data_on_record(inputs: Inputs) -> dict[str, object]:
    """What run.json says of the problems."""
    return {
        "data": inputs.fingerprint,
        "data_counts": {split: asdict(counts) for split, counts in inputs.data.counts.items()},
        "data_notes": list(inputs.data.notes),
        "first_prompt": inputs.train[0].text,
    }


def _train_engine(config: TrainConfig, inputs: Inputs, engine: RolloutEngine) -> RolloutEngine:
    """Where training completions come from, if not from the engine that evaluation uses."""
    if config.rollout.train_engine is None:
        return engine
    return build_part(config.rollout.train_engine, key="rollout.train_engine")(inputs.tokenizer)


def _loop(session: Run, stopped: threading.Event) -> None:
    """Steps until the end or a signal.

    An engine that fails does so between two of the learner's updates: what it has learned is saved.
    """
    try:
        _steps(session, stopped)
    except EngineFailed as error:
        if session.step:
            _save(session)
        kept = f"step {session.step} is saved" if session.step else "nothing was trained yet"
        raise EngineFailed(f"{error}\n{kept}; the same command goes on from there") from error
    except torch.OutOfMemoryError as error:
        raise RunFailed(
            f"{str(error).splitlines()[0]} Lower model.micro_batch_size, model.logits_chunk_tokens or what "
            "sampling takes: rollout.engine.max_sequences_per_call (hf) or gpu_memory_utilization (vllm)"
        ) from error


def _steps(session: Run, stopped: threading.Event) -> None:
    config = session.config
    if _evaluation_due(session) and session.logger.evaluated_step < session.step:
        _evaluate(session)  # before the first step, or where the engine failed in one that was due
    while not _ended(session):
        rollout_step(session)
        last = _ended(session)
        if _evaluation_due(session):
            _evaluate(session)
        if last or stopped.is_set() or _due(session.step, config.checkpoint.every):
            _save(session)
        if stopped.is_set() and not last:
            session.progress.message(
                f"stopped and saved after step {session.step}; the same command goes on from there"
            )
            raise KeyboardInterrupt
    if session.step < config.num_steps:
        count = session.unrewarded_steps
        session.progress.message(
            f"ended after step {session.step}: {count} steps in a row without any reward"
        )


def _ended(session: Run) -> bool:
    """After the last step, or with nothing left to learn from, unless a KL to a reference can change that."""
    limit = 0 if session.config.algo.needs_reference else session.config.stop_after_unrewarded
    return session.step >= session.config.num_steps or 0 < limit <= session.unrewarded_steps


def rollout_step(session: Run) -> None:
    """Fresh completions, then the optimiser steps over them."""
    config, watch = session.config, Stopwatch()
    with watch("total"):
        drawn = _sample(session, watch)
        session.step += 1
        with watch("credit"):
            pad = session.inputs.tokenizer.pad_token_id
            assert isinstance(pad, int)
            batch, credit_metrics = credited(
                drawn, session.inputs.algorithm, session.learner, pad_token_id=pad
            )
        steps = _learn(session, batch)
    clock = {f"time/{name}_seconds": value for name, value in watch.seconds.items()}
    clock["time/tokens_per_second"] = drawn.tokens / watch.seconds["total"]
    shared = (
        session.counters()
        | drawn.metrics
        | credit_metrics
        | {"data/dropped_prompts": session.inputs.dropped}
        | session.engine.metrics()
        | clock
    )
    for update in steps:
        session.logger.log_step(shared | update.metrics)
    session.progress.update(shared | steps[-1].metrics)
    if _due(session.step, config.logger.completions_every):
        rows = _completion_rows(
            drawn, batch, steps, config.logger.completions_groups, session.inputs.tokenizer
        )
        session.logger.log_completions(session.step, rows)
    if _due(session.step, config.algo.reference_reset_every):
        session.learner.reset_reference()
    if _due(session.step, config.algo.optimizer_reset_every):
        session.learner.reset_optimizer()


def _sample(session: Run, watch: Stopwatch) -> Sample:
    version = session.learner.optimizer_step
    drawn = sample(
        session.sampler, step=session.step + 1, first=session.prompts, weight_version=version, watch=watch
    )
    session.engine.rest()
    session.prompts += drawn.prompts
    session.completions += drawn.completions
    session.generated_tokens += drawn.tokens
    session.unrewarded_steps = 0 if drawn.rewarded else session.unrewarded_steps + 1
    return drawn


def _learn(session: Run, batch: Batch) -> list[Update]:
    try:
        return list(
            updates(session.learner, session.inputs.algorithm, session.config, batch, step=session.step)
        )
    except TrainingDiverged as error:
        last = session.checkpointer.latest()
        raise TrainingDiverged(f"{error}; last good checkpoint: {last or 'none, the base model'}") from error


def _evaluate(session: Run) -> None:
    watch = Stopwatch()
    with watch("total"):
        metrics = evaluate(
            session.engine,
            session.verifier,
            session.inputs.held_out,
            session.config,
            seed=derive_seed(session.config.seed, EVALUATION, session.step),
            weight_version=session.learner.optimizer_step,
        )
    line = metrics | session.counters()
    session.logger.log_evaluation(line | {"time/total_seconds": watch.seconds["total"]})
    session.progress.evaluation(line)
    session.engine.rest()


def _save(session: Run) -> None:
    session.logger.sync()
    learner, counters = session.learner, session.counters()
    state = learner.state_dict() | {"rollout_step": session.step, "counters": counters}
    reference = learner.reference if learner.reference_resets else None
    session.checkpointer.save(session.step, state, learner.model, session.inputs.tokenizer, reference)
    session.record.update(counters)


def _completion_rows(
    drawn: Sample, batch: Batch, steps: Sequence[Update], count: int, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, object]]:
    """The first `count` groups, one row a completion, with what the curvature model said of each token in the
    last pass; a completion that the filter took out keeps none of its tokens."""

    def whole(get: Callable[[StepRecord], Tensor]) -> Tensor:
        last = [(step.rows, get(step.record)) for step in steps if step.record is not None]
        return join(last, batch.completion_mask)

    keep = whole(lambda r: r.selection.keep_mask)
    policy_shift = whole(lambda r: r.shifts.policy_shift)
    objective_shift = whole(lambda r: r.shifts.objective_shift)
    size = drawn.rewards.shape[1]
    seen = {i for group in drawn.groups[:count] for c in group.completions for i in c.token_ids}
    texts = {i: tokenizer.decode([i]) for i in seen}
    rows: list[dict[str, object]] = []
    for p, group in enumerate(drawn.groups[:count]):
        for g, completion in enumerate(group.completions):
            row, tokens = p * size + g, slice(0, len(completion.token_ids))
            rows.append(
                {
                    "prompt": group.prompt.text,
                    "completion": completion.text,
                    "answer": group.prompt.problem.answer,
                    "family": group.prompt.problem.family,
                    "reward": drawn.rewards[p, g].item(),
                    "advantage": batch.advantages[row, 0].item(),
                    "truncated": completion.truncated,
                    "weight_version": group.weight_version,
                    "token_ids": list(completion.token_ids),
                    "tokens": [texts[i] for i in completion.token_ids],
                    "log_prob": list(completion.sampler_log_probs),
                    "policy_shift": policy_shift[row, tokens].tolist(),
                    "objective_shift": objective_shift[row, tokens].tolist(),
                    "keep": keep[row, tokens].tolist(),
                }
            )
    return rows


def _evaluation_due(session: Run) -> bool:
    """Before the first step, after every so many, and after the last."""
    return session.step == 0 or _ended(session) or _due(session.step, session.config.evaluation.every)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
