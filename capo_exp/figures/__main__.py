"""`python -m capo_exp.figures runs=DIR [figure=NAME]`: figures and tables from logged runs."""

from capo_exp.cli.figures import main

if __name__ == "__main__":
    raise SystemExit(main())
