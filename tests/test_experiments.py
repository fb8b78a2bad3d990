"""conf/experiment: jobs compose, experiments run, tiny/X is paper/X elsewhere, numbers as published."""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, open_dict

from capo_exp.cli import front
from capo_exp.config.checks import check, plan
from capo_exp.config.schema import TrainConfig, conf_dir, register, to_config
from capo_exp.runs import record as run_record
from capo_exp.runs.record import as_dict, run_id
from capo_exp.training import loop as train

EXPERIMENTS = sorted(
    path.stem
    for path in (conf_dir() / "experiment" / "paper").glob("*.yaml")
    if not path.stem.startswith("_")  # a recipe
)


@dataclass(frozen=True)
class Jobs:
    """What one command runs."""

    sweep: Mapping[str, str] | None
    """Parameters of the sweep; None for a single run."""
    configs: Mapping[tuple[str, ...], TrainConfig]
    """Overrides of each job but for the seed -> its configuration; a single run has none."""


def composed(name: str, *overrides: str) -> TrainConfig:
    return to_config(_compose(name, *overrides)[0])


def _compose(name: str, *overrides: str) -> tuple[DictConfig, dict[str, str] | None]:
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", [f"experiment={name}", *overrides], return_hydra_config=True)
    sweep = None if config.hydra.mode is None else {k: str(v) for k, v in config.hydra.sweeper.params.items()}
    with open_dict(config):
        del config["hydra"]
    return config, sweep


@cache
def jobs(name: str) -> Jobs:
    """All jobs of paper/X; of tiny/X, whose grid is the same, the first and the last."""
    config, sweep = _compose(name)
    if sweep is None:
        return Jobs(None, {(): to_config(config)})
    texts = [f"{key}={value}" for key, value in sweep.items() if key != "seed"]
    grid = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(texts), None)[0]
    lines = [grid[0], grid[-1]] if name.startswith("tiny/") else grid
    return Jobs(sweep, {tuple(line): composed(name, *line) for line in lines})


def flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def batch(config: TrainConfig) -> int:
    return config.regime.prompts_per_step * config.regime.group_size


# Every job.


@pytest.mark.parametrize("name", [f"{kind}/{name}" for kind in ("paper", "tiny") for name in EXPERIMENTS])
def test_every_job_composes_and_shows_its_plan(name: str) -> None:
    configs = jobs(name).configs.values()
    for config in configs:
        check(config)
        assert f"= {batch(config):,} completions a step" in plan(config)[1]
        assert config.experiment_name == name.replace("/", "_")
    if len(configs) > 1:
        assert len({run_id(config) for config in configs}) == len(configs)  # no run twice


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_seeds_are_five_but_for_dash_which_publishes_one(name: str) -> None:
    experiment = jobs(f"paper/{name}")
    dash = name.startswith("dash")
    assert {config.seed for config in experiment.configs.values()} == {42 if dash else 0}
    if experiment.sweep is not None:
        assert experiment.sweep.get("seed") == (None if dash else "range(5)")


# tiny/X against paper/X.

SETTING = (
    "model.",
    "dataset.",
    "reward.",
    "rollout.temperature",
    "rollout.top_k",
    "regime.learning_rate",
    "regime.prompts_per_step",
    "num_steps",
    "experiment_name",
)
STUDIED = ("figure_1",)
"""Twins in the study's keywords setting, which has a schedule and evaluations of its own."""
SCHEDULE = ("optimizer.schedule", "optimizer.warmup_ratio", "evaluation.", "stop_after_unrewarded")
LENGTHS = ("algo.aggregation.length", "algo.shaping.max_length", "algo.shaping.cache")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_tiny_is_the_papers_experiment_in_another_setting(name: str) -> None:
    papers, tiny = jobs(f"paper/{name}"), jobs(f"tiny/{name}")
    studied = name in STUDIED
    model, dataset, prefixes = ("tiny", "arithmetic", SETTING)
    if studied:
        model, dataset, prefixes = ("keywords", "keywords", (*SETTING, *SCHEDULE))
    one_model = {"model": "tiny"} if papers.sweep and "model" in papers.sweep else {}
    assert tiny.sweep == (papers.sweep and papers.sweep | one_model)
    compared = [
        (ours, theirs)
        for line, theirs in papers.configs.items()
        if (ours := tiny.configs.get(tuple("model=tiny" if o.startswith("model=") else o for o in line)))
    ]
    assert len(compared) >= len(tiny.configs)
    for ours, theirs in compared:
        mine, other = dict(flat(as_dict(ours))), dict(flat(as_dict(theirs)))
        different = {key for key in {*mine, *other} if mine.get(key) != other.get(key)}
        lengths = {key for key in different if key in LENGTHS}
        assert all(key.startswith(prefixes) for key in different - lengths), different
        for key in lengths:
            shares = [v[key] / v["dataset.max_completion_tokens"] for v in (mine, other)]
            assert shares[0] == pytest.approx(shares[1], rel=0.02)
        assert (ours.model.name, ours.dataset.name, ours.reward.name) == (model, dataset, "exact")
        factors = [c.regime.learning_rate / c.model.reference_learning_rate for c in (ours, theirs)]
        assert factors[0] == pytest.approx(factors[1])
        assert ours.regime.prompts_per_step <= theirs.regime.prompts_per_step
        assert studied or ours.num_steps <= theirs.num_steps
        assert ours.num_steps * batch(ours) < 60_000  # minutes on two cores


def test_tiny_capo_is_the_default_command() -> None:
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        default = to_config(compose("config"))
    assert run_id(composed("tiny/capo")) == run_id(default)


# Published numbers, written by hand from ../shared/ALGORITHMS.md (sections 1.2, 1.3, 1.7, 2, 3, 6).


@dataclass(frozen=True)
class Published:
    """What every job of an experiment has; grid: what its jobs differ in, in order."""

    step: int | None  # completions a step; None where the jobs differ in it
    total: int | None  # completions
    updates: int | None  # optimiser steps
    values: Mapping[str, Any]
    grid: tuple[Mapping[str, Any], ...] = ({},)

    def but(self, values: Mapping[str, Any] | None = None, **changes: Any) -> "Published":
        """The same with other numbers."""
        return Published(**{**vars(self), "values": {**self.values, **(values or {})}, **changes})


SELECTION = "algo.selection"
NO_SELECTION = {f"{SELECTION}._target_": "capo_exp.algorithms.neutral.keep_all"}


def bounds(policy: float, objective: float) -> dict[str, Any]:
    return {
        f"{SELECTION}._target_": "capo_exp.algorithms.capo.shift_bounds",
        f"{SELECTION}.policy_shift_max": policy,
        f"{SELECTION}.objective_shift_min": -objective,
        f"{SELECTION}.objective_shift_max": objective,
    }


def over(key: str, *values: Any) -> tuple[Mapping[str, Any], ...]:
    return tuple({key: value} for value in values)


def cross(*grids: tuple[Mapping[str, Any], ...]) -> tuple[Mapping[str, Any], ...]:
    return tuple({k: v for one in cell for k, v in one.items()} for cell in product(*grids))


RECIPE = Published(96, 9_600, 100, {
    "model.path": "Qwen/Qwen2.5-Math-7B", "dataset.name": "math", "reward.name": "math_verify",
    "num_steps": 100, "dataset.max_prompt_tokens": 512, "dataset.max_completion_tokens": 1024,
    "regime.prompts_per_step": 12, "regime.group_size": 8, "regime.learning_rate": 1.5e-5,
    "rollout.temperature": 0.9, "rollout.top_k": 50, "rollout.top_p": 1.0,
    "optimizer.betas": [0.9, 0.999], "optimizer.eps": 1e-8, "optimizer.weight_decay": 0.0,
    "optimizer.max_grad_norm": 1.0, "optimizer.schedule": "cosine", "optimizer.warmup_ratio": 0.1,
    "algo.kl_coefficient": 0.0, "algo.num_iterations": 1, "algo.token_loss.clip_eps_low": 0.2,
    "algo.token_loss.clip_eps_high": 0.2, "curvature.optimizer_model": "adam", "curvature.top_k": 50,
    "checkpoint.every": 10, "algo.num_minibatches": 1,
})  # fmt: skip
GRPO = {"algo.name": "grpo", "algo.advantage.target_std": 1.0, "algo.advantage.eps": 1e-4, **NO_SELECTION}
DR_GRPO = {"algo.name": "dr_grpo", "algo.aggregation.length": 1024, **NO_SELECTION}
REINFORCE = {"algo.name": "reinforce", **NO_SELECTION}
CAPO = {"algo.name": "capo", **bounds(1e-4, 1e-2)}
DR_CAPO = {"algo.name": "dr_capo", **bounds(1e-3, 5e-4)}
REIN_CAPO = {"algo.name": "rein_capo", **bounds(1e-5, 1e-1)}
SGD = {"curvature.optimizer_model": "sgd"}
POLICY_ONLY = {f"{SELECTION}.objective_shift_min": -math.inf, f"{SELECTION}.objective_shift_max": math.inf}
OBJECTIVE_ONLY = {f"{SELECTION}.policy_shift_max": math.inf}
SAFE = {
    "regime.name": "conservative",
    "regime.learning_rate": 3e-6,
    "regime.prompts_per_step": 144,
    "num_steps": 52,
}
AGGRESSIVE = {"regime.name": "aggressive", "regime.learning_rate": 1.5e-5, "regime.prompts_per_step": 12}
ZERO = {**GRPO, "regime.learning_rate": 0.0, "num_steps": 10}
CURVES = Published(None, None, None, {
    key: value for key, value in RECIPE.values.items()
    if key not in (*SAFE, "curvature.optimizer_model")
})  # fmt: skip
BASES = (GRPO, DR_GRPO, REINFORCE)
METHODS = ("rloo", "reinforce_pp", "reinforce_pp_baseline", "dapo", "gspo", "cpgd", "grpo_dual_clip", "dash")
MEANS = ("sequence_mean", "sequence_mean_over_all")
PLAIN = Published(96, 9_600, 100, {
    key: value for key, value in RECIPE.values.items()
    if key not in ("algo.kl_coefficient", "algo.token_loss.clip_eps_low", "algo.token_loss.clip_eps_high")
})  # fmt: skip

DRIFT = {"algo.token_loss.drift_coefficient": 0.01, "algo.token_loss.drift_max": 0.2}
CPGD = Published(1_024, 624_640, 4_880, {
    "model.path": "Qwen/Qwen2.5-7B", "dataset.name": "math", "num_steps": 610, "regime.prompts_per_step": 128,
    "regime.group_size": 8, "regime.learning_rate": 1e-6, "rollout.temperature": 1.0, "rollout.top_k": 0,
    "algo.num_iterations": 1, "algo.num_minibatches": 8, "dataset.max_completion_tokens": 4096,
    "optimizer.betas": [0.9, 0.95], "optimizer.weight_decay": 0.01, "optimizer.warmup_ratio": 0.0,
})  # fmt: skip
CPGD_CLIP = {"algo.token_loss.clip_eps_low": 0.2, "algo.token_loss.clip_eps_high": 0.2}
CPGD_OWN = {
    "algo.name": "cpgd",
    "algo.advantage.max_weight": 3.0,
    "algo.token_loss.tightness": 1.0,
    **CPGD_CLIP,
}
COLLAPSE = (
    "rloo",
    "reinforce_pp",
    "grpo",
    "grpo_no_clip",
    "grpo_dual_clip",
    "grpo_drift",
    "pg",
    "cpg",
    "pgd",
    "cpgd",
)

DASH_RUN = Published(256, 89_856, 351, {
    "model.path": "Qwen/Qwen2.5-0.5B", "dataset.name": "math", "dataset.max_prompt_tokens": 256,
    "dataset.max_completion_tokens": 2048, "regime.prompts_per_step": 64, "regime.group_size": 4,
    "regime.learning_rate": 3e-6, "rollout.temperature": 0.9, "rollout.top_k": 50, "seed": 42,
    "algo.kl_coefficient": 0.04, "rollout.chunking": "per_step", "evaluation.temperature": 0.7,
})  # fmt: skip
FILTER = {"algo.name": "dash", "algo.completion_filter.threshold": 0.1, "algo.advantage.eps": 1e-4}
NO_FILTER = {
    "algo.completion_filter._target_": "capo_exp.algorithms.neutral.all_completions",
    "algo.aggregation.length": 2048,
    "algo.advantage.eps": 1e-4,
}
SFT = {"algo.name": "sft", "algo.kl_coefficient": 0.0}
HUMAN = {
    "regime.prompts_per_step": 256,
    "regime.group_size": 1,
    "rollout.temperature": 1.0,
    "rollout.top_k": 0,
}
SIZES = over("model.path", "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-3B")
DASH_ROWS = Published(256, 89_856, 351, {
    key: value for key, value in DASH_RUN.values.items()
    if key not in ("model.path", "algo.kl_coefficient", "rollout.chunking")
})  # fmt: skip

PUBLISHED: dict[str, Published] = {
    "capo": RECIPE.but(CAPO),
    "grpo_aggressive": RECIPE.but(GRPO),
    "grpo_conservative": RECIPE.but({**GRPO, **SAFE}, step=1_152, total=59_904, updates=52),
    "dr_grpo_aggressive": RECIPE.but(DR_GRPO),
    "reinforce_aggressive": RECIPE.but(REINFORCE),
    "dr_capo": RECIPE.but(DR_CAPO),
    "rein_capo": RECIPE.but(REIN_CAPO),
    "dr_capo_policy_1e_2": RECIPE.but({**DR_CAPO, f"{SELECTION}.policy_shift_max": 1e-2}),
    "zero_learning_rate": RECIPE.but(ZERO, total=960, updates=10),
    "capo_sgd": RECIPE.but({**CAPO, **SGD}),
    "dr_capo_sgd": RECIPE.but({**DR_CAPO, **SGD}),
    "rein_capo_sgd": RECIPE.but({**REIN_CAPO, **SGD}),
    "capo_policy_bound": RECIPE.but({**CAPO, **POLICY_ONLY}),
    "capo_objective_bound": RECIPE.but({**CAPO, **OBJECTIVE_ONLY}),
    "rein_capo_policy_bound": RECIPE.but({**REIN_CAPO, **POLICY_ONLY}),
    "rein_capo_objective_bound": RECIPE.but({**REIN_CAPO, **OBJECTIVE_ONLY}),
    "advantage_std": RECIPE.but({**GRPO, "algo.advantage.target_std": 0.75}),
    "no_advantage_normalisation": RECIPE.but({
        "algo.advantage._target_": "capo_exp.algorithms.dr_grpo.group_centred",
        "algo.aggregation._target_": "capo_exp.algorithms.aggregation.sequence_mean",
    }),
    # 24 x 4 GPUs x 8 accumulated = 768 completions
    "minibatch_8_actions": RECIPE.but(
        {"algo.advantage._target_": "capo_exp.algorithms.grpo.first_of_group", "regime.prompts_per_step": 96},
        step=768, total=76_800,
    ),
    "group_size_1": RECIPE.but({**REINFORCE, "regime.prompts_per_step": 96, "regime.group_size": 1}),
    "timing": RECIPE.but(
        {**CAPO, "num_steps": 20, "curvature.calibrate_every": 0, "checkpoint.every": 20},
        total=1_920, updates=20,
    ),
    "figure_1": CURVES.but(grid=({**GRPO, **SAFE}, {**GRPO, **AGGRESSIVE}, CAPO, ZERO)),
    "figure_2": CURVES.but(grid=({**GRPO, **SAFE}, {**GRPO, **AGGRESSIVE}, CAPO, DR_GRPO, REINFORCE, ZERO)),
    "figure_3": CURVES.but(
        {"curvature.optimizer_model": "adam"},
        grid=({**GRPO, **SAFE}, {**GRPO, **AGGRESSIVE}, CAPO, DR_GRPO, REINFORCE),
    ),
    "figure_3_raw_gradient": CURVES.but(
        SGD, grid=({**GRPO, **SAFE}, {**GRPO, **AGGRESSIVE}, DR_GRPO, REINFORCE)
    ),
    "figure_4": CURVES.but(grid=(DR_CAPO, CAPO, REIN_CAPO, {**GRPO, **AGGRESSIVE}, DR_GRPO, REINFORCE, ZERO)),
    "figure_5": RECIPE.but(grid=(CAPO, DR_CAPO, REIN_CAPO)),
    "figure_6": CURVES.but(AGGRESSIVE, grid=tuple(
        {**algo, "curvature.optimizer_model": model}
        for ours, base in zip((CAPO, DR_CAPO, REIN_CAPO), BASES, strict=True)
        for algo, model in ((ours, "adam"), (ours, "sgd"), (base, "adam"))
    )),
    # 100 optimiser steps: 50 rollout steps of 2 passes, 20 of 5
    "figure_7": RECIPE.but({**DR_GRPO}, total=None, grid=tuple(
        {"algo.num_iterations": k, "num_steps": 100 // k, "algo.token_loss.clip_eps_low": eps,
         "algo.token_loss.clip_eps_high": eps}
        for k in (2, 5) for eps in (0.2, 0.02, 0.002)
    )),
    "figure_8": RECIPE.but(grid=cross((GRPO, DR_GRPO), over("algo.kl_coefficient", 0.01, 0.1, 1.0))),
    "constraint_ablation": RECIPE.but(grid=tuple(
        {**algo, **kind} for algo in (CAPO, REIN_CAPO) for kind in (POLICY_ONLY, OBJECTIVE_ONLY, {})
    )),
    "group_size": RECIPE.but(GRPO, grid=tuple(
        {"regime.prompts_per_step": prompts, "regime.group_size": size}
        for prompts, size in ((24, 4), (12, 8), (6, 16), (3, 32), (1, 96))
    )),
    "llama_3_1_8b_instruct": RECIPE.but(
        {"model.path": "meta-llama/Llama-3.1-8B-Instruct", "regime.prompts_per_step": 10,
         "model.micro_batch_size": 20},
        step=80, total=8_000, grid=(GRPO, CAPO),
    ),
    "qwen2_5_7b": RECIPE.but(
        {"model.path": "Qwen/Qwen2.5-7B", "model.micro_batch_size": 24}, grid=(GRPO, CAPO)
    ),
    "calibration": RECIPE.but({"curvature.calibrate_every": 1}, grid=(GRPO, CAPO)),
    "extension_thresholds": RECIPE.but(grid=tuple(
        bounds(policy, objective) for policy in (1e-5, 1e-4, 1e-3) for objective in (1e-3, 1e-2, 1e-1)
    )),
    "extension_theorem": RECIPE.but({f"{SELECTION}.policy_shift_max": 1e-4}, grid=over(
        f"{SELECTION}.objective_shift_min", 1e-7, 1e-6, 1e-5
    )),
    "extension_levels": RECIPE.but({"algo.name": "grpo"}, grid=over(
        "algo.variant", "capo", "completion", "batch", "levels"
    )),
    "extension_controls": RECIPE.but({"algo.name": "grpo"}, grid=over(
        "algo.variant", "capo", "random_matched", "advantage_matched", "low_probability_matched",
        "top_policy_shift", "random", "by_sign", "drop_truncated",
    )),
    "extension_differences": RECIPE.but(CAPO, grid=cross(
        over("curvature.hidden_shift", 0, 1),
        over("algo.aggregation._target_", *(f"capo_exp.algorithms.aggregation.{k}" for k in MEANS)),
    )),
    "extension_methods": PLAIN.but(NO_SELECTION, grid=over("algo.name", *METHODS)),
    "extension_capo_on_top": PLAIN.but(
        {"algo.variant": "capo", **bounds(1e-4, 1e-2)}, grid=over("algo.name", *METHODS)
    ),
    "cpgd": CPGD.but({**CPGD_OWN, **DRIFT, "algo.kl_coefficient": 0.0}),
    "cpgd_reference_kl": CPGD.but({**CPGD_OWN, **DRIFT, "algo.kl_coefficient": 0.01}),
    "cpgd_comparison": CPGD.but(CPGD_CLIP, grid=over(
        "algo.name", "grpo", "rloo", "reinforce_pp", "cpgd", "cpgd_std"
    )),
    "cpgd_ablation": CPGD.but({"algo.kl_coefficient": 0.0}, grid=over(
        "algo.name", "pg", "pgd", "cpg", "cpgd", "cpgd_unprocessed", "cpgd_equal", "cpgd_std"
    )),
    "cpgd_collapse": CPGD.but({"num_steps": 1_220}, total=1_249_280, updates=9_760, grid=tuple(
        {"algo.name": name, **({"algo.token_loss.dual_clip": 3.0} if name == "grpo_dual_clip" else {})}
        for name in COLLAPSE
    )),
    "cpgd_drift": CPGD.but(CPGD_OWN, grid=cross(
        over("algo.token_loss.drift_coefficient", 0.001, 0.01), over("algo.token_loss.drift_max", 0.2, 2.0)
    )),
    "cpgd_tightness": CPGD.but({"algo.name": "cpgd", **CPGD_CLIP, **DRIFT}, grid=over(
        "algo.token_loss.tightness", 0.0, 0.5, 1.0
    )),
    "dash": DASH_RUN.but(FILTER),
    "dash_no_kl": DASH_RUN.but({**FILTER, "algo.kl_coefficient": 0.0}),
    "dash_no_filter": DASH_RUN.but(NO_FILTER),
    "dash_baseline": DASH_RUN.but({**NO_FILTER, "algo.name": "grpo", "rollout.chunking": "per_micro_batch"}),
    "dash_multi_update": DASH_RUN.but({**FILTER, "algo.num_iterations": 3}, updates=1_053),
    "dash_mini_update": DASH_RUN.but({**FILTER, "algo.num_minibatches": 32}, updates=11_232),
    "dash_sft_demonstrations": DASH_RUN.but(
        {**SFT, **HUMAN, "rollout.name": "demonstrations"}, total=22_272, updates=87
    ),
    "dash_sft_own_completions": DASH_RUN.but(SFT),
    "dash_table": DASH_ROWS.but(grid=cross(SIZES, (
        {**NO_FILTER, "algo.kl_coefficient": 0.04, "rollout.chunking": "per_micro_batch"},
        {**NO_FILTER, "algo.kl_coefficient": 0.04, "rollout.chunking": "per_step"},
        {**FILTER, "algo.kl_coefficient": 0.04, "rollout.chunking": "per_step"},
        {**FILTER, "algo.kl_coefficient": 0.0, "rollout.chunking": "per_step"},
    ))),
    "dash_sft": Published(256, None, None, {"seed": 42, "regime.learning_rate": 3e-6}, cross(SIZES, (
        {**SFT, **HUMAN, "num_steps": 87}, {**SFT, "num_steps": 351}, {**FILTER, "num_steps": 351},
    ))),
    "dash_updates": DASH_ROWS.but(updates=None, grid=cross(SIZES[:2], tuple(
        {**FILTER, "algo.num_iterations": k, "algo.num_minibatches": m} for k, m in ((1, 1), (3, 1), (1, 32))
    ))),
    "dash_filter": DASH_RUN.but({**FILTER, "algo.filter_denominator": "kept"}, grid=over(
        "algo.completion_filter.threshold", 0.0, 0.01, 0.1
    )),
    # 2,000 steps x 256 x 16; 256 / 64 prompts = 4 updates a step
    "prorl": Published(4_096, 8_192_000, 8_000, {
        "regime.prompts_per_step": 256, "regime.group_size": 16, "regime.learning_rate": 2e-6,
        "rollout.temperature": 1.2, "algo.token_loss.clip_eps_low": 0.2, "algo.token_loss.clip_eps_high": 0.4,
        "algo.kl_coefficient": 1e-4, "algo.reference_reset_every": 200,
        "algo.aggregation._target_": "capo_exp.algorithms.aggregation.token_mean",
        "algo.group_filter._target_": "capo_exp.algorithms.dapo.mixed_rewards",
    }),
}  # fmt: skip


def test_every_experiment_has_its_published_numbers_here() -> None:
    assert sorted(PUBLISHED) == EXPERIMENTS


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_published_numbers(name: str) -> None:
    published, configs = PUBLISHED[name], list(jobs(f"paper/{name}").configs.values())
    assert len(configs) == len(published.grid)
    for config, cell in zip(configs, published.grid, strict=True):
        values = dict(flat(as_dict(config)))
        for key, expected in {**published.values, **cell}.items():
            same = pytest.approx(expected) if isinstance(expected, float) else expected
            assert values[key] == same, f"{key}={values[key]}"
        updates = config.num_steps * config.algo.num_iterations * config.algo.num_minibatches
        assert published.step in (None, batch(config))
        assert published.total in (None, batch(config) * config.num_steps)
        assert published.updates in (None, updates)


# Every experiment runs: one small step of its first job, on the tiny model, which is then tiny/X's too.

SMALL = [
    "model=tiny", "dataset=arithmetic", "reward=exact", "logger=files", "device=cpu", "num_steps=1",
    "model.micro_batch_size=4", "dataset.max_prompt_tokens=64", "dataset.max_completion_tokens=12",
    "rollout.temperature=1.0", "rollout.top_k=0", "evaluation.every=0", "evaluation.num_problems=1",
    "experiment_name=small",
    "checkpoint.every=1", "curvature.calibrate_completions=4", "curvature.calibrate_tokens=16",
    "dataset.source.num_train=64", "dataset.source.num_eval=8",
]  # fmt: skip


def small(config: TrainConfig) -> list[str]:
    """Overrides that leave of a run what takes half a second."""
    alone = config.regime.group_size == 1
    prompts, group = (8, 1) if alone else (2, 4)
    return [
        *SMALL,
        f"regime.prompts_per_step={prompts}",
        f"regime.group_size={group}",
        f"algo.num_minibatches={min(2, config.algo.num_minibatches)}",
    ]


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all, so that a run which is in several figures is made once."""
    return tmp_path_factory.mktemp("outputs")


RUNS = [*(f"paper/{name}" for name in EXPERIMENTS), *(f"tiny/{name}" for name in STUDIED)]
"""Made small, the other twins are the same runs again."""


@pytest.mark.parametrize("name", RUNS)
def test_every_experiment_runs(name: str, output_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        run_record, "_git_state", lambda directory: None
    )  # a second where much is uncommitted
    line, config = next(iter(jobs(name).configs.items()))
    line = [o for o in line if not o.startswith(("model=", "regime.group_size="))]
    config = composed(name, *line, *small(config), f"output_dir={output_dir}")
    check(config)
    directory = train.run(config)
    rows = [json.loads(text) for text in (directory / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["counter/optimizer_step"] == len(rows) >= 1
    for key in ("loss/total", "policy/grad_norm", "policy/entropy", "curvature/token/policy_shift/mean"):
        assert all(math.isfinite(row[key]) for row in rows), key
    assert json.loads((directory / "run.json").read_text())["status"] == "finished"


# The command line.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["seed=0,7"], 6),
        (["seed=0", "experiment/paper=capo"], 1),
        (["seed=0", "curvature.top_k=10,50"], 6),
        (["hydra.mode=RUN"], 0),
    ],
)
def test_a_sweep_from_the_command_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["capo_exp", "experiment=paper/figure_5", "plan_only=true", *arguments])
    assert front.run_training() == 0
    out = capsys.readouterr().out
    assert out.count("job ") == expected
    assert out.count("completions a step") == max(1, expected)
    written = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert written == (["outputs/paper_figure_5/multirun.yaml"] if expected else [])


def test_recipes_are_not_offered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["capo_exp", "experiment=paper/figure_9"])
    assert front.run_training() == 2
    error = capsys.readouterr().err
    assert "expected one of paper/advantage_std, paper/calibration" in error and "/_" not in error
    assert "nearest: paper/figure_" in error
