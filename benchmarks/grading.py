"""The grader against model outputs with known labels, and its speed. Prints Markdown.

Reads ../shared/data, or the folder that CAPO_DATA_DIR names. Every disagreement is listed by the id of its
row, with a cause and who is right, as judged by reading question, completion and gold (JUDGED below);
"unjudged" is new since then.

    python benchmarks/grading.py
"""

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from capo_exp.grading.compare import Grade
from capo_exp.grading.reading import read_gold
from capo_exp.grading.verifier import MathVerifier

DATA = Path(os.environ.get("CAPO_DATA_DIR", Path(__file__).resolve().parents[2] / "shared" / "data"))
WORKERS = 2
SETS = (("outputs_openai_gsm8k", "auto"), ("outputs_qwen25math", "boxed"), ("outputs_rho", "auto"))
"""With the style that fits how the models were asked; disagreements are listed for these."""
OTHERS = (
    ("outputs_qwen25math", "auto", "all"),
    ("outputs_rho", "boxed", "tora code+boxed"),
    ("outputs_rho", "final_answer", "few-shot CoT"),
)
"""Other styles, on the rows that ask for them."""
QUESTIONS = (
    "math/train", "math/test", "math500/test", "gsm8k/test", "aime24/test", "aime25/test", "amc23/test",
    "minerva/test", "olympiadbench/test",
)  # fmt: skip
NO_JUDGEMENT = ("unjudged", "")

JUDGED: dict[tuple[str, str], dict[str, str]] = {
    ("label's grader accepts 100 times too much or too little", "ours"): {
        "1b-interpreter": "gsm8k/199 gsm8k/594",
        "1b": "gsm8k/328 gsm8k/413 gsm8k/951",
        "7b-interpreter": "gsm8k/413",
        "7b": "gsm8k/586 gsm8k/1182",
    },
    ("label's grader ignores whether an interval is open", "ours"): {
        "1b-interpreter": "minerva_math/307",
        "7b-interpreter": "minerva_math/307",
    },
    ("label's grader accepts one of two answers", "ours"): {"1b": "minerva_math/25"},
    ("nothing is answered; the label took a number from the text", "ours"): {
        "1b": "minerva_math/474",
        "7b-interpreter": "minerva_math/25",
    },
    ("label's grader reads a calculation before the answer as part of it", "ours"): {
        "1b": "gsm8k/16 gsm8k/908 minerva_math/53 minerva_math/146 minerva_math/384",
        "7b": "gsm8k/53 gsm8k/138 gsm8k/509 gsm8k/669 gsm8k/844",
    },
    ("label's grader reads words after the answer as part of it", "ours"): {
        "1b": (
            "gsm8k/76 minerva_math/37 minerva_math/107 minerva_math/174 minerva_math/182 minerva_math/243 "
            "minerva_math/329 minerva_math/337 minerva_math/374"
        ),
        "7b": "gsm8k/405 gsm8k/607 gsm8k/692 minerva_math/73 minerva_math/97",
    },
    ("label's grader does not read the letter of a choice", "ours"): {"7b": "minerva_math/255"},
    ("label's grader cannot read the unit in the gold", "ours"): {
        "1b": "minerva_math/467",
        "7b-interpreter": "minerva_math/467",
        "7b": "minerva_math/257",
    },
    ("label's grader takes the last of two boxes or of a chain of equations", "ours"): {
        "1b-interpreter": "minerva_math/339 minerva_math/456",
        "7b-interpreter": "minerva_math/456",
    },
    ("nothing announced; the result ends the text, the label took another number", "ours"): {
        "1b": "minerva_math/20",
        "7b": "gsm8k/760",
    },
    ("label's grader cannot read the thousands separator in the gold", "ours"): {"qwenrm": "72/7"},
    ("right in another unit, which we do not read", "label"): {
        "7b-interpreter": "gsm8k/1067",
        "7b": "gsm8k/466",
    },
    ("nothing announced; we took a number from the text that is right by accident", "label"): {
        "1b": "minerva_math/211 minerva_math/213",
        "7b-interpreter": "minerva_math/150",
    },
    ("equal, but not in the form that the question asks for", "label"): {
        "1b-interpreter": "minerva_math/164 minerva_math/179",
        "7b": "minerva_math/451",
    },
}
"""Cause and who is right -> model -> rows."""


def judgements() -> dict[str, tuple[str, str]]:
    """Row id -> cause and who is right."""
    return {
        f"qwenrm/{row}" if model == "qwenrm" else f"rho/rho-math-{_full(model)}/{row}/0": judged
        for judged, models in JUDGED.items()
        for model, rows in models.items()
        for row in rows.split()
    }


def _full(model: str) -> str:
    return f"{model}-v0.1"


def read(name: str) -> list[dict[str, Any]]:
    return pq.read_table(DATA / f"{name}.parquet").to_pylist()


def math_verifier(style: str) -> MathVerifier:
    numbers = {"timeout_seconds": 5.0, "workers": WORKERS, "memory_limit_gib": 4.0}
    return MathVerifier(**numbers, style=style, unparsable_gold="drop")


def grade_rows(rows: list[dict[str, Any]], style: str) -> list[Grade]:
    with math_verifier(style) as verifier:
        result = verifier.score([[row["completion"]] for row in rows], [(row["gold"],) for row in rows])
    return [verdicts[0] for verdicts in result.grades]


def show(*cells: object) -> None:
    sys.stdout.write(f"| {' | '.join(map(str, cells))} |\n")
    sys.stdout.flush()


def head(title: str, *columns: str) -> None:
    sys.stdout.write(f"\n**{title}**\n\n")
    show(*columns)
    show(*["---"] * len(columns))


def agreement(name: str, kind: str, style: str, rows: list[dict[str, Any]], grades: list[Grade]) -> None:
    pairs = [(bool(row["label"]), one.correct) for row, one in zip(rows, grades, strict=True)]
    count, reasons = Counter(pairs), Counter(one.reason for one in grades)
    same = count[True, True] + count[False, False]
    stuck = reasons["timeout"] + reasons["crash"] + reasons["error"]
    percent = f"{100 * same / len(rows):.2f}"
    show(name, kind, f"`{style}`", len(rows), percent, count[True, False], count[False, True], stuck)


def accuracies(name: str, rows: list[dict[str, Any]], grades: list[Grade]) -> None:
    for model in sorted({row["model"] for row in rows}):
        found = [
            (bool(row["label"]), one.correct)
            for row, one in zip(rows, grades, strict=True)
            if row["model"] == model
        ]
        label, ours = (100 * sum(pair[side] for pair in found) / len(found) for side in (0, 1))
        show(name, model.split(" (")[0], len(found), f"{label:.2f}", f"{ours:.2f}", f"{ours - label:+.2f}")


def disagreements(rows: list[dict[str, Any]], grades: list[Grade]) -> list[tuple[str, str, str, str]]:
    """What we said, cause, who is right, id."""
    known = judgements()
    return [
        ("correct" if one.correct else "not correct", *known.get(row["id"], NO_JUDGEMENT), row["id"])
        for row, one in zip(rows, grades, strict=True)
        if one.correct != bool(row["label"])
    ]


def causes(listed: list[tuple[str, str, str, str]]) -> None:
    head("Every disagreement, by cause", "cause", "we say", "right", "number", "rows")
    groups = Counter(line[:3] for line in listed)
    for (verdict, cause, side), number in sorted(groups.items(), key=lambda item: (item[0][2], -item[1])):
        ids = ", ".join(line[3] for line in listed if line[:3] == (verdict, cause, side))
        show(cause, verdict, side or "?", number, ids)


def golds() -> None:
    """Each gold against itself, not letter by letter the same, and against the gold of the next problem."""
    columns = ("set", "golds", "readable", "seconds", "as formulas", "right about themselves")
    head("Gold answers, style `auto`", *columns, "right about the problem before")
    for name in QUESTIONS:
        rows = [row for row in read(name) if not row.get("broken")]
        answers = [row["answer"] for row in rows]
        accepted = [(answer,) for answer in answers]
        with math_verifier("auto") as verifier:
            verifier.score([["1"]], [("1",)])
            began = time.perf_counter()
            readable = sum(verifier.gradable(accepted))
            seconds = time.perf_counter() - began
            after = [*answers[1:], answers[0]]
            texts = [
                [rf"\boxed{{\displaystyle {own}}}", rf"\boxed{{{other}}}"]
                for own, other in zip(answers, after, strict=True)
            ]
            grades = verifier.score(texts, accepted).grades
        itself = [row["id"] for row, verdicts in zip(rows, grades, strict=True) if not verdicts[0].correct]
        next_to = [
            row["id"]
            for row, verdicts, other in zip(rows, grades, after, strict=True)
            if verdicts[1].correct and row["answer"] != other
        ]
        formulas = sum((known := read_gold(gold)) is not None and known.value is not None for gold in answers)
        own = f"all but {', '.join(itself)}" if itself else "all"
        show(name, len(rows), readable, f"{seconds:.1f}", formulas, own, ", ".join(next_to))


def speed() -> None:
    """Distinct short boxed answers, half of them right, after the workers have started."""
    short = list(dict.fromkeys(row["answer"] for row in read("math/test") if len(row["answer"]) <= 12))[:1000]
    other = [*short[1:], short[0]]
    steps = "Then the next step follows from the one before. " * 20
    head(
        "Speed",
        "short boxed answers",
        f"answers/s on {WORKERS} workers",
        "processes that wanted a core before",
    )
    with math_verifier("boxed") as verifier:
        verifier.score([["1", "2", "3", "4"]], [("1",)])
        for turn in ("first 2,000", "another 2,000 from the same problems"):
            texts = [
                [rf"{steps}{turn}: $\boxed{{\displaystyle {own}}}$", rf"{steps}{turn}: $\boxed{{{wrong}}}$"]
                for own, wrong in zip(short, other, strict=True)
            ]
            load, began = os.getloadavg()[0], time.perf_counter()
            verifier.score(texts, [(own,) for own in short])
            show(turn, f"{2 * len(short) / (time.perf_counter() - began):.0f}", f"{load:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speed", action="store_true", help="nothing but the speed")
    if parser.parse_args().speed:
        speed()
        return
    kept = [
        (name, style, rows, grade_rows(rows, style)) for name, style in SETS for rows in [read(f"{name}/all")]
    ]
    columns = ("set", "rows asked for", "style", "rows", "agree %", "false negatives", "false positives")
    head("Agreement with the labels", *columns, "time-outs and errors")
    for name, style, rows, grades in kept:
        agreement(name, "all", style, rows, grades)
    for name, style, kind in OTHERS:
        rows = [row for row in read(f"{name}/all") if kind in ("all", row["style"])]
        agreement(name, kind, style, rows, grade_rows(rows, style))
    head("Accuracy of each model", "set", "model", "rows", "by label", "by us", "points")
    for name, _, rows, grades in kept:
        accuracies(name, rows, grades)
    listed = [line for _, _, rows, grades in kept for line in disagreements(rows, grades)]
    causes(listed)
    golds()
    speed()


if __name__ == "__main__":
    main()
