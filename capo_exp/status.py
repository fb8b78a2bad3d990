"""`python -m capo_exp.status [DIR ...]`: which runs there are, and how far each one is."""

from capo_exp.cli import status

if __name__ == "__main__":
    raise SystemExit(status.main())
