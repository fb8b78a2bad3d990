"""From a data source to the prompts of a run: what is left out on the way is counted, and why."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from capo_exp.config.build import build_part
from capo_exp.config.checks import check_trains
from capo_exp.config.errors import ConfigError
from capo_exp.config.schema import DatasetConfig, TrainConfig
from capo_exp.core.types import Problem, Prompt
from capo_exp.data.contamination import count_repeated, find_overlap
from capo_exp.data.prompts import choose_visits, count_with_special_tokens, render_prompts
from capo_exp.data.rows import Problems

Gradable = Callable[[list[tuple[str, ...]]], list[bool]]
"""Verifier.gradable: says which golds it can grade by."""


@dataclass(frozen=True)
class DataCounts:
    """What became of the rows of one split.

    rows = unusable + filtered + contaminated + too_long + ungradable + kept, but an evaluation split keeps
    what is ungradable.
    """

    rows: int
    """Rows of the source."""
    unusable: int
    """Rows without question or answer, or flagged as broken by the source."""
    kept: int
    used: int
    """Problems, among those kept, that are asked: all in training, the first evaluation.num_problems in
    evaluation."""
    repeated: int
    """Problems, among those kept, that ask the same as an earlier one."""
    filtered: int = 0
    """Problems of another level or type than dataset.levels and dataset.types."""
    contaminated: int = 0
    """Training problems that are evaluation problems, too; see contamination.normalise."""
    too_long: int = 0
    """Prompts of more than dataset.max_prompt_tokens."""
    ungradable: int = 0
    """Answers that the verifier cannot read: not trained on; in evaluation all completions count as wrong."""

    def describe(self, split: str) -> str:
        """Tells what is not 0, such as `training data: 7,500 rows, 2 unusable, 35 too long; 7,463 kept`."""
        reasons = {
            "unusable": self.unusable,
            "of other levels or types": self.filtered,
            "also in the evaluation data": self.contaminated,
            "too long": self.too_long,
            "ungradable": self.ungradable,
        }
        out = [f"{count:,} {name}" for name, count in reasons.items() if count]
        left = [f"{self.kept:,} kept", *([f"{self.repeated:,} of them repeated"] if self.repeated else [])]
        asked = [f"the first {self.used:,} are asked"] if self.used < self.kept else []
        return f"{split} data: {', '.join([f'{self.rows:,} rows', *out])}; {', '.join([*left, *asked])}"


@dataclass(frozen=True)
class Data:
    """The prompts of a run."""

    train: list[Prompt]
    held_out: list[Prompt]
    """What each evaluation asks."""
    counts: dict[str, DataCounts]
    """Counts of `training` and of `evaluation`."""
    notes: tuple[str, ...]
    """What else a person should know of the sources."""

    def lines(self) -> list[str]:
        """Returns the counts and the notes, one line each."""
        return [*(counts.describe(split) for split, counts in self.counts.items()), *self.notes]


def prepare(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, gradable: Gradable) -> Data:
    """Reads both splits of the run's dataset and renders them.

    Training leaves out, in this order: unusable rows; other levels and types; problems that are in the
    evaluation split, too, in all of it; prompts that are too long; answers that the verifier cannot read.

    Raises:
        ConfigError: nothing to train on, and whatever is wrong with the source, the filters or the prompt.
    """
    check_trains(config)
    dataset = config.dataset
    assert dataset.train_split is not None
    trained = read_split(dataset, dataset.train_split)
    evaluated = read_split(dataset, dataset.eval_split)
    train, train_counts = _training(dataset, tokenizer, gradable, trained, evaluated)
    held_out, held_out_counts = _evaluation(config, tokenizer, gradable, evaluated)
    notes = dict.fromkeys([*_notes(trained, tokenizer), *_notes(evaluated, tokenizer)])
    return Data(train, held_out, {"training": train_counts, "evaluation": held_out_counts}, tuple(notes))


def read_split(dataset: DatasetConfig, split: str) -> list[Problem]:
    """Reads the usable problems of a split; raises ConfigError as the dataset's source."""
    return build_part(dataset.source, key="dataset.source")(split, path=dataset.path)


def order_evaluation(problems: Sequence[Problem], order: str) -> list[Problem]:
    """Returns the problems as in the file; or shuffled, always alike, so that the first few stand for all."""
    if order == "file":
        return list(problems)
    return [problems[i] for i in choose_visits(len(problems), first=0, count=len(problems), seed=0)]


def choose_problems(
    problems: Sequence[Problem], levels: Collection[str], types: Collection[str]
) -> list[Problem]:
    """Returns the problems of some levels (`3` is short for `Level 3`) and some types; [] = all.

    Raises:
        ConfigError: a level or type that no problem has, or none that has both.
    """
    by_level = _find_named(levels, {problem.level for problem in problems}, "dataset.levels")
    by_type = _find_named(types, {problem.family for problem in problems}, "dataset.types")
    kept = [problem for problem in problems if problem.level in by_level and problem.family in by_type]
    if not kept:
        pairs = sorted({f"{p.level} {p.family}" for p in problems if p.level and p.family})
        raise ConfigError(
            f"got dataset.levels={list(levels)} with dataset.types={list(types)}, which no problem has; "
            f"expected a pair of {', '.join(pairs)}"
        )
    return kept


def _find_named(names: Collection[str], stated: set[str], key: str) -> set[str]:
    """Returns those of the stated levels or types that the names mean."""
    if not names:
        return stated
    meant = {_short(name): name for name in names}
    known = sorted(stated - {""})
    unknown = sorted(name for short, name in meant.items() if short not in map(_short, known))
    if unknown:
        choices = f"some of {', '.join(known)}" if known else "[], since this dataset states none"
        raise ConfigError(f"got {key}={', '.join(unknown)}, expected {choices}")
    return {name for name in known if _short(name) in meant}


def _short(name: str) -> str:
    return " ".join(name.split()).casefold().removeprefix("level ")


def _training(
    dataset: DatasetConfig,
    tokenizer: PreTrainedTokenizerBase,
    gradable: Gradable,
    found: Sequence[Problem],
    evaluated: Sequence[Problem],
) -> tuple[list[Prompt], DataCounts]:
    asked = choose_problems(found, dataset.levels, dataset.types)
    known = find_overlap(asked, evaluated)
    fresh = [problem for index, problem in enumerate(asked) if index not in known]
    if not fresh:
        raise ConfigError(
            f"got {len(asked)} training problems, all of which are in the evaluation split, too; "
            "expected others: change dataset.train_split or dataset.path"
        )
    prompts, too_long = render_prompts(fresh, tokenizer, dataset)
    kept = [p for p, good in zip(prompts, gradable([p.problem.golds for p in prompts]), strict=True) if good]
    if not kept:
        raise ConfigError(
            f"got {len(prompts)} training problems, none with an answer that the verifier can read; expected "
            "formulas: change dataset.source.answer_format, reward or reward.verifier.unparsable_gold"
        )
    counts = replace(
        _counts(found, kept),
        filtered=len(found) - len(asked),
        contaminated=len(known),
        too_long=too_long,
        ungradable=len(prompts) - len(kept),
    )
    return kept, counts


def _evaluation(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, gradable: Gradable, found: Sequence[Problem]
) -> tuple[list[Prompt], DataCounts]:
    asked = order_evaluation(found, config.dataset.eval_order)
    prompts, too_long = render_prompts(asked, tokenizer, config.dataset)
    used = prompts[: config.evaluation.num_problems]
    unreadable = gradable([prompt.problem.golds for prompt in used]).count(False)
    counts = replace(_counts(found, prompts), too_long=too_long, ungradable=unreadable, used=len(used))
    return used, counts


def _counts(found: Sequence[Problem], kept: Sequence[Prompt]) -> DataCounts:
    rows = found.rows if isinstance(found, Problems) else len(found)
    repeats = count_repeated([prompt.problem for prompt in kept])
    return DataCounts(rows, rows - len(found), kept=len(kept), used=len(kept), repeated=repeats)


def _notes(found: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    said = [found.note] if isinstance(found, Problems) and found.note else []
    if special := count_with_special_tokens(found, tokenizer):
        said.append(
            f"{special:,} questions hold the text of a special token, which ends or begins a turn there"
        )
    return said
