"""`python -m capo_exp`: trains what the command line composes."""

from capo_exp.cli.compose import main

if __name__ == "__main__":
    main()
