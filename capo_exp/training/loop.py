"""The loop of a run: rollout steps, evaluations and checkpoints, until the last step or a signal."""

import logging
import threading
from contextlib import ExitStack
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from capo_exp.config.errors import same_command
from capo_exp.config.schema import TrainConfig
from capo_exp.core import policy
from capo_exp.core.seeds import EVALUATION, derive_seed
from capo_exp.core.timing import Stopwatch
from capo_exp.distributed.world import open_world, own_device, stop_asked
from capo_exp.evaluation.draw import evaluate_policy
from capo_exp.runs.files import stop_on_disk_error
from capo_exp.runs.identity import run_dir
from capo_exp.runs.lock import locked
from capo_exp.runs.logger import Draw
from capo_exp.runs.processes import ended_by_signals, stop_signal
from capo_exp.runs.record import begins_anew, clear, run_status
from capo_exp.training.completions import tabulate_completions
from capo_exp.training.failures import explained
from capo_exp.training.inputs import read_inputs
from capo_exp.training.rollout_step import take_rollout_step
from capo_exp.training.session import Session, open_session


def run(config: TrainConfig, draw: Draw | None = None) -> Path:
    """Trains, or goes on from the last checkpoint; does nothing if this configuration has already finished.

    Args:
        config: of the run.
        draw: makes the pictures of its directory once it has finished.

    Returns:
        The run directory.

    Raises:
        ConfigError: before anything is written, if an input is missing or wrong.
        TrainingDiverged: if a loss is not finite; says what to lower, and which checkpoint is from before.
        RunFailed: if the disk takes no more; says where the same command goes on.
        KeyboardInterrupt: after a signal, once the step is done and saved.
    """
    directory = run_dir(config)
    if run_status(directory) == "finished" and not begins_anew(config):
        return directory
    disable_progress_bar()  # transformers' bars for weights of a second would tear the live line
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries end in one ConfigError
    device = own_device(config.distributed, policy.choose_device(config.device))
    with open_world(config, device) as world:
        inputs = read_inputs(config, world, device)
        with ended_by_signals(), stop_on_disk_error(directory, config.overwrite), ExitStack() as stack:
            stack.enter_context(inputs.verifier)
            world.first(lambda: _take_over(directory, begins_anew(config), stack))
            session = open_session(config, inputs, directory, stack, world, draw)
            stopped = stack.enter_context(stop_signal(session.progress.message))
            # so that run.json has the reason
            with stop_on_disk_error(directory, config.overwrite), explained(session):
                _take_steps(session, stopped)
    return directory


def _take_over(directory: Path, overwrite: bool, stack: ExitStack) -> None:
    stack.enter_context(locked(directory))
    if overwrite:
        clear(directory)


def _take_steps(session: Session, stopped: threading.Event) -> None:
    config = session.config
    evaluated = session.world.first(lambda: session.logger.evaluated_step)
    if _evaluation_due(session) and evaluated < session.step:
        _evaluate(session)  # before the first step, or where the engine failed in one that was due
    if config.rollout.has_pairs:
        session.take_pairs()
    if session.learner.algorithm.reference_samples and not session.step:
        session.remember_reference()
    while not _ended(session):
        take_step(session)
        last = _ended(session)
        if _evaluation_due(session):
            _evaluate(session)
        stop = session.world.any(stopped.is_set() or stop_asked())
        if last or stop or _due(session.step, config.checkpoint.every):
            session.save()
        if stop and not last:
            goes_on = f"{same_command(config.overwrite)} goes on from there"
            session.progress.message(f"stopped and saved after step {session.step}; {goes_on}")
            raise KeyboardInterrupt
    if session.step < config.num_steps:
        why = f"{session.counts['counter/unrewarded_steps']} steps in a row without any reward"
        session.progress.message(f"ended after step {session.step}: {why}")


def take_step(session: Session) -> None:
    """Takes one rollout step, counts it and logs it."""
    learner, inputs, logger = session.learner, session.inputs, session.logger
    step, first, pad = session.step + 1, session.counts["counter/prompts"], inputs.pad_token_id
    done = take_rollout_step(learner, session.sampler, step=step, first=first, pad_token_id=pad)
    session.count(done.rollout)
    dropped = {"data/dropped_prompts": inputs.data.counts["training"].too_long}
    shared = session.counters() | done.metrics | dropped | session.engine.metrics()
    if _due(session.step, session.config.logger.completions_every):  # before the row that they belong to
        count = session.config.logger.completions_groups
        rows = tabulate_completions(done.rollout, done.batch, done.updates, count, inputs.tokenizer)
        logger.log_completions(session.step, rows)
    for update in done.updates:
        logger.log_step(shared | update.metrics)
    session.progress.update(shared | done.updates[-1].metrics)
    if _due(session.step, learner.algorithm.reference_reset_every):
        learner.reset_reference()
    if _due(session.step, learner.algorithm.optimizer_reset_every):
        learner.reset_optimizer()


def _evaluate(session: Session) -> None:
    watch = Stopwatch()
    with watch("total"):
        metrics = evaluate_policy(
            session.engine, session.inputs.verifier, session.inputs.data.held_out, session.config,
            seed=derive_seed(session.config.seed, EVALUATION, session.step),
            weight_version=session.learner.optimizer_step, world=session.world,
        )  # fmt: skip
    line = metrics | session.counters()
    session.logger.log_evaluation(line | {"time/total_seconds": watch.seconds["total"]})
    session.progress.evaluation(line)
    session.engine.rest()


def _ended(session: Session) -> bool:
    """Returns whether the last step is done, or nothing is left to learn from and no KL to a reference can
    change that."""
    limit = 0 if session.learner.algorithm.needs_reference else session.config.stop_after_unrewarded
    return session.step >= session.config.num_steps or 0 < limit <= session.counts["counter/unrewarded_steps"]


def _evaluation_due(session: Session) -> bool:
    """Returns whether this is before the first step, after one of every so many, or after the last."""
    return session.step == 0 or _ended(session) or _due(session.step, session.config.evaluation.every)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
