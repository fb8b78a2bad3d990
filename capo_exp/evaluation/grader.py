"""What a verdict depends on: the verifier's settings, its packages, and our part. Imports no torch."""

import hashlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from capo_exp.grading import compare as grading
from capo_exp.grading import extract as answers

KEYS = ("style", "timeout_seconds", "memory_limit_gib", "unparsable_gold")
PACKAGES = ("math-verify", "latex2sympy2-extended", "sympy")


def describe(verifier: Mapping[str, Any]) -> dict[str, Any]:
    """The grader's entry of a card.

    Args:
        verifier: the part `reward.verifier`.
    """
    settings = {key: value for key, value in verifier.items() if key in KEYS}
    return {
        "verifier": verifier["_target_"],
        **settings,
        "packages": versions(PACKAGES),
        "code": _code(),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of those that are installed."""
    found: dict[str, str] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _code() -> str:
    """8 hex digits of answers.py and grading.py."""
    sources = [Path(module.__file__ or "").read_bytes() for module in (answers, grading)]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:8]
