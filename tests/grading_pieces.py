"""A verifier, and real problems. Imports no torch: workers import what the tests import."""

import os
from pathlib import Path

import pytest

from capo_exp.grading.verifier import MathVerifier

SHARED = Path(os.environ.get("CAPO_DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="neither CAPO_DATA_DIR nor ../shared/data")


def math_verifier(**changes):
    numbers = {"timeout_seconds": 5.0, "workers": 1, "memory_limit_gib": 4.0}
    return MathVerifier(**(numbers | {"style": "auto", "unparsable_gold": "drop"} | changes))
