import base64
import hashlib
import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path

import pytest

from capo_exp.figures import style
from capo_exp.figures.curves import Curve
from capo_exp.figures.report.overview import differing, overview, run_labels
from capo_exp.figures.report.page import write_report
from capo_exp.runs.read import load_run
from tests.report_pieces import (
    CAPO,
    HOSTILE,
    TOKENS,
    completion,
    config,
    drawn,
    study,
    write_completions,
    write_run,
)

SEEDS = [("CAPO", 0), ("CAPO", 1), ("GRPO", 0), ("DAPO", 0)]


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text in each kind of tag."""

    def __init__(self, path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags:
            self.texts.append((self.tags[-1][0], data))

    def all(self, tag, attribute):
        return [found[attribute] for name, found in self.tags if name == tag and attribute in found]

    @property
    def text(self):
        return " ".join(" ".join(text for tag, text in self.texts if tag not in ("script", "style")).split())


@dataclass(frozen=True)
class Study:
    curves: list[Curve]
    path: Path

    @cached_property
    def page(self):
        return Page(self.path)

    @property
    def runs(self):
        return [run for curve in self.curves for run in curve.runs]

    @property
    def data(self):
        embedded = self.path.read_text().split('id="viewer-data">')[1].split("</script>")[0]
        return json.loads(embedded)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    curves = study(folder / "runs")
    runs = [run for curve in curves for run in curve.runs]
    path = write_report(runs[::-1], curves, [drawn(folder)], folder / "out", "COMMAND")
    assert path == folder / "out" / "report.html"
    return Study(curves, path)


def test_the_summary_by_hand(written):
    named = run_labels(written.runs, written.curves)
    first, second, third, failed = overview(written.runs, named, written.curves)
    headings = written.page.all("th", "data-value")
    assert headings == [f"{name} (A) · seed {seed}" for name, seed in SEEDS]
    assert [cell.text for cell in first.cells] == [
        "finished", "30 of 30", "50.0%", "25.0% → 50.0%", "60.0%", "2.0%", "3.0%", "2,880", "0:01:15",
    ]  # fmt: skip
    assert [cell.value for cell in second.cells[2:5]] == pytest.approx([0.6, 0.6, 0.7])
    assert (first.label, second.label) == ("CAPO (A) · seed 0", "CAPO (A) · seed 1")
    assert (first.error, failed.cells[0].text) == (None, "failed")
    assert failed.error == "RunFailed: <img src=x onerror=window.pwned=4> \udcff"
    looks = style.looks(written.curves)
    assert [line.colour for line in (first, second, third)] == [
        looks[label].colour for label in ("CAPO (A)", "CAPO (A)", "GRPO (A)")
    ]


def test_the_summary_says_what_happened_not_what_was_planned(tmp_path):
    planned = config("capo", 0, CAPO) | {"num_steps": 200, "stop_after_unrewarded": 20}
    path = write_run(tmp_path / "a", planned, accuracy=0.0, record={"status": "finished"})
    text = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(
        text.replace('"selection/', '"counter/unrewarded_steps": 20, "selection/')
    )
    (line,) = overview([load_run(path)], ["a run"], [])
    assert [cell.text for cell in line.cells[:2]] == ["stopped, no reward", "30 of 200"]
    assert line.cells[7].text == "2,880"


@pytest.mark.parametrize("seconds", ["NaN", "1e20", "-1"])
def test_a_time_that_is_none_is_not_told(seconds, tmp_path):
    path = write_run(tmp_path / "a", config("capo", 0, CAPO), accuracy=0.0, record={})
    (path / "run.json").write_text((path / "run.json").read_text().replace("75.0", seconds))
    (line,) = overview([load_run(path)], ["a run"], [])
    assert line.cells[-1].text == "-"


def test_what_cannot_be_read_is_named_and_hides_nothing(tmp_path):
    paths = [
        write_run(tmp_path / name, config("capo", 0, CAPO), accuracy=0.5, record={"status": "finished"})
        for name in "ab"
    ]
    for path in paths:
        write_completions(path, 10, [completion(TOKENS)])
    (paths[0] / "completions" / "step_000010.parquet").write_bytes(b"torn")
    runs = [load_run(path) for path in paths]
    page = Page(write_report(runs, [], [], tmp_path, "COMMAND"))
    assert re.search(r"left out: \S+step_000010.parquet is not a parquet file", page.text)
    assert "b: 1 of 1 logged steps: 10; all 1 completions of these" in page.text


def test_what_differs_has_a_column_for_all_seeds_of_a_curve(written):
    table = differing(written.runs, run_labels(written.runs, written.curves))
    assert table.heading == ["setting", "CAPO (A) (2 runs)", "GRPO (A) · seed 0", "DAPO (A) · seed 0"]
    rows = {key: values for key, *values in table.rows}
    assert rows["algo.name"] == ["capo", "grpo", "dapo"]
    assert rows["algo.selection.policy_shift_max"] == ["0.0001", "-", "-"]
    assert rows["seed"] == ["0, 1", "0", "0"]
    assert "num_steps" not in rows
    assert differing(written.runs[:1], ["one"]).rows == []
    assert differing(written.runs[:2], ["a · seed 0", "a · seed 1"]).rows == [["seed", "0, 1"]]


def test_runs_of_one_name_are_told_apart(written):
    twice = [written.runs[0], replace(written.runs[0], path=Path("elsewhere/copy"))]
    alike = [Curve("CAPO (A)", tuple(twice))]
    assert len(set(run_labels(twice, alike))) == 2
    assert run_labels(twice, [])[1] == "copy"


def test_static_parts_are_there_without_a_script(written):
    text, page = written.page.text, written.page
    for part in ("study <one>: 4 runs", "25.0% → 50.0%", "Figure <1>", "Mean & 95 % interval", "<i>a</i>",
                 "x | y", "algo.selection.policy_shift_max", "c0ffee with changes (git.diff)",
                 "RunFailed: <img src=x onerror=window.pwned=4> ?", "needs JavaScript",
                 "3 of 3 logged steps: 10, 20, 30; all 9 completions of these",
                 "no completions on disk (logger.completions_every)"):  # fmt: skip
        assert part in text
    assert ("div", {"id": "viewer", "hidden": None}) in page.tags  # until its script shows it
    (picture,) = page.all("img", "src")
    file = written.path.parents[1] / "one.png"
    assert base64.b64decode(str(picture).removeprefix("data:image/png;base64,")) == file.read_bytes()
    assert (page.all("img", "width"), page.all("img", "height")) == (["96"], ["48"])  # 160 x 80 at 160 a inch
    (numbers,) = [str(link) for link in page.all("a", "href") if str(link).startswith("data:text/csv")]
    assert base64.b64decode(numbers.partition("base64,")[2]) == b"x,y\n1,2\n"
    assert page.all("a", "download") == ["one.csv"]


def test_nothing_comes_from_outside_and_only_our_scripts_may_run(written):
    addresses = [
        str(value) for _, attributes in written.page.tags for name, value in attributes.items()
        if name in ("src", "href", "action", "data", "srcset")
    ]  # fmt: skip
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert not any(name.startswith("on") for _, attributes in written.page.tags for name in attributes)
    html = written.path.read_text(encoding="utf-8")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    texts = re.findall(r"<(?:script|style)>(.*?)</(?:script|style)>", html, re.S)
    assert len(texts) == 3
    for text in texts:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"&#39;sha256-{digest}&#39;" in policy
    assert policy.startswith("default-src &#39;none&#39;; img-src data:; ")
    assert "unsafe" not in policy


def test_completions_stay_data(written):
    raw = written.path.read_text(encoding="utf-8").split('id="viewer-data">')[1].split("</script>")[0]
    assert not set("<>&") & set(raw) and raw.isascii()
    rows = written.data["runs"][1]["steps"][0]["rows"]
    assert [written.data["tokens"][row["tokens"][0]][1] for row in rows] == [*HOSTILE, "x"]
    assert len([1 for tag, _ in written.page.tags if tag == "script"]) == 3


def test_a_completion_in_the_data_by_hand(written):
    capo, _, grpo = written.data["runs"]
    assert [step["step"] for step in capo["steps"]] == [10, 20, 30]
    assert capo["bounds"] == [1e-4, -1e-2, 1e-2]
    row = capo["steps"][1]["rows"][0]
    tokens = [[100, "20"], *([101 + i, t] for i, t in enumerate(TOKENS[1:]))]
    assert [written.data["tokens"][i] for i in row["tokens"]] == tokens
    assert written.data["prompts"][row["prompt"]] == ["Count.", "3", "counting"]
    assert row["policy"] == [2e-5, 2e-4, 3e-9, 2e-4, None, 0]
    assert row["objective"] == [-4e-4, 0, 2e-3, -2e-2, 0, 5e-2]
    assert row["probability"] == pytest.approx([1, 0.607, 0.368, 0.223, 0.135, 0.0821])
    assert row["rejected"] == "010312"  # kept, m_F, kept, both, m_F not a number, m_H
    assert (row["reward"], row["advantage"], row["length"], row["text"]) == (1, 1, 6, None)
    older = grpo["steps"][0]["rows"][0]
    assert [written.data["tokens"][i] for i in older["tokens"]] == [[100 + i, None] for i in range(6)]
    assert older["text"] == "".join(TOKENS)
    assert older["probability"] == []
    assert (older["rejected"], grpo["bounds"]) == ("040444", None)
    labels = [run["label"] for run in written.data["runs"]]
    assert labels == ["CAPO (A) · seed 0", "CAPO (A) · seed 1", "GRPO (A) · seed 0"]


def test_the_same_runs_give_the_same_page(written, tmp_path):
    pages = [
        write_report(written.runs, written.curves, [], tmp_path / f"{n}.html", "COMMAND") for n in range(2)
    ]
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_a_single_old_run_without_anything(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    page = Page(write_report([load_run(tmp_path)], [], [], tmp_path / "new" / "page.html", "COMMAND"))
    assert "No run has logged completions" in page.text
    assert "Nothing: there is one run." in page.text
