"""Composing of the training configuration beside the command line's own, and the choices of its groups."""

import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from filecmp import cmp
from glob import iglob
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from capo_exp.config.build import check_target, find_parts
from capo_exp.config.choices import refuse_sweep, without_hydra
from capo_exp.config.errors import error
from capo_exp.config.plugins import allow_plugins
from capo_exp.config.record import walk
from capo_exp.config.schema import conf_dir, expected_type, register

HYDRAS = r"hydra\._internal\.core_plugins\.[\w.]+|hydra_plugins\.[\w.]+|optuna\.samplers\.\w+"
"""What Hydra may build of its own nodes: launchers, sweepers and their samplers."""

MAKES_NODES = r"\$\{(?!(?:mul|add|div|last_name|now|oc\.env|hydra):|\.*[\w.\[\]]+\})"
"""Begins an interpolation that could hide a _target_ in a text, as oc.create and its like do."""

PLACES = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.output_subdir", "hydra.job.chdir")
OWN_PLACE = "output_dir=..., below which each run makes a folder of its own"


def entries(value: str) -> list[str]:
    """Splits `a,b` or `[a,b]`."""
    inner = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    return [entry.strip().strip("'\"") for entry in inner.split(",") if entry.strip()]


def guard(words: Sequence[str], folders: Sequence[str]) -> None:
    """Allows the plugins of a command line, and refuses what Hydra would build before a configuration is
    checked: it makes callbacks and log handlers as soon as it has composed.

    Args:
        words: `key=value` of the command line.
        folders: with YAML files of a user's own.

    Raises:
        ConfigError: something stands there that is no part.
    """
    given = [word.lstrip("+").partition("=")[::2] for word in words]
    allow_plugins(entries(([""] + [value for key, value in given if key == "plugins"])[-1]))
    for key, value in given:
        if key in PLACES:
            raise error(key, value, OWN_PLACE)
        if key.startswith("hydra"):
            for target in re.findall(r"_target_['\"]?\s*[=:]\s*['\"]?([^\s,}'\"]*)", f"{key}={value}"):
                if not re.fullmatch(HYDRAS, target):
                    raise error(key, target, "a launcher, a sweeper or a sampler of Hydra's")
    searched = [place for key, value in given if key == "hydra.searchpath" for place in entries(value)]
    for folder in (*folders, *searched):
        _check_folder(folder.removeprefix("file://"))
    for folder in searched:
        if hidden := _find_packaged(folder.removeprefix("file://")):
            raise error("hydra.searchpath", folder, f"--config-dir, for conf/ has {hidden[0]}, too")
    for folder in folders[-1:]:
        if replaced := ", ".join(_find_packaged(folder)):
            sys.stderr.write(f"{folder}: in place of the file of this package: {replaced}\n")


def _find_packaged(folder: str) -> list[str]:
    """Returns which YAML files of a folder have a name, and not the text, of one in conf/."""
    own = ((path, conf_dir() / path) for path in sorted(iglob("**/*.yaml", root_dir=folder, recursive=True)))
    return [path for path, ours in own if ours.is_file() and not cmp(Path(folder, path), ours, shallow=False)]


def _check_folder(folder: str) -> None:
    """Reads the YAML files of a folder of which one speaks of Hydra's own nodes, whatever will be chosen."""
    files: dict[str, tuple[str, Any]] = {}
    for path in iglob("**/*.yaml", root_dir=folder, recursive=True, include_hidden=True):
        with suppress(OmegaConfBaseException, YAMLError, OSError, ValueError):
            text = (Path(folder) / path).read_text(encoding="utf-8")  # Hydra says so, if it reads it
            files[path] = (text, OmegaConf.to_container(OmegaConf.create(text)))
    for path, (_, values) in files.items():
        for entry in (values.get("defaults") or []) if isinstance(values, dict) else []:
            if ".." in str(entry) or "//" in str(entry):
                raise error(f"{path}: defaults", entry, "a file of conf/ or of this folder")
    for path, (text, values) in files.items() if "hydra" in repr(files) else ():
        tree = list(walk(values))
        for said in (text, *(said for _, *pair in tree for said in pair if isinstance(said, str))):
            if strange := re.search(MAKES_NODES, said):
                wanted = "${key}, or one of mul, add, div, last_name, now, oc.env, hydra"
                raise error(path, said[strange.start() :][:40], wanted)
        for key, part in find_parts(values, "", part=False):
            if "_target_" in part and not re.fullmatch(HYDRAS, str(part["_target_"])):
                check_target({"_target_": part["_target_"]}, key=f"{path}: {key.lstrip('.')}")
        for where, name, value in tree:
            if where in PLACES:
                raise error(f"{path}: {where}", value, OWN_PLACE)
            if name.lstrip("+~").startswith(("hydra.", "hydra/")) or name in ("()", "env_set"):
                raise error(f"{path}: {name}", value, "no such key in a file: the command line can set it")
            if name == "class" and value not in ("logging.StreamHandler", "logging.NullHandler"):
                raise error(f"{path}: {name}", value, "logging.StreamHandler")


def compose_config(overrides: Sequence[str], *, config_dir: str | None = None) -> DictConfig:
    """Composes the training configuration; a user's own YAML files are found in `config_dir`."""
    return without_hydra(_compose(overrides, config_dir))


def compose_run(overrides: Sequence[str], *, config_dir: str | None = None) -> DictConfig:
    """Composes the training configuration of one run.

    Raises:
        ConfigError: an experiment sweeps over a key that the overrides do not set.
    """
    config = _compose(overrides, config_dir)
    refuse_sweep(config.hydra.sweeper.params or {}, overrides)
    return without_hydra(config)


def _compose(overrides: Sequence[str], config_dir: str | None) -> DictConfig:
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        if config_dir:
            loader: Any = GlobalHydra.instance().config_loader()
            path = loader.get_search_path()
            path.prepend("command-line", f"file://{Path(config_dir).absolute()}", "main")
            loader.repository.initialize_sources(path)
        return compose("config", list(overrides), return_hydra_config=True)


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
