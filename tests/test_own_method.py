"""A method outside the package: one .py and one .yaml, and every check, error and name works on it."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from capo_exp.cli import front
from capo_exp.config.build import needs_reference
from capo_exp.config.checks import check
from capo_exp.config.errors import ConfigError
from capo_exp.config.plan import plan
from capo_exp.config.schema import TrainConfig, conf_dir, register, to_config
from capo_exp.runs.identity import run_id, run_name
from capo_exp.training.loop import run

Bold = Callable[..., TrainConfig]
FUNCTIONS = """
from typing import Annotated

from capo_exp.config.declare import compares_group, needs_kl
from capo_exp.config.ranges import POSITIVE, SHARE


@compares_group
def best_of_group(rewards, *, margin: Annotated[float, POSITIVE]):
    return margin * (rewards - rewards.max(1, keepdim=True).values)


def _hidden(rewards, *, margin): ...


@needs_kl(unless_zero="beta")
def charge(rewards, lengths, kl, *, beta: Annotated[float, SHARE]):
    return rewards - beta * kl
"""
METHOD = """
name: bold
label: Bold, mine
colour: "#112233"
shaping:
  _target_: bold_methods.functions.charge
  _partial_: true
  beta: 0.0
advantage:
  _target_: bold_methods.functions.best_of_group
  _partial_: true
  margin: 2.0
token_loss:
  _target_: capo_exp.algorithms.grpo.clipped_surrogate
  _partial_: true
  clip_eps_low: 0.2
  clip_eps_high: 0.2
aggregation:
  _target_: capo_exp.algorithms.aggregation.token_mean
  _partial_: true
"""
SHORT = (
    "num_steps=1", "regime.prompts_per_step=2", "regime.group_size=2", "dataset.max_completion_tokens=4",
    "evaluation.num_problems=1", "logger=files", "device=cpu",
)  # fmt: skip


@pytest.fixture
def bold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bold:
    """Composes `algo=bold` from a user's folders; the package is allowed, as a command line would."""
    package = tmp_path / "bold_methods"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "functions.py").write_text(FUNCTIONS)
    (tmp_path / "conf" / "algo").mkdir(parents=True)
    (tmp_path / "conf" / "algo" / "bold.yaml").write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CAPO_EXP_PLUGINS", "bold_methods")
    for name in [name for name in sys.modules if name.startswith("bold_methods")]:
        monkeypatch.delitem(sys.modules, name)

    def compose_config(*overrides: str) -> TrainConfig:
        register()
        search = f"hydra.searchpath=[file://{tmp_path}/conf]"
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            return to_config(compose("config", [search, "algo=bold", *overrides]))

    return compose_config


def test_it_passes_the_checks_and_has_its_names(bold: Bold) -> None:
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
        (["algo.advantage.margin=much"], "algo.advantage.margin=much: expected a positive finite number"),
        (["algo.shaping.beta=2"], "algo.shaping.beta=2: expected a number in [0, 1]"),
        (
            ["~algo.shaping.beta"],
            "algo.shaping.beta: no value; bold_methods.functions.charge needs one here",
        ),
        (
            ["+algo.advantage.eps=1"],
            "algo.advantage.eps: unknown parameter of bold_methods.functions.best_of_group; known: margin",
        ),
        (
            ["algo.advantage._target_=bold_methods.functions.best"],
            "algo.advantage._target_=bold_methods.functions.best: unknown function; ",
        ),
        (["regime.group_size=1"], "regime.group_size=1: expected at least 2, since best_of_group compares"),
        (["algo.reference_reset_every=5"], "algo.reference_reset_every=5: expected 0 without a KL"),
        (["algo.colour=red"], "algo.colour=red: expected empty, or a colour as #rrggbb"),
    ],
)
def test_its_mistakes_are_told_like_the_packages(bold: Bold, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(bold(*overrides))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_what_it_declares_decides_about_the_reference(bold: Bold) -> None:
    assert not needs_reference(bold().algo)
    charged = bold("algo.shaping.beta=0.1", "algo.reference_reset_every=5")
    check(charged)
    assert needs_reference(charged.algo)


def plan_of(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["capo_exp", "algo=bold", "plan_only=true", *arguments])
        try:
            return front.run_training()
        except SystemExit as end:
            return int(end.code or 0)


def test_its_package_has_to_be_allowed_on_this_command_line(
    bold: Bold, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = f"--config-dir={tmp_path / 'conf'}"
    assert plan_of(own, "plugins=[bold_methods]") == 0
    assert capsys.readouterr().out.startswith("bold on arithmetic with tiny")
    for allowed in ([], ["plugins=[]"], ["plugins=[bold_method]"], ["plugins=[bold_methods.other]"]):
        assert plan_of(own, *allowed) == 2  # what an earlier command allowed does not count
        line = capsys.readouterr().err
        assert line.startswith(
            "algo.shaping._target_=bold_methods.functions.charge: expected a function of capo_exp"
        )
        assert (
            line.endswith("which plugins=[bold_methods] on the command line allows\n")
            and line.count("\n") == 1
        )


@pytest.mark.parametrize("name", ["Annotated", "POSITIVE", "_hidden", "compares_group", "nothing"])
def test_what_its_package_imports_or_hides_is_no_part(bold: Bold, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"functions\.{name}: "):
        check(bold(f"algo.advantage._target_=bold_methods.functions.{name}"))


@pytest.mark.slow
def test_it_trains(bold: Bold, tmp_path: Path) -> None:
    config = bold(*SHORT, f"output_dir={tmp_path}", "algo.shaping.beta=0.1")
    check(config)
    directory = run(config)
    assert run_id(config) in directory.name and (directory / "metrics.jsonl").read_text().count("\n") == 1
