"""Models on benchmarks: one model in memory whose weights are exchanged, one engine that follows it."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from capo_exp.config.build import build_part
from capo_exp.config.checks import check_ranges
from capo_exp.config.errors import ConfigError
from capo_exp.config.places import slug
from capo_exp.config.record import as_data
from capo_exp.config.schema import DatasetConfig, TrainConfig
from capo_exp.core import policy
from capo_exp.core.model_files import check_logits
from capo_exp.core.types import Prompt, RolloutGroup
from capo_exp.data.contamination import find_overlap
from capo_exp.data.prepare import choose_problems, order_evaluation, read_split
from capo_exp.data.prompts import render_prompts
from capo_exp.data.rows import Problems
from capo_exp.evaluation.benchmark import Benchmark, Told, evaluate_benchmark
from capo_exp.evaluation.card import card_digest, make_card
from capo_exp.evaluation.command import UNSEEN, EvaluateCommand, WeightSet, tell
from capo_exp.evaluation.draw import draw_completions
from capo_exp.evaluation.send import send_evaluation
from capo_exp.evaluation.table import BenchmarkScore
from capo_exp.grading.verifier import Verifier
from capo_exp.rollout import RolloutEngine, SamplingRequest
from capo_exp.rollout.hf import find_end_token_ids
from capo_exp.runs.checkpoint import find_damage
from capo_exp.runs.parse import read_rows

NOT_FACTS = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")
"""Of a model's config.json: what has no say in what it samples."""
PROGRESS_SECONDS = 10.0
"""Between two lines of progress."""
FAILED = ("timeout", "crash", "error", "gold_unparsable")
"""Reasons of verdicts that say nothing about the completion."""


class Subject:
    """The model under test and its engine, which starts when something has to be sampled."""

    def __init__(self, config: TrainConfig, log_folder: Path) -> None:
        """Loads the tokenizer and the base weights.

        Raises:
            ConfigError: as training does.
        """
        disable_progress_bar()
        self._config = config
        self._log_folder = log_folder
        self.device = policy.choose_device(config.device)
        self.dtype = policy.choose_dtype(config.model, self.device)
        check_logits(config.model)
        longest = config.dataset.longest_row
        policy.check_length(config.model, longest)
        self.tokenizer = policy.load_tokenizer(config.model)
        self._model = policy.load_model(config.model, self.device)
        facts = {k: v for k, v in self._model.config.to_dict().items() if k not in NOT_FACTS}
        ends = find_end_token_ids(self._model, self.tokenizer)
        said = json.dumps([facts, ends], sort_keys=True, default=str)
        self.facts = hashlib.sha256(said.encode()).hexdigest()[:8]  # What the model says beside its weights
        self._base = True
        self._engine: RolloutEngine | None = None
        self.version = 0
        self.weights = ""  # Their digest, once they are loaded

    def load(self, weights: Path | None) -> None:
        """Takes the weights of a checkpoint, or those of model.path."""
        if weights is not None or not self._base:
            loaded = policy.load_model(self._config.model, torch.device("cpu"), weights=weights)
            self._model.load_state_dict(loaded.state_dict())
            self.version += 1
        self._base = weights is None
        self.weights = weights_digest(self._model)

    def engine(self, prompts: Sequence[Prompt]) -> RolloutEngine:
        """Returns the engine; starts it with these prompts, which prove its weights, if it does not run."""
        if self._engine is None:
            make = build_part(self._config.rollout.engine, key="rollout.engine")
            engine: RolloutEngine = make(self._model, self.tokenizer, self.dtype)
            self._log_folder.mkdir(parents=True, exist_ok=True)
            self._engine = engine  # first, so that one that fails to start is closed
            engine.start(self._log_folder, prompts)
        return self._engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._engine is not None:
            self._engine.close()


@torch.no_grad()
def weights_digest(model: PreTrainedModel) -> str:
    """Returns 16 hex digits over names, shapes and float32 values of all parameters, whatever their file."""
    hasher = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        hasher.update(f"{name} {tuple(parameter.shape)}".encode())
        hasher.update(parameter.detach().float().cpu().numpy().tobytes())
    return hasher.hexdigest()[:16]


def evaluate_targets(
    command: EvaluateCommand, configs: Sequence[TrainConfig], targets: Sequence[WeightSet],
    *, trained_on: Mapping[str, Any] | None,
) -> Iterator[BenchmarkScore]:  # fmt: skip
    """Every target on every benchmark, one after another; what has been done before is read.

    Args:
        command: how to sample.
        configs: one a benchmark; they differ in data, lengths and reward.
        targets: weights.
        trained_on: `dataset` of a run's config.yaml; its training problems are looked for in the benchmarks.

    Raises:
        ConfigError: as training does.
        EngineFailed: what was sampled is kept.
    """
    widest = max(configs, key=lambda c: c.dataset.longest_row)
    with ExitStack() as stack:
        subject = stack.enter_context(Subject(widest, targets[0].root))
        verifiers: dict[str, Verifier] = {}
        benchmarks = []
        for config in configs:
            if (known := repr(config.reward.verifier)) not in verifiers:
                made = build_part(config.reward.verifier, key="reward.verifier")()
                verifiers[known] = stack.enter_context(made)
            benchmarks.append(_load(config, subject, command, verifiers[known]))
        for line in _overlaps(benchmarks, trained_on):
            tell(line)
        for target in targets:
            try:
                subject.load(target.weights)
            except Exception:
                if target.weights is None or not (damage := find_damage(target.weights, None)):
                    raise
                tell(f"{target.label} is left out: {damage}")  # training goes on, and has removed it
                continue
            for benchmark in benchmarks:
                yield _evaluate(command, subject, target, benchmark)


def _load(config: TrainConfig, subject: Subject, command: EvaluateCommand, verifier: Verifier) -> Benchmark:
    dataset = config.dataset
    found = read_split(dataset, dataset.eval_split)
    where = found.where if isinstance(found, Problems) else str(dataset.source["_target_"])
    if isinstance(found, Problems) and found.note:
        tell(found.note)
    asked = order_evaluation(choose_problems(found, dataset.levels, dataset.types), dataset.eval_order)
    prompts, dropped = render_prompts(asked, subject.tokenizer, dataset)
    if dropped:
        tell(f"{dataset.name}: {dropped} problems exceed dataset.max_prompt_tokens and are not asked")
    return Benchmark(config, prompts[: command.num_problems], dropped, where, verifier)


def _overlaps(benchmarks: Sequence[Benchmark], trained_on: Mapping[str, Any] | None) -> list[str]:
    """A line for each benchmark that shares problems with the split that a run was trained on."""
    if trained_on is None or trained_on.get("train_split") is None:
        return []
    try:
        given = OmegaConf.merge(OmegaConf.structured(DatasetConfig), as_data(trained_on))
        dataset = OmegaConf.to_object(given)
        assert isinstance(dataset, DatasetConfig) and dataset.train_split is not None
        check_ranges(dataset, "dataset.")
        train = read_split(dataset, dataset.train_split)
    except (ConfigError, OmegaConfBaseException) as error:
        return [f"{UNSEEN}: {error}"]
    counts = {
        each.config.dataset.name: len(find_overlap([prompt.problem for prompt in each.prompts], train))
        for each in benchmarks
    }
    split = f"{dataset.name}/{dataset.train_split}, which training drew from"
    return [f"{name}: {count} problems are also in {split}" for name, count in counts.items() if count]


def _evaluate(
    command: EvaluateCommand, subject: Subject, target: WeightSet, benchmark: Benchmark
) -> BenchmarkScore:
    prompts, dataset = benchmark.prompts, benchmark.config.dataset
    name, limit = dataset.name, dataset.max_completion_tokens
    card = make_card(benchmark, command, target, subject)

    def sample(some: Sequence[Prompt], seed: int) -> list[RolloutGroup]:
        request = SamplingRequest(
            some, command.samples, limit, command.temperature, command.top_k, command.top_p,
            seed=seed, weight_version=subject.version,
        )  # fmt: skip
        return draw_completions(subject.engine(prompts), request)

    folder = target.root / f"{slug(target.label)}-{subject.weights[:8]}" / f"{name}-{card_digest(card)}"
    told = _progress(f"{target.label} {name}", len(prompts))
    scores = evaluate_benchmark(folder, card, benchmark, sample, overwrite=command.overwrite, told=told)
    failed = [f"{count} {reason}" for reason, count in scores["reasons"].items() if reason in FAILED]
    if failed:
        tell(f"{target.label} {name}: not judged and counted as wrong: {', '.join(failed)}")
    if command.logger != "files":
        run = f"{folder.parent.parent.parent.name}-{folder.parent.name}-{folder.name}"
        tell(f"card: {send_evaluation(command.logger, command.project, folder, run, scores)}")
    rows = read_rows(folder / "problems.parquet")
    accuracies = {f"{i} {row['id']}": row["accuracy"] for i, row in enumerate(rows)}
    return BenchmarkScore(
        target.label, target.step, target.completions, name, folder.name, scores, accuracies
    )


def _progress(label: str, total: int) -> Told:
    """Tells at most every PROGRESS_SECONDS, and at the end, how far it is."""
    began = last = time.monotonic()

    def told(sampled: int, done: int, right: float) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= PROGRESS_SECONDS:
            last = now
            left = timedelta(seconds=round((now - began) / sampled * (total - done)))
            tell(f"{label}: {done:,}/{total:,} problems, {right / done:.1%} so far, left {left}")

    return told
