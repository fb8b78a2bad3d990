"""The two errors that a user sees as one line, and how their messages are put together. Imports no torch."""

import difflib
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """Bad input. The message is one line: what was got, what is expected, which key to change."""


class RunFailed(RuntimeError):
    """A run that has to end although its configuration is right. The message says why, and how to go on."""


MOST_CHOICES = 20
"""Longest list of choices that a message has; of a longer one it has the nearest five."""


def error(key: str, value: Any, expected: str) -> ConfigError:
    """Returns the error `key=value: expected ...`, in one line."""
    if value is None or isinstance(value, bool):
        value = {None: "null", True: "true", False: "false"}[value]  # as YAML writes it
    text = "".join(each if each.isprintable() else repr(each)[1:-1] for each in str(value))
    return ConfigError(f"{key}={text if len(text) <= 200 else f'{text[:200]}...'}: expected {expected}")


def same_command(overwrite: bool) -> str:
    """Returns what goes on with what is there: with overwrite=true it would begin again."""
    return "the same command without overwrite=true" if overwrite else "the same command"


def printable(text: object) -> str:
    """Returns a text that cannot steer a terminal; its lines stay."""
    return "".join(each if each.isprintable() or each == "\n" else "?" for each in str(text))


def brief(failure: Exception, length: int = 160) -> str:
    """Returns what a library's exception says, in one line of about so many characters."""
    text = " ".join(str(failure).split()) or type(failure).__name__
    return text if len(text) <= length else f"{text[:length]}..."


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns the second half of a message about an unknown name: the choices, and the one probably meant."""
    choices = list(known)
    near = difflib.get_close_matches(name, choices, n=5, cutoff=0.6 if len(choices) <= MOST_CHOICES else 0.0)
    if len(choices) > MOST_CHOICES:
        return f"expected one of {len(choices)} choices; nearest: {', '.join(near)}"
    return f"expected one of {', '.join(choices)}" + (f"; nearest: {near[0]}" if near else "")
