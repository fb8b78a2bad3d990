"""outputs/reference: the logged runs that are kept, and the figures that are drawn from them."""

import csv
import json
import re
from pathlib import Path
from statistics import fmean

import pyarrow.parquet as pq
import pytest

from capo_exp.figures.__main__ import main
from capo_exp.runs.read import find_runs, load_run
from scripts.judge_real_rates import judge, judge_shifts, measure, reach, read_curves
from scripts.judge_real_rates import main as main_of_rates
from scripts.judge_why import read, table

REFERENCE = Path(__file__).parents[1] / "outputs" / "reference"
FIGURES = sorted(path.stem for path in (REFERENCE / "paper_figure_1-tiny" / "figures").glob("*.csv"))


def numbers(path):
    return list(csv.reader(line for line in path.read_text().splitlines() if not line.startswith("#")))


@pytest.mark.slow
def test_the_kept_figures_are_redrawn_from_the_kept_runs(tmp_path):
    assert {"1", "3", "5", "stability"} <= set(FIGURES)
    assert (
        main([f"runs={REFERENCE}/paper_figure_1-tiny", f"figure={','.join(FIGURES)}", f"output={tmp_path}"])
        == 0
    )
    for name in FIGURES:
        kept, drawn = (numbers(folder / f"{name}.csv") for folder in (_figures(), tmp_path))
        assert [row[:2] for row in drawn] == [row[:2] for row in kept]
        for ours, theirs in zip(drawn, kept, strict=True):
            for a, b in zip(ours[2:], theirs[2:], strict=True):
                assert a == b or float(a) == pytest.approx(float(b), rel=1e-9, nan_ok=True), (name, ours[:2])
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def _figures():
    return REFERENCE / "paper_figure_1-tiny" / "figures"


def test_they_are_whole_runs_of_one_clean_commit_and_small():
    runs = [load_run(path) for path in find_runs([REFERENCE / "paper_figure_1-tiny"])]
    assert len(runs) == 20
    assert {run.record["git"]["commit"] for run in runs} == {runs[0].record["git"]["commit"]}
    assert not any(run.record["git"]["dirty"] for run in runs)
    for run in runs:
        assert run.state == "finished"
        given_up = run.metrics[-1]["counter/unrewarded_steps"] == run.setting("stop_after_unrewarded")
        assert len(run.metrics) == run.setting("num_steps") or given_up
        assert "/tmp" not in json.dumps([run.record, run.config])
    assert sum(path.stat().st_size for path in REFERENCE.rglob("*") if path.is_file()) < 3_000_000


@pytest.mark.parametrize(("place", "task"), [(0, "sums"), (1, "max_of_three")])
def test_the_page_on_real_weights_says_what_the_kept_runs_say(place, task):
    page = (REFERENCE.parents[1] / "docs" / "study" / "real_weights_numbers.md").read_text()
    table = re.findall(r"(?:^\|.*F \(median\).*\n)(?:^\|.*\n)+", page, re.MULTILINE)[place]
    names, _, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines())
    said = [dict(zip(names, row, strict=True)) for row in rows]
    lines = judge(read_curves(REFERENCE / "smollm2" / task / "runs.parquet"))
    names, *rows = (line.split(", ") for line in lines if line.count(", ") == 11)
    judged = {(row[0], float(row[1])): dict(zip(names, row, strict=True)) for row in rows}
    assert len(said) == len(judged) > 0
    for row in said:
        one = judged[row["method"].strip("`"), float(row["rate"])]
        for name in ("F (median)", "P", "end"):
            assert row[name] == one[name], (row, name)
        assert [f"{row[name]}/3" for name in ("collapsed", "held")] == [one["collapsed"], one["held"]]
        assert (row["learns"] == "yes") == (one["learns"] == "True")


def test_a_run_that_two_files_have_is_no_run(monkeypatch):
    plain = str(REFERENCE / "smollm2" / "sums" / "plain.parquet")
    monkeypatch.setattr("sys.argv", ["judge_real_rates.py", plain, plain])
    with pytest.raises(
        SystemExit, match=r"plain\.parquet and \S+plain\.parquet both have \('grpo', .* of sums"
    ):
        main_of_rates()


def test_the_page_on_evidence_says_what_its_runs_say_of_the_last_layer():
    page = (REFERENCE.parents[1] / "docs" / "study" / "evidence.md").read_text()
    said = re.findall(r"^\|.*\| the (?:last layer|squared rate) \| (.*) \|$", page, re.MULTILINE)
    told = [
        line.rpartition(": ")[2]
        for task in ("sums", "max_of_three")
        for name, method in (("runs", "measured"), ("evidence", "evidence"))
        for line in judge_shifts(REFERENCE / "smollm2" / task / f"{name}.parquet") if line.startswith(method)
    ]  # fmt: skip
    assert len(told) == 8 and [cells.replace(" | ", ", ") for cells in said] == told


def test_the_page_on_the_reasons_has_the_table_of_its_runs():
    page = (REFERENCE.parents[1] / "docs" / "study" / "real_why.md").read_text()
    assert "\n".join(table(read(REFERENCE / "smollm2" / "sums" / "why.parquet"))) in page


def test_the_page_on_a_tenth_says_what_its_kept_rows_say():
    page = (REFERENCE.parents[1] / "docs" / "study" / "evidence_small.md").read_text()
    said = re.findall(r"^\| (\w+) \|.*\| (\d+) to (\d+) \|.*\| ([\d., ]+) \|$", page, re.MULTILINE)
    ends: dict[tuple[str, str, int], list[float]] = {}
    for row in pq.read_table(REFERENCE / "study_evidence_small" / "runs.parquet").to_pylist():
        values = dict(part.split("=", 1) for part in row["overrides"].split())
        kind = values.get("algo.step_rule.share", "1") if "step_rule" in values else "grpo"
        key = (values["setting"], kind, int(values["seed"]))
        if row["counter/rollout_step"] > 180:
            ends.setdefault(key, []).append(row["reward/accuracy"])
    wanted = sorted(
        (setting, seed, round(100 * sum(last) / 20, 1)) for (setting, _, seed), last in ends.items()
    )
    found = [
        (setting, seed, float(end))
        for setting, first, last, cells in said
        for seed, end in zip(range(int(first), int(last) + 1), cells.split(", "), strict=True)
    ]
    assert len(found) == 35 and sorted(found) == wanted


def test_the_page_on_the_corrected_support_says_what_its_kept_rows_say():
    page = (REFERENCE.parents[1] / "docs" / "study" / "corrected_support.md").read_text()
    curves = read_curves(REFERENCE / "smollm2" / "sums" / "corrected.parquet")
    row = r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| yes \| (\d+) \|"
    said = re.findall(row, page, re.MULTILINE)
    for seed, *cells in said:
        found = measure(curve := curves["capo", 1e-4, int(seed)], base=0.016)
        assert found.collapsed
        assert cells == [f"{x:.3f}" for x in (found.final, found.peak, found.end)] + [str(len(curve))]
    assert len(said) == len(curves) == 3


def test_the_page_on_a_tenth_with_real_weights_says_what_its_kept_rows_say():
    page = (REFERENCE.parents[1] / "docs" / "study" / "tenth.md").read_text()
    tasks = [read_curves(REFERENCE / "smollm2" / task / "tenth.parquet") for task in ("sums", "max_of_three")]
    methods = {"a tenth": "evidence algo.step_rule.share=0.1", "`grpo`": "grpo"}
    number, row = r" ([\d.]+) \|", r"^\| (a tenth|`grpo`), (\S+) \| (\d+) \|"
    row += rf"{number * 3} no \| [^|]+ \|{number} [\d.]+ \| ([\d, ]+) \|$"
    for part, curves, size in zip(page.split("On max_of_three:"), tasks, (6, 3), strict=True):
        said = re.findall(row, part, re.MULTILINE)
        for method, rate, seed, *cells in said:
            curve = curves[methods[method], float(rate), int(seed)]
            found = measure(curve, base=0.0)
            assert not found.collapsed
            tenths = ", ".join(f"{100 * fmean(curve[i : i + 5]):.0f}" for i in range(0, 50, 5))
            numbers = [f"{each:.3f}" for each in (found.final, found.peak, found.end)]
            assert cells == [*numbers, f"{reach(curve, 0.6):.0f}", tenths], (method, seed)
        assert len(said) == len(curves) == size
