"""`python -m capo_exp`: trains what the command line composes."""

from capo_exp.cli import front

if __name__ == "__main__":
    raise SystemExit(front.run_training())
