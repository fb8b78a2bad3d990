import json
import math

import numpy as np
import pytest

from capo_exp.figures.report import viewer
from capo_exp.runs.read import LoggedRun, load_run
from tests.report_pieces import CAPO, TOKENS, completion, config, write_completions, write_run


def test_bounds_are_read_only_from_a_selection_that_tests_each_token(tmp_path):
    def bounds(selection):
        return viewer.bounds_of(LoggedRun(tmp_path, config("capo", 0, selection), {}, [], []))

    assert bounds(CAPO) == (1e-4, -1e-2, 1e-2)
    assert bounds(CAPO | {"_target_": "capo_exp.algorithms.capo.completion_bounds"}) is None
    assert bounds(CAPO | {"objective_shift_max": math.inf}) == (1e-4, -1e-2, math.inf)
    assert bounds({}) is None


def test_text_that_no_token_has_is_there_as_well(tmp_path):
    path = write_run(tmp_path / "a", config("capo", 0, CAPO), accuracy=0.5, record={"status": "finished"})
    split = completion(["�", "�"]) | {"completion": "🦊"}
    write_completions(path, 1, [split, completion(["�", "x"])])
    data = viewer.viewer_data(viewer.excerpts([load_run(path)]), ["a"])
    assert [row["text"] for row in data["runs"][0]["steps"][0]["rows"]] == ["🦊", None]


def test_a_damaged_completion_is_shown_as_far_as_it_goes(tmp_path):
    path = write_run(tmp_path / "a", config("capo", 0, CAPO), accuracy=0.5, record={"status": "finished"})
    more = {"token_ids": [], "keep": [None, False], "log_prob": [800.0, None], "completion": None}
    write_completions(path, 1, [completion(["a", "b"]) | more])
    data = viewer.viewer_data(viewer.excerpts([load_run(path)]), ["a"])
    (row,) = data["runs"][0]["steps"][0]["rows"]
    assert (data["tokens"], row["rejected"], row["probability"]) == (
        [(None, "a"), (None, "b")],
        "01",
        [1, None],
    )


@pytest.mark.parametrize(
    ("enough", "right"),
    [
        (None, [False, False, True, False]),
        (0.4996, [False, True, True, False]),
        (0, [True, True, True, False]),
    ],
)
def test_what_was_right_is_what_the_run_counted_as_correct(enough, right, tmp_path):
    settings = config("capo", 0, CAPO) | {"reward": {"verifier": {"correct_from": enough}}}
    path = write_run(tmp_path / "a", settings, accuracy=0.5, record={"status": "finished"})
    write_completions(
        path, 1, [completion(TOKENS) | {"reward": reward} for reward in (0.4995, 0.5, 1.0, None)]
    )
    data = viewer.viewer_data(viewer.excerpts([load_run(path)]), ["a"])
    assert [row["right"] for row in data["runs"][0]["steps"][0]["rows"]] == right


def test_steps_and_completions_that_fit(tmp_path):
    path = write_run(tmp_path / "a", config("capo", 0, CAPO), accuracy=0.5, record={"status": "finished"})
    for step in range(10, 210, 10):
        write_completions(path, step, [completion(TOKENS) for _ in range(4)])
    (path / "completions" / "step_abc.parquet").touch()
    run, size = load_run(path), 4 * viewer.row_bytes(completion(TOKENS))

    def taken(steps):
        part = viewer.excerpt(run, steps * size)
        return list(part.steps), part.shown

    spread = [10, 30, 40, 60, 80, 100, 110, 130, 150, 170, 180, 200]
    assert taken(100) == (spread, 4 * viewer.MAX_STEPS)
    assert taken(12) == (spread, 48) and taken(11.9) == (spread, 36)
    assert taken(0.01) == (spread, 12)  # one of each at least
    assert [part.shown for part in viewer.excerpts([run] * 2, 12 * size)] == [24, 24]  # runs share the room
    note = viewer.excerpt(run, 6 * size).note
    said = ", ".join(map(str, spread))
    assert note == f"12 of 20 logged steps: {said}; the first 24 of 48 completions of these"


def test_a_long_completion_is_cut_and_takes_no_more_room_than_it_is_given(tmp_path):
    path = write_run(tmp_path / "a", config("capo", 0, CAPO), accuracy=0.5, record={"status": "finished"})
    long = completion(["word"] * (viewer.MAX_TOKENS + 500))
    write_completions(path, 1, [long])
    (row,) = viewer.viewer_data(viewer.excerpts([load_run(path)]), ["a"])["runs"][0]["steps"][0]["rows"]
    assert row["length"] == viewer.MAX_TOKENS + 500
    columns = ("tokens", "policy", "objective", "probability", "rejected")
    assert {len(row[name]) for name in columns} == {viewer.MAX_TOKENS}
    assert len(json.dumps(row, separators=(",", ":"))) <= viewer.row_bytes(long)


def test_a_kept_token_is_kept_and_a_bound_itself_is_beyond():
    limit = float(np.float32(1e-4))  # as parquet has it

    def code(policy, objective, keep, bounds=(1e-4, -1e-2, 1e-2)):
        return viewer.reasons([policy], [objective], [keep], bounds)[0]

    assert code(1.0, 1.0, True) == viewer.KEPT
    assert code(limit, 0.0, False) == viewer.BY_POLICY
    assert code(limit * 0.999999, 0.0, False) == viewer.OTHER
    assert code(0.0, -1e-2, False) == viewer.BY_OBJECTIVE
    assert code(1.0, 1.0, False, None) == viewer.OTHER
