"""Hydra that merges a choice of groups once in a process.

Composing takes a third of a second, nearly all of it to read the YAML files of the chosen groups and to merge
them, and the tests compose some thousand times. What was read and merged is remembered for as long as the
files are the same; Hydra parses every command line, and sets its values on a copy, as ever.
"""

import os
from copy import deepcopy
from dataclasses import replace
from functools import cache
from glob import iglob
from pathlib import Path
from typing import Any

import yaml
from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, _utils, basecontainer

REMEMBERED = ("config", "evaluate_command", "figures_command", "status_command")
"""Configurations whose schema in Hydra's store is always the same."""


def compose_once() -> None:
    """Makes Hydra remember, and read YAML with libyaml, which gives the same values."""
    find, merge = defaults_list.create_defaults_list, ConfigLoaderImpl._compose_config_from_defaults_list
    read = ConfigRepository.load_config
    files: dict[Any, Any] = {}
    lists: dict[Any, defaults_list.DefaultsList] = {}
    merged: dict[int, DictConfig | None] = {}

    def read_once(self: ConfigRepository, config_path: str) -> Any:
        source: Any = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is None or source.scheme() not in ("file", "pkg"):
            return read(self, config_path)
        key = (str(source), config_path)
        if source.scheme() == "file":
            stat = os.stat(Path(source.path, source._normalize_file_name(config_path)))
            key += (stat.st_mtime_ns, stat.st_size)
        if key not in files:
            files[key] = read(self, config_path)
        return deepcopy(files[key])

    def find_once(repo: Any, config_name: str, overrides_list: list[Any], **more: Any) -> Any:
        given = defaults_list.Overrides(repo, overrides_list).config_overrides
        chosen = [each.input_line for each in overrides_list if not any(each is value for value in given)]
        if config_name not in REMEMBERED:
            return find(repo, config_name, overrides_list, **more)
        key = (config_name, *chosen, *more.items(), *map(_state, repo.get_sources()))
        if key not in lists:
            lists[key] = find(repo, config_name, overrides_list, **more)
            merged[id(lists[key].defaults)] = None
        return replace(lists[key], config_overrides=given)

    def merge_once(self: ConfigLoaderImpl, defaults: list[Any], repo: Any) -> DictConfig:
        if id(defaults) not in merged:
            return merge(self, defaults, repo)
        known = merged[id(defaults)] = merged[id(defaults)] or merge(self, defaults, repo)
        return deepcopy(known)

    ConfigRepository.load_config = read_once
    config_loader_impl.create_defaults_list = find_once
    ConfigLoaderImpl._compose_config_from_defaults_list = merge_once
    _utils.get_yaml_loader = basecontainer.get_yaml_loader = cache(_make_loader)


def _state(source: Any) -> Any:
    """What tells whether the YAML files of a source are the same, wherever they are."""
    if source.scheme() != "file":
        return str(source)
    paths = sorted(iglob("**/*.yaml", root_dir=source.path, recursive=True))
    stats = [os.stat(Path(source.path, path)) for path in paths]
    return tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in zip(paths, stats, strict=True))


def _make_loader(genuine: Any = _utils.get_yaml_loader) -> Any:
    slow = yaml.SafeLoader
    yaml.SafeLoader = yaml.CSafeLoader
    try:
        return genuine()
    finally:
        yaml.SafeLoader = slow
