"""What Hydra knows of a composed configuration: the choices of its groups, and the name that they give it."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from capo_exp.config.errors import ConfigError

NAMING = ("experiment", "scale", "hparams_search")
"""Groups whose choices make `experiment_name`, in this order."""


def name_choices(root: DictConfig) -> str:
    """Returns one folder name, such as `paper_figure_1-tiny`; `default` stands for no experiment."""
    choices = _find_choices(root)
    experiment = choices.get("experiment") or "default"
    others = [choices[group] for group in NAMING[1:] if choices.get(group)]
    return "-".join([experiment.replace("/", "_"), *others])


def refuse_sweep(swept: Mapping[Any, Any], overrides: Sequence[str]) -> None:
    """Raises ConfigError for a key that an experiment sweeps over and the overrides of one run do not set."""
    given = [override.lstrip("+").partition("=")[0] for override in overrides]
    for key, values in swept.items():
        if key not in given:
            raise ConfigError(f"{key}={values}: expected one of them, since this is one run")


def without_hydra(config: DictConfig) -> DictConfig:
    """Removes Hydra's own node, and with it the choices, once what names them has been read off it."""
    HydraConfig.instance().set_config(config)
    config = config.copy()
    OmegaConf.set_struct(config, False)
    config.experiment_name = config.experiment_name
    del config["hydra"]
    OmegaConf.set_struct(config, True)
    return config


def list_choices(root: DictConfig) -> str:
    """Returns a paragraph for each group that the command line can choose from, for --help."""
    groups = sorted(key for key in _find_choices(root) if "@" not in key and not key.startswith("hydra/"))
    chosen = {group: names for group in groups if (names := _list_names(group))}
    return "\n".join(
        textwrap.fill(f"{group}: {', '.join(names)}", 80, subsequent_indent="    ", break_on_hyphens=False)
        for group, names in chosen.items()
        if not group.startswith("experiment/")  # what a figure sweeps over, listed with the experiments
    )


def _list_names(group: str) -> list[str]:
    """Returns the files of a group, those in its folders after its own; `_name` is a part of others."""
    loader = GlobalHydra.instance().config_loader()
    names = [name for name in loader.get_group_options(group) if not name.startswith("_")]
    if group.partition("/")[0] == "experiment":  # its folders only sort
        folders = loader.list_groups(group)
        names += [f"{folder}/{name}" for folder in folders for name in _list_names(f"{group}/{folder}")]
    return names


def _find_choices(root: DictConfig) -> dict[str, Any]:
    """Reads the choices where Hydra has them: in the tree while it composes, later in HydraConfig."""
    known: Any = root if "hydra" in root else HydraConfig.instance().cfg
    return dict(known.hydra.runtime.choices) if known is not None else {}
