"""Every random number is a function of (run seed, stream, step): resuming needs no generator's state."""

import numpy as np

ORDER, ROLLOUT, EVALUATION, SELECTION, MINIBATCH, CALIBRATION, STEP_RULE, DIAGNOSIS = range(8)
REFERENCE, CONTINUATION, PAIRS, RESUMED = range(8, 12)
"""Streams that never share numbers."""


def derive_seed(seed: int, stream: int, *position: int) -> int:
    """Returns a 32-bit seed for one use of randomness: the run's seed, one of the streams above, and the
    position in it (step, and if a step has several uses, which)."""
    return int(np.random.SeedSequence([seed, stream, *position]).generate_state(1)[0])
