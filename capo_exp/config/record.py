"""A recorded configuration is data: what config.yaml of a run, perhaps a stranger's, may do to who reads it.

It is plain values: no interpolation in it is resolved. Its parts are checked as any (build.py). It allows no
plugins, overwrites nothing, and uses no place (a server, a path, a hub id) that the reader has not named, on
the command line or in this installation's own conf/. Imports no torch.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from capo_exp.config.errors import ConfigError, printable
from capo_exp.config.places import unresolved
from capo_exp.config.plugins import allow_plugins, allowed_plugins
from capo_exp.config.ranges import ATTENTIONS
from capo_exp.config.schema import TrainConfig, conf_dir, to_config

PLACES = (
    "path", "eval_path", "model_path", "hub_id", "server_url", "weight_transfer_address", "output_dir",
    "revision", "hub_revision", "attn_implementation",
)  # fmt: skip
"""Last names of the keys that say where something is read, written or sent, or which version of it: a
revision of a hub's repository, or a kernel there, may be anybody's."""
Values = dict[str, Any]


class _Loader(yaml.CSafeLoader):
    """Reads YAML as OmegaConf does, but for interpolations: 1e-4 is a number, 2026-11-26 is text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if not tag.endswith(":timestamp")]
    for first, rules in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def as_data(node: Any) -> Any:
    """Copies plain values so that OmegaConf takes every text as it is, also one such as `${oc.env:HOME}`."""
    if isinstance(node, Mapping):
        return {name: as_data(value) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [as_data(value) for value in node]
    if isinstance(node, str):
        return unresolved(node)
    return node


def to_yaml(config: TrainConfig) -> str:
    """Returns config.yaml."""
    return OmegaConf.to_yaml(OmegaConf.create(as_data(asdict(config))), resolve=True)


def read_values(text: str, what: str) -> Values:
    """Returns what config.yaml says, interpolations as the text that they are.

    Raises:
        ConfigError: It is not YAML, or no mapping; `what` names it.
    """
    try:
        values = yaml.load(text, _Loader)
        _check_tree(values, set())
    except (yaml.YAMLError, ValueError, RecursionError) as failure:
        reason = " ".join(str(failure).split()).replace(";", ",")[:160]
        raise ConfigError(f"{what} is not YAML ({reason}); expected config.yaml of a run") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(f"{what}: got {str(values)[:40]!r}, expected the config of a run, with its keys")
    return values


def _check_tree(node: Any, seen: set[int]) -> None:
    """Refuses an alias, which no record has: it can lead back to itself, or stand for a billion values."""
    if isinstance(node, dict | list):
        if id(node) in seen:
            raise ValueError("an alias, such as *a")
        seen.add(id(node))
        for child in node.values() if isinstance(node, dict) else node:
            _check_tree(child, seen)


def walk(node: Any, key: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yields the dotted key, its last name and the value of all that is in a tree of mappings and lists."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, child in children:
        where = f"{key}.{name}".lstrip(".")
        yield where, str(name), child
        yield from walk(child, where)


def find_unnamed(
    values: Any, arguments: Sequence[str], key: str = "", *, replaced: bool = True
) -> Iterator[tuple[str, str]]:
    """Yields the key and value of each place that a record names and its reader does not.

    Args:
        values: of the record, or a part of them.
        arguments: `key=value` of the command line.
        key: dotted place of the values.
        replaced: whether a place counts as named for which the reader gave another value.
    """
    given = _read_words(arguments)
    named = {text.strip("'\"") for text in given.values()}
    for where, name, value in walk(values, key):
        is_named = (replaced and where in given) or str(value) in named
        if name in PLACES and not (isinstance(value, dict | list) or is_named or _is_own(value)):
            yield where, str(value)


def _read_words(arguments: Sequence[str]) -> dict[str, str]:
    return {key: value for key, _, value in (each.lstrip("+").partition("=") for each in arguments)}


def refuse_place(key: str, value: str) -> ConfigError:
    """Returns the error about a place that only a record names."""
    shown = printable(value.replace("\n", "?"))[:160]
    return ConfigError(
        f"{key}={shown}: stands in a record only, whose servers, paths and hub ids are not used; "
        f"expected {key}=... on this command line"
    )


def _is_own(value: Any) -> bool:
    shipped = isinstance(value, str) and value.startswith("pkg://capo_exp/") and ".." not in value
    return value is None or shipped or value in ("start", *ATTENTIONS, *_read_own_places())


@cache
def _read_own_places() -> frozenset[str]:
    """Returns the places that the YAML files of this installation name."""
    files = [conf_dir() / "config.yaml", *conf_dir().glob("*/*.yaml")]
    texts = [file.read_text(encoding="utf-8") for file in files]
    found = [re.findall(rf"(?m)^ *(?:{'|'.join(PLACES)}): *([^\s{{}}#]+)", text) for text in texts]
    return frozenset(place for places in found for place in places)


def read_config(text: str, arguments: Sequence[str] = ()) -> TrainConfig:
    """Returns a recorded configuration to run again.

    Args:
        text: config.yaml.
        arguments: what the reader says of it: `plugins=[PKG]`, `overwrite=true`, places by their keys and
            `logger.wandb_mode`; or `own=true` for all that it says, as a sweep tells its jobs.

    Raises:
        ConfigError: It is not YAML, not of this version's keys, or names what the reader has not.
    """
    given = _read_words(arguments)
    own = given.pop("own", "false") == "true"
    allow_plugins(filter(None, re.split(r"[\[\],\s]+", given.pop("plugins", ""))))
    if strange := [
        key for key in given if key.rpartition(".")[2] not in (*PLACES, "overwrite", "wandb_mode")
    ]:
        raise ConfigError(
            f"{strange[0]}: expected own=true, plugins=[PKG], overwrite, or a place of the record"
        )
    values = read_values(text, "standard input") | {"plugins": allowed_plugins()}
    try:
        merged: Any = OmegaConf.merge(OmegaConf.structured(TrainConfig), as_data(values))
        for key, value in given.items():
            OmegaConf.update(merged, key, yaml.safe_load(value), force_add=True)
    except (OmegaConfBaseException, yaml.YAMLError) as failure:
        raise ConfigError(f"standard input: {str(failure).splitlines()[0]}; expected config.yaml") from None
    for key, value in () if own else find_unnamed(values, arguments):  # before anything there is read
        raise refuse_place(key, value)
    config = to_config(merged)
    if not own:
        config.overwrite = given.get("overwrite") == "true"
        if "logger.wandb_mode" not in given and config.logger.wandb_mode != "disabled":
            config.logger.wandb_mode = "offline"  # no key of the reader's is used unasked
        if config.logger.name == "trackio":
            config.logger.name = "files"  # nor the reader's database
    return config
