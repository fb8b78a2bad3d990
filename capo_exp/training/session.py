"""A run in progress: what it holds, and how it is opened."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

import torch

from capo_exp.config.errors import ConfigError
from capo_exp.config.schema import TrainConfig
from capo_exp.core import policy
from capo_exp.core.types import Prompt
from capo_exp.data.prompts import preview
from capo_exp.distributed.sharding import local
from capo_exp.distributed.world import SINGLE, World
from capo_exp.grading.terms import build_terms
from capo_exp.rollout import RolloutEngine
from capo_exp.rollout.pairs import FILE, PairRollout, read_pairs, write_pairs
from capo_exp.runs import metrics as names
from capo_exp.runs.checkpoint import Checkpointer, find_reference
from capo_exp.runs.console import Progress
from capo_exp.runs.identity import run_id
from capo_exp.runs.logger import Draw, RunLogger
from capo_exp.runs.record import RunRecord, read_record
from capo_exp.runs.samples import read_logged
from capo_exp.training.budget import read_unfinished
from capo_exp.training.inputs import Inputs, build_engine, choose_train_engine, load_reference, share_out
from capo_exp.training.learner import Learner
from capo_exp.training.optimizer_step import TrainingDiverged
from capo_exp.training.pairs import PairBuilder
from capo_exp.training.rollout_step import Rollout
from capo_exp.training.sampler import Sampler, remember_reference

ENGINES = "engines"
"""Folder with the logs of the engines beside the first process."""
COUNTS = tuple(
    f"counter/{name}"
    for name in ("rollout_step", "prompts", "completions", "generated_tokens", "unrewarded_steps")
)
"""What a session counts; the last one in a row, up to the last step."""


@dataclass
class Session:
    """What a run in progress holds, and how far it has got. Whatever writes is `Silent` beside the first
    process."""

    world: World
    directory: Path
    config: TrainConfig
    inputs: Inputs
    learner: Learner
    engine: RolloutEngine  # Samples for evaluations, and for training unless sampler.engine is another
    sampler: Sampler
    checkpointer: Checkpointer
    logger: RunLogger
    record: RunRecord
    progress: Progress
    counts: dict[str, int]  # The COUNTS
    pairs: str | None  # Digest of the pairs that it learns from
    saved: int  # Step of the newest checkpoint

    @property
    def step(self) -> int:
        """The rollout steps done."""
        return self.counts["counter/rollout_step"]

    def count(self, rollout: Rollout) -> None:
        """Counts a rollout step that is done, and keeps what the next one goes on with."""
        self.sampler = replace(self.sampler, unfinished=rollout.unfinished)
        done = (1, rollout.prompts, rollout.completions, rollout.tokens, 1)
        for name, number in zip(COUNTS, done, strict=True):
            self.counts[name] += number
        if rollout.rewarded:
            self.counts["counter/unrewarded_steps"] = 0

    def remember_reference(self) -> None:
        """Samples what parts ask to know of the reference, and counts it."""
        samples = self.inputs.algorithm.reference_samples
        self.progress.message(f"sampling {samples} completions of each prompt by the reference")
        self.sampler, *sampled = remember_reference(self.config, self.inputs.algorithm, self.sampler)
        self._count_sampled(*sampled)

    def take_pairs(self) -> None:
        """Lets the sampler hand out the run's pairs, which it builds before the first step, and reads after.

        Raises:
            ConfigError: no two completions differ, or a run that has begun no longer has its pairs.
        """
        source, place = self.sampler.engine, self.directory / FILE
        assert isinstance(source, PairRollout)
        built = self.world.first(lambda: read_pairs(place))
        if self.step and (built is None or built.digest != self.pairs):
            raise ConfigError(f"{place}: expected the pairs that the run began with, or overwrite=true")
        if built is None:
            self.progress.message(f"building pairs of {source.samples} completions of each prompt")
            asked = replace(self.sampler, engine=self.engine)
            built = PairBuilder(self.config, self.inputs.algorithm, asked, source).build()
            self.world.first(lambda: write_pairs(place, built))
        if not built.pairs:
            raise ConfigError(
                f"rollout.train_engine.samples={source.samples} gave no pair: all completions of each prompt "
                "earn the same; expected more, or problems that the model solves now and then"
            )
        known = source.hold(built.pairs, self.sampler.prompts)
        self.sampler = replace(self.sampler, prompts=source.prompts, reference_rewards=known)
        if not self.step:
            self._count_sampled(built.completions, built.tokens)
        self.pairs = built.digest
        self.progress.message(f"{len(built.pairs)} pairs, in {place}")

    def _count_sampled(self, completions: int, tokens: int) -> None:
        self.counts["counter/completions"] += completions
        self.counts["counter/generated_tokens"] += tokens

    def counters(self) -> dict[str, int]:
        """Returns how far the run has got, under the names of its metrics."""
        learner = self.learner
        own = {"counter/optimizer_step": learner.optimizer_step}
        return self.counts | own | {"counter/reference_resets": learner.reference_resets}

    def save(self) -> None:
        """Writes a checkpoint.

        Raises:
            TrainingDiverged: if a weight is not finite; nothing is written then.
        """
        learner, counters = self.learner, self.counters()
        if self.world.any(not all(local(weight).isfinite().all() for weight in learner.model.parameters())):
            raise TrainingDiverged(f"the weights after step {self.step} are not finite")
        self.logger.sync()
        state = learner.state_dict() | {
            "counters": counters,
            "reference_rewards": dict(self.sampler.reference_rewards),
            "unfinished": [asdict(group) for group in self.sampler.unfinished],
            "pairs": self.pairs,
        }
        reference = learner.reference if learner.reference_resets else None
        self.record.forget()
        self.checkpointer.save(self.step, state, learner.model, self.inputs.tokenizer, reference)
        self.record.update(counters)
        self.saved = self.step


class Silent:
    """Stands beside the first process for what writes files or prints: takes every call, and does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def open_session(
    config: TrainConfig,
    inputs: Inputs,
    directory: Path,
    stack: ExitStack,
    world: World = SINGLE,
    draw: Draw | None = None,
) -> Session:
    """Loads what a run holds, from its last checkpoint if it has one, and starts the engine.

    Args:
        config: of the run.
        inputs: what has been read already.
        directory: the run's, which is locked.
        stack: closes all of it.
        draw: makes the pictures of a run that has ended.

    Raises:
        ConfigError: if the run began with other problems.
    """
    checkpointer = Checkpointer(directory, keep=config.checkpoint.keep, run_id=run_id(config), world=world)
    latest = checkpointer.latest()
    if latest is not None:
        inputs = _as_begun(config, inputs, directory, world)
    model = policy.load_model(config.model, inputs.device, weights=latest)
    engine = build_engine(config, inputs, model, world)
    share_out(config, world, model)  # before another whole model is on the device
    reference = load_reference(config, inputs, find_reference(latest))
    share_out(config, world, reference)
    learner = Learner(model, reference, inputs.algorithm, config, inputs.compute_dtype, world)
    state = {} if latest is None else checkpointer.restore(latest, model)
    counters = state.get("counters", {})
    step: int = counters.get(names.STEP, 0)
    if state:
        learner.load_state_dict(state)
    stack.callback(engine.close)
    stack.callback(inputs.verifier.close)
    opened: list[Any] = []  # not the result of `first`, which would send them to the other processes
    world.first(lambda: opened.extend(_open_writers(config, inputs, directory, counters, stack, draw)))
    record, logger, progress = opened or [Silent()] * 3
    for line in (*inputs.data.lines(), *_show_first(inputs.data.train)):
        progress.message(line)
    torch.cuda.empty_cache()  # an engine of its own takes what the device has left
    world.together(lambda: engine.start(_engine_folder(directory, world), inputs.data.train))
    if latest is not None:
        progress.message(f"goes on after step {step}, from {latest}")
    train_engine = choose_train_engine(config, inputs, engine)
    terms = build_terms(config.reward)
    sampler = Sampler(
        train_engine, engine, inputs.verifier, inputs.data.train, terms, world,
        spell=lambda ids: inputs.tokenizer.batch_decode([[token] for token in ids]),
        reference_rewards=state.get("reference_rewards", {}),
        unfinished=read_unfinished(state.get("unfinished", ())),
    )  # fmt: skip
    counts = {name: counters.get(name, 0) for name in COUNTS}
    return Session(
        world, directory, config, inputs, learner, engine, sampler, checkpointer, logger, record, progress,
        counts, state.get("pairs"), saved=step,
    )  # fmt: skip


def _as_begun(config: TrainConfig, inputs: Inputs, directory: Path, world: World) -> Inputs:
    """Returns the inputs for a run that goes on: what `auto` became for model.compute_dtype when it began
    stays, whatever it is on this machine."""
    known = world.first(lambda: read_record(directory) or {})
    if (before := known.get("data", inputs.fingerprint)) != inputs.fingerprint:
        raise ConfigError(
            f"{directory} began with other problems ({before}): expected those, or overwrite=true"
        )
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    began = dtypes.get(str(known.get("compute_dtype")))
    return replace(inputs, compute_dtype=began) if began and config.model.compute_dtype == "auto" else inputs


def _open_writers(
    config: TrainConfig,
    inputs: Inputs,
    directory: Path,
    counters: dict[str, int],
    stack: ExitStack,
    draw: Draw | None,
) -> tuple[RunRecord, RunLogger, Progress]:
    closing = stack.enter_context(ExitStack())  # after the record, which says how the run ended
    device, counters = policy.device_name(inputs.device), dict.fromkeys(COUNTS, 0) | counters
    record = stack.enter_context(RunRecord(directory, config, device_name=device, counters=counters))
    dtype = str(inputs.compute_dtype).removeprefix("torch.")  # what `auto` became
    origin = {"model_origin": policy.read_origin(config.model), "compute_dtype": dtype}
    record.add(_describe_data(inputs) | origin)  # before the logger, whose tracker gets the record
    tracker, mode = config.logger.name, config.logger.wandb_mode
    step = counters[names.STEP]
    logger = RunLogger(directory, resume_step=step, wandb_mode=mode, tracker=tracker, draw=draw)
    closing.enter_context(logger)
    record.add({"tracker": logger.tracker_location})
    past = read_logged(directory)
    progress = stack.enter_context(Progress(total_steps=config.num_steps, first_step=step, past=past))
    return record, logger, progress


def _engine_folder(directory: Path, world: World) -> Path:
    """Returns where an engine writes its log: each has a folder of its own."""
    folder = directory if world.is_first else directory / ENGINES / f"rank_{world.rank}"
    if world.leads:
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _show_first(prompts: Sequence[Prompt]) -> list[str]:
    """Returns what became of the first three rows, a line of the terminal each."""
    width = get_terminal_size().columns - len("prompt 1: ")
    return [f"prompt {number}: {preview(each, width)}" for number, each in enumerate(prompts[:3], 1)]


def _describe_data(inputs: Inputs) -> dict[str, object]:
    """Returns what run.json says of the problems."""
    return {
        "data": inputs.fingerprint,
        "data_counts": {split: asdict(counts) for split, counts in inputs.data.counts.items()},
        "data_notes": list(inputs.data.notes),
        "first_prompt": inputs.data.train[0].text,
    }
