"""A verifier with numbers of a test's own. Imports no torch: workers import what the tests import."""

from typing import Any

from capo_exp.grading.verifier import MathVerifier


def math_verifier(**changes: Any) -> MathVerifier:
    numbers = {"timeout_seconds": 5.0, "workers": 1, "memory_limit_gib": 4.0}
    return MathVerifier(**(numbers | {"style": "auto", "unparsable_gold": "drop"} | changes))
