"""`python -m capo_exp.doctor`: can this machine run what the configuration asks for?"""

from capo_exp.cli import doctor

if __name__ == "__main__":
    raise SystemExit(doctor.main())
