"""The packages of a user's own that a YAML may name functions of: only a command line allows them."""

import os
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points

from capo_exp.config.errors import error

PLUGINS = "CAPO_EXP_PLUGINS"
"""Environment variable: the packages that the command line allows. The processes of a run inherit it."""
ENTRY_POINTS = "capo_exp.plugins"
"""Group of entry points by whose names an installed package can be allowed, as by its own."""


def allow_plugins(names: Iterable[str]) -> None:
    """Lets `_target_` name functions of these packages, and of no others, in this process and its children.

    Only a command line calls it: what a file or a record says allows nothing.

    Args:
        names: of packages, or of their entry points in the group capo_exp.plugins.

    Raises:
        ConfigError: for what is no package of a user's own.
    """
    allowed, ours = {name: find_package(name) for name in names}, {"capo_exp", *sys.stdlib_module_names}
    for name, package in allowed.items():
        if not all(each.isidentifier() for each in package.split(".")) or package.partition(".")[0] in ours:
            raise error("plugins", f"[{name}]", "names of packages of your own, as in plugins=[mypackage]")
    os.environ[PLUGINS] = ",".join(allowed.values())


def find_package(name: str) -> str:
    """Returns the package that an entry point of this name stands for, else the name.

    Raises:
        ConfigError: installed packages disagree about it.
    """
    found = sorted({point.module for point in entry_points(group=ENTRY_POINTS, name=name)})
    if len(found) > 1:
        wanted = f"the name of a package, since this entry point means {' and '.join(found)}"
        raise error("plugins", f"[{name}]", wanted)
    return found[0] if found else name


def allowed_plugins() -> list[str]:
    """Returns the packages that the command line allows."""
    return [name for name in os.environ.get(PLUGINS, "").split(",") if name]


def find_plugin(module: str) -> str | None:
    """Returns the allowed package in which a module stands."""
    return next((name for name in allowed_plugins() if f"{module}.".startswith(f"{name}.")), None)
