"""Pairs of gold and answer, real gold answers and labels, and what the verifier remembers."""

import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from capo_exp.grading import compare
from capo_exp.grading.compare import (
    Grade,
    can_read_gold,
    choose_best,
    grade,
    grade_any,
    is_plain_number,
    last_number_match,
)
from capo_exp.grading.extract import find_last_box
from capo_exp.grading.pool import Failed, Workers
from capo_exp.grading.spelling import RULES, spell
from capo_exp.grading.verifier import ExactVerifier
from tests.grading_pieces import SHARED, math_verifier, needs_data
from tests.process_pieces import wait_for

ROOT = Path(__file__).resolve().parent.parent

EQUAL = {
    "math/test/1660": "the same fraction, with and without braces",
    "math500/22": "a number and x = that number",
}
"""Golds that equal the next problem's although they are written otherwise."""


@pytest.fixture(scope="module")
def verifier():
    with math_verifier(timeout_seconds=20.0, workers=os.cpu_count() or 2) as shared:
        yield shared


def pairs(half, style):
    """Yields completion, gold, and whether it is right, of what a style can read."""
    text = (ROOT / "tests/answer_pairs.txt").read_text(encoding="utf-8")
    kind = ""
    for line in text.split("\n== ")[half].splitlines():
        gold, *rest = re.split(r" ([~!]) ", line)
        if not rest or gold.startswith("#"):
            kind = line.strip("[]")
            continue
        whole = kind in ("text", "gsm8k", "final_answer")  # else in a box
        if style == {"text": "auto"}.get(kind, kind) or (not whole and style in ("auto", "boxed")):
            for mark, answer in zip(rest[::2], rest[1::2], strict=True):
                boxed = rf"So the answer is \boxed{{{answer}}}."
                yield answer.replace("⏎", "\n") if whole else boxed, gold, mark == "~"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("half", "style", "count", "least"),
    [(0, "auto", 350, 0.99), (0, "gsm8k", 10, 1.0), (0, "final_answer", 20, 1.0), (1, "boxed", 230, 0.95)],
)
def test_pairs(half, style, count, least):
    """The second half was written with the first and not looked at while the rules were made."""
    asked = list(pairs(half, style))
    assert len(asked) >= count
    said = [(right, grade(text, gold, style), text, gold) for text, gold, right in asked]
    assert [each for right, *each in said if each[0].correct and not right] == []
    missed = [each for right, *each in said if right and not each[0].correct]
    assert len(missed) <= (1 - least) * sum(right for _, _, right in asked), missed


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [("It is 1,234.", "1,234", True), ("so 5.0", "5", True), ("\u22125", "-5", True), ("\u22125", "5", False),
     ("5.5", "5", False), ("94 + 85", "179", False), ("94 + 85 = 179", "179", True)],
)  # fmt: skip
def test_the_last_number_is_compared_as_it_is_written(text, gold, right):
    assert last_number_match(text, gold).correct is right


def test_each_rule_does_what_its_example_says():
    for rule in RULES:
        assert re.sub(rule.pattern, rule.written, rule.example) == rule.becomes, rule
        assert spell(rule.becomes) == spell(rule.example), rule


def test_what_is_not_declared_is_no_answer():
    for style, completion in (("gsm8k", "The answer is 5"), ("final_answer", "#### 5"), ("boxed", "A: 5")):
        assert grade(completion, "5", style) == Grade(False, "", "no_answer"), style


def test_styles_differ_in_what_counts_as_an_answer():
    assert grade(r"\boxed{\frac12}", "0.5") == Grade(True, r"\frac12", "correct")
    assert not grade(r"\boxed{\frac12}", "0.5", "boxed").correct
    assert not grade(r"\boxed{\frac12}", "12", "boxed").correct
    with pytest.raises(ValueError, match="'strict'; known: auto, boxed, gsm8k, final_answer"):
        grade("1", "1", "strict")


def test_no_gold_and_no_answer_are_said():
    for gold in ("", "  ", "$$", "$ $"):
        assert grade(r"\boxed{1}", gold) == Grade(False, "", "gold_unparsable")
    for completion in ("", "no idea", r"\boxed{}", r"\boxed{" + "{" * 3000):
        assert grade(completion, "1") == Grade(False, "", "no_answer")


def test_any_of_several_golds_counts():
    assert grade_any(r"\boxed{5}", ("7", "5")) == Grade(True, "5", "correct")
    assert grade_any(r"\boxed{5}", ("", "6")) == Grade(False, "5", "wrong")
    assert grade_any(r"\boxed{5}", ("", " ")) == grade_any("", ()) == Grade(False, "", "gold_unparsable")
    wrong, right = Grade(False, "1", "wrong"), Grade(True, "1", "correct")
    assert choose_best([wrong, right, wrong]) is right
    exact = ExactVerifier().score([[r"\boxed{5}", r"\boxed{7}"]], [("", "5", "6")])
    assert exact.rewards == [[1.0, 0.0]] and exact.grades[0][1].reason == "wrong"


def test_plain_golds_need_no_parser_and_would_pass_it():
    for gold in ("1", "-2", "1,200", "3.25", r"\frac{1}{2}", r"-\dfrac{-1}{20}"):
        assert is_plain_number(gold) and can_read_gold(gold)
        assert grade("nothing", gold).reason == "no_answer"


@pytest.mark.parametrize("error", [RecursionError, TypeError("sympy")])
def test_what_the_library_raises_is_a_verdict(monkeypatch, error):
    def raising(*_):
        raise error

    monkeypatch.setattr(compare, "read_answer", raising)
    assert grade("5", "7") == Grade(False, "", "error")
    monkeypatch.setattr(compare, "read_gold", raising)
    assert not can_read_gold("x")


@pytest.mark.slow
def test_last_boxed_takes_one_pass_and_only_the_end_of_a_very_long_text_is_read():
    """Two million boxes that never close, and backslashes without end."""
    assert find_last_box("\\boxed{" * 2_000_000) is None
    assert find_last_box("\\boxed{5} " + "\\" * 2_000_000) == "5"
    assert find_last_box("\\boxed{5}" + "\\boxed" + " " * 2_000_000) == "5"
    assert grade(r"\boxed{5}" + " " * 2_000_000, "5", "boxed").reason == "no_answer"
    assert grade(" " * 2_000_000 + r"\boxed{5}", "5", "boxed").correct


def read(name):
    import pyarrow.parquet as pq

    return pq.read_table(SHARED / f"{name}.parquet").to_pylist()


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", ["math/test", "gsm8k/test", "math500/test", "amc23/test"])
def test_every_gold_parses_equals_itself_and_no_other(verifier, name):
    """Itself behind a command that changes nothing, so that it is read; of large sets a sample."""
    rows = read(name)
    some = rows[:: 9 if len(rows) > 1000 else 1]
    golds = [(row["answer"],) for row in some]
    own = verifier.score([[rf"\boxed{{\displaystyle {gold}}}"] for (gold,) in golds], golds).grades
    assert not [row["id"] for row, (verdict,) in zip(some, own, strict=True) if not verdict.correct]
    assert all(verifier.gradable(golds[::10]))
    pairs = list(zip(rows, [*rows[1:], rows[0]], strict=True))[4 :: 9 if len(rows) > 1000 else 1]
    texts = [[rf"\boxed{{{other['answer']}}}"] for _, other in pairs]
    found = verifier.score(texts, [(row["answer"],) for row, _ in pairs])
    equal = {
        row["id"]
        for (row, other), (verdict,) in zip(pairs, found.grades, strict=True)
        if verdict.correct and row["answer"] != other["answer"]
    }
    assert equal == set(EQUAL) & {row["id"] for row, _ in pairs}


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize(
    ("name", "style", "every", "least"),
    [
        ("outputs_openai_gsm8k", "auto", 7, 1.0),
        ("outputs_qwen25math", "auto", 7, 0.995),
        ("outputs_rho", "auto", 21, 0.99),
    ],
)
def test_agreement_with_labels(verifier, monkeypatch, name, style, every, least):
    """benchmarks/grading.py has all rows and every disagreement."""
    rows = read(f"{name}/all")[::every]
    monkeypatch.setattr(verifier, "grader", partial(grade_any, style=style))
    verifier.close()  # forgets the other style's verdicts
    result = verifier.score([[row["completion"]] for row in rows], [(row["gold"],) for row in rows])
    agree = sum(one.correct == bool(row["label"]) for row, (one,) in zip(rows, result.grades, strict=True))
    assert agree >= least * len(rows)


@pytest.mark.slow
def test_golds_that_cannot_be_read_leave_the_data_or_earn_one():
    golds = [("7",), (" ",), ("", "1/2"), (r"\text{Evelyn}",), ()]
    texts = [[r"\boxed{7}", "none"]] * len(golds)
    for policy, gradable, unread in (
        ("drop", [True, False, True, True, False], 0.0),
        ("one", [True] * 5, 1.0),
    ):
        with math_verifier(unparsable_gold=policy) as own:
            assert own.gradable(golds) == gradable
            result = own.score(texts, golds)
        assert result.rewards == [[1.0, 0.0], [unread] * 2, [0.0] * 2, [0.0] * 2, [unread] * 2]
        assert [one.correct for row in result.grades for one in row] == [True] + [False] * 9
        assert result.metrics["reward/gold_unparsable"] == 4
    assert ExactVerifier().gradable([("7",), (" ",), ("", "x"), ()]) == [True, False, True, False]


def logged(completion, golds):
    """A grader that writes down its calls; runs in the worker."""
    reason, _, path = completion.partition(" ")
    with Path(path).open("a") as file:
        file.write(f"{reason}\n")
    if reason == "raise":
        raise RuntimeError("grader")
    return Grade(reason == "correct", "x" * (2_000 if reason == "wrong" else 1), reason)


@pytest.mark.slow
def test_verdicts_are_remembered_until_close_but_not_what_may_be_the_machines_fault(tmp_path):
    calls = tmp_path / "calls"
    texts = [[f"{reason} {calls}" for reason in ("correct", "no_answer", "timeout", "raise", "wrong")]]
    again = ["timeout", "raise", "wrong"]  # the last only because its text would take too much memory
    every = Counter(["correct", "no_answer", *again])
    with math_verifier() as own:
        own.grader = logged
        first = own.score(texts, [("1",)])
        assert own.score(texts, [("1",)]) == first
        assert first.rewards == [[1.0, 0.0, 0.0, 0.0, 0.0]]
        assert Counter(calls.read_text().split()) == every + Counter(again)
        own.score(texts, [("1", "2")])
        own.close()
        assert own.score(texts, [("1",)]) == first
        assert Counter(calls.read_text().split()) == every + every + every + Counter(again)


def sized(item):
    """Runs in the worker."""
    if item == 3:
        os._exit(1)
    if item == 5:
        raise ValueError("five")
    while item == 6:
        pass
    return item * item


def warm():
    """Runs in the worker."""


def fork_and_wait(end):
    """Runs in the worker, whose pipe the second process keeps open."""
    second = os.fork() == 0
    wait_for(Path(end).exists)
    if second:
        os._exit(0)


def test_a_silent_worker_that_has_forked_ends(tmp_path):
    own = Workers(count=1, cpu_seconds=0.1, memory_limit_gib=4.0, warm_up=warm, silent_seconds=8.0)
    item = (str(tmp_path / "end"),)
    with ThreadPoolExecutor(1) as thread:
        grading = thread.submit(own.run, fork_and_wait, [item])
        try:
            assert grading.result(timeout=60) == {item: Failed("timeout")}
        finally:
            Path(*item).touch()
            own.close()


def test_a_bad_item_costs_its_batch_nothing():
    own = Workers(count=1, cpu_seconds=0.7, memory_limit_gib=4.0, warm_up=warm)
    results = own.run(sized, [(item,) for item in range(40)])
    own.close()
    failed = {3: "crash", 5: "error", 6: "timeout"}
    reasons = {item: each.reason for (item,), each in results.items() if isinstance(each, Failed)}
    assert reasons == failed and results[(5,)].detail == "ValueError: five"
    assert all(results[(item,)] == item * item for item in range(40) if item not in failed)
