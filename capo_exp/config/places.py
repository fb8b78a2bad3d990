"""Where things stand: the YAML files, and what a model's path means. Imports no torch."""

import os
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

from capo_exp.config.errors import error

MADE_HERE = "cache://"
"""Begins the path of a model that is made on this machine when it is first used; see core/smollm2.py."""
CACHE_DIR_VARIABLE = "CAPO_CACHE_DIR"


def conf_dir() -> Path:
    """Returns the folder of the YAML files: in the installed package, or beside it in a clone."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def unresolved(text: str) -> str:
    """Escapes a text so that OmegaConf takes it as it is, also one such as `${oc.env:HOME}`."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def quoted(text: object) -> str:
    """Writes any text as a value of Hydra's grammar, in which nothing is resolved."""
    escaped = re.sub(r"(\\+)(?='|\Z)", r"\1\1", unresolved(str(text))).replace("'", "\\'")
    return f"'{escaped}'"


def typed(key: str, value: object) -> str:
    """Writes `key=value` of a text as a shell takes it, to be pasted behind a command."""
    plain = re.fullmatch(r"[A-Za-z0-9_.-]*/[A-Za-z0-9_./-]*", str(value))
    return f"{key}={value}" if plain else shlex.quote(f"{key}={quoted(value)}")


def slug(name: str, longest: int = 60) -> str:
    """Returns a name as that of one folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-")[:longest] or "unnamed"


def is_local_path(path: str) -> bool:
    """Returns whether a model path means this machine's disk and not a hub id."""
    return path.startswith(("pkg://", MADE_HERE, "/", "./", "../", "~")) or os.path.isdir(path)


def resolve_model_path(path: str) -> str:
    """Returns the directory that pkg://PACKAGE/DIR means, or cache://NAME (in CAPO_CACHE_DIR, else in
    ~/.cache/capo_exp), or any other path as it is.

    Raises:
        ConfigError: for a package that is not installed.
    """
    if path.startswith(MADE_HERE):
        cache = Path(os.environ.get(CACHE_DIR_VARIABLE) or "~/.cache/capo_exp").expanduser()
        return str(cache / path.removeprefix(MADE_HERE))
    if not path.startswith("pkg://"):
        return os.path.expanduser(path)
    package, _, inside = path.removeprefix("pkg://").partition("/")
    spec = find_spec(package) if package.isidentifier() else None  # which looks, and imports nothing
    if spec is None or not spec.submodule_search_locations:
        raise error("model.path", path, f"an installed package, got {package}")
    return str(Path(spec.submodule_search_locations[0], inside))
