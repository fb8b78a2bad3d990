"""The two errors that a user sees as one line, and how their messages are put together. Imports no torch."""

import difflib
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """Bad input. The message is one line: what was got, what is expected, which key to change."""


class RunFailed(RuntimeError):
    """A run that has to end although its configuration is right. The message says why, and how to go on."""


def error(key: str, value: Any, expected: str) -> ConfigError:
    """Returns the error `key=value: expected ...`, in one line."""
    if value is None or isinstance(value, bool):
        value = {None: "null", True: "true", False: "false"}[value]  # as YAML writes it
    return ConfigError(f"{key}={value}: expected {expected}".replace("\n", "\\n"))


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns the second half of a message about an unknown name: the choices, and the one probably meant."""
    choices = list(known)
    near = difflib.get_close_matches(name, choices, n=1)
    return f"expected one of {', '.join(choices)}" + (f"; nearest: {near[0]}" if near else "")
