"""`python -m capo_exp.doctor`: can this machine run what the configuration asks for?"""

from capo_exp.cli.doctor import main

if __name__ == "__main__":
    main()
