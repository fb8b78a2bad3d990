"""Hydra that reads a file once and merges a choice of groups once: composing takes a third of a second."""

import os
from copy import deepcopy
from dataclasses import replace
from functools import cache
from glob import iglob
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig, OmegaConf, _utils, base, basecontainer, flag_override
from omegaconf.errors import OmegaConfBaseException

MARK = "HYDRA_REMOVE_TOP_LEVEL_DEFAULTS"
REMEMBERED = ("config", "evaluate_command", "figures_command", "status_command")
"""Configurations whose schema in Hydra's store is always the same."""


def compose_once():
    """Makes Hydra remember, and read YAML with libyaml, which gives the same values."""
    find, merge = defaults_list.create_defaults_list, ConfigLoaderImpl._compose_config_from_defaults_list
    choices = defaults_list._create_interpolation_map
    lists: dict[Any, defaults_list.DefaultsList] = {}
    read: dict[Any, dict[str, Any]] = {}
    merged: dict[int, DictConfig | None] = {}
    begun: dict[tuple[str, ...], DictConfig | None] = {(): OmegaConf.create()}

    def find_once(repo, config_name, overrides_list, **more):
        given = defaults_list.Overrides(repo, overrides_list).config_overrides
        chosen = [each.input_line for each in overrides_list if not any(each is value for value in given)]
        if config_name not in REMEMBERED:
            return find(repo, config_name, overrides_list, **more)
        state = tuple(map(_state, repo.get_sources()))
        repo.cache = read.setdefault(state, {})
        key = (config_name, *chosen, *more.items(), *state)
        if key not in lists:
            lists[key] = find(repo, config_name, overrides_list, **more)
            merged[id(lists[key].defaults)] = None
        return replace(lists[key], config_overrides=given)

    def merge_once(self, defaults, repo):
        if id(defaults) not in merged:
            return merge(self, defaults, repo)
        try:
            known = merged[id(defaults)] = merged[id(defaults)] or go_on(self, defaults, repo)
        except OmegaConfBaseException:
            repo.cache = {}
            return merge(self, defaults, repo)  # Hydra's own message
        return deepcopy(known)

    def go_on(self, defaults, repo):
        """Merges what follows the longest beginning that another choice has, too."""
        names = tuple(f"{id(repo.cache)} {each.config_path}@{each.package}" for each in defaults)
        shared = max(len(_common(names, other)) for other in begun)
        done = next(count for count in range(shared, -1, -1) if begun.get(names[:count]) is not None)
        config = deepcopy(begun[names[:done]])
        begun.setdefault(names)
        for place, default in enumerate(defaults[done:], done):
            if place == shared:
                begun[names[:place]] = deepcopy(config)
            loaded = self._load_single_config(default, repo).config
            with flag_override(config, "no_deepcopy_set_nodes", True):
                config.merge_with(loaded if default.package else deepcopy(loaded))
        _drop_defaults(config)
        return config

    def choices_if_needed(overrides, defaults, self_added):
        needed = any(default.is_interpolation() for default in defaults)
        return choices(overrides, defaults, self_added) if needed else None

    defaults_list._create_interpolation_map = choices_if_needed
    config_loader_impl.create_defaults_list = find_once
    ConfigLoaderImpl._compose_config_from_defaults_list = merge_once
    base.parse = _utils.parse = cache(base.parse)
    _utils.get_yaml_loader = basecontainer.get_yaml_loader = cache(_make_loader)


def _drop_defaults(node):
    """Removes the defaults lists that structured configs brought with them, which Hydra has marked."""
    if not isinstance(node, DictConfig) or node._is_missing() or node._is_none():
        return
    if node._get_flag(MARK):
        node._set_flag(MARK, None)
        with flag_override(node, ["readonly", "struct"], False):
            node.pop("defaults", None)
    for _, child in node.items_ex(resolve=False):
        _drop_defaults(child)


def _common(one, other):
    return [*takewhile(bool, map(str.__eq__, one, other))]


def _state(source):
    """What tells whether the YAML files of a source are the same, wherever they are."""
    if source.scheme() != "file":
        return str(source)
    paths = sorted(iglob("**/*.yaml", root_dir=source.path, recursive=True))
    stats = [os.stat(Path(source.path, path)) for path in paths]
    return tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in zip(paths, stats, strict=True))


def _make_loader(genuine=_utils.get_yaml_loader):
    slow = yaml.SafeLoader
    yaml.SafeLoader = yaml.CSafeLoader
    try:
        return genuine()
    finally:
        yaml.SafeLoader = slow
