"""Every YAML composes and passes the checks; every impossible combination is refused in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from capo_exp.config.build import find_parts
from capo_exp.config.checks import check
from capo_exp.config.errors import ConfigError, suggest
from capo_exp.config.plan import count_evaluations, plan
from capo_exp.config.ranges import RULES
from capo_exp.config.schema import TrainConfig, conf_dir, expected_type, register, to_config

Make = Callable[..., TrainConfig]


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


@pytest.fixture
def make() -> Make:
    """Composes and types a configuration; no file of the shipped model is needed."""
    register()

    def compose_config(*overrides: str) -> TrainConfig:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            return to_config(compose("config", list(overrides)))

    return compose_config


@pytest.fixture
def model_dir(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text("{}")
    return f"model.path={tmp_path}"


@pytest.fixture
def made(make: Make, model_dir: str) -> Make:
    """As if scripts/pretrain.py had made the models that are not shipped."""

    def compose_config(*overrides: str) -> TrainConfig:
        config = make(*overrides)
        return make(*overrides, model_dir) if config.model.path.startswith("outputs/") else config

    return compose_config


@pytest.mark.parametrize(
    "group", ["algo", "model", "dataset", "regime", "rollout", "reward", "optimizer", "logger"]
)
def test_every_choice_composes_and_passes(made: Make, group: str) -> None:
    for choice in choices(group):
        config = made(f"{group}={choice}")
        check(config)
        assert getattr(config, group).name == choice


def test_every_prompt_composes_and_passes(make: Make) -> None:
    for choice in choices("prompt"):
        config = make("dataset=math", f"prompt={choice}")
        check(config)
        assert config.dataset.prompt_style == choice
    assert make("dataset=math", "prompt=think").dataset == make("dataset=math").dataset


def test_every_correction_composes_and_passes(make: Make) -> None:
    targets = set()
    for choice in choices("rollout/correction"):
        config = make(f"rollout/correction={choice}")
        check(config)
        targets.add(config.rollout.correction["_target_"])
    assert len(targets) == len(choices("rollout/correction"))
    assert make("rollout/correction=none").rollout == make().rollout


def test_every_regime_divides_into_the_micro_batches_of_every_model(made: Make) -> None:
    for model in choices("model"):
        for regime in choices("regime"):
            check(made(f"model={model}", f"regime={regime}"))


def test_defaults_are_capo_aggressive_without_download(make: Make) -> None:
    config = make()
    assert (config.algo.name, config.regime.name, config.model.name) == ("capo", "aggressive", "tiny")
    assert config.regime.prompts_per_step * config.regime.group_size == 96
    assert config.regime.learning_rate == pytest.approx(5 * config.model.reference_learning_rate)


@pytest.mark.parametrize(
    ("algo", "policy_shift_max", "objective_shift"),
    [("capo", 1e-4, 1e-2), ("dr_capo", 1e-3, 5e-4), ("rein_capo", 1e-5, 1e-1)],
)
def test_bounds_of_the_authors_recipes(
    make: Make, algo: str, policy_shift_max: float, objective_shift: float
) -> None:
    selection = make(f"algo={algo}").algo.selection
    assert selection["policy_shift_max"] == policy_shift_max
    assert (selection["objective_shift_min"], selection["objective_shift_max"]) == (
        -objective_shift,
        objective_shift,
    )


@pytest.mark.parametrize(
    ("variant", "base"), [("capo", "grpo"), ("dr_capo", "dr_grpo"), ("rein_capo", "reinforce")]
)
def test_a_capo_variant_differs_from_its_base_by_the_selection_alone(
    make: Make, variant: str, base: str
) -> None:
    ours, theirs = make(f"algo={variant}").algo, make(f"algo={base}").algo
    different = {name for name in vars(ours) if getattr(ours, name) != getattr(theirs, name)}
    assert different == {"name", "selection"}


def test_paper_recipe(make: Make) -> None:
    config = make("experiment=paper/capo")
    assert config.regime.learning_rate == pytest.approx(1.5e-5)
    assert (config.rollout.temperature, config.rollout.top_k, config.num_steps) == (0.9, 50, 100)
    assert config.dataset.name == "math"


def test_constant_length_follows_the_dataset(make: Make) -> None:
    config = make("algo=dr_grpo", "dataset.max_completion_tokens=33")
    assert config.algo.aggregation["length"] == 33


@pytest.mark.parametrize(
    "override",
    [
        "num_steps=0",
        "seed=-1",
        "device=gpu",
        "experiment_name=../x",
        "regime.learning_rate=-1e-4",
        "regime.learning_rate=-1e-4",
        "regime.learning_rate=inf",
        "regime.learning_rate=nan",
        "regime.prompts_per_step=0",
        "regime.group_size=0",
        "regime.group_size=1",
        "model.micro_batch_size=36",
        "model.micro_batch_size=0",
        "model.compute_dtype=fp8",
        "model.attn_implementation=flash",
        "model.path=Qwen2.5-0.5B",
        "model.path=./nothing/here",
        "model.path=pkg://capo_exp/assets/nothing",
        "model.revision=abc",
        "dataset.template=x",
        "dataset.max_completion_tokens=0",
        "dataset.examples=[{problem: 1+1?}]",
        "rollout.temperature=0",
        "rollout.top_p=0",
        "rollout.top_p=1.1",
        "rollout.top_k=-1",
        "rollout.top_k=1025",
        "curvature.top_k=0",
        "curvature.top_k=1025",
        "curvature.optimizer_model=lion",
        "optimizer.betas=[0.9]",
        "optimizer.betas=[0.9, 1.0]",
        "optimizer.schedule=cosin",
        "optimizer.warmup_ratio=1",
        "optimizer.weight_decay=-1",
        "optimizer.max_grad_norm=0",
        "logger.wandb_mode=on",
        "logger.completions_every=-1",
        "evaluation.every=-1",
        "evaluation.num_problems=0",
        "evaluation.samples=2",
        "checkpoint.every=0",
        "checkpoint.keep=0",
        "algo.kl_coefficient=-1",
        "algo.num_iterations=0",
        "algo.selection.policy_shift_max=-1",
        "algo.selection.policy_shift_max=nan",
        "algo.selection.policy_shift_max=many",
        "algo.selection.objective_shift_min=1",
        "algo.token_loss.clip_eps_low=-0.1",
        "algo.advantage.eps=0",
        "algo.selection._target_=os.system",
        "reward.verifier._target_=os.system",
        "rollout.correction._target_=os.system",
    ],
)
def test_refused_in_one_line_that_names_the_key(make: Make, model_dir: str, override: str) -> None:
    own = [override] if override.startswith("model.path") else [model_dir, override]
    with pytest.raises(ConfigError) as error:
        check(make(*own))
    message = str(error.value)
    assert "expected" in message and "\n" not in message
    key = {"dataset.examples": "dataset.examples[0]"}.get(name := override.partition("=")[0], name)
    assert message.startswith(f"{key}=")


def test_a_model_that_is_made_here_but_is_not_yet_says_how(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"python scripts/pretrain\.py warm_start=format makes it"):
        check(make("model=format", "model.path=outputs/models/nowhere"))
    with pytest.raises(ConfigError) as error:
        check(make("model.path=./nothing/here"))
    assert "pretrain" not in str(error.value)


def test_flash_attention_needs_an_accelerator(make: Make, model_dir: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.attn_implementation=flash_attention_2: expected sdpa"):
        check(make(model_dir, "model.attn_implementation=flash_attention_2", "device=cpu"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["regime.group_size=1", "algo=reinforce"],
        ["regime.prompts_per_step=1"],  # smaller than the micro-batch: one micro-batch
        ["algo.selection.policy_shift_max=inf", "algo.selection.objective_shift_min=-inf"],
        ["optimizer.max_grad_norm=inf"],
        ["optimizer.schedule=constant"],
        ["evaluation.samples=4", "evaluation.temperature=0.6"],
        ["device=cuda:1"],
    ],
)
def test_unusual_but_possible(make: Make, model_dir: str, overrides: list[str]) -> None:
    check(make(model_dir, *overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+foo=1"], "foo=1: unknown key; expected one of algo"),
        (["+regime.group_sizes=1"], "regime.group_sizes=1: unknown key"),
        (["~seed"], "seed: no value; expected an integer"),
        (["num_steps=???"], "num_steps: no value; expected an integer"),
        (["regime.learning_rate=${nope}"], "regime.learning_rate: Interpolation key 'nope' not found"),
    ],
)
def test_what_gets_past_hydra_is_still_refused(make: Make, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make(*overrides)
    assert str(error.value).startswith(message)


def test_live_moments_need_betas_that_can_be_corrected(make: Make) -> None:
    zero = ["optimizer.betas=[0.0,0.999]", "curvature.betas=[0.9,0.999]"]
    check(make(*zero))
    with pytest.raises(ConfigError, match=r"optimizer\.betas=\[0\.0, 0\.999\]: expected two numbers inside"):
        check(make(*zero, "curvature.optimizer_model=adam_live"))


def test_every_rule_names_a_key_of_the_schema() -> None:
    assert all(expected_type(key) for key in RULES)


def test_plan_counts_the_batch(make: Make) -> None:
    # 12 prompts x 8 = 96 completions = 4 x 24; 100 steps x 2 = 200 updates; 9,600 x 96 = 921,600 tokens;
    # evaluations before step 1 and after 20, 40, 60, 80, 100 = 6.
    lines = plan(make("algo=grpo", "model.micro_batch_size=24", "algo.num_iterations=2"))
    assert lines[1:5] == [
        "12 prompts x 8 = 96 completions a step = 4 micro-batches of 24",
        "100 steps x 2 iterations = 200 optimiser steps",
        "9,600 completions of at most 96 tokens = at most 921,600 generated tokens",
        "6 evaluations of at most 200 completions",
    ]


def test_plan_of_a_batch_smaller_than_the_micro_batch(make: Make) -> None:
    assert "= 1 micro-batch of 16" in plan(make("regime.prompts_per_step=2", "model.micro_batch_size=96"))[1]


@pytest.mark.parametrize(
    ("steps", "every", "count"), [(100, 20, 6), (100, 30, 5), (3, 0, 2), (1, 1, 2), (2, 5, 2)]
)
def test_evaluations(steps: int, every: int, count: int) -> None:
    assert count_evaluations(steps, every) == count


@pytest.mark.parametrize(
    "override",
    [
        "token_truncation ratio_cap=0",
        "token_truncation ratio_cap=inf",
        "token_mask ratio_low=0",
        "token_mask ratio_low=1.1",
        "token_mask ratio_high=0.9",
        "token_mask ratio_high=many",
        "sequence_mask ratio_cap=-1",
    ],
)
def test_numbers_of_a_correction_are_refused_by_name(make: Make, model_dir: str, override: str) -> None:
    choice, _, number = override.partition(" ")
    with pytest.raises(ConfigError, match=rf"rollout\.correction\.{number}.*: expected a .*number"):
        check(make(model_dir, f"rollout/correction={choice}", f"rollout.correction.{number}"))


def test_what_nobody_sampled_cannot_be_corrected(make: Make, model_dir: str) -> None:
    check(make(model_dir, "rollout=demonstrations"))
    for choice in choices("rollout/correction"):
        if choice != "none":
            with pytest.raises(ConfigError, match=r"rollout/correction=none with rollout.train_engine"):
                check(make(model_dir, "rollout=demonstrations", f"rollout/correction={choice}"))


def test_find_parts_sees_every_part(make: Make) -> None:
    keys = {key for key, _ in find_parts(make("algo=grpo", "selection=random"))}
    assert keys == {
        "algo.group_filter",
        "algo.shaping",
        "algo.advantage",
        "algo.credit",
        "algo.completion_filter",
        "algo.kl_estimator",
        "algo.selection.score",
        "algo.selection",
        "algo.token_loss",
        "algo.aggregation",
        "algo.step_rule",
        "dataset.source",
        "rollout.engine",
        "rollout.correction",
        "reward.verifier",
        "reward.format",
        "reward.length",
    }


def test_suggestions() -> None:
    assert suggest("capoo", ["capo", "grpo"]) == "expected one of capo, grpo; nearest: capo"
    assert suggest("zzz", ["capo", "grpo"]) == "expected one of capo, grpo"
