"""Answers written to hurt: each gets a verdict that is counted, and none holds up or ends anything else."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capo_exp.grading.compare import STYLES, can_read_gold, grade, grade_any
from capo_exp.grading.extract import find_last_box
from tests.grading_pieces import math_verifier

REASONS = {"correct", "wrong", "no_answer", "gold_unparsable", "error", "timeout", "crash"}
RIGHT = r"\boxed{7}"


def box(content):
    return f"\\boxed{{{content}}}"


HEAVY = {"power tower": box("9^{9^{9^{9}}}"), "factorial of factorials": box("((20!)!)!")}
"""May run into the limit."""

LIGHT = {
    "100,000 digits": box("7" * 100_000),
    "deep braces": box("{" * 5_000 + "7" + "}" * 5_000),
    "deep fractions": box(r"\frac{1}{1+" * 300 + "x" + "}" * 300),
    "2 MB in a box": box("x" * 2_000_000),
    "2 MB of unclosed boxes": "\\boxed{" * 300_000,
    "2 MB of braces": "\\boxed{" + "{}" * 1_000_000,
    "2 MB of backslashes": "\\boxed{" + "\\" * 2_000_000,
    "huge matrix": box(r"\begin{pmatrix}" + r"\\".join(["&".join("1" * 30)] * 30) + r"\end{pmatrix}"),
    "long sum": box("+".join(["x"] * 1_000)),
    "endless sum": box(r"\sum_{n=1}^{\infty} \frac{1}{n^2}"),
    "division by zero": box(r"\frac{7}{0}"),
    "0^0": box("0^0"),
    "infinity minus itself": box(r"\infty - \infty"),
    "control characters": box("\x01\x02\x1b[31m7\x7f"),
    "NUL": box("7\x00"),
    "lone surrogate": box("\ud800"),
    "surrogate beside a box": "\udfff" + box("8"),
    "right to left": "\u202e" + box("\u06f7\u200f"),
    "full-width digits": box("\uff18"),
    "combining marks": box("7" + "\u0301" * 5_000),
    "unclosed box": r"so \boxed{8",
    "empty box": box(""),
    "box of a box": box(box(box("8"))),
    "only a percent sign": box("%"),
    "broken fraction": box(r"\frac{7}"),
    "unknown command": box(r"\frobnicate{7}{8}"),
    "half of an environment": box(r"\begin{cases} 7"),
    "reversed interval": box("(9, 2]"),
    "percent": box(r"70\%"),
    "units": box(r"8 \text{ cm}^3"),
    "two answers": box(r"x = 7 \text{ or } x = 8"),
    "Python": box("__import__('os').system('exit 1')"),
    "lambda": box("(lambda f: f(f))(lambda f: f(f))"),
    "answer is, endlessly": "the answer is " * 20_000,
    "1e400": box("1e400"),
    "big exponent": box("10^{100000}"),
    "a million roots": box(r"\sqrt{" * 400 + "7" + "}" * 400),
    "comparisons": box("1 < 2 < 3 < x < 7 \\le y"),
}
"""None of them is 7; but for a machine that is busy, none needs long."""

NASTY_GOLDS = ["", " ", "$", "$$", "\x00", "\ud800", r"\frac{", "}", r"\boxed{", "?", "\U0001f937", "0/0"]


@pytest.fixture(scope="module")
def verifier():
    with math_verifier(timeout_seconds=1.0, workers=2, memory_limit_gib=2.0) as shared:
        yield shared


@pytest.mark.slow
def test_every_answer_gets_a_verdict_and_the_right_ones_stay_right(verifier):
    """A right answer between any two."""
    nasty = {**HEAVY, **LIGHT}
    texts = [text for content in nasty.values() for text in (RIGHT, content)]
    result = verifier.score([texts, [RIGHT]], [("7",), ("9^{9^{9^{9}}}",)])
    verdicts, (heavy,) = result.grades
    assert all(verdict.correct for verdict in verdicts[::2])
    for name, verdict in zip(nasty, verdicts[1::2], strict=True):
        assert verdict.reason in REASONS and not verdict.correct, (name, verdict.reason)
    assert verdicts[1].reason == "timeout", "power tower"
    assert heavy.reason in REASONS and not heavy.correct
    bad = result.metrics["reward/timeouts"] + result.metrics["reward/crashes"]
    assert bad == sum(verdict.reason in ("timeout", "crash", "error") for verdict in (*verdicts, heavy))


def test_nasty_golds_are_read_or_counted(verifier):
    golds = [(gold,) for gold in NASTY_GOLDS]
    readable = verifier.gradable(golds)
    result = verifier.score([[RIGHT, "no answer at all"]] * len(golds), golds)
    for can, verdicts in zip(readable, result.grades, strict=True):
        assert all(verdict.reason in REASONS and not verdict.correct for verdict in verdicts)
        assert can == (verdicts[0].reason != "gold_unparsable")
    assert not any(readable[:4])


def test_nothing_but_the_answer_is_executed(tmp_path, monkeypatch):
    """sympy's parser evaluates Python; no text may reach it as such."""
    monkeypatch.chdir(tmp_path)
    code = "__import__('pathlib').Path('mark').touch()"
    for text in (code, box(code), f"The answer is {code}", f"#### {code}", f"A: {code}", f"${code}$"):
        for style in STYLES:
            grade(text, "7", style)
            grade(RIGHT, text, style)
    assert not list(tmp_path.iterdir())


PIECES = (
    "\\boxed{", "{", "}", "\\frac", "\\sqrt", "\\left(", "\\right)", "\\text{", "$", "\\(", "\\)", "\\[",
    "\\]", "_", "\\%", "%", ",", "or", " and ", "=", "<", "\\le", "\\cup", "\\pm", "\\infty", "(", ")", "[",
    "]", "x", "#### ", "answer is ", "Final Answer: ", "\\begin{pmatrix}", "\\end{pmatrix}", "&", "\\\\",
    "\\", "i", "pi", "\\pi", "1", "25", "0.5", "-", "+", "/", " ", "\n", "\x00", "\ud800", "\u202e", "\u0667",
)  # fmt: skip
SHAPES = (
    "%s+%s", "%s-%s", "%s/%s", "%s %s", "%s,%s", "(%s,%s)", "[%s,%s)", "\\{%s,%s\\}", "%s=%s", "%s<%s",
    "%s\\cup%s", "%s \\text{ or } %s", "\\frac{%s}{%s}", "\\sqrt[%s]{%s}", "%s\\%%, %s", "\\text{%s}%s",
    "\\begin{pmatrix}%s\\\\%s\\end{pmatrix}", "\\sin(%s)\\cdot %s", "\\pm %s %s", "\\left(%s\\right]%s",
    "%s_{%s}", "|%s| \\ge %s",
)  # fmt: skip
ATOMS = st.sampled_from(
    ("1", "-2", "0", "25", "0.5", "x", "y", "\\pi", "\\infty", "i", "", "1,000", "\\emptyset")
)


def joined(inner):
    return st.tuples(st.sampled_from(SHAPES), inner, inner).map(lambda parts: parts[0] % parts[1:])


FORMULAS = st.recursive(ATOMS, joined, max_leaves=6)
SENTENCES = FORMULAS.map(lambda text: f"the final answer is ${text}$. I hope it is correct")
TEXTS = st.one_of(FORMULAS.map(box), SENTENCES, st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
"""Formulas in boxes and in sentences, and pieces of LaTeX in any order."""


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=TEXTS, gold=FORMULAS, style=st.sampled_from(STYLES))
def test_grade_never_raises_and_says_the_same_twice(text, gold, style):
    first = grade(text, gold, style)
    assert first.reason in REASONS and first == grade(text, gold, style)
    assert first.correct == (first.reason == "correct")
    assert can_read_gold(gold) == (first.reason != "gold_unparsable") or first.reason == "error"
    assert grade_any(text, (gold, gold), style) == first
    find_last_box(text)
