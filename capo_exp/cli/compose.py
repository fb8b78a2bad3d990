"""Composing of the training configuration beside the command line's own, and the choices of its groups."""

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from capo_exp.config.choices import without_hydra
from capo_exp.config.schema import conf_dir, expected_type, register


def compose_config(overrides: Sequence[str], *, config_dir: str | None = None) -> DictConfig:
    """Composes the training configuration; a user's own YAML files are found in `config_dir`."""
    register()
    extra = [f"hydra.searchpath=['file://{Path(config_dir).absolute()}']"] if config_dir else []
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return without_hydra(compose("config", [*extra, *overrides], return_hydra_config=True))


def find_choices(group: str, config_dir: str | None = None) -> list[str]:
    """Returns the names of a group's YAML files, without those of groups inside it and parts of recipes."""
    roots = [conf_dir()] + ([Path(config_dir)] if config_dir else [])
    files = [(root / group, path) for root in roots for path in (root / group).rglob("*.yaml")]
    names = {str(path.relative_to(folder).with_suffix("")) for folder, path in files}
    own = [name for name in names if "/" not in name or not is_group(f"{group}/{name}".rpartition("/")[0])]
    return sorted(name for name in own if "/_" not in f"/{name}")


def is_group(folder: str) -> bool:
    """Returns whether a folder of conf/ is a group of its own, as rollout/correction is: it has a key.

    The folders in experiment/ only sort its choices.
    """
    return (conf_dir() / folder).is_dir() and bool(expected_type(folder.replace("/", ".")))
