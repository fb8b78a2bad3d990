"""Runs -> curves: what is a seed of what, what a curve is called, and what must not be drawn together."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from capo_exp.config.errors import ConfigError
from capo_exp.figures import labels, style
from capo_exp.figures.curves import curves, families, reference_of, start_value
from capo_exp.figures.report.overview import differing
from capo_exp.runs.identity import run_id, run_name
from capo_exp.runs.read import LoggedRun
from tests.conftest import ALGORITHMS
from tests.pieces import one_line

STEP, COMPLETIONS = "counter/rollout_step", "counter/completions"


@pytest.fixture
def make(composed):
    """A run as `python -m capo_exp OVERRIDES` would leave it."""

    def run(*overrides, record=None, metrics=None):
        config = composed(*overrides)
        base = {"run_id": run_id(config), "device": "cpu", "data": "d1"} | (record or {})
        return LoggedRun(Path("outputs") / run_name(config), asdict(config), base, metrics or [], [])

    return run


def seeds(make, *overrides, count=2):
    return [make(*overrides, f"seed={seed}") for seed in range(count)]


def shape(found):
    return [(curve.label, [run.setting("seed") for run in curve.runs]) for curve in found]


def test_the_curves_of_figure_1(make):
    runs = [
        *seeds(make, "algo=grpo", "regime=conservative", "num_steps=52"),
        *seeds(make, "algo=grpo", count=3),
        *seeds(make, "algo=grpo", "regime.name=zero", "regime.learning_rate=0.0", "num_steps=10"),
        *reversed(seeds(make, "algo=capo")),
    ]  # fmt: skip
    found = curves(runs, mix=False)
    assert shape(found) == [
        ("CAPO (A)", [0, 1]),
        ("GRPO", [0, 1]),
        ("GRPO (A)", [0, 1, 2]),
        ("GRPO (learning rate 0)", [0, 1]),
    ]
    assert [labels.is_safe(curve.run) for curve in found] == [False, True, False, False]
    assert reference_of(found) is found[1]
    assert reference_of(found[2:]) is None


def test_what_changes_no_training_makes_no_other_curve(make):
    for override in (
        "logger=files", "checkpoint.every=3", "experiment_name=other", "overwrite=true", "algo.label=X",
        "evaluation.every=5", "curvature.calibrate_every=10", "algo.colour=red",
    ):  # fmt: skip
        [curve] = curves([make("seed=0"), make("seed=1", override)], mix=False)
        assert len(curve.runs) == 2, override


def test_a_server_of_its_own_and_other_limits_of_the_engine_make_no_other_curve(make):
    shared = ("algo=grpo", "rollout=vllm")
    other = ("rollout.server_url=http://localhost:8", "rollout.engine.gpu_memory_utilization=0.7", "seed=1")
    assert shape(curves([make(*shared), make(*shared, *other)], mix=False)) == [("GRPO (A)", [0, 1])]


@pytest.mark.parametrize(
    ("override", "labelled"),
    [
        ("regime.learning_rate=5e-4", "CAPO (A) lr 5e-4"),
        ("algo.selection.policy_shift_max=1e-5", "CAPO (A) m_F < 1e-5"),
        ("curvature.optimizer_model=sgd", "CAPO (A) sgd model"),
        ("optimizer.betas=[0.9,0.95]", "CAPO (A) betas [0.9, 0.95]"),
        ("model.gradient_checkpointing=true", "CAPO (A) gradient_checkpointing on"),
        ("algo.token_loss._target_=capo_exp.algorithms.pg.plain", "CAPO (A) token_loss plain"),
    ],
)
def test_what_tells_a_curve_from_the_default_one(make, override, labelled):
    found = curves([make("seed=0"), make("seed=1"), make(override, "seed=0")], mix=False)
    assert [len(curve.runs) for curve in found if curve.label == labelled] == [1]
    assert len(found) == 2 and all(curve.label.startswith("CAPO (A) ") for curve in found)


@pytest.mark.parametrize(
    ("overrides", "labelled"),
    [
        (["algo=dr_capo"], "Dr. CAPO (A)"),
        (["algo=grpo", "selection=random_matched"], "GRPO (A) selection random_matched"),
        (["algo=cpgd", "selection=capo", "regime=conservative"], "CPGD selection capo"),
        (["algo=dr_grpo", "algo.variant=2_passes_clip_0.2"], "Dr. GRPO (A) 2 passes clip 0.2"),
        (["algo=grpo", "algo.label=", "algo.name=mine"], "mine (A)"),
        (["algo=dr_grpo", "algo.label="], "Dr. GRPO (A)"),  # a run that is older than the key
    ],
)
def test_labels(make, overrides, labelled):
    [curve] = curves([make(*overrides)], mix=False)
    assert curve.label == labelled


def test_every_shipped_method_states_its_look():
    """So that a run which is older than these keys has one, too."""
    for name in ALGORITHMS:
        run = LoggedRun(Path("r"), {"algo": {"name": name}}, {}, [], [])
        label, colour, marker = (labels.logged(run, key) for key in ("label", "colour", "marker"))
        assert label and colour and colour not in style.SPARE and marker in style.MARKERS, name


def test_a_method_that_states_no_look_has_one_by_its_name():
    def bare(**algo):
        return LoggedRun(Path("r"), {"algo": algo}, {}, [], [])

    mine = bare(name="mine")
    assert (labels.algorithm(mine), labels.method(mine)) == ("mine", "mine")
    assert style.colour(mine) in style.SPARE and style.marker(mine) in style.MARKERS
    assert style.colour(mine) == style.colour(bare(name="mine", variant="x"))
    wrong = bare(name="mine", colour="javascript:1", marker="none of these")  # a record may hold anything
    assert (style.colour(wrong), style.marker(wrong)) == (style.colour(mine), style.marker(mine))


def test_a_key_with_braces_is_told_as_it_is():
    assert labels.text("algo.{x}", {"algo.{x}": 1e-4}) == "{x} 1e-4"


def test_a_sweep_has_the_fewest_settings_in_its_labels_and_is_in_order(make):
    rates, batches = ("2e-5", "1e-4", "1e-3"), (12, 144, 48)
    runs = [
        make(f"regime.learning_rate={rate}", f"regime.prompts_per_step={batch}", f"num_steps={9600 // batch}")
        for batch in batches
        for rate in rates
    ]
    assert [curve.label for curve in curves(runs, mix=False)] == [
        f"CAPO (A) lr {rate} {batch} prompts" for rate in rates for batch in sorted(batches)
    ]


def test_labels_that_rounding_makes_the_same_are_numbered_and_mixed_ones_say_their_model(make):
    runs = [make(f"regime.learning_rate={rate}") for rate in ("1.00001e-4", "1.00002e-4")]
    found = sorted(curve.label for curve in curves(runs, mix=False))
    assert found == ["CAPO (A) lr 1e-4 #1", "CAPO (A) lr 1e-4 #2"]
    runs = [make("algo=grpo", "model.name=large"), make("algo=capo"), LoggedRun(Path("bare"), {}, {}, [], [])]
    assert [curve.label for curve in curves(runs, mix=True)] == ["CAPO (A) tiny", "GRPO (A) large", "bare"]


def test_a_copy_counts_once_and_the_one_that_came_further_counts(make):
    run = make("seed=0")
    short, long = replace(run, path=Path("a"), metrics=[{}]), replace(run, path=Path("b"), metrics=[{}, {}])
    for order in ([short, long], [long, short]):
        [curve] = curves(order, mix=False)
        assert [each.path for each in curve.runs] == [Path("b")]


def test_no_copy_is_of_another_device_or_commit(make):
    """A run of one id on a GPU is another curve; one of another commit is as good as its twin."""
    cpu = make("seed=0", record={"git": {"commit": "a"}})
    gpu, newer = (replace(cpu, path=Path(str(more)), record=cpu.record | more)
                  for more in ({"device": "NVIDIA X"}, {"git": {"commit": "b"}}))  # fmt: skip
    assert len(curves([cpu, gpu], mix=False)) == 2
    with pytest.raises(ConfigError, match="different runs with the same settings and seed 0"):
        curves([cpu, newer], mix=False)


def test_two_different_runs_of_one_seed_are_refused(make):
    run, often = make("seed=3"), make("seed=3", "evaluation.every=1")  # trains to the same numbers
    for ids in ("aaaa", "bbbb"), ("aaaa", None):
        records = [{"run_id": name, "data": "d1"} for name in ids]
        same = [replace(run, path=Path(f"x{i}"), record=record) for i, record in enumerate(records)]
        for mix in (False, True):
            with pytest.raises(ConfigError, match=r"x0, x1: different runs .* seed 3; expected one run for"):
                curves(same, mix=mix)
    with pytest.raises(ConfigError, match="same settings and seed 3"):
        curves([run, often], mix=False)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["model.name=large"], "model.name: tiny (2 runs), large (1 run)"),
        (["dataset.max_completion_tokens=128"], "dataset.max_completion_tokens: 96 (2 runs), 128 (1 run)"),
        (["dataset.source.seed=1"], "dataset.source.seed: 0 (2 runs), 1 (1 run)"),
        (["rollout.temperature=0.9"], "rollout.temperature: 1.0 (2 runs), 0.9 (1 run)"),
        (["evaluation.temperature=1.0"], "evaluation.temperature"),
    ],
)
def test_what_cannot_be_compared_is_refused(make, overrides, key):
    runs = [*seeds(make, "algo=grpo"), make("algo=capo", *overrides)]
    message = one_line(lambda: curves(runs, mix=False))
    assert key in message and "mix=true" in message and "narrow runs=" in message
    assert [len(curve.runs) for curve in curves(runs, mix=True)] == [1, 2]
    assert families(runs) == [runs[:2], runs[2:]]
    bare = LoggedRun(Path("bare"), {}, {}, [], [])  # which can be compared with all
    assert families([bare, *runs]) == [[bare, *runs[:2]], runs[2:]]


def test_other_problems_are_refused_whatever_their_folder_is_called(make):
    one, same = make("seed=0", "dataset.path=/here"), make("seed=1", "dataset.path=/there")
    assert len(curves([one, same], mix=False)) == 1
    other = replace(same, record=same.record | {"data": "d2"})
    with pytest.raises(ConfigError, match=r"data: d1 \(1 run\), d2 \(1 run\)"):
        curves([one, other], mix=False)
    assert len(curves([one, other], mix=True)) == 2
    unknown = [replace(run, record={"run_id": run.name}) for run in (one, same)]
    assert len(curves(unknown, mix=False)) == 2  # perhaps the same, perhaps not
    assert len(curves([one, unknown[1]], mix=False)) == 2


def test_a_run_that_is_older_than_a_neutral_key_is_a_seed_of_a_newer_one(make):
    old = make("seed=1", "algo=grpo")
    for group, keys in {"algo": ["credit", "variant", "kl_estimator"], "curvature": ["hidden_shift"],
                        "rollout": ["correction", "train_engine", "chunking"],
                        "model": ["hidden_size", "model_type", "revision"]}.items():  # fmt: skip
        for key in keys:
            del old.config[group][key]
    [curve] = curves([make("seed=0", "algo=grpo"), old], mix=False)
    assert len(curve.runs) == 2
    newer = make("seed=0", "algo=grpo", "curvature.hidden_shift=1", "algo.kl_coefficient=0.1")
    assert len(curves([newer, old], mix=False)) == 2
    del old.config["optimizer"]["weight_decay"]  # and one without a known neutral value is shown
    assert "GRPO (A) without weight_decay" in [c.label for c in curves([make("algo=grpo"), old], mix=False)]


def test_length_counts_where_the_learning_rate_follows_it(make):
    def number(*overrides):
        return len(curves([make("seed=0", *overrides), make("seed=1", "num_steps=7", *overrides)], mix=False))

    assert number() == 2
    assert number("optimizer.schedule=constant") == 1
    assert number("regime.learning_rate=0.0") == 1
    runs = [make("optimizer.schedule=constant"), make()]
    found = {curve.label for curve in curves(runs, mix=False)}
    assert found == {"CAPO (A) constant schedule", "CAPO (A) cosine schedule"}


def test_the_kind_of_device_counts_not_its_number(make):
    def run(seed, name, device):
        return make(f"seed={seed}", f"device={name}", record={"device": device})

    assert len(curves([run(0, "auto", "cpu"), run(1, "cpu", "cpu")], mix=False)) == 1
    assert len(curves([run(0, "cuda:0", "NVIDIA X"), run(1, "cuda:1", None)], mix=False)) == 1
    found = curves([run(0, "auto", "cpu"), run(1, "auto", "NVIDIA X")], mix=False)  # float32 and bfloat16
    assert [curve.label for curve in found] == ["CAPO (A) device cpu", "CAPO (A) device gpu"]


def test_what_differs(make):
    other = ("algo=grpo", "seed=1", "evaluation.every=5", "dataset.path=/b")
    runs = [make("algo=capo", "seed=0", "output_dir=/a"), make(*other)]
    heading, rows = vars(differing(runs, ["a", "b"])).values()
    table = {key: values for key, *values in rows}
    assert heading == ["setting", "a", "b"]
    assert table["algo.name"] == ["capo", "grpo"] and table["seed"] == ["0", "1"]
    assert table["evaluation.every"] == ["20", "5"]
    assert table["algo.selection.policy_shift_max"] == ["0.0001", "-"]
    functions = ["capo_exp.algorithms.capo.shift_bounds", "capo_exp.algorithms.neutral.keep_all"]
    assert table["algo.selection._target_"] == functions
    assert len(table) == 7 and rows[0][0] == "algo.name"
    assert differing([runs[0], runs[0]], ["a", "a"]).rows == []
    bare = differing([replace(run, record={}) for run in runs], ["a", "b"])
    assert "dataset.path" not in [key for key, *_ in bare.rows]


def test_the_reference_is_the_plain_curve_with_most_seeds(make):
    runs = [
        *seeds(make, "algo=grpo", "regime=conservative", "num_steps=10", count=1),
        *seeds(make, "algo=grpo", "regime=conservative", "num_steps=20", count=2),
        *seeds(make, "algo=grpo", "regime=conservative", "selection=random", count=3),
    ]
    found = reference_of(curves(runs, mix=False))
    assert found is not None and found.label == "GRPO 20 steps"


def still(make, seed, accuracies, first=1):
    steps = enumerate(accuracies, first)
    rows = [{STEP: step, COMPLETIONS: 96 * step, "reward/accuracy": a} for step, a in steps]
    return make("algo=grpo", "regime.name=zero", "regime.learning_rate=0", f"seed={seed}", metrics=rows)


def test_where_accuracy_curves_start(make):
    long, short = still(make, 0, [0.1] * 9 + [0.4, 0.9, 0.9]), still(make, 1, [0.2, 0.6])
    moving = make("algo=grpo", metrics=[{STEP: 10, "reward/accuracy": 0.99}])
    assert start_value([long, short, moving], "reward/accuracy") == pytest.approx((0.4 + 0.6) / 2)
    assert start_value([moving], "reward/accuracy") is None
    assert start_value([still(make, 0, [None]), still(make, 1, [0.3], first=11)], "reward/accuracy") is None
    rows = [{COMPLETIONS: 0, "eval/accuracy": 0.5}, {COMPLETIONS: 1920, "eval/accuracy": 0.8}]
    assert start_value([replace(make(), evaluations=rows), make()], "eval/accuracy") == 0.5
    assert start_value([make()], "eval/accuracy") is None


def test_a_config_that_has_been_through_javascript_is_the_same(make):
    run, other = (make(f"seed={seed}", "optimizer.betas=[0.0,0.95]") for seed in (0, 1))
    text = json.dumps(other.config).replace(".0,", ",").replace(".0}", "}")
    exported = replace(other, config=json.loads(text))
    assert exported.config["optimizer"]["betas"] == [0, 0.95] and '"top_p": 1,' in text
    assert len(curves([run, exported], mix=False)) == 1
    whole = make("seed=1", "model.gradient_checkpointing=true", "optimizer.betas=[0.0,0.95]")
    assert len(curves([run, whole], mix=False)) == 2
