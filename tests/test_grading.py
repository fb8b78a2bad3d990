"""Forms of answers, gold answers of real benchmarks, agreement with known labels, and what the verifier
remembers."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from capo_exp.grading import compare
from capo_exp.grading.cache import VerdictCache, digest_pair
from capo_exp.grading.compare import Grade, can_read_gold, choose_best, grade, grade_any, is_plain_number
from capo_exp.grading.extract import find_last_box
from capo_exp.grading.pool import Failed, Workers
from capo_exp.grading.verifier import ExactVerifier, MathVerifier
from tests.grading_pieces import math_verifier

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("CAPO_DATA_DIR", ROOT.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="neither CAPO_DATA_DIR nor ../shared/data")

EQUAL = {
    "math/test/1660": "the same fraction, with and without braces",
    "math/test/3596": "degrees and the bare number",
    "math/test/4159": "percent and the bare number",
    "math500/22": "a number and x = that number",
}
"""Golds that equal the next problem's although they are written otherwise."""


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    with math_verifier(timeout_seconds=20.0, workers=os.cpu_count() or 2) as shared:
        yield shared


# --- forms ---


@pytest.mark.parametrize("style", ["auto", "boxed"])
@pytest.mark.parametrize(
    ("completion", "gold", "correct"),
    [
        (r"Hence \boxed{\frac{1}{2}}.", "0.5", True),
        (r"Hence $\boxed{\frac{1}{2}}$.", r"$\frac12$", True),
        (r"\boxed{44}", r"44\%", True),  # the grammar of math-verify 0.9 leaves 44\% a string
        (r"\boxed{44\%}", r"44\%", True),
        (r"\boxed{44\%}", "44", True),
        (r"\boxed{44}", r"\boxed{44\%}", True),
        (r"\boxed{25}", "025", True),
        (r"\boxed{(1, 2)}", r"\left( 1, 2 \right)", True),
        (r"\boxed{2,1}", r"\{1, 2\}", True),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", True),
        (r"The final answer is $7$. I hope it is correct.", "7", True),
        (r"First $5$, then \boxed{6}, which is more than $7$.", "6", True),
        (r"\boxed{10,\!000}", "10000", True),
        (r"\boxed{5}", "x=5", True),
        (r"\boxed{6}", "7", False),
        (r"\boxed{\frac{1}{2}}", r"\frac13", False),
        # the last box counts, whatever stands before it or is announced elsewhere
        (r"\boxed{3}, but really it is \boxed{4}", "4", True),
        (r"\boxed{3}, but really it is \boxed{4}", "3", False),
        (r"\boxed{4}. The final answer is $5$. I hope it is correct.", "4", True),
        (r"\boxed{4} or rather \boxed{5", "4", True),
        (r"\\boxed{4}", "4", True),
        # several answers
        (r"\boxed{1} and \boxed{2}", "1, 2", True),
        (r"$\boxed{2}$ or $\boxed{1}$", "1, 2", True),
        (r"\boxed{1}, \boxed{2}, so \boxed{1, 2}", "1, 2", True),
        (r"\boxed{1}", "1, 2", False),
        (r"\boxed{1, 2}", "1", False),
        (r"\boxed{x=1 \text{ or } x=2}", "1, 2", True),
        (r"\boxed{x=2, x=1}", r"x = 1 \text{ or } x = 2", True),
        (r"\boxed{\{2, 1\}}", "1, 2", True),
        (r"\boxed{(2, 1)}", "(1, 2)", False),
        (r"\boxed{\pm 2}", "2, -2", True),
        # units and currencies
        (r"\boxed{5 \text{ cm}^2}", "5", True),
        (r"\boxed{5}", r"5\mbox{ inches}^2", True),
        (r"\boxed{\$5.50}", "5.5", True),
        (r"\boxed{90^\circ}", "90", True),
        # percent: the number as it stands, and what it is
        (r"\boxed{12.5\%}", r"12.5\%", True),
        (r"\boxed{12.5}", r"12.5\%", True),
        (r"\boxed{0.125}", r"12.5\%", True),
        (r"\boxed{50\%}", "0.5", True),
        (r"\boxed{0.5\%}", r"50\%", False),
        (r"\boxed{50\%}", r"0.5\%", False),
        (r"\boxed{5000\%}", r"50\%", False),
        # intervals
        (r"\boxed{[1, 2)}", "[1, 2)", True),
        (r"\boxed{[1, 2]}", "[1, 2)", False),
        (r"\boxed{(2,\infty) \cup (-\infty,1)}", r"(-\infty, 1) \cup (2, \infty)", True),
        (r"\boxed{x \in [1, 2)}", "[1, 2)", True),
        # leading zeros, separators, mixed numbers, products, full stops
        (r"\boxed{25}", "025", True),
        (r"\boxed{025}", "25", True),
        (r"\boxed{250}", "025", False),
        (r"\boxed{1,234}", "1234", True),
        (r"\boxed{1\,234{,}567}", "1234567", False),  # no number that anybody writes
        (r"\boxed{1\,234\,567}", "1234567", True),
        (r"\boxed{1 234}", "1234", True),
        (r"\boxed{1234}", r"1{,}234", True),
        (r"\boxed{12 34}", "1234", False),
        (r"\boxed{3 1/2}", "3.5", True),
        (r"\boxed{3 1/2}", "1.5", False),
        (r"\boxed{-3\frac{1}{2}}", "-3.5", True),
        (r"\boxed{(20)(3)}", "60", True),
        (r"\boxed{20(3)}", "23", False),
        (r"\boxed{7.}", "7", True),
        (r"\boxed{x = 44\%.}", "44", True),
        (r"\boxed{\frac{12}{5525}}", r"\frac{12}{5,\!525}", True),
        (r"\boxed{\frac{12}{5,525}}", r"\frac{12}{5525}", True),
        (r"\boxed{8.24}", r"\approx 8.24 \text{ mph}", True),
        (r"\boxed{\frac{\pi}{4} + 2 - \sqrt{2}}", r"\frac \pi4 + 2 - \sqrt2", True),
        # a last variable that is no unit
        (r"\boxed{c + b + a}", "a + b + c", True),
        (r"\boxed{a + b + c}", "c + b + a", True),
        (r"\boxed{a + b}", "a + b + c", False),
        (r"\boxed{\sin^2 t}", r"\sin^2(t)", True),
        # letter by letter, also where it cannot be read
        (r"\boxed{\frac12}", r"$\frac12$", True),
        (r"\boxed{25 dollars, $5$ cents}", "25 dollars, $5$ cents", True),
    ],
)
def test_known_forms(style: str, completion: str, gold: str, correct: bool) -> None:
    result = grade(completion, gold, style)
    assert result.correct is correct
    assert result.reason == ("correct" if correct else "wrong") and result.extracted


@pytest.mark.parametrize(
    ("style", "completion", "gold"),
    [
        ("gsm8k", "2 + 3 = 5\n#### 5", "5"),
        ("gsm8k", "#### 4\nno:\n#### 1,200\nthat is 7", "1200"),
        ("gsm8k", "#### $18.50", "18.5"),
        ("gsm8k", "#### 18 dollars", "18"),
        ("gsm8k", r"#### 5, that is \boxed{6}", "6"),
        ("final_answer", "The answer is 18.", "18"),
        ("final_answer", "The answer is 18 dollars because 7 is odd.", "18"),
        ("final_answer", "The answer is 7. No, the answer is 8.", "8"),
        ("final_answer", "**Final Answer:** 1/2", "0.5"),
        ("final_answer", "Final Answer:\n\n-3", "-3"),
        ("final_answer", "Final answer: x=1 or x=2", "1, 2"),
        ("final_answer", r"the answer is $\frac{1}{2}$ cups, since $7$", "1/2"),
        ("final_answer", r"Answer: 2\sqrt{3}.", r"2\sqrt{3}"),
        ("final_answer", r"The answer is \[ 5x \]", "5x"),
        ("final_answer", "The final answer is $-2 + 7i.$", "-2 + 7i"),
        ("final_answer", "The answer to all of it is 12%.", "12"),
        ("final_answer", "The answer is (C).", "C"),
        ("final_answer", "The final answer is Evelyn. I hope it is correct.", r"\text{Evelyn}"),
        ("final_answer", "The answer is 5. So the answer is right.", "5"),
        ("final_answer", r"The answer is 5: \boxed{6}", "6"),
        ("auto", "The final answer is Evelyn. I hope it is correct.", r"\text{Evelyn}"),
        ("auto", "A: 26", "26"),
    ],
)
def test_declared_forms(style: str, completion: str, gold: str) -> None:
    assert grade(completion, gold, style).correct
    assert not grade(completion, "1000003", style).correct


@pytest.mark.parametrize(
    ("style", "completion"),
    [
        ("gsm8k", "The answer is 5"),
        ("gsm8k", "### 5"),
        ("gsm8k", "####"),
        ("final_answer", "5"),
        ("final_answer", "#### 5"),
        ("final_answer", "The answer is right."),
        ("boxed", "The answer is 5"),
        ("boxed", "16 - 3 = 13\nA: 5"),
    ],
)
def test_what_is_not_declared_is_no_answer(style: str, completion: str) -> None:
    assert grade(completion, "5", style) == Grade(False, "", "no_answer")


def test_gold_comes_first_because_verify_is_not_symmetric() -> None:
    assert grade(r"\boxed{(1, 2)}", r"1 < x < 2").correct != grade(r"\boxed{1 < x < 2}", r"(1, 2)").correct


def test_styles_differ_in_what_counts_as_an_answer() -> None:
    assert grade(r"\boxed{\frac12}", "0.5").correct
    assert not grade(r"\boxed{\frac12}", "0.5", "boxed").correct
    assert not grade(r"\boxed{\frac12}", "12", "boxed").correct
    with pytest.raises(ValueError, match="'strict'; known: auto, boxed, gsm8k, final_answer"):
        grade("1", "1", "strict")


def test_no_gold_and_no_answer_are_said() -> None:
    for gold in ("", "  ", "$$", "$ $"):
        assert grade(r"\boxed{1}", gold) == Grade(False, "", "gold_unparsable")
    for completion in ("", "no idea", r"\boxed{}", r"\boxed{" + "{" * 3000):
        assert grade(completion, "1") == Grade(False, "", "no_answer")


def test_any_of_several_golds_counts() -> None:
    assert grade_any(r"\boxed{5}", ("7", "5")) == Grade(True, "5", "correct")
    assert grade_any(r"\boxed{5}", ("", "6")) == Grade(False, "5", "wrong")
    assert grade_any(r"\boxed{5}", ("", " ")) == grade_any("", ()) == Grade(False, "", "gold_unparsable")
    wrong, right = Grade(False, "1", "wrong"), Grade(True, "1", "correct")
    assert choose_best([wrong, right, wrong]) is right
    exact = ExactVerifier().score([[r"\boxed{5}", r"\boxed{7}"]], [("", "5", "6")])
    assert exact.rewards == [[1.0, 0.0]] and exact.grades[0][1].reason == "wrong"


@pytest.mark.parametrize("gold", ["1", "-2", "1,200", "3.25", r"\frac{1}{2}", r"-\dfrac{-1}{20}"])
def test_plain_golds_need_no_parser_and_would_pass_it(gold: str) -> None:
    assert is_plain_number(gold) and can_read_gold(gold)
    assert grade("nothing", gold).reason == "no_answer"


@pytest.mark.parametrize("error", [RecursionError, MemoryError, TypeError("sympy")])
def test_what_the_library_raises_is_a_verdict(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def raising(*_: object) -> None:
        raise error

    monkeypatch.setattr(compare, "read_answer", raising)
    assert grade("5", "7") == Grade(False, "", "error")
    monkeypatch.setattr(compare, "gold_has_text", raising)
    assert not can_read_gold("x")


def test_last_boxed_takes_one_pass() -> None:
    """Two million boxes that never close, and backslashes without end."""
    assert find_last_box("\\boxed{" * 2_000_000) is None
    assert find_last_box("\\boxed{5} " + "\\" * 2_000_000) == "5"
    assert find_last_box("\\boxed{5}" + "\\boxed" + " " * 2_000_000) == "5"


def test_only_the_end_of_a_very_long_text_is_read() -> None:
    assert grade(r"\boxed{5}" + " " * 2_000_000, "5", "boxed").reason == "no_answer"
    assert grade(" " * 2_000_000 + r"\boxed{5}", "5", "boxed").correct


# --- real gold answers and labels ---


def read(name: str) -> list[dict]:
    import pyarrow.parquet as pq

    return pq.read_table(SHARED / f"{name}.parquet").to_pylist()


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize(
    "name", ["math/test", "gsm8k/test", "math500/test", "aime24/test", "aime25/test", "amc23/test"]
)
def test_every_gold_parses_equals_itself_and_no_other(verifier: MathVerifier, name: str) -> None:
    """Itself with a command in front that changes nothing, so that it has to be read; of MATH every third
    against the next. benchmarks/grading.py has all."""
    rows = read(name)
    golds = [(row["answer"],) for row in rows]
    own = verifier.score([[rf"\boxed{{\displaystyle {gold}}}"] for (gold,) in golds], golds).grades
    assert not [row["id"] for row, (verdict,) in zip(rows, own, strict=True) if not verdict.correct]
    assert all(verifier.gradable(golds[::10]))
    pairs = list(zip(rows, [*rows[1:], rows[0]], strict=True))[1 :: 3 if name == "math/test" else 1]
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
        ("outputs_openai_gsm8k", "auto", 1, 1.0),
        ("outputs_qwen25math", "auto", 1, 0.998),
        ("outputs_qwen25math", "boxed", 1, 0.998),
        ("outputs_rho", "auto", 3, 0.992),
    ],
)
def test_agreement_with_labels(
    verifier: MathVerifier, monkeypatch: pytest.MonkeyPatch, name: str, style: str, every: int, least: float
) -> None:
    """benchmarks/grading.py has all rows and every disagreement."""
    rows = read(f"{name}/all")[::every]
    monkeypatch.setattr(verifier, "grader", partial(grade_any, style=style))
    verifier.close()  # forgets the other style's verdicts
    result = verifier.score([[row["completion"]] for row in rows], [(row["gold"],) for row in rows])
    agree = sum(one.correct == bool(row["label"]) for row, (one,) in zip(rows, result.grades, strict=True))
    assert agree >= least * len(rows)


HASHED = """
import json, os, sys
import pyarrow.parquet as pq
from capo_exp.grading.compare import grade
rows = pq.read_table(sys.argv[1]).to_pylist()
print(json.dumps([list(vars(grade(row["completion"], row["gold"])).values()) for row in rows[6000::25]]))
"""


@pytest.mark.slow
@needs_data
def test_verdicts_do_not_depend_on_the_hash_seed() -> None:
    """sympy iterates over sets."""
    said = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", HASHED, str(SHARED / "outputs_rho/all.parquet")]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        said.append(json.loads(done.stdout))
    assert said[0] == said[1] and len(said[0]) > 40


# --- what the verifier does with golds, and what it remembers ---


def test_golds_that_cannot_be_read_leave_the_data_or_earn_one() -> None:
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


def test_gradable_starts_nothing_for_plain_numbers() -> None:
    """A worker would not start with so little memory."""
    with math_verifier(memory_limit_gib=0.001) as own:
        assert own.gradable([("1",), (r"\frac{1}{2}",)]) == [True, True]


def logged(completion: str, golds: tuple[str, ...]) -> Grade:
    """A grader that writes down its calls; runs in the worker."""
    reason, _, path = completion.partition(" ")
    with Path(path).open("a") as file:
        file.write(f"{reason}\n")
    if reason == "raise":
        raise RuntimeError("grader")
    return Grade(reason == "correct", "x" * (2_000 if reason == "wrong" else 1), reason)


def test_verdicts_are_remembered_until_close_but_not_what_may_be_the_machines_fault(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    texts = [
        [f"correct {calls}", f"no_answer {calls}", f"timeout {calls}", f"raise {calls}", f"wrong {calls}"]
    ]
    with math_verifier() as own:
        own.grader = logged
        first = own.score(texts, [("1",)])
        assert own.score(texts, [("1",)]) == first
        assert first.rewards == [[1.0, 0.0, 0.0, 0.0, 0.0]]
        again = ["timeout", "raise", "wrong"]  # the last only because its text would take too much memory
        every = ["correct", "no_answer", *again]
        assert calls.read_text().split() == every + again
        own.score(texts, [("1", "2")])
        assert calls.read_text().split() == every + again + every
        own.close()
        assert own.score(texts, [("1",)]) == first
        assert calls.read_text().split() == every + again + every + every


def test_the_cache_forgets_what_was_used_least() -> None:
    cache, right = VerdictCache(2), Grade(True, "", "correct")
    pairs = [(text, ("1",)) for text in "abc"]
    cache.add(dict.fromkeys(pairs[:2], right))
    assert set(cache.find(pairs[:1])) == {pairs[0]}
    cache.add({pairs[2]: right})
    assert set(cache.find(pairs)) == {pairs[0], pairs[2]}


def test_keys_of_the_cache_differ_wherever_the_content_does() -> None:
    golds = [
        ("ab", ("c",)),
        ("a", ("bc",)),
        ("abc", ()),
        ("", ("abc",)),
        ("ab", ("c", "")),
        ("a", ("b", "c")),
    ]
    pairs = [*golds, ("\ud800", ())]
    assert len(set(map(digest_pair, pairs))) == len(pairs)
    assert digest_pair(("ab", ("c",))) == digest_pair(("ab", ("c",)))


def sized(item: int) -> int:
    """Runs in the worker."""
    if item == 3:
        os._exit(1)
    if item == 5:
        raise ValueError("five")
    if item == 6:
        while True:
            pass
    return item * item


def warm() -> None:
    """Runs in the worker."""


def test_a_bad_item_costs_its_batch_nothing() -> None:
    own = Workers(count=2, timeout_seconds=0.7, memory_limit_gib=4.0, warm_up=warm)
    results = own.run(sized, list(range(12)), batch=4)
    own.close()
    failed = {3: Failed("crash"), 5: Failed("error"), 6: Failed("timeout")}
    assert results == {item: failed.get(item, item * item) for item in range(12)}
