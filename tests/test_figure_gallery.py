"""Every figure on runs whose right answer is known."""

import csv
import io
import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg

from capo_exp.core.intervals import seed_estimate
from capo_exp.figures import output, style, tables
from capo_exp.figures.curves import Curve, curves
from capo_exp.figures.gallery import FIGURES, find_figure
from capo_exp.figures.page import caption, compose, draw_page
from capo_exp.figures.panel import cell_text
from capo_exp.figures.study import Lacking, Study
from capo_exp.figures.tokens import count_tokens
from capo_exp.runs.read import load_run, to_its_end
from tests.figure_pieces import FIGURE_1, NO_WARNINGS, PAPER, study_in, write_jsonl, write_run, write_study
from tests.pieces import one_line

pytestmark = NO_WARNINGS

CLIMBS = {
    "grpo_conservative": lambda x, seed: 0.4 + 2e-6 * x + 0.02 * seed,
    "grpo_aggressive": lambda x, seed: 0.42 + 0.02 * seed,
    "capo": lambda x, seed: 0.4 + 4e-5 * x + 0.02 * seed,
    "zero_learning_rate": lambda x, seed: 0.35 + 0.02 * seed,
}
"""Mean over seeds 0 and 1: GRPO ends at 0.529808, which CAPO first reaches at 32 x 96 = 3,072 completions."""
TARGET = 0.41 + 2e-6 * 59904


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Two seeds of the paper's runs, at most 12 steps."""
    return study_in(write_study(tmp_path_factory.mktemp("all"), PAPER, steps=12))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Figure 1's runs, in full."""
    root = tmp_path_factory.mktemp("first")
    for job in FIGURE_1:
        write_study(root, [job], accuracy=CLIMBS[job])
    return study_in(root)


def drawn(shown):
    with rc_context(style.SETTINGS):
        return draw_page(shown)


def rows(panels):
    return list(csv.DictReader(io.StringIO(tables.csv_text(panels))))


def curve(found, label, panel=None):
    return [row for row in found if row["curve"] == label and panel in (None, row["panel"])]


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn_in_full(name, everything):
    shown = compose(name, everything)
    assert shown.lacking == ()
    assert len(shown.panels) == len(FIGURES[name].panels(everything))
    assert len(rows(shown.panels)) >= len(shown.panels)
    assert len(tables.table_of(shown.panels).rows) >= 1
    check_page(drawn(shown))


def check_page(figure):
    """Nothing sticks out of the page, no text lies on another, no legend on the axes."""
    with rc_context(style.SETTINGS):  # how many ticks there are follows the size of their letters
        figure.draw_without_rendering()
        renderer = FigureCanvasAgg(figure).get_renderer()
        everything, (width, height) = figure.get_tightbbox(renderer), figure.get_size_inches()
        assert min(everything.x0, everything.y0) > -0.01
        assert everything.x1 < width + 0.01 and everything.y1 < height + 0.01
        for axes in figure.axes:
            box = axes.get_window_extent(renderer)
            assert not any(legend.get_window_extent(renderer).overlaps(box) for legend in figure.legends)
            for axis in (axes.xaxis, axes.yaxis):
                check_apart(shown_ticks(axis))
            check_apart([text for text in axes.texts if text.get_text()])


def check_apart(texts):
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    for (one, box), (other, its) in itertools.combinations(boxes, 2):
        assert not box.overlaps(its), (one, other)


def shown_ticks(axis):
    """Labels inside the limits; matplotlib keeps others."""
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [tick.label1 for tick in ticks if tick.label1.get_visible() and tick.label1.get_text()]


def test_figure_1_is_the_mean_the_line_and_the_factor(first):
    shown = compose("1", first)
    found = rows(shown.panels)
    capo = curve(found, "CAPO (A)")
    assert [int(row["x"]) for row in capo] == [96 * step for step in range(101)]
    assert float(capo[0]["centre"]) == pytest.approx(0.36)  # step 10 of the runs at learning rate 0
    np.testing.assert_allclose(
        [float(row["centre"]) for row in capo[1:]], 0.41 + 4e-5 * 96 * np.arange(1, 101)
    )
    assert {row["seeds"] for row in capo} == {"2"}
    for row in capo[1:]:  # two seeds: the bootstrap's 95 % reaches from one to the other
        assert (float(row["low"]), float(row["high"])) == pytest.approx(
            (float(row["centre"]) - 0.01, float(row["centre"]) + 0.01)
        )
    [line] = curve(found, "GRPO at 59.9k")
    assert float(line["centre"]) == pytest.approx(TARGET)
    [ring] = curve(found, "CAPO (A) reaches GRPO at 59.9k")
    assert (int(ring["x"]), float(ring["centre"])) == (3072, pytest.approx(TARGET))
    [factor] = curve(found, "CAPO (A), Training accuracy, sample efficiency")
    assert float(factor["centre"]) == 59904 / 3072 and float(factor["low"]) > 0
    [panel] = shown.panels
    assert panel.x_max == 9600
    table = {row[0]: row for row in tables.table_of(shown.panels).rows}
    assert table["CAPO (A)"][-1].startswith("19.5x [")
    assert table["GRPO (A)"][-1] == "not reached"
    assert table["GRPO"][-1] == "reference"
    assert table["GRPO"][:3] == ["GRPO", "2", "53.0 % [52.0, 54.0]"]
    [axes] = drawn(shown).axes
    dashed = [line for line in axes.lines if line.get_color() == style.REFERENCE]
    assert [float(line.get_ydata()[0]) for line in dashed] == [pytest.approx(TARGET)]
    assert {text.get_text() for text in axes.texts} == {"19.5x", "53.0 %"}
    assert axes.get_xlim() == (0, 9600) and len(axes.collections) == 3  # a band for each curve


def test_smoothing_is_the_figures_own_unless_told(first):
    paper = Study(**{**vars(first), "smoothing": None, "bands": {}})
    found = curve(rows(compose("1", paper).panels), "CAPO (A)")
    first_step = 0.41 + 4e-5 * 96
    assert float(found[1]["centre"]) == pytest.approx(0.9 * 0.36 + 0.1 * first_step)
    says = caption(compose("1", paper))
    assert "EMA 0.1: moving average in which a new value has that weight." in says
    assert "Not smoothed." in caption(compose("1", first))
    steps = Study(**{**vars(first), "x": "counter/optimizer_step", "bands": {}})
    found = curve(rows(compose("1", steps).panels), "GRPO")
    assert [row["x"] for row in found] == [str(step) for step in range(53)]


def test_only_runs_at_rate_0_are_said_to_be_where_curves_start(tmp_path):
    """Held-out accuracy has an x = 0 of its own."""
    said = "Training accuracy at x = 0: of runs at learning rate 0."
    for job in ("capo", "zero_learning_rate"):
        write_run(tmp_path, job, steps=12)
        assert (said in caption(compose("2", study_in(tmp_path)))) == (job != "capo")


def test_where_curves_start_is_asked_once_of_all_runs(tmp_path, monkeypatch):
    """Each asking goes through the settings of every run: with 300 of them a figure took minutes."""
    asked = []
    monkeypatch.setattr("capo_exp.figures.study.start_value", lambda *all_of: asked.append(all_of))
    compose("stability", study_in(write_study(tmp_path, FIGURE_1, steps=3)))
    assert len(asked) == 1


def test_nothing_short_is_smoothed(tmp_path):
    jumps = {"capo": 9, "grpo_aggressive": 10}  # steps, and as many points
    for job, steps in jumps.items():
        write_run(tmp_path, job, steps=steps, accuracy=lambda x, _: 0.9 if x > 500 else 0.1)
    shown = compose("1", study_in(tmp_path, smoothing=None))
    found = rows(shown.panels)
    assert float(curve(found, "CAPO (A)")[-1]["centre"]) == 0.9
    assert float(curve(found, "GRPO (A)")[-1]["centre"]) == pytest.approx(0.9 - 0.8 * 0.9**5)
    assert "fewer than 10 points are not smoothed: CAPO (A) (training accuracy)" in caption(shown)


def test_seeds_that_end_look_ended(tmp_path):
    """Three seeds of 100 planned steps: two end at 60 and 40, one goes to the end."""
    for seed, steps in enumerate((100, 60, 40)):
        write_run(tmp_path, "capo", seed, steps=steps)
    shown = compose("accuracy", study_in(tmp_path))
    assert [row["seeds"] for row in curve(rows(shown.panels), "CAPO (A)", "Training accuracy")] == (
        ["3"] * 40 + ["2"] * 20 + ["1"] * 40
    )
    assert shown.panels[0].series[0].losses == ((3840, 2), (5760, 1))
    axes = drawn(shown).axes[0]
    assert [text.get_text() for text in axes.texts] == ["n=2", "n=1"]
    whole, rest = (line for line in axes.lines if len(line.get_xdata()) > 5)
    assert (whole.get_xdata()[-1], rest.get_xdata()[-1]) == (5760, 9600)  # fewer than half go on
    assert whole.get_linewidth() > 2 * rest.get_linewidth()


def test_a_run_stopped_for_want_of_reward_counts_as_zero_and_looks_ended(tmp_path):
    path = write_run(tmp_path, "capo", steps=20)
    text = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(text.replace('unrewarded_steps": 0', 'unrewarded_steps": 20'))
    whole = to_its_end(load_run(path))
    shown = compose("accuracy", Study(**vars(study_in(tmp_path)) | {
        "runs": (whole,), "curves": tuple(curves([whole], mix=False))}))  # fmt: skip
    [series], [held_out] = (panel.series for panel in shown.panels)
    assert (series.x[-1], series.centre[-1], series.losses) == (9600, 0, ((1920, 0),))
    assert held_out.losses == ((1920, 0),)
    said = "stopped for want of reward, it counts as 0 from there, in evaluations as it was last;"
    assert f"Cross: a seed ended there; {said}" in caption(shown)
    assert [run["steps"] for run in output.provenance(shown, "")["runs"]] == [20]


def test_what_lies_beyond_the_axes_leaves_them_whole(tmp_path):
    """Seeds that end at a gradient of 0, which a log axis lacks, and an interval beyond 0 and 100 %."""
    for seed in (0, 1):
        path = write_run(tmp_path, "capo", seed, steps=60, accuracy=lambda _, seed: float(seed))
        text = (path / "metrics.jsonl").read_text()
        last = f'grad_norm": {60.0 * (1 + seed)}'
        (path / "metrics.jsonl").write_text(text.replace(last, 'grad_norm": 0.0'))
    study = study_in(tmp_path, interval="t")
    assert drawn(compose("1", study)).axes[0].get_ylim() == (-0.05, 1.05)
    drawn(compose("metrics", study))  # a layout that collapses is a warning


def test_a_curve_without_the_metric_is_named(tmp_path):
    write_run(tmp_path, "capo", steps=5)
    write_run(tmp_path, "grpo_aggressive", steps=5, without=["policy/entropy"])
    study = study_in(tmp_path)
    shown = compose("metrics", study)
    assert shown.lacking == ("Entropy: not in GRPO (A)",)
    assert "Left out: Entropy: not in GRPO (A)." in caption(shown)
    assert {row["curve"] for row in rows(shown.panels) if row["panel"] == "Entropy"} == {"CAPO (A)"}
    assert {row["curve"] for row in rows(shown.panels)} == {"CAPO (A)", "GRPO (A)"}


def test_a_run_without_the_metric_is_named_and_not_counted(tmp_path):
    """One of three seeds failed before its first step."""
    for seed in range(3):
        write_run(tmp_path, "capo", seed, steps=5 if seed else 0)
    for name, titles in (("1", ["Training accuracy"]), ("time", ["Time of a step"])):
        picture = compose(name, study_in(tmp_path))
        said = [f"{title}: not in 1 of 3 runs of CAPO (A)" for title in titles]
        assert list(picture.lacking) == said and said[0] in caption(picture)
        assert " of n = 2 seeds; " in caption(picture)
        assert [row[:2] for row in tables.table_of(picture.panels).rows] == [["CAPO (A)", "2"]]
        assert output.provenance(picture, "")["seeds"] == {"CAPO (A)": 2}


def test_what_is_lacking_is_said(tmp_path):
    study = study_in(write_study(tmp_path, ["grpo_aggressive"], seeds=1, steps=3))
    for name, reason in (
        ("8", "needs runs with algo.kl_coefficient > 0; these have algo.kl_coefficient = 0.0"),
        ("4", "needs runs with method = CAPO|Dr. CAPO|ReinCAPO; these have method = GRPO"),
        ("5", "needs runs with algo.selection._target_ not keep_all; these have"),
        ("regimes", "needs a method with more than one learning rate or batch"),
    ):
        assert one_line(partial(compose, name, study), Lacking).startswith(reason)


def test_plain_is_what_the_label_says(tmp_path):
    """Whatever is put on top of a method changes its label, and figure 1 shows plain methods only."""
    jobs = ["grpo_aggressive", "grpo_aggressive selection=random", "grpo_aggressive step_rule=measured"]
    jobs += ["capo algo.label=mine", "figure_8 algo=grpo algo.kl_coefficient=0.1"]
    study = study_in(write_study(tmp_path, jobs, seeds=1, steps=3))
    assert [curve.label for curve in compose("1", study).curves] == ["GRPO (A)"]
    assert len(study.curves) == 5


def test_rejected_tokens_are_counted(tmp_path):
    study = study_in(write_study(tmp_path, ["capo"], steps=3))
    shown = compose(find_figure("tokens"), study)
    assert tables.table_of(shown.panels).rows == [
        ["CAPO (A)", "␣$b_", "2", "2", "100.0 %", "33.3 %", "14.3 %"],
        ["CAPO (A)", "a", "4", "10", "40.0 %", "66.7 %", "71.4 %"],
    ]
    (study.runs[0].path / "completions" / "step_000010.parquet").write_bytes(b"torn")
    assert "Counted in the logged completions of n = 2 seeds." in caption(shown)
    damaged = compose("rejected_tokens", study_in(tmp_path))  # the other seed's are still there
    assert "Counted in the logged completions of n = 1 seed." in caption(damaged)
    assert tables.table_of(damaged.panels).rows[0][2:4] == ["1", "1"]
    assert "step_000010.parquet is not a parquet file." in caption(damaged)


def test_who_rejected_no_token_is_named(tmp_path):
    write_study(tmp_path, ["capo", "dr_capo"], seeds=1, steps=3)
    for path in tmp_path.glob("dr_capo*/completions/*"):
        path.unlink()
    (lack,) = compose("rejected_tokens", study_in(tmp_path)).lacking
    assert lack.startswith("Rejected by Dr. CAPO (A): no completions on disk")


@pytest.mark.parametrize("name", ["rejected_tokens", "regimes", "settings"])
def test_dollars_in_a_label_are_no_formula(name, tmp_path):
    for rate in (0.1, 0.2):
        path = write_run(tmp_path, f"capo regime.learning_rate={rate}", steps=3)
        text = (path / "config.yaml").read_text()
        (path / "config.yaml").write_text(text.replace("label: CAPO", r"label: a$\foo$"))
    figure = drawn(compose(name, study_in(tmp_path)))
    assert any(r"a$\foo$" in axes.get_title("left") for axes in figure.axes) or name == "settings"


def test_tokens_without_a_text_an_id_or_a_verdict(tmp_path):
    """A null text is told by its id, what has neither is no token; null is neither kept nor rejected."""
    path = write_run(tmp_path, "capo", steps=3) / "completions" / "step_000010.parquet"
    columns = {"tokens": [["a", None, "a"], [], ["b"], None], "token_ids": [[1, 2, 1], [3], None, None]}
    keep = [[False, False, None], [False], [False], [False]]
    pq.write_table(pa.table({**columns, "keep": keep}), path)
    assert count_tokens(study_in(tmp_path).runs[0]) == ({"a": 1, "#2": 1, "#3": 1, "b": 1},) * 2


def test_time_is_shared_out(tmp_path):
    study = study_in(write_study(tmp_path, ["capo"], steps=3))
    *listed, seconds = rows(compose("time", study).panels)
    found = {row["x"]: float(row["centre"]) for row in listed}
    assert found == {"sampling": 0.5, "curvature": 0.125, "other": pytest.approx(0.375)}
    assert list(seconds.values())[1:] == ["CAPO (A), seconds a step", "", "2", "2", "2", ""]
    for path in tmp_path.glob("*/metrics.jsonl"):
        path.write_text(path.read_text().replace('total_seconds": 2.0', 'total_seconds": 0.0'))
    with pytest.raises(Lacking, match="no run has logged time/total_seconds"):
        compose("time", study_in(tmp_path))


def test_updates_of_one_step_share_its_time(tmp_path):
    """Four updates a step of 10 s, 2 of them sampling; each update 1.5 s of passes and 0.4 s of curvature."""
    path = write_run(tmp_path, "capo", steps=3) / "metrics.jsonl"
    spent = {"total": 10, "rollout": 2, "policy": 1.5, "curvature": 0.4}
    spent = {f"time/{name}_seconds": seconds for name, seconds in spent.items()}
    write_jsonl(path, [row | spent for row in load_run(path.parent).metrics for _ in range(4)])
    *listed, seconds = rows(compose("time", study_in(tmp_path)).panels)
    shares = {"sampling": 0.2, "forward and backward": 0.6, "curvature": 0.16, "other": 0.04}
    assert {row["x"]: float(row["centre"]) for row in listed} == pytest.approx(shares)
    assert seconds["centre"] == "10"


def test_runs_of_different_cards_are_told_apart(tmp_path):
    for seed in (0, 1):
        path = write_run(tmp_path, "capo", seed, steps=3) / "evaluations" / "test.jsonl"
        path.write_text(path.read_text().replace("}", f', "cards": ["{seed}"]}}'))
    with pytest.raises(Lacking, match=r"different cards: 0 \(1 run\); 1 \(1 run\); expected"):
        compose("test", study_in(tmp_path))


@pytest.mark.slow
def test_the_largest_gradient_norm(everything):
    found = rows(compose("8", everything).panels)
    norms = [row for row in found if row["x"] == "max"]
    assert {float(row["centre"]) for row in norms} == {18.0}  # 12 steps, of 1 and 2 each
    assert {(float(row["low"]), float(row["high"])) for row in norms} == {(12.0, 24.0)}


def test_stability_of_a_seed_that_breaks_down_and_one_that_does_not(tmp_path):
    def breaks(x, seed):
        return 0.41 if x > 50 * 96 and seed == 0 else 0.4 + 0.004 * min(x / 96, 50)

    study = study_in(write_study(tmp_path, ["capo"], steps=60, accuracy=breaks))
    shown = compose("stability", study)
    found = {row["panel"]: float(row["centre"]) for row in rows(shown.panels)}
    area = found.pop("Area under the curve")
    assert found == {
        "Collapsed seeds": 0.5,
        "First collapse": 51 * 96,
        "Peak": pytest.approx(0.6),
        "Worst after the peak": pytest.approx((0.41 + 0.6) / 2),
        "Final": pytest.approx((0.41 + 0.6) / 2),
    }
    assert 0.5 < area < 0.53  # (0.404 + 0.6) / 2 for 49 of 59 steps, then 0.505
    [line] = tables.table_of(shown.panels).rows
    assert line[2].startswith("50.0 % [")
    assert line[3] == "4.9k"
    (first,) = [row for row in rows(shown.panels) if row["panel"] == "First collapse"]
    assert first["seeds"] == "1"
    assert "First collapse is the median over the seeds that collapsed." in caption(shown)
    assert "of fewer than 20 values noise is not known" in caption(shown)


def test_updates_that_repeat_a_reward_hide_no_noise(tmp_path):
    """Three updates a step, flat noise: along optimiser steps no seed collapses but by chance."""
    rng = np.random.default_rng(0)
    for seed in range(9):
        path = write_run(tmp_path, "capo", seed, accuracy=lambda *_: rng.binomial(96, 0.45) / 96)
        made = [
            row | {"counter/optimizer_step": 3 * i + update}
            for i, row in enumerate(load_run(path).metrics) for update in (1, 2, 3)
        ]  # fmt: skip
        write_jsonl(path / "metrics.jsonl", made)
    write_run(tmp_path, "zero_learning_rate", steps=10, accuracy=lambda *_: 0.45)
    study = study_in(tmp_path, smoothing=None, x="counter/optimizer_step")
    (panel, *_) = compose("stability", study).panels
    assert panel.columns[0].cells["CAPO (A)"].value == 0
    (accuracy, *_) = compose("accuracy", study).panels
    assert list(accuracy.series[0].x[:3]) == [0, 3, 6]


def test_heat_map_cells(tmp_path):
    for rate in (0.1, 0.2):
        for prompts in (2, 4):
            write_run(
                tmp_path, f"capo regime.learning_rate={rate} regime.prompts_per_step={prompts}", steps=4,
                accuracy=lambda x, seed, rate=rate, prompts=prompts: rate + prompts / 100,
            )  # fmt: skip
    study = study_in(tmp_path)
    shown = compose("regimes", study)
    final, worst = drawn(shown).axes
    assert [text.get_text() for text in final.get_xticklabels()] == ["16", "32"]
    assert [text.get_text() for text in final.get_yticklabels()] == ["0.1", "0.2"]
    cells = {(round(t.get_position()[0]), round(t.get_position()[1])): t.get_text() for t in final.texts}
    assert cells == {(0, 0): "12.0 %", (1, 0): "14.0 %", (0, 1): "22.0 %", (1, 1): "24.0 %"}
    assert {text.get_va() for text in final.texts} == {"center"}  # one seed: nothing stands below
    assert worst.get_title("left") == "CAPO: worst accuracy"
    write_run(tmp_path, "capo regime.learning_rate=0.1 regime.prompts_per_step=2 num_steps=5", steps=4)
    write_run(
        tmp_path, "capo regime.learning_rate=0.1 regime.prompts_per_step=2 optimizer.weight_decay=1", steps=4
    )
    with pytest.raises(Lacking, match="have the same learning rate and batch; narrow runs="):
        compose("regimes", study_in(tmp_path))


def test_a_method_has_one_colour_everywhere_and_no_two_curves_look_the_same(everything):
    seen: dict[str, set[str]] = {}
    for name in ("1", "2", "3", "4", "5", "accuracy"):
        looks = style.looks(compose(name, everything).curves)
        assert len({(str(look.dashes), look.marker, look.filled) for look in looks.values()}) == len(looks)
        assert len({look.colour for look in looks.values()}) == len(looks)
        for label, look in looks.items():
            seen.setdefault(label, set()).add(look.colour)
    spelled = [replace(everything.curves[0].run, config={"algo": {"colour": c}}) for c in ("red", "#FF0000")]
    one, other = style.looks([Curve(str(i), (run,)) for i, run in enumerate(spelled)]).values()
    assert one != other and one.colour == "#ff0000"
    first = {name: seen[name] for name in ("CAPO (A)", "GRPO (A)", "GRPO")}
    assert first == {"CAPO (A)": {"#0072b2"}, "GRPO (A)": {"#d55e00"}, "GRPO": {"#753400"}}


def test_a_lead_is_paired_by_seed_and_over_the_best_plain_rate(tmp_path):
    """Constant curves: areas are heights. Seed 0 has no partner, none a rival of another batch."""
    slow, fast = "grpo_aggressive regime.learning_rate=1e-5", "grpo_aggressive regime.learning_rate=2e-4"
    heights = {
        slow: {1: 0.5, 2: 0.5},
        fast: {1: 0.6, 2: 0.7},
        f"{fast} regime.prompts_per_step=24": {1: 0.9, 2: 0.9},
        "capo": {0: 0.1, 1: 0.65, 2: 0.72},
        "grpo_conservative": {1: 0.9, 2: 0.9},
    }
    for job, of_seeds in heights.items():
        for seed in of_seeds:
            write_run(tmp_path, job, seed, steps=6, accuracy=lambda _, s, of_seeds=of_seeds: of_seeds[s])
    study = study_in(tmp_path)
    picture = compose("criterion", study)
    (column,) = [c for c in picture.panels[-1].columns if "Lead" in c.heading]
    found = dict(column.cells)
    by_t = seed_estimate(np.array([0.05, 0.02]), "mean", "t")
    said = cell_text(found["CAPO (A)"], column.unit)
    assert said == cell_text(by_t, "points") == "3.5 [-15.6, 22.6]"
    assert found["GRPO"] == "no rival"
    told = ["no rival", "the best rival", "the best rival"]
    assert sorted(cell for cell in found.values() if isinstance(cell, str)) == told
    axes = drawn(picture).axes[-1]
    assert sorted(text.get_text() for text in axes.texts) == told
    assert axes.get_xlabel() == "difference of mean accuracy, points"
    assert "%" not in "".join(text.get_text() for text in axes.get_xticklabels())
    leads = [row for row in rows(picture.panels) if row["panel"] == "Lead over plain GRPO"]
    assert {row["curve"]: row["seeds"] for row in leads if "CAPO" in row["curve"]} == {"CAPO (A)": "2"}
    assert "95 % t interval, same batch, over the x both have." in caption(picture)


def test_the_best_rival_is_the_best_as_far_as_the_curve_goes(tmp_path):
    """One that is better only in steps that the curve does not have is not."""
    late, early = "grpo_aggressive regime.learning_rate=1e-5", "grpo_aggressive regime.learning_rate=2e-4"
    write_run(tmp_path, late, steps=30, accuracy=lambda x, _: 0.3 if x <= 5 * 96 else 0.9)
    write_run(tmp_path, early, steps=30, accuracy=lambda x, _: 0.4 if x <= 5 * 96 else 0.5)
    write_run(tmp_path, "capo", steps=5, accuracy=lambda *_: 0.5)
    panels = compose("criterion", study_in(tmp_path)).panels
    assert panels[-1].columns[0].cells["CAPO (A)"].value == pytest.approx(0.1)


def test_other_problems_are_not_measured_against(tmp_path):
    """With mix=true: CAPO and GRPO on one data set, GRPO in both regimes on an easy one."""
    write_study(tmp_path, ["capo", "grpo_aggressive"], steps=6)
    easy = [f"grpo_{regime} dataset.name=easy" for regime in ("aggressive", "conservative")]
    write_study(tmp_path, easy, steps=6, accuracy=lambda x, _: 0.8 + 1e-5 * x)
    study = study_in(tmp_path)
    of_k = [curve.label for curve in study.curves if curve.run.setting("dataset.name") != "easy"]
    assert len(of_k) == 2
    factors = compose("1", study).panels[0].columns[-1].cells
    assert {label for label, cell in factors.items() if cell == "other problems"} == set(of_k)
    assert list(factors.values()).count("reference") == 1
    leads = compose("criterion", study).panels[-1].columns[0].cells
    assert leads[of_k[0]].value == pytest.approx(0) and leads[of_k[1]] == "the best rival"


def test_a_seed_that_never_began_takes_no_rival_away(tmp_path):
    """The best plain rate is 0.8, though its second seed failed before the first step."""
    for rate, height in (("1e-4", 0.8), ("1e-5", 0.3)):
        for seed in (1, 2):
            write_run(
                tmp_path, f"grpo_aggressive regime.learning_rate={rate}", seed,
                steps=0 if rate == "1e-4" and seed == 2 else 6, accuracy=lambda *_, height=height: height,
            )  # fmt: skip
    write_study(tmp_path, ["capo"], seeds=3, steps=6, accuracy=lambda *_: 0.5)
    panels = compose("criterion", study_in(tmp_path)).panels
    lead = panels[-1].columns[0].cells["CAPO (A)"]
    assert (lead.value, lead.low) == (pytest.approx(-0.3), None)


def test_seeds_of_other_x_are_judged_by_their_own_points(tmp_path):
    """Groups were filtered, so that seeds are drawn between their points: that takes noise off them."""
    rng = np.random.default_rng(0)
    for seed in range(12):
        path = write_run(tmp_path, "capo", seed, accuracy=lambda *_: rng.binomial(96, 0.45) / 96)
        x = np.cumsum(rng.integers(40, 97, 100)).tolist()
        made = [row | {"counter/completions": at} for row, at in zip(load_run(path).metrics, x, strict=True)]
        write_jsonl(path / "metrics.jsonl", made)
    study = study_in(tmp_path)
    (largest,) = [p for p in compose("stability", study).panels if p.title == "Peak"]
    peaks = [max(row["reward/accuracy"] for row in run.metrics) for run in study.runs]
    assert largest.columns[0].cells["CAPO (A)"].value == pytest.approx(np.mean(peaks))


@pytest.mark.parametrize("name", ["criterion", "methods", "stability"])
def test_bars_say_which_seeds_ended_early(name, tmp_path):
    """One of two, at half of its way: the final accuracy is where both still count."""
    for seed, steps in enumerate((100, 50)):
        write_run(tmp_path, "capo", seed, steps=steps)
    picture = compose(name, study_in(tmp_path))
    assert ". A seed counts as far as it went; seeds that go on: CAPO (A) 2, 1 from 4.8k." in caption(picture)
    (final,) = [row for row in rows(picture.panels) if row["panel"] in ("Final", "Training, final")]
    assert (float(final["centre"]), final["seeds"]) == (pytest.approx(0.41 + 0.048), "2")


def test_bars_along_another_x_say_so(tmp_path):
    study = study_in(write_study(tmp_path, ["capo"], steps=12), x="counter/optimizer_step")
    picture = compose("methods", study)
    assert [panel.title for panel in picture.panels][2] == "Until 90 %"
    assert drawn(picture).axes[2].get_xlabel() == "optimiser steps"


def test_a_method_ends_with_what_each_of_its_seeds_ends_with(tmp_path):
    """Wherever they end: of 20 and 30 steps, all but the last evaluation of the longer seed is 0."""
    for seed, steps in enumerate((20, 30)):
        write_run(
            tmp_path, "capo", seed, steps=steps, accuracy=lambda x, s: 0.8 if x == 30 * 96 else 0.4 * (1 - s)
        )
    panels = compose("methods", study_in(tmp_path)).panels
    (column,) = [c for panel in panels for c in panel.columns if panel.title == "Held-out, final"]
    assert column.cells["CAPO (A)"].value == pytest.approx(0.6)


def test_what_a_method_ends_with_is_smoothed_as_its_caption_says(tmp_path):
    """Twelve evaluations at 0.1, the last at 0.9, weight 0.1."""
    write_run(tmp_path, "capo", steps=100, accuracy=lambda x, _: 0.9 if x == 100 * 96 else 0.1)
    path = next(tmp_path.glob("*/eval.jsonl"))
    evaluations = load_run(path.parent).evaluations
    write_jsonl(path, [*(evaluations[0] | {"counter/completions": at} for at in (1, 2)), *evaluations[1:11]])
    picture = compose("methods", study_in(tmp_path, smoothing=0.1))
    assert picture.panels[0].columns[0].cells["CAPO (A)"].value == pytest.approx(0.1 + 0.1 * 0.8)
    assert "EMA 0.1:" in caption(picture)


def test_a_method_is_good_where_each_of_its_seeds_is(tmp_path):
    """Seeds rise by a tenth or a twentieth a step of 96 from 0.5, so they are at 0.9 in steps 4 and 8."""
    for seed in range(2):
        write_run(tmp_path, "capo", seed, steps=10, accuracy=lambda x, s: 0.5 + x / 96 / (10 + 10 * s))
        write_run(tmp_path, "grpo_aggressive", seed, steps=10, accuracy=lambda _, s: 0.9 - 0.1 * s)
    panels = compose("methods", study_in(tmp_path)).panels
    (column,) = [c for panel in panels for c in panel.columns if panel.title == "Until 90 %"]
    assert column.cells["CAPO (A)"].value == 6 * 96
    assert column.cells["GRPO (A)"] == "1 of 2 seeds"
