"""`python -m capo_exp.evaluate`: a run's checkpoint, a model, or completions on disk become scores."""

import signal

from capo_exp.cli import evaluate

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's SIGTERM does what Ctrl-C does
    raise SystemExit(evaluate.main())
