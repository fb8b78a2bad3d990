"""Prints docs/METRICS.md from the table in capo_exp/runs/metrics.py."""

import sys

from capo_exp.runs.metrics import FAMILIES, GROUPS, METRICS
from capo_exp.runs.metrics import __doc__ as about

HEAD = "# Metrics\n\nDo not edit this page: `python scripts/metrics_page.py > docs/METRICS.md` prints it.\n\n"


def page() -> str:
    """Returns the page: a table for each group of keys, then the keys with a name in them."""
    known = METRICS | {f"{prefix}<name>": meaning for prefix, meaning in FAMILIES.items()}
    text = HEAD + str(about).split("\n\n", 1)[1]
    for group, subject in GROUPS.items():
        rows = [f"| `{key}` | {meaning} |\n" for key, meaning in known.items() if key.split("/")[0] == group]
        text += f"\n## {group}\n\n{subject}\n\n| key | meaning |\n|---|---|\n{''.join(rows)}"
    return text


if __name__ == "__main__":
    sys.stdout.write(page())
