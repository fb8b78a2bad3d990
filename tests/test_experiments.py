"""conf/setting, conf/experiment, conf/scale: every job passes the checks and has the published numbers."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from capo_exp.config.checks import check
from capo_exp.config.choices import without_hydra
from capo_exp.config.errors import ConfigError
from capo_exp.config.plan import plan
from capo_exp.config.schema import TrainConfig, conf_dir, register, to_config
from capo_exp.runs.identity import run_id
from capo_exp.sweep import sweep
from capo_exp.training import loop as train
from tests.conftest import is_value, with_values
from tests.pieces import run_training


def names_in(group):
    """The choices of a group; `_name` is part of others."""
    files = (conf_dir() / group).rglob("*.yaml")
    names = (str(path.relative_to(conf_dir() / group).with_suffix("")) for path in files)
    return sorted(name for name in names if "/_" not in f"/{name}")


EXPERIMENTS = names_in("experiment")
PAPERS = [name for name in EXPERIMENTS if name.startswith("paper/")]
STUDIES = [name for name in EXPERIMENTS if name.startswith("study/")]
STUDY_SETTINGS = [name for name in names_in("setting") if not name.endswith("_paper")]
MADE_MODELS = {"format", "keywords_deep"}
"""Models that scripts/pretrain.py makes; the checks want to see their files."""


@dataclass(frozen=True)
class Composed:
    config: TrainConfig
    sweep: Mapping[str, str]
    """Parameters of the sweep; none for a single run."""


@cache
def compose_once(*overrides):
    """The keys, not yet resolved, and the sweep."""
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", list(overrides), return_hydra_config=True)
    sweep = {} if cfg.hydra.mode is None else {k: str(v) for k, v in cfg.hydra.sweeper.params.items()}
    return without_hydra(cfg), sweep


@cache
def composed(*overrides):
    cfg, sweep = compose_once(*overrides)
    return Composed(to_config(cfg), sweep)


@cache
def grid(*overrides):
    """The overrides of each job of a sweep, but for its seeds; one line without any for a single run."""
    texts = [f"{key}={value}" for key, value in composed(*overrides).sweep.items() if key != "seed"]
    parsed = OverridesParser.create().parse_overrides(texts)
    return [tuple(line) for line in BasicSweeper.split_arguments(parsed, None)[0]]


@cache
def jobs(*overrides):
    """Overrides and configuration of the first job of a sweep, the last, and those with one other value than
    the first; of choices, each of which is composed by itself, the first and the last have to do."""
    lines, found = grid(*overrides), []
    for line in lines:
        changed = [text for text, one in zip(line, lines[0], strict=True) if text != one]
        if line == lines[-1] or not changed or (len(changed) == 1 and is_value(changed[0])):
            cfg, _ = compose_once(*overrides, *(text for text in line if not is_value(text)))
            found.append((line, to_config(with_values(cfg, [text for text in line if is_value(text)]))))
    return found


def figures_of_runs():
    """Whose jobs are single runs of the paper."""
    return [name for name in PAPERS if "experiment/paper" in composed(f"experiment={name}").sweep]


def flat(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def batch(config):
    return config.regime.prompts_per_step * config.regime.group_size


def updates(config):
    return config.num_steps * config.algo.num_iterations * config.algo.num_minibatches


def same(seen, wanted):
    number = isinstance(wanted, float) and isinstance(seen, float | int)
    return math.isclose(seen, wanted, rel_tol=1e-9) if number else seen == wanted


def expect(where, seen, wanted):
    assert same(seen, wanted), f"{where}: got {seen}, expected {wanted}"


def expect_checked(where, config):
    try:
        check(config)
    except ConfigError as error:
        raise AssertionError(where) from error
    assert f"= {batch(config):,} completions a step" in plan(config)[1], where


@pytest.mark.slow
def test_every_experiment_passes_the_checks_and_jobs_are_runs_of_their_own():
    """Jobs of every fourth study, and of the papers' sweeps that other tests here look at."""
    for name in EXPERIMENTS:
        config, dash = composed(f"experiment={name}").config, "dash" in name
        expect_checked(name, config)
        expect(f"{name}: experiment_name", config.experiment_name, name.replace("/", "_"))
        expect(f"{name}: seed", config.seed, 42 if dash else 0)  # the only paper that states its seed
        texts = {*chain(*grid(f"experiment={name}"))}
        runs = {one.removeprefix("experiment/").replace("=", "/") for one in texts if "experiment/" in one}
        expect(f"{name}: unknown runs", runs - set(EXPERIMENTS), set())
        if sweep := composed(f"experiment={name}").sweep:
            real = ("study/real_rates", "study/real_rule", "study/real_why")
            judging = dict.fromkeys(real, "10,11,12,13,14")
            own = {"paper/extension_grid": "range(2)"} | judging
            seeds = own.get(name, None if dash else "range(5)")
            expect(f"{name}: swept seeds", sweep.get("seed"), seeds)
    for name in (*STUDIES[::4], *(f"paper/{sweep}" for sweep in SWEEPS), *figures_of_runs()):
        configs = jobs(f"experiment={name}")
        for line, config in configs:
            expect_checked(f"{name} {' '.join(line)}", config)
        expect(f"{name}: run ids", len({run_id(config) for _, config in configs}), len(configs))


@pytest.mark.slow
def test_studies_compose_in_other_settings():
    """A few in each."""
    for place, setting in enumerate(STUDY_SETTINGS):
        shipped = ["model.path=org/model"] if setting in MADE_MODELS else []
        for name in STUDIES[place::8]:
            config = composed(f"experiment={name}", f"setting={setting}", *shipped).config
            where = f"{name} in {setting}"
            expect_checked(where, config)
            expect(f"{where}: schedule", config.optimizer.schedule, "constant_with_warmup")
            expect(f"{where}: name", config.experiment_name, name.replace("/", "_"))
            expect(f"{where}: model", config.model.name, composed(f"setting={setting}").config.model.name)


def test_both_regimes_of_a_study_setting_ask_for_the_same_completions():
    """The criterion compares accuracies after as many completions."""
    for setting in STUDY_SETTINGS:
        aggressive, conservative = (
            config.num_steps * batch(config)
            for regime in ("aggressive", "conservative")
            for config in [composed(f"setting={setting}", f"regime={regime}").config]
        )
        assert conservative == pytest.approx(aggressive, rel=0.05), setting
        assert aggressive == {"keywords_deep": 9_600, "sums": 4_800}.get(setting, 19_200), setting


TINY_CHANGES = (
    "model.", "dataset.", "reward.", "rollout.temperature", "rollout.top_k", "regime.learning_rate",
    "regime.prompts_per_step", "num_steps", "experiment_name",
)  # fmt: skip
STUDY_CHANGES = ("optimizer.schedule", "optimizer.warmup_ratio", "evaluation.", "stop_after_unrewarded")
"""What scale=tiny changes further where it takes the study's keywords setting."""
LENGTHS = ("algo.aggregation.length", "algo.shaping.max_length", "algo.shaping.cache")


def compare_tiny(name, line):
    """A job of paper/X at scale=tiny, beside the same job as the paper has it."""
    theirs = composed(f"experiment={name}", *line).config
    line = tuple("model=tiny" if o.startswith("model=") else o for o in line)
    ours = composed(f"experiment={name}", "scale=tiny", *line).config
    studied = name == "paper/figure_1"
    where = f"{name} scale=tiny {' '.join(line)}"
    mine, other = dict(flat(asdict(ours))), dict(flat(asdict(theirs)))
    different = {key for key in {*mine, *other} if mine.get(key) != other.get(key)}
    allowed = TINY_CHANGES + (STUDY_CHANGES if studied else ()) + LENGTHS
    expect_checked(where, ours)
    expect(f"{where}: further changes", {k for k in different if not k.startswith(allowed)}, set())
    for key in different.intersection(LENGTHS):
        shares = [values[key] / values["dataset.max_completion_tokens"] for values in (mine, other)]
        expect(f"{where}: {key}", abs(shares[0] / shares[1] - 1) < 0.02, True)
    names = (ours.model.name, ours.dataset.name, ours.reward.name)
    model = "keywords" if studied else "tiny"
    expect(where, names, (model, "keywords" if studied else "arithmetic", "exact"))
    factors = [c.regime.learning_rate / c.model.reference_learning_rate for c in (ours, theirs)]
    expect(f"{where}: rate in safe rates", factors[0], factors[1])
    smaller = ours.regime.prompts_per_step <= theirs.regime.prompts_per_step
    shorter = studied or ours.num_steps <= theirs.num_steps
    minutes = ours.num_steps * batch(ours) < 60_000
    expect(f"{where}: smaller, shorter, minutes", (smaller, shorter, minutes), (True,) * 3)


@pytest.mark.slow
def test_tiny_is_the_papers_experiment_on_another_model():
    """Of every fourth one, and of those for which conf/_scale has a file."""
    own = {name.removesuffix("_tiny") for name in names_in("_scale/experiment") if name.endswith("_tiny")}
    for name in sorted({*PAPERS[::4], *own.intersection(PAPERS)}):
        plain, tiny = composed(f"experiment={name}"), composed(f"experiment={name}", "scale=tiny")
        models = {"model": "tiny"} if "model" in plain.sweep else {}
        wanted, seen = {**plain.sweep, **models}, dict(tiny.sweep)
        if name == "paper/extension_grid":  # rates are multiples of the model's
            assert wanted.pop("regime.learning_rate") != seen.pop("regime.learning_rate")
        expect(f"{name}: sweep", seen, wanted)
        expect(f"{name}: name", tiny.config.experiment_name, f"{name.replace('/', '_')}-tiny")
        compare_tiny(name, ())
        if models:
            compare_tiny(name, jobs(f"experiment={name}")[-1][0])


@pytest.mark.slow
def test_smoke_is_seconds_of_any_experiment():
    """Of every tenth one, and of those for which conf/_scale has a file."""
    own = {name.removesuffix("_smoke") for name in names_in("_scale/experiment") if name.endswith("_smoke")}
    assert own < set(EXPERIMENTS)
    for name in sorted({*EXPERIMENTS[::10], *own}):
        smoke = composed(f"experiment={name}", "scale=smoke")
        config = smoke.config
        expect_checked(f"{name} scale=smoke", config)
        models = {smoke.sweep.get("model", config.model.name), config.model.name} - {"keywords"}
        expect(f"{name}: models", models - {"tiny"}, set())
        few = updates(config) <= 10 and batch(config) <= 192
        expect(f"{name}: seconds", few, True)


def test_the_command_line_has_the_last_word_on_scale_name_and_setting():
    asked = composed("experiment=paper/capo", "scale=smoke", "model=qwen2_5_0_5b", "dataset=math").config
    assert (asked.model.name, asked.dataset.name, asked.num_steps) == ("qwen2_5_0_5b", "math", 2)
    assert asked.experiment_name == "paper_capo-smoke"
    named = composed("experiment=paper/capo", "experiment_name=mine").config
    tiny = composed("experiment=paper/capo", "scale=tiny").config
    assert (named.experiment_name, run_id(tiny)) == ("mine", run_id(composed().config))  # the default command
    assert [composed(*o).config.experiment_name for o in ((), ("scale=tiny",))] == ["default", "default-tiny"]
    swept = composed("experiment=study/rates", "setting=format").config
    assert (swept.model.name, swept.regime.name) == ("format", "scaled")


# Published numbers, by hand: CAPO arXiv 2510.00819, CPGD 2505.12504, DASH 2505.17218, ProRL 2505.24864.

SETTINGS: dict[str, Mapping[str, Any]] = {
    "experiment=paper/capo": {  # table 3 and the recipes of the authors' program
        "model.path": "Qwen/Qwen2.5-Math-7B", "dataset.name": "math", "reward.name": "math_verify",
        "num_steps": 100, "dataset.max_prompt_tokens": 512, "dataset.max_completion_tokens": 1024,
        "regime.prompts_per_step": 12, "regime.group_size": 8, "regime.learning_rate": 1.5e-5,
        "rollout.temperature": 0.9, "rollout.top_k": 50, "rollout.top_p": 1.0, "checkpoint.every": 10,
        "optimizer.betas": [0.9, 0.999], "optimizer.eps": 1e-8, "optimizer.weight_decay": 0.0,
        "optimizer.max_grad_norm": 1.0, "optimizer.schedule": "cosine", "optimizer.warmup_ratio": 0.1,
        "algo.kl_coefficient": 0.0, "algo.num_iterations": 1, "algo.num_minibatches": 1,
        "algo.token_loss.clip_eps_low": 0.2, "algo.token_loss.clip_eps_high": 0.2,
        "curvature.optimizer_model": "adam", "curvature.top_k": 50,
        "algo.selection.policy_shift_max": 1e-4, "algo.selection.objective_shift_min": -1e-2,
        "algo.selection.objective_shift_max": 1e-2,
    },
    "experiment=paper/cpgd": {  # MM-EUREKA's script: 128 completions of 1,024 an update
        "model.path": "Qwen/Qwen2.5-7B", "dataset.name": "math", "num_steps": 610,
        "regime.prompts_per_step": 128, "regime.group_size": 8, "regime.learning_rate": 1e-6,
        "rollout.temperature": 1.0, "rollout.top_k": 0, "dataset.max_completion_tokens": 4096,
        "algo.name": "cpgd", "algo.num_iterations": 1, "algo.num_minibatches": 8, "algo.kl_coefficient": 0.0,
        "algo.advantage.max_weight": 3.0, "algo.token_loss.tightness": 1.0,
        "algo.token_loss.clip_eps_low": 0.2, "algo.token_loss.clip_eps_high": 0.2,
        "algo.token_loss.drift_coefficient": 0.01, "algo.token_loss.drift_max": 0.2,
        "optimizer.betas": [0.9, 0.95], "optimizer.weight_decay": 0.01, "optimizer.warmup_ratio": 0.0,
    },
    "experiment=paper/dash": {  # its table of hyperparameters; 117 whole batches an epoch, 3 epochs
        "model.path": "Qwen/Qwen2.5-0.5B", "dataset.name": "math", "num_steps": 351, "seed": 42,
        "dataset.max_prompt_tokens": 256, "dataset.max_completion_tokens": 2048,
        "regime.prompts_per_step": 64, "regime.group_size": 4, "regime.learning_rate": 3e-6,
        "rollout.temperature": 0.9, "rollout.top_k": 50, "rollout.chunking": "per_step",
        "algo.name": "dash", "algo.kl_coefficient": 0.04, "algo.completion_filter.threshold": 0.1,
        "algo.advantage.eps": 1e-4, "evaluation.temperature": 0.7,
    },
    "experiment=paper/prorl": {  # second-hand; 256 / 64 prompts = 4 updates a step
        "num_steps": 2000, "regime.prompts_per_step": 256, "regime.group_size": 16,
        "regime.learning_rate": 2e-6, "rollout.temperature": 1.2, "algo.num_minibatches": 4,
        "algo.kl_coefficient": 1e-4, "algo.reference_reset_every": 200, "algo.token_loss.clip_eps_low": 0.2,
        "algo.token_loss.clip_eps_high": 0.4,
        "algo.aggregation._target_": "capo_exp.algorithms.aggregation.token_mean",
        "algo.group_filter._target_": "capo_exp.algorithms.dapo.mixed_rewards",
    },
}  # fmt: skip


def test_the_numbers_of_each_papers_setting():
    for override, numbers in SETTINGS.items():
        values = dict(flat(asdict(composed(override).config)))
        for k, v in numbers.items():
            expect(f"{override} {k}", values[k], v)


INF = math.inf
SAFE, ZERO, AGGRESSIVE = (3e-6, 1_152, 52), (0.0, 96, 10), (1.5e-5, 96, 100)
"""Learning rate, completions a step, steps: CAPO, table 3; the start point is ours."""
CURVES: dict[str, tuple[str, tuple[float, int, int], str, tuple[float, float]]] = {
    "grpo_conservative": ("grpo", SAFE, "adam", (INF, INF)),
    "grpo_aggressive": ("grpo", AGGRESSIVE, "adam", (INF, INF)),
    "dr_grpo_aggressive": ("dr_grpo", AGGRESSIVE, "adam", (INF, INF)),
    "reinforce_aggressive": ("reinforce", AGGRESSIVE, "adam", (INF, INF)),
    "zero_learning_rate": ("grpo", ZERO, "adam", (INF, INF)),
    "capo": ("capo", AGGRESSIVE, "adam", (1e-4, 1e-2)),  # the bounds: table 4
    "dr_capo": ("dr_capo", AGGRESSIVE, "adam", (1e-3, 5e-4)),
    "rein_capo": ("rein_capo", AGGRESSIVE, "adam", (1e-5, 1e-1)),
    "dr_capo_policy_1e_2": ("dr_capo", AGGRESSIVE, "adam", (1e-2, 5e-4)),
    "capo_sgd": ("capo", AGGRESSIVE, "sgd", (1e-4, 1e-2)),
    "dr_capo_sgd": ("dr_capo", AGGRESSIVE, "sgd", (1e-3, 5e-4)),
    "rein_capo_sgd": ("rein_capo", AGGRESSIVE, "sgd", (1e-5, 1e-1)),
    "capo_policy_bound": ("capo", AGGRESSIVE, "adam", (1e-4, INF)),
    "capo_objective_bound": ("capo", AGGRESSIVE, "adam", (INF, 1e-2)),
    "rein_capo_policy_bound": ("rein_capo", AGGRESSIVE, "adam", (1e-5, INF)),
    "rein_capo_objective_bound": ("rein_capo", AGGRESSIVE, "adam", (INF, 1e-1)),
}
"""CAPO's single runs: algorithm, regime, optimiser model, bounds on m_F and |m_H|."""
RUNS: dict[str, tuple[int, int, Mapping[str, Any]]] = {
    "advantage_std": (96, 100, {"algo.advantage.target_std": 0.75}),  # recipes of CAPO's authors
    "no_advantage_normalisation": (96, 100, {
        "algo.advantage._target_": "capo_exp.algorithms.dr_grpo.group_centred",
        "algo.aggregation._target_": "capo_exp.algorithms.aggregation.sequence_mean",
    }),
    "minibatch_8_actions": (  # 24 x 4 GPUs x 8 accumulated
        768, 100, {"algo.advantage._target_": "capo_exp.algorithms.grpo.first_of_group"},
    ),
    "group_size_1": (96, 100, {"algo.name": "reinforce", "regime.prompts_per_step": 96}),
    "timing": (96, 20, {"algo.name": "capo", "curvature.calibrate_every": 0, "checkpoint.every": 20}),
    "cpgd_reference_kl": (1_024, 4_880, {"algo.kl_coefficient": 0.01}),
    "dash_no_kl": (256, 351, {"algo.kl_coefficient": 0.0, "algo.completion_filter.threshold": 0.1}),
    "dash_no_filter": (256, 351, {
        "algo.kl_coefficient": 0.04, "algo.aggregation.length": 2048, "algo.advantage.eps": 1e-4,
        "algo.completion_filter._target_": "capo_exp.algorithms.neutral.all_completions",
    }),
    "dash_baseline": (256, 351, {
        "algo.name": "grpo", "algo.kl_coefficient": 0.04, "algo.aggregation.length": 2048,
        "algo.completion_filter._target_": "capo_exp.algorithms.neutral.all_completions",
        "rollout.chunking": "per_micro_batch",
    }),
    "dash_multi_update": (256, 3 * 351, {"algo.num_iterations": 3}),
    "dash_mini_update": (256, 32 * 351, {"algo.num_minibatches": 32}),
    "dash_sft_demonstrations": (256, 87, {
        "algo.name": "sft", "rollout.name": "demonstrations", "regime.group_size": 1,
        "rollout.temperature": 1.0,
    }),
    "dash_sft_own_completions": (256, 351, {"algo.name": "sft", "algo.kl_coefficient": 0.0}),
}  # fmt: skip
"""The other single runs: completions a step, optimiser steps, and what they are about."""
PASSES = {"algo.num_iterations": [2, 5], "algo.token_loss.clip_eps_low": [0.2, 0.02, 0.002]}
SWEEPS: dict[str, tuple[int, Mapping[str, list[Any] | str]]] = {
    "figure_7": (6, {**PASSES, "algo.token_loss.clip_eps_high": [0.2, 0.02, 0.002], "num_steps": [50, 20]}),
    "figure_8": (6, {"algo.name": "grpo dr_grpo", "algo.kl_coefficient": [0.01, 0.1, 1.0]}),  # caption
    "group_size": (5, {
        "regime.group_size": [4, 8, 16, 32, 96], "regime.prompts_per_step": [24, 12, 6, 3, 1],
    }),
    "cpgd_comparison": (5, {"algo.name": "grpo rloo reinforce_pp cpgd cpgd_std"}),
    "cpgd_ablation": (7, {
        "algo.name": "pg pgd cpg cpgd cpgd_unprocessed cpgd_equal cpgd_std", "algo.kl_coefficient": [0.0],
    }),
    "cpgd_collapse": (10, {
        "num_steps": [1_220],
        "algo.name": "rloo reinforce_pp grpo grpo_no_clip grpo_dual_clip grpo_drift pg cpg pgd cpgd",
    }),
    "cpgd_drift": (4, {
        "algo.token_loss.drift_coefficient": [0.001, 0.01], "algo.token_loss.drift_max": [0.2, 2.0],
    }),
    "cpgd_tightness": (3, {"algo.token_loss.tightness": [0.0, 0.5, 1.0]}),
    "dash_filter": (3, {
        "algo.completion_filter.threshold": [0.0, 0.01, 0.1], "algo.filter_denominator": ["kept"],
    }),
}  # fmt: skip
"""Sweeps over keys: how many jobs, and the values that a key has in them, in the order of the jobs."""


@pytest.mark.slow
def test_the_numbers_of_single_runs():
    for name, (algo, regime, optimizer_model, (policy, objective)) in CURVES.items():
        config = composed(f"experiment=paper/{name}").config
        selection = config.algo.selection
        low, high = selection.get("objective_shift_min", -INF), selection.get("objective_shift_max", INF)
        bounds = (selection.get("policy_shift_max", INF), -low, high)
        expect(name, config.algo.name, algo)
        expect(f"{name} bounds", bounds, (policy, objective, objective))
        expect(f"{name} rate", config.regime.learning_rate, regime[0])
        expect(f"{name} size", (batch(config), config.num_steps), regime[1:])
        expect(f"{name} optimiser model", config.curvature.optimizer_model, optimizer_model)
        standardised = config.algo.advantage.get("target_std"), config.algo.advantage.get("eps")
        expect(name, standardised, (1.0, 1e-4) if algo in ("grpo", "capo") else (None, None))
    for name, (size, steps, numbers) in RUNS.items():
        config = composed(f"experiment=paper/{name}").config
        values = dict(flat(asdict(config)))
        expect(f"{name} size", (batch(config), updates(config)), (size, steps))
        for k, v in numbers.items():
            expect(f"{name} {k}", values[k], v)


@pytest.mark.slow
def test_the_numbers_of_sweeps():
    for name, (count, numbers) in SWEEPS.items():
        configs = [dict(flat(asdict(config))) for _, config in jobs(f"experiment=paper/{name}")]
        expect(f"{name} jobs", len(grid(f"experiment=paper/{name}")), count)
        for key, values_or_words in numbers.items():
            wanted = values_or_words.split() if isinstance(values_or_words, str) else values_or_words
            group = {"algo.name": "algo=", "algo.variant": "selection="}.get(key, "no group")
            texts = [text for text in chain(*grid(f"experiment=paper/{name}")) if text.startswith(group)]
            chosen = [text.removeprefix(group) for text in texts] or [values[key] for values in configs]
            seen = list(dict.fromkeys(chosen))
            assert len(seen) == len(wanted) and all(map(same, seen, wanted)), f"{name} {key}={seen}"


@pytest.mark.slow
def test_a_figures_jobs_are_the_single_runs():
    """Whether it is run by its own command or in a figure, a run has one identity."""
    assert len(figures_of_runs()) > 8
    for name in figures_of_runs():
        raw = ["curvature.optimizer_model=sgd"] if name == "paper/figure_3_raw_gradient" else []
        for line, config in jobs(f"experiment={name}")[-1:]:
            alone = [text.replace("experiment/paper=", "experiment=paper/") for text in line]
            expect(f"{name} {' '.join(line)}", run_id(config), run_id(composed(*alone, *raw).config))


SMALL = (
    "scale=smoke", "logger=files", "device=cpu", "num_steps=1", "dataset.max_completion_tokens=12",
    "evaluation.every=0", "evaluation.num_problems=1", "curvature.calibrate_completions=4",
    "curvature.calibrate_tokens=16", "dataset.source.num_train=64", "dataset.source.num_eval=8",
)  # fmt: skip
FEATURES = {
    "algo=grpo step_rule=calibrated curvature.hidden_shift=1": "step/policy_shift_measured",
    "rollout/correction=token_mask curvature.optimizer_model=adam_live": "mismatch/dropped_fraction",
    "experiment=paper/calibration hydra.mode=RUN": "calibration/tokens",
    "experiment=study/diagnosis curvature.diagnose_every=1": "diagnosis/gradient/cosine",
    "setting=keywords algo=grpo model=keywords dataset=keywords": "reward/accuracy",
}
"""Kinds of step that no other test runs, and what each measures; those of the learner and of selections have
all methods."""


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "measure"), FEATURES.items())
def test_every_kind_of_step_runs(overrides, measure, tmp_path):
    config = composed(*SMALL, *overrides.split(), f"output_dir={tmp_path}").config
    check(config)
    directory = train.run(config)
    rows = [json.loads(text) for text in (directory / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["counter/optimizer_step"] == len(rows) >= 1
    for key in ("loss/total", "policy/grad_norm", "policy/entropy", "curvature/token/policy_shift/mean"):
        assert all(math.isfinite(row[key]) for row in rows), key
    assert rows[-1].get(measure) is not None
    assert json.loads((directory / "run.json").read_text())["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected", "folder"),
    [
        (["seed=0", "scale=tiny", "curvature.top_k=10,50"], 6, "paper_figure_5-tiny"),
        (["hydra.mode=RUN"], 0, ""),
    ],
)
def test_a_sweep_and_its_jobs_are_in_one_folder(tmp_path, monkeypatch, capsys, arguments, expected, folder):
    seen = []
    monkeypatch.setattr(sweep, "run_dir", lambda config: seen.append(config.experiment_name))
    monkeypatch.chdir(tmp_path)
    run_training("experiment=paper/figure_5", "plan_only=true", *arguments)
    out = capsys.readouterr().out
    assert out.count("job ") == expected == len(seen)
    assert out.count("completions a step") == max(1, expected)
    assert {*seen} == ({folder} if expected else set())
    written = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert written == ([f"outputs/{folder}/multirun.yaml"] if expected else [])
