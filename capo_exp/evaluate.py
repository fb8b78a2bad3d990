"""`python -m capo_exp.evaluate`: a run's checkpoint, a model, or completions on disk become scores."""

import signal

from capo_exp.cli.evaluate import interrupt, main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    raise SystemExit(main())
