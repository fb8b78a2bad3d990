"""Which samples count as the same answer, without the gold's help."""

from capo_exp.evaluation.majority import MAX_COMPARED, number_answers
from capo_exp.grading.compare import exact_match, grade
from capo_exp.grading.verifier import RewardResult


class Judge:
    """A verifier in this process that keeps what it was asked."""

    def __init__(self, decide):
        self.decide, self.calls = decide, []

    def score(self, completions, golds):
        self.calls.append(
            [(text, gold) for group, gold in zip(completions, golds, strict=True) for text in group]
        )
        grades = [
            [self.decide(text, gold[0]) for text in group]
            for group, gold in zip(completions, golds, strict=True)
        ]
        return RewardResult([[float(g.correct) for g in group] for group in grades], {}, grades)


def test_equal_answers_written_otherwise_are_one_class():
    answers = [[r"\frac{1}{2}", "0.5", "2", "1/2", "", "2.0"], ["x", "y", "x"], ["", ""]]
    assert number_answers(answers, Judge(grade)) == [[0, 0, 1, 0, -1, 1], [0, 1, 0], [-1, -1]]


def test_by_text_where_the_verifier_compares_texts():
    assert number_answers([["x/2", "0.5x", " x/2 "]], Judge(exact_match)) == [[0, 1, 0]]


def test_numbers_need_no_verifier():
    judge = Judge(grade)
    assert number_answers([["1/2", "0.5", "1,000", "1000.0", "1/0", "7"]], judge) == [[0, 0, 1, 1, 2, 3]]
    assert {text for call in judge.calls for text, _ in call} == {r"\boxed{1/0}", r"\boxed{7}"}


def test_a_list_and_a_number_of_gigabytes_are_for_the_verifier():
    judge = Judge(exact_match)
    assert number_answers([["1,2", "12", "1e999999999", "7"]], judge) == [[0, 1, 2, 3]]
    assert (r"\boxed{1e999999999}", ("12",)) in judge.calls[1]


def test_one_call_a_round_for_all_problems():
    judge = Judge(exact_match)
    number_answers([["a", "b", "c"], ["a", "a"], ["d", "e"]], judge)
    assert [len(call) for call in judge.calls] == [3, 1, 0]


def test_long_answers_are_compared_as_text():
    long, judge = "7" * (MAX_COMPARED + 1), Judge(grade)
    assert number_answers([[long, "7", long, "7.0", long + "1"]], judge) == [[0, 1, 0, 1, 2]]
    assert all(len(text) < MAX_COMPARED + 9 for call in judge.calls for text, _ in call)
