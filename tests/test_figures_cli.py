"""`python -m capo_exp.figures` as a user meets it: files, their provenance, messages, exit status."""

import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from capo_exp.cli import figures
from capo_exp.cli.figures import main
from capo_exp.figures import output
from capo_exp.figures.gallery import FIGURES
from capo_exp.runs.files import replace_file
from capo_exp.runs.read import LoggedRun
from tests.figure_pieces import COMMIT, FIGURE_1, write_run, write_study

SUFFIXES = (".png", ".pdf", ".csv", ".md", ".tex")
NO_HEAVY = """
import runpy, sys
sys.argv = ["capo_exp.figures", *sys.argv[1:]]
try:
    runpy.run_module("capo_exp.figures", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "transformers", "datasets", "vllm", "wandb", "matplotlib.pyplot"} & set(sys.modules)
assert not heavy, heavy
"""


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys):
    def run_here(*arguments):
        status = main([str(argument) for argument in arguments])
        return Outcome(status, *capsys.readouterr())

    return run_here


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"), FIGURE_1, steps=12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"runs=\[\]: expected directories of runs"),
        (["runs=x", "figure=stabilty"], "figure=stabilty: no such figure; .*nearest: stability"),
        (["runs=x", "statistic=median"], "statistic=median: expected one of mean, iqm"),
        (["runs=x", "smoothing=papr"], "smoothing=papr: expected paper, off or a number"),
        (["runs=x", "x=counter/completion"], "x=counter/completion: expected null, or one of counter/compl"),
        (["runs=x", "keys=policy/entropi"], "keys=policy/entropi: .*; nearest: policy/entropy"),
        (["runs=/nowhere/at/all"], "/nowhere/at/all: no such file or directory"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(arguments, message, run):
    result = run(*arguments)
    assert (result.status, result.out) == (2, "")
    assert re.search(message, result.err)
    assert result.err.count("\n") == 1


@pytest.mark.slow
def test_all_goes_on_without_what_it_lacks(study, tmp_path, run, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", {name: FIGURES[name] for name in ("1", "8", "time")})
    result = run(f"runs={study}", f"output={tmp_path}")
    assert (result.status, result.err) == (0, "")
    assert "figure 8: skipped, needs runs with algo.kl_coefficient > 0; these have" in result.out
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {f"{name}{suffix}" for name in ("1", "time") for suffix in SUFFIXES}
    asked = run(f"runs={study}", "figure=8", f"output={tmp_path}")  # by its name it is an error
    lack = "needs runs with algo.kl_coefficient > 0; these have algo.kl_coefficient = 0.0"
    assert (asked.status, asked.out, asked.err) == (2, "", f"figure 8: {lack}\n")


@pytest.mark.slow
def test_all_of_runs_that_cannot_be_compared_is_drawn_by_families(tmp_path, run, monkeypatch):
    """And a damaged run hides none of them, not in the figures and not in the report."""
    monkeypatch.setattr(figures, "FIGURES", {name: FIGURES[name] for name in ("5", "8", "time")})
    runs = tmp_path / "runs"
    for job in ("zero_learning_rate model.name=a", "grpo_aggressive model.name=b", "capo model.name=b"):
        write_run(runs / job[-1], job, steps=2)
    broken = write_run(runs / "b", "grpo_aggressive model.name=b", 1, steps=2)
    (broken / "metrics.jsonl").write_text("{}\n[1]\n")
    refused = run(f"runs={runs}", "figure=1", f"output={tmp_path}/out")
    assert refused.status == 2 and "model.name" in refused.err and "mix=true" in refused.err
    result = run(f"runs={runs}", "figure=all", f"output={tmp_path}/out", "report=html")
    lines = [line for line in result.out.splitlines() if ": skipped" not in line and "report" not in line]
    assert result.status == 0
    assert "b: 3 runs" in lines and sum(line.endswith(" run") for line in lines) == 1
    drawn = {line.split(":")[0] for line in lines if f"{tmp_path}/out/b/" in line}
    assert drawn == {"figure 5", "figure time"}
    assert result.err.count("\n") == 1 and result.err.startswith(f"left out: {broken}/metrics.jsonl, line 2")
    assert f"left out: {broken}/metrics.jsonl, line 2" in (tmp_path / "out" / "b" / "report.html").read_text()


def test_no_two_families_have_one_folder():
    groups = [[LoggedRun(Path(folder), {}, {}, [], [])] for folder in ("a/1", "b/1", "c/1-2")]
    assert [folder.name for folder in figures._folders(groups, Path("o"))] == ["1", "1-2", "1-2-2"]


def test_a_copy_counts_once_where_curves_start(tmp_path, run):
    """Runs at learning rate 0 with an accuracy of 0.2 and, copied, of 0.4."""
    write_run(tmp_path / "runs", "capo", steps=2)
    for seed in (0, 1):
        path = write_run(tmp_path / "runs", FIGURE_1[3], seed, steps=2, accuracy=lambda _, s: 0.2 * (1 + s))
    shutil.copytree(path, tmp_path / "runs" / "copy")
    assert run(f"runs={tmp_path}/runs", "figure=1", f"output={tmp_path}", "smoothing=off").status == 0
    rows = list(csv.reader((tmp_path / "1.csv").read_text().splitlines()))
    assert [row[3] for row in rows if row[1:3] == ["CAPO (A)", "0"]] == [pytest.approx("0.30000000000000004")]


def test_what_stands_in_a_comment_neither_ends_it_nor_begins_a_formula(tmp_path, run):
    path, out = write_run(tmp_path / "runs", "capo", steps=2), tmp_path / "a--b -->"
    (path / "run.json").write_text(json.dumps({"run_id": "a,=HYPERLINK(1),-2;@x"}))
    assert run(f"runs={tmp_path / 'runs'}", "figure=5", f"output={out}").status == 0
    comment = (out / "5.csv").read_text().splitlines()[1]
    assert not re.search(r"[,;]\s*[-=+@]", comment)
    first = (out / "5.md").read_text().splitlines()[0]
    assert first.count("--") == 2
    for text in (comment.removeprefix("# "), first[5:-4]):
        assert json.loads(text)["runs"][0]["id"] == "a,=HYPERLINK(1),-2;@x"
        assert json.loads(text)["command"].endswith("a--b -->'")


@pytest.mark.parametrize("label", ["![x](//e.vil/a)", "<img src=//e.vil/a>"])
def test_no_label_makes_a_viewer_fetch_a_picture(label, tmp_path, run):
    """Neither in the table nor in the caption, which names the longer curve."""
    for seed, steps in enumerate((5, 4)):
        path = write_run(tmp_path / "runs", "capo", seed, steps=steps)
        config = (path / "config.yaml").read_text()
        (path / "config.yaml").write_text(config.replace("label: CAPO", f"label: '{label}'"))
    assert run(f"runs={tmp_path / 'runs'}", "figure=accuracy", f"output={tmp_path}").status == 0
    text = (tmp_path / "accuracy.md").read_text().split(" -->", 1)[1]  # behind the comment
    assert text.count("e.vil") == 2 and not re.search(r"(?<!\\)\]\(|<img", text)


def test_where_from_is_inside_every_file(study, tmp_path, run):
    command = [f"runs={study}/capo*,{study}/grpo*", "figure=1", f"output={tmp_path}", "interval=sem"]
    assert run(*command).status == 0
    found = {
        "png": Image.open(tmp_path / "1.png").info["capo_exp"],
        "pdf": pdf_text(tmp_path / "1.pdf"),
        "csv": (tmp_path / "1.csv").read_text().splitlines()[1].removeprefix("# "),
        "md": (tmp_path / "1.md").read_text().splitlines()[0].removeprefix("<!-- ").removesuffix(" -->"),
        "tex": (tmp_path / "1.tex").read_text().splitlines()[1].removeprefix("% "),
    }
    values = {kind: json.loads(text) for kind, text in found.items()}
    assert all(value == values["png"] for value in values.values())
    origin = values["png"]
    assert origin["command"] == "python -m capo_exp.figures " + " ".join(
        f"'{part}'" if "*" in part else part for part in command
    )
    assert len(origin["runs"]) == 8  # those at learning rate 0 too: the start point
    for one in origin["runs"]:
        assert (one["commit"], one["dirty"], one["id"] in one["name"]) == (COMMIT, False, True)
    assert origin["seeds"] == {"CAPO (A)": 2, "GRPO": 2, "GRPO (A)": 2}
    assert (origin["interval"], origin["statistic"]) == ("sem", "mean")
    assert origin["smoothing"] == {"reward/accuracy": 0.1}
    assert set(origin["packages"]) == {"matplotlib", "numpy", "scipy"}


def pdf_text(path):
    """The document's subject; PDF puts a backslash before parentheses and backslashes."""
    found = re.search(rb"/Subject \((.*?[^\\])\)\s", path.read_bytes(), re.DOTALL)
    assert found is not None
    return re.sub(rb"\\([()\\])", rb"\1", found[1]).decode()


@pytest.mark.slow
def test_the_same_again_is_the_same_bytes_and_starts_without_torch(study, tmp_path, run):
    command = [f"runs={study}", "figure=1,rejected_tokens", f"output={tmp_path}", "report=html"]
    assert run(*command).status == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for path in tmp_path.iterdir():
        path.unlink()
    subprocess.run([sys.executable, "-c", NO_HEAVY, *command], check=True, capture_output=True)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(after) == 11
    other = {name for name in after if after[name] != before[name]}
    assert other <= {"report.html"}  # its command is that of the process
    assert all(f'id="figure-{name}"' in after["report.html"].decode() for name in ("1", "rejected_tokens"))


@pytest.mark.slow
def test_default_output_and_table(study, run):
    assert run(f"runs={study}", "figure=1").status == 0
    folder = study / "figures"
    with (folder / "1.csv").open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert {row["curve"] for row in rows} >= {"CAPO (A)", "GRPO", "GRPO (A)"}
    text = (folder / "1.md").read_text()
    assert "| CAPO (A) | 2 | " in text
    assert "\nMean of n = 2 seeds; band: 95 % bootstrap interval over seeds. " in text
    assert "\\begin{tabular}" in (folder / "1.tex").read_text()
    assert run(f"runs={study}", "keys=loss/total,eval/accuracy").status == 0  # the folder is no run
    panels = {row.split(",")[0] for row in (folder / "metrics.csv").read_text().splitlines()[3:]}
    assert panels == {"loss/total", "eval/accuracy"}


@pytest.mark.slow
def test_a_failure_leaves_the_old_files(study, tmp_path, run, monkeypatch):
    assert run(f"runs={study}", "figure=5", f"output={tmp_path}").status == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    full = []

    def replacing_until_full(path):
        full.append(path)
        if len(full) == 4:
            raise OSError(28, "No space left on device")
        return replace_file(path)

    monkeypatch.setattr(output, "replace_file", replacing_until_full)
    result = run(f"runs={study}", "figure=5", "smoothing=0.5", f"output={tmp_path}")
    assert result.status == 1
    assert re.fullmatch(r".*No space left on device.*\n", result.err)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
