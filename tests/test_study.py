"""conf/setting and conf/experiment/study: every job composes and passes the checks, in every setting."""

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import open_dict

from capo_exp.config.checks import check
from capo_exp.config.schema import conf_dir, register, to_config
from capo_exp.runs.record import run_id

SETTINGS = sorted(path.stem for path in (conf_dir() / "setting").glob("*.yaml"))
SWEEPS = sorted(path.stem for path in (conf_dir() / "experiment" / "study").glob("[!_]*.yaml"))

HOME = {"real_rates": "sums"}
"""The setting of a sweep that is not keywords."""

SHIPPED = ["model.path=pkg://capo_exp/assets/tiny"]
"""Some models are made by scripts/pretrain.py and are not there."""


def composed(*overrides):
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", list(overrides), return_hydra_config=True)
    params = {key: str(value) for key, value in (config.hydra.sweeper.params or {}).items()}
    with open_dict(config):
        del config["hydra"]
    return to_config(config), params


def jobs(sweep, setting):
    """All in the setting of the sweeps; in the others, where the grid is the same, the first and the last."""
    chosen = [f"experiment=study/{sweep}", f"setting={setting}", *SHIPPED]
    _, params = composed(*chosen)
    assert params.pop("seed") in ("range(5)", "10,11,12,13,14")  # those for choosing, those for judging
    parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    grid = BasicSweeper.split_arguments(parsed, None)[0]
    lines = grid if setting == HOME.get(sweep, "keywords") else [grid[0], grid[-1]]
    return [composed(*chosen, *line)[0] for line in lines]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_job_is_a_run_of_its_own(sweep, setting):
    configs = jobs(sweep, setting)
    for config in configs:
        check(config)
        assert config.experiment_name == f"study_{sweep}"
        assert config.optimizer.schedule == "constant_with_warmup"
    assert len({run_id(config) for config in configs}) == len(configs)


@pytest.mark.parametrize("setting", SETTINGS)
def test_regimes_ask_for_the_same_completions(setting):
    """The criterion compares accuracies after as many completions."""
    sizes = []
    for regime in ("aggressive", "conservative"):
        config, _ = composed(f"setting={setting}", f"regime={regime}")
        sizes.append(config.num_steps * config.regime.prompts_per_step * config.regime.group_size)
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)
    assert sizes[0] % 100 == 0


def test_a_setting_goes_on_the_command_line_and_on_an_experiment():
    alone, _ = composed("setting=keywords", "algo=grpo")
    swept, _ = composed("experiment=study/rates", "setting=keywords")
    for config in (alone, swept):
        assert (config.model.name, config.dataset.name) == ("keywords", "keywords")
    assert (alone.regime.name, alone.regime.learning_rate) == ("aggressive", pytest.approx(4e-3))
