"""The loop. Reads top to bottom: set up, then sample -> score -> credit -> learn -> log, step by step."""

import hashlib
import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from capo_exp import parts, policy
from capo_exp.algorithm import Algorithm, build_algorithm
from capo_exp.checkpoint import Checkpointer
from capo_exp.collate import collate
from capo_exp.config import ConfigError, TrainConfig
from capo_exp.data.prompts import render, step_indices
from capo_exp.evaluate import evaluate
from capo_exp.learner import Learner, TrainingDiverged
from capo_exp.logger import RunLogger
from capo_exp.progress import Progress
from capo_exp.rewards import Verifier
from capo_exp.rollout import RolloutEngine
from capo_exp.run_record import RunRecord, clear, locked, read, run_dir, run_id, status
from capo_exp.timing import Stopwatch
from capo_exp.types import Batch, Prompt, RolloutGroup, StepRecord

# Streams of random numbers; each call's seed is a function of (config.seed, stream, step), so resume needs no
# state.
_ORDER, _ROLLOUT, _EVALUATION = range(3)


@dataclass(frozen=True)
class Inputs:
    """What can be checked and read before a run directory exists."""

    tokenizer: PreTrainedTokenizerBase
    train: list[Prompt]
    held_out: list[Prompt]
    dropped: int
    fingerprint: str
    """Of the problems, so that a run cannot go on with others."""
    algorithm: Algorithm
    device: torch.device
    compute_dtype: torch.dtype


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
    step: int
    completions: int
    generated_tokens: int

    def counters(self) -> dict[str, int]:
        return {
            "counter/rollout_step": self.step,
            "counter/optimizer_step": self.learner.optimizer_step,
            "counter/completions": self.completions,
            "counter/generated_tokens": self.generated_tokens,
        }


def run(config: TrainConfig) -> Path:
    """Trains, or goes on from the last checkpoint; does nothing if this configuration has already finished.

    Returns:
        The run directory.

    Raises:
        ConfigError: before anything is written, if an input is missing or wrong.
        TrainingDiverged: if a loss is not finite; names the last good checkpoint.
        KeyboardInterrupt: after a signal, once the step is done and saved.
    """
    directory = run_dir(config)
    if status(directory) == "finished" and not config.overwrite:
        return directory
    disable_progress_bar()  # transformers' bars for weights of a second would tear the live line
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries end in one ConfigError
    inputs = read_inputs(config)
    with ExitStack() as stack:
        stack.enter_context(locked(directory))
        if config.overwrite:
            clear(directory)
        session = start(config, inputs, directory, stack)
        stopped = stack.enter_context(_stop_signal(session.progress))
        _loop(session, stopped)
    return directory


def read_inputs(config: TrainConfig) -> Inputs:
    algorithm = build_algorithm(config.algo)
    device = _device(config.device)
    policy.check_architecture(config.model)
    tokenizer = policy.load_tokenizer(config.model)
    source = parts.build(config.dataset.source, key="dataset.source")
    train, dropped = render(
        source(config.dataset.train_split, path=config.dataset.path), tokenizer, config.dataset
    )
    held_out, _ = render(
        source(config.dataset.eval_split, path=config.dataset.path), tokenizer, config.dataset
    )
    held_out = held_out[: config.evaluation.num_problems]
    fingerprint = _fingerprint([*train, *held_out])
    dtype = _compute_dtype(config, device)
    return Inputs(tokenizer, train, held_out, dropped, fingerprint, algorithm, device, dtype)


def start(config: TrainConfig, inputs: Inputs, directory: Path, stack: ExitStack) -> Run:
    checkpointer = Checkpointer(directory, keep=config.checkpoint.keep)
    latest = checkpointer.latest()
    model = policy.load_model(config.model, inputs.device, weights=latest)
    reference = None
    if config.algo.kl_coefficient > 0:
        reference = policy.load_model(config.model, inputs.device).requires_grad_(False)
    learner = Learner(model, reference, inputs.algorithm, config, inputs.compute_dtype)
    before = (read(directory) or {}).get("data", inputs.fingerprint)
    if latest is not None and before != inputs.fingerprint:
        raise ConfigError(
            f"{directory} began with other problems ({before}): expected those, or overwrite=true"
        )
    step, counters = (0, {}) if latest is None else checkpointer.restore(latest, learner)
    engine = parts.build(config.rollout.engine, key="rollout.engine")
    record = stack.enter_context(RunRecord(directory, config, device_name=str(inputs.device)))
    logger = stack.enter_context(RunLogger(directory, config, run_id=run_id(config), resume_step=step))
    record.fields |= {"wandb": logger.wandb_location, "data": inputs.fingerprint}
    record.update({})
    progress = stack.enter_context(Progress(total_steps=config.num_steps, first_step=step))
    if latest is not None:
        progress.message(f"goes on after step {step}, from {latest}")
    return Run(
        config=config,
        inputs=inputs,
        learner=learner,
        engine=engine(model, inputs.tokenizer, inputs.compute_dtype),
        verifier=stack.enter_context(parts.build(config.reward.verifier, key="reward.verifier")()),
        checkpointer=checkpointer,
        logger=logger,
        record=record,
        progress=progress,
        step=step,
        completions=counters.get("counter/completions", 0),
        generated_tokens=counters.get("counter/generated_tokens", 0),
    )


def _loop(session: Run, stopped: threading.Event) -> None:
    config = session.config
    if session.step == 0:
        _evaluate(session)
    while session.step < config.num_steps:
        rollout_step(session)
        last = session.step == config.num_steps
        if last or _due(session.step, config.evaluation.every):
            _evaluate(session)
        if last or stopped.is_set() or _due(session.step, config.checkpoint.every):
            _save(session)
        if stopped.is_set() and not last:
            session.progress.message(
                f"stopped and saved after step {session.step}; the same command goes on from there"
            )
            raise KeyboardInterrupt


def rollout_step(session: Run) -> None:
    """One rollout step: num_iterations optimiser steps on one batch of fresh completions."""
    config, algorithm, watch = session.config, session.inputs.algorithm, Stopwatch()
    session.step += 1
    with watch("total"):
        with watch("rollout"):
            groups = _generate(session)
        with watch("reward"):
            texts = [[completion.text for completion in group.completions] for group in groups]
            result = session.verifier.score(texts, [group.prompt.problem.answer for group in groups])
            rewards = torch.tensor(result.rewards)
        advantages = algorithm.advantage(rewards)
        pad = session.inputs.tokenizer.pad_token_id
        assert isinstance(pad, int)
        batch = collate(groups, advantages, pad_token_id=pad, device=session.inputs.device)
        shared = {
            **_rollout_metrics(groups, rewards),
            **result.metrics,
            "data/dropped_prompts": session.inputs.dropped,
        }
        old_log_probs: Tensor | None = None
        lines: list[dict[str, float]] = []
        for _ in range(algorithm.num_iterations):
            metrics, record = _learn(session, batch, old_log_probs)
            old_log_probs = record.old_log_probs
            lines.append({**shared, **metrics, **session.counters()})
    clock = {f"time/{name}_seconds": value for name, value in watch.seconds.items()}
    clock["time/tokens_per_second"] = int(batch.completion_mask.sum()) / watch.seconds["total"]
    for line in lines:
        session.logger.log_step(line | clock)
    session.progress.update(lines[-1] | clock)
    if _due(session.step, config.logger.completions_every):
        rows = _completion_rows(groups, rewards, advantages, record, config.logger.completions_groups)
        session.logger.log_completions(session.step, rows)


def _generate(session: Run) -> list[RolloutGroup]:
    config, train = session.config, session.inputs.train
    order = _seed(config, _ORDER, 0)
    indices = step_indices(len(train), config.regime.prompts_per_step, session.step - 1, order)
    groups = session.engine.generate(
        [train[i] for i in indices],
        group_size=config.regime.group_size,
        max_tokens=config.dataset.max_completion_tokens,
        temperature=config.rollout.temperature,
        top_k=config.rollout.top_k,
        top_p=config.rollout.top_p,
        seed=_seed(config, _ROLLOUT, session.step),
        weight_version=session.learner.optimizer_step,
    )
    session.completions += sum(len(group.completions) for group in groups)
    session.generated_tokens += sum(len(c.token_ids) for group in groups for c in group.completions)
    return groups


def _learn(session: Run, batch: Batch, old_log_probs: Tensor | None) -> tuple[dict[str, float], StepRecord]:
    try:
        return session.learner.step(batch, old_log_probs)
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
            seed=_seed(session.config, _EVALUATION, session.step),
            weight_version=session.learner.optimizer_step,
        )
    line = metrics | session.counters()
    session.logger.log_evaluation(line | {"time/total_seconds": watch.seconds["total"]})
    session.progress.evaluation(line)


def _save(session: Run) -> None:
    session.checkpointer.save(session.step, session.learner, session.inputs.tokenizer, session.counters())
    session.record.update(session.counters())


def _rollout_metrics(groups: Sequence[RolloutGroup], rewards: Tensor) -> dict[str, float]:
    completions = [completion for group in groups for completion in group.completions]
    return {
        "reward/accuracy": (rewards > 0.5).float().mean().item(),
        "reward/mean": rewards.mean().item(),
        "rollout/completion_length/mean": fmean(len(completion.token_ids) for completion in completions),
        "rollout/truncated_fraction": fmean(completion.truncated for completion in completions),
        "advantage/zero_group_fraction": (rewards == rewards[:, :1]).all(1).float().mean().item(),
    }


def _completion_rows(
    groups: Sequence[RolloutGroup], rewards: Tensor, advantages: Tensor, record: StepRecord, count: int
) -> list[dict[str, object]]:
    """The first `count` groups, one row a completion, with what the curvature model said of each token."""
    size = rewards.shape[1]
    rows: list[dict[str, object]] = []
    for p, group in enumerate(groups[:count]):
        for g, completion in enumerate(group.completions):
            row, tokens = p * size + g, slice(0, len(completion.token_ids))
            rows.append(
                {
                    "prompt": group.prompt.text,
                    "completion": completion.text,
                    "answer": group.prompt.problem.answer,
                    "family": group.prompt.problem.family,
                    "reward": rewards[p, g].item(),
                    "advantage": advantages[p, g].item(),
                    "truncated": completion.truncated,
                    "weight_version": group.weight_version,
                    "token_ids": list(completion.token_ids),
                    "policy_shift": record.shifts.policy_shift[row, tokens].tolist(),
                    "objective_shift": record.shifts.objective_shift[row, tokens].tolist(),
                    "keep": record.selection.keep_mask[row, tokens].tolist(),
                }
            )
    return rows


@contextmanager
def _stop_signal(progress: Progress) -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, so that the step can end and be saved; a second one stops at
    once."""
    stopped = threading.Event()

    def handle(number: int, frame: object) -> None:
        del number, frame
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        progress.message(
            "stopping after this step; once more stops now and loses what came after the last checkpoint"
        )

    if threading.current_thread() is not threading.main_thread():  # signals can only be handled there
        yield stopped
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    """16 hex digits over what the model reads and the answers it is graded by."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.text}\0{prompt.problem.answer}\0".encode())
    return digest.hexdigest()[:16]


def _seed(config: TrainConfig, stream: int, step: int) -> int:
    return int(np.random.SeedSequence([config.seed, stream, step]).generate_state(1)[0])


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device, gpus = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ConfigError(f"device={name}: expected one of the {gpus} GPUs that torch sees here, or cpu")
    return device


def _compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    if config.model.compute_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.model.compute_dtype)
