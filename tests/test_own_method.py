"""A method outside the package, and every other part: each check, error and name works on them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from capo_exp.cli.compose import compose_config
from capo_exp.config.build import build_part, holds_reference
from capo_exp.config.checks import check
from capo_exp.config.errors import ConfigError
from capo_exp.config.plan import plan
from capo_exp.config.schema import TrainConfig, to_config
from capo_exp.data.prepare import read_split
from capo_exp.runs.identity import run_id, run_name
from capo_exp.training.loop import run
from tests.pieces import one_line, run_training

Bold = Callable[..., TrainConfig]
ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
FUNCTIONS = """
from typing import Annotated
import torch
from capo_exp import Grade, Problem, RewardResult, Selection, StepDecision
from capo_exp import compares_group, needs_kl, whole_step
from capo_exp.config.ranges import AT_LEAST_1, POSITIVE, SHARE
from capo_exp.rollout.hf import HFRollout
@compares_group
def best_of_group(rewards, *, margin: Annotated[float, POSITIVE]):
    return margin * (rewards - rewards.max(1, keepdim=True).values)
def _hidden(rewards, *, margin): ...
@needs_kl(unless_zero="beta")
def charge(rewards, lengths, kl, *, beta: Annotated[float, SHARE]):
    return rewards - beta * kl
def all_groups(rewards):
    return torch.ones(len(rewards), dtype=torch.bool)
def spread(advantages, mask, kl):
    return advantages[:, None] * mask
def all_completions(batch):
    return torch.ones_like(batch.truncated)
@whole_step
def every_second(scored):
    keep = scored.batch.completion_mask.clone()
    keep[:, 1::2] = False
    return Selection(keep, {"odd": scored.batch.completion_mask & ~keep})
def half_kl(log_probs, reference):
    return (log_probs - reference) ** 2 / 2
def mean(values, keep_mask, batch, totals):
    return (values * keep_mask).sum() / totals.completion_tokens
def half_step(trial):
    return StepDecision(0.5)
def unweighted(log_ratio, mask):
    return mask.float()
def engine(model, tokenizer, compute_dtype, *, max_sequences_per_call: Annotated[int, AT_LEAST_1]):
    return HFRollout(model, tokenizer, compute_dtype, max_sequences_per_call=max_sequences_per_call)
def source(split, *, path):
    return [Problem(f"{split}/{n}", f"What is {n} + 1?", str(n + 1)) for n in range(4)]
class Judge:
    def score(self, completions, golds, problems=None):
        rewards = [[float(len(text)) for text in group] for group in completions]
        return RewardResult(rewards, {}, [[Grade(True, "", "correct")] * len(row) for row in rewards])
def tidy(text):
    return 1.0
def brief(tokens):
    return 0.5
"""
METHOD = """
name: bold
label: Bold, mine
colour: "#112233"
group_filter: {_target_: bold_methods.functions.all_groups, _partial_: true}
shaping: {_target_: bold_methods.functions.charge, _partial_: true, beta: 0.0}
advantage: {_target_: bold_methods.functions.best_of_group, _partial_: true, margin: 2.0}
credit: {_target_: bold_methods.functions.spread, _partial_: true}
completion_filter: {_target_: bold_methods.functions.all_completions, _partial_: true}
selection: {_target_: bold_methods.functions.every_second, _partial_: true}
token_loss: {_target_: my_method.clipped_weight, _partial_: true, clip_eps_low: 0.2, clip_eps_high: 0.2}
kl_estimator: {_target_: bold_methods.functions.half_kl, _partial_: true}
aggregation: {_target_: bold_methods.functions.mean, _partial_: true}
step_rule: {_target_: bold_methods.functions.half_step, _partial_: true}
"""
OTHERS = {
    "rollout": """
defaults: [hf]
name: mine
engine: {_target_: bold_methods.functions.engine}
correction: {_target_: bold_methods.functions.unweighted, _partial_: true}
""",
    "dataset": """
defaults: [/prompt@_here_: plain, _self_]
name: mine
path: null
source: {_target_: bold_methods.functions.source, _partial_: true}
train_split: train
eval_split: test
max_prompt_tokens: 64
max_completion_tokens: 8
""",
    "reward": """
name: mine
verifier: {_target_: bold_methods.functions.Judge, _partial_: true}
format: {_target_: bold_methods.functions.tidy, _partial_: true}
format_weight: 0.5
length: {_target_: bold_methods.functions.brief, _partial_: true}
""",
}
TERMS = {"format": "tidy", "length": "brief"}
SHORT = (
    "num_steps=1", "regime.prompts_per_step=2", "regime.group_size=2", "dataset.max_completion_tokens=4",
    "evaluation.num_problems=1", "logger=files", "device=cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user's folder with the package and conf/."""
    home = tmp_path_factory.mktemp("home")
    package = home / "bold_methods"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "functions.py").write_text(FUNCTIONS)
    for group, text in {"algo": METHOD, **OTHERS}.items():
        (home / "conf" / group).mkdir(parents=True)
        (home / "conf" / group / ("bold.yaml" if group == "algo" else "mine.yaml")).write_text(text)
    return home


@pytest.fixture
def bold(home, monkeypatch):
    """Composes `algo=bold` from a user's folders; the package is allowed, as a command line would."""
    for folder in (home, EXAMPLES / "own_method", EXAMPLES / "own_reward"):
        monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("CAPO_EXP_PLUGINS", "bold_methods,my_method,my_reward")

    def compose(*overrides):
        return to_config(compose_config(["algo=bold", *overrides], config_dir=str(home / "conf")))

    return compose


def test_it_passes_the_checks_and_has_its_names(bold):
    config = bold()
    check(config)
    assert (config.algo.full_name, config.algo.label, config.algo.colour) == ("bold", "Bold, mine", "#112233")
    assert plan(config)[0].startswith("bold on arithmetic with tiny")
    assert run_name(config).startswith("bold-tiny-arithmetic-aggressive-")
    on_top = bold("selection=theorem")
    check(on_top)
    assert on_top.algo.full_name == "bold-theorem"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algo.advantage.margin=0"], "algo.advantage.margin=0: expected a positive finite number"),
        (["regime.group_size=1"], "regime.group_size=1: expected at least 2, since best_of_group compares"),
        (["algo.reference_reset_every=5"], "algo.reference_reset_every=5: expected 0 without a KL"),
    ],
)
def test_its_mistakes_are_told_like_the_packages(bold, overrides, message):
    assert one_line(lambda: check(bold(*overrides))).startswith(message)


def test_what_it_declares_decides_about_the_reference(bold):
    assert not holds_reference(bold().algo)
    charged = bold("algo.shaping.beta=0.1", "algo.reference_reset_every=5")
    check(charged)
    assert holds_reference(charged.algo)


def plan_of(*arguments):
    return run_training("algo=bold", "plan_only=true", *arguments)


def test_its_package_has_to_be_allowed_on_this_command_line(bold, home, capsys):
    own = f"--config-dir={home / 'conf'}"
    assert plan_of(own, "plugins=[bold_methods,my_method]") == 0
    assert capsys.readouterr().out.startswith("bold on arithmetic with tiny")
    for allowed in ([], ["plugins=[bold_methods.other]"]):
        assert plan_of(own, *allowed) == 2  # what an earlier command allowed does not count
        line = capsys.readouterr().err
        assert line.startswith(
            "algo.group_filter._target_=bold_methods.functions.all_groups: expected a function of capo_exp"
        )
        assert (
            line.endswith("which plugins=[bold_methods] on the command line allows\n")
            and line.count("\n") == 1
        )


@pytest.mark.parametrize("name", ["Annotated", "POSITIVE", "_hidden", "compares_group", "nothing"])
def test_what_its_package_imports_or_hides_is_no_part(bold, name):
    with pytest.raises(ConfigError, match=rf"functions\.{name}: "):
        check(bold(f"algo.advantage._target_=bold_methods.functions.{name}"))


def test_an_entry_point_stands_for_its_package(
    bold, home, tmp_path, capsys,
    monkeypatch,
):  # fmt: skip
    """Of an installed package, by the name that its own pyproject.toml gives."""
    said = {"one": "bold-ones = bold_methods.functions", "two": "bad = json\nboth = a", "three": "both = b"}
    for name, points in said.items():
        info = tmp_path / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[capo_exp.plugins]\n{points}\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = f"--config-dir={home / 'conf'}"
    assert plan_of(own, "plugins=[bold-ones,my_method]") == 0
    assert capsys.readouterr().out.startswith("bold on arithmetic with tiny")
    for name, wanted in (
        ("bad", "names of packages of your own"),
        ("both", "this entry point means a and b"),
    ):
        assert plan_of(own, f"plugins=[{name}]") == 2
        assert wanted in capsys.readouterr().err


def test_data_engine_and_verifier_may_be_its_own_too(bold):
    check(config := bold("rollout=mine", "dataset=mine", "reward=mine"))
    assert [each.answer for each in read_split(config.dataset, "test")] == ["1", "2", "3", "4"]
    judge = build_part(config.reward.verifier, key="reward.verifier")()
    assert judge.score([["12", "1"]], [("2",)]).rewards == [[2.0, 1.0]]
    with pytest.raises(
        ConfigError, match=r"selection\._target_=.*half_kl: expected a part that is called like"
    ):
        check(bold("algo.selection._target_=bold_methods.functions.half_kl"))


@pytest.mark.slow
def test_it_trains_on_the_examples_data_and_reward(bold, tmp_path):
    """Every part of the method, the engine and the terms of the reward are the user's."""
    source = f"dataset.path={EXAMPLES / 'own_reward' / 'sums.jsonl'}"
    columns = ("dataset.source.columns.problem=question", "dataset.source.columns.answer=result")
    terms = [f"reward.{term}._target_=bold_methods.functions.{name}" for term, name in TERMS.items()]
    reward = (
        "reward=function",
        "reward.verifier.function=my_reward.near",
        "reward.format_weight=0.5",
        *terms,
    )
    config = bold("rollout=mine", "dataset=file", source, *columns, *reward, *SHORT, f"output_dir={tmp_path}",
                  "algo.shaping.beta=0.1", "algo.kl_coefficient=0.1")  # fmt: skip
    check(config)
    directory = run(config)
    (row,) = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    assert run_id(config) in directory.name and run_id(config) != run_id(bold())
    assert (row["reward/format"], row["reward/length"]) == (1.0, 0.5)
    assert row["selection/rejection_rate_odd"] > 0.2 and row["optim/step_scale"] == 0.5
    assert row["reward/exceptions"] + row["reward/crashes"] + row["reward/not_a_number"] == 0
    assert row["reward/mean"] > 0.5  # the term of the form, and near misses
