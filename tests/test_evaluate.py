"""`python -m capo_exp.evaluate` on real runs of the tiny model and on completions on disk."""

import copy
import json
import os
import shutil
import sys
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from statistics import fmean

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from capo_exp.cli.evaluate import main
from capo_exp.cli.evaluate_config import benchmark_config, run_config
from capo_exp.config.errors import ConfigError, RunFailed
from capo_exp.config.plugins import PLUGINS
from capo_exp.config.schema import TrainConfig, conf_dir
from capo_exp.evaluation import benchmark
from capo_exp.evaluation import subject as evaluate_model
from capo_exp.evaluation.card import describe_grader
from capo_exp.evaluation.subject import weights_digest
from capo_exp.evaluation.table import BenchmarkScore, gains, results_table
from capo_exp.evaluation.table import test_rows as rows_on_record
from capo_exp.figures.__main__ import main as figures
from capo_exp.grading.verifier import ExactVerifier
from capo_exp.runs.lock import locked
from capo_exp.runs.read import load_run, read_jsonl
from capo_exp.training import loop as train
from tests.grading_pieces import SHARED, needs_data
from tests.process_pieces import needs_vllm

TRAIN = [
    "logger=files", "num_steps=2", "regime.prompts_per_step=4", "regime.group_size=4", "algo=grpo",
    "evaluation.num_problems=24", "dataset.max_completion_tokens=40", "checkpoint.every=1",
    "regime.learning_rate=2e-3", "optimizer.schedule=constant_with_warmup", "optimizer.warmup_ratio=0",
    "dataset.source.num_train=40", "dataset.source.num_eval=40",
]  # fmt: skip
FEW = ["samples=2", "num_problems=24", "problems_per_part=10"]


@pytest.fixture(scope="module")
def trained(composed, tmp_path_factory):
    return train.run(composed(*TRAIN, f"output_dir={tmp_path_factory.mktemp('outputs')}"))


@pytest.fixture
def evaluated(capsys):
    """Runs a command line that has to succeed; gives what it printed."""

    def run(*arguments):
        status = main(list(arguments))
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out

    return run


def refused(capsys, *arguments):
    assert main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def rows(path):
    return pq.ParquetFile(path).read().to_pylist()


def folder(root, label, name="arithmetic"):
    (found,) = root.glob(f"**/{label}-*/{name}-*")
    return found


@pytest.fixture(scope="module")
def scored(trained):
    """The run's last checkpoint and its base model, evaluated once."""
    assert main([f"run={trained}", *FEW]) == 0
    return folder(trained / "evaluations", "step_000002")


@pytest.mark.slow
def test_scores_are_those_of_the_completions_on_record(scored):
    completions, problems = rows(scored / "completions.parquet"), rows(scored / "problems.parquet")
    scores = json.loads((scored / "scores.json").read_text())
    assert [(row["index"], row["sample"]) for row in completions] == [
        (i, s) for i in range(24) for s in range(2)
    ]
    assert scores["problems"] == len(problems) == 24 and scores["samples"] == 2
    assert scores["average"]["value"] == pytest.approx(fmean(row["correct"] for row in completions))
    pairs = [completions[i : i + 2] for i in range(0, 48, 2)]
    solved = [any(row["correct"] for row in pair) for pair in pairs]
    assert scores["pass_at"]["2"]["value"] == pytest.approx(fmean(solved))
    assert scores["average"]["low"] < scores["average"]["value"] < scores["average"]["high"]
    for pair, problem in zip(pairs, problems, strict=True):
        assert problem["accuracy"] == fmean(row["correct"] for row in pair)
        assert problem["prompt"] == f"{problem['problem']}\n"
        for row in pair:  # by hand: the text of the last box
            right = rf"\boxed{{{row['gold'][0]}}}" in row["completion"]
            assert row["correct"] == right == (row["reason"] == "correct")
    assert scores["completion_length"] == pytest.approx(fmean(row["tokens"] for row in completions))
    cut = [row for row in completions if row["truncated"]]
    assert cut and all(row["tokens"] == 40 and row["reason"] != "correct" for row in cut)
    assert scores["truncated_fraction"] == len(cut) / 48
    assert scores["reasons"].get("correct", 0) == sum(row["correct"] for row in completions)
    assert sum(level["problems"] for level in scores["by_level"].values()) == 24


def test_the_card_says_what_the_score_depends_on(scored, trained):
    card = json.loads((scored / "card.json").read_text())
    assert card["sampling"] == {
        "samples": 2, "temperature": 0.6, "top_k": 0, "top_p": 0.95, "max_tokens": 40, "seed": 0,
        "problems_per_call": 10,
    }  # fmt: skip
    assert card["dataset"]["problems"] == 24 and len(card["dataset"]["fingerprint"]) == 16
    assert card["model"]["step"] == 2 and scored.parent.name == f"step_000002-{card['model']['weights'][:8]}"
    assert card["prompt"]["template"] == "{problem}\n"
    assert card["prompt"]["first"] == rows(scored / "problems.parquet")[0]["prompt"]
    assert {"torch", "transformers"} <= set(card["engine"]["packages"])
    assert card["grader"]["verifier"].endswith("ExactVerifier")
    base = json.loads((folder(trained.parents[1] / "evaluations", "tiny") / "card.json").read_text())
    assert base["model"]["weights"] != card["model"]["weights"]
    del base["model"], card["model"]
    assert base == card


def test_the_weights_digest_sees_every_parameter_and_not_where_it_came_from(small_model):
    seen = {weights_digest(small_model)}
    for parameter in small_model.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
        seen.add(weights_digest(small_model))
    assert len(seen) == 1 + len(list(small_model.parameters()))
    assert weights_digest(copy.deepcopy(small_model).double().float()) in seen


def test_the_same_command_samples_nothing_and_shows_the_same(scored, trained, evaluated, monkeypatch):
    monkeypatch.setattr(evaluate_model, "draw_completions", None)
    shown = evaluated(f"run={trained}", *FEW)
    average = json.loads((scored / "scores.json").read_text())["average"]["value"]
    assert f"{100 * average:.1f} [" in shown
    assert "step_000002 - base" in shown
    steps = {row["counter/rollout_step"]: row for row in read_jsonl(trained / "evaluations" / "test.jsonl")}
    assert [steps[step]["counter/completions"] for step in (0, 2)] == [0, 32]
    assert steps[2]["test/accuracy"] == steps[2]["test/accuracy/arithmetic"] == pytest.approx(average)


@pytest.mark.slow
def test_a_card_its_scores_and_examples_are_sent_to_each_tracker(
    scored, trained, evaluated, tmp_path, monkeypatch
):
    """From the files alone: nothing is sampled again."""
    monkeypatch.setattr(evaluate_model.Subject, "engine", None)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    for tracker in ("tensorboard", "trackio", "wandb"):
        if find_spec(tracker):
            evaluated(f"run={trained}", *FEW, f"logger={tracker}", "base=false", "project=mine")
    scores = json.loads((scored / "scores.json").read_text())
    events = EventAccumulator(str(scored / "tensorboard")).Reload()
    assert events.Scalars("test/average/value")[0].value == pytest.approx(scores["average"]["value"])
    [card], [examples] = (events.Tensors(f"{name}/text_summary") for name in ("card", "examples"))
    assert scored.name.rpartition("-")[0] in card.tensor_proto.string_val[0].decode()
    assert examples.tensor_proto.string_val[0].decode().count("\n") == 48 + 1
    [written] = scored.glob("wandb/offline-run-*/files/media/table/examples_*.table.json")
    assert len(json.loads(written.read_text())["data"]) == 48
    from trackio.sqlite_storage import SQLiteStorage

    [run] = SQLiteStorage.get_runs("mine")
    [row] = SQLiteStorage.get_logs("mine", run)
    assert run.startswith(trained.name) and run.endswith(scored.name)
    assert row["test/average/value"] == scores["average"]["value"] and len(row["examples"]["_value"]) == 48


@pytest.mark.slow
def test_rows_of_several_commands_and_runs_stay_apart_and_figures_draw_those_of_one_card(
    trained, evaluated, tmp_path, capsys
):
    """No row of an earlier command is lost; the benchmarks that were tested last are drawn."""
    runs, few, out = [tmp_path / name for name in ("a", "b")], ["num_problems=3"], tmp_path / "out"
    for run in runs:
        shutil.copytree(trained, run, ignore=shutil.ignore_patterns("evaluations"))
    shown = evaluated(f"run={runs[0]},{runs[1]}", "samples=1", *few, f"output={out}")
    assert {"a", "b"} <= {*shown.splitlines()} and len(list(out.glob("tiny-*/arithmetic-*"))) == 1
    assert [len(read_jsonl(out / name / "test.jsonl")) for name in ("a", "b")] == [2, 2]
    for run, samples in zip(runs, ("1", "2"), strict=True):
        evaluated(f"run={run}", *few, "base=false", f"samples={samples}")
    draw = [f"runs={tmp_path}", "figure=test", f"output={tmp_path / 'figures'}"]
    assert figures(draw) == 2
    assert "runs tested by different cards: arithmetic-" in capsys.readouterr().err
    evaluated(f"run={runs[0]}", *few, "base=false", "samples=2", "checkpoint=all")
    rows = read_jsonl(runs[0] / "evaluations" / "test.jsonl")
    assert [row["counter/rollout_step"] for row in rows] == [2, 1, 2] and rows[0]["cards"] != rows[2]["cards"]
    assert [row for row in load_run(runs[0]).evaluations if "test/accuracy" in row] == rows[1:]
    assert figures(draw) == 0


def test_who_comes_second_waits_and_reads(trained, scored, evaluated, monkeypatch):
    """Another process holds the folder, and writes the scores before it lets go."""
    scores, is_locked, seen = (scored / "scores.json").read_text(), benchmark.is_locked, list[bool]()
    (scored / "scores.json").unlink()
    with ExitStack() as other:
        other.enter_context(locked(scored))

        def polled(folder):
            if folder != scored:
                return is_locked(folder)
            seen.append(is_locked(folder))
            (scored / "scores.json").write_text(scores)
            other.close()
            return seen[-1]

        monkeypatch.setattr(benchmark, "is_locked", polled)
        monkeypatch.setattr(evaluate_model, "draw_completions", None)
        monkeypatch.setattr(benchmark, "POLL_SECONDS", 0.0)
        evaluated(f"run={trained}", *FEW)
    assert seen == [True]


@pytest.mark.slow
def test_ended_anywhere_it_goes_on_to_the_same_completions(
    scored, trained, evaluated, monkeypatch, tmp_path,
    capsys,
):  # fmt: skip
    """What was sampled is not lost when grading fails, and no part is sampled twice."""
    command = [f"run={trained}", *FEW, "base=false", f"output={tmp_path}"]
    draw, score, calls = evaluate_model.draw_completions, ExactVerifier.score, []

    def interrupted(*args, **kwargs):
        calls.append(args[1].seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*args, **kwargs)

    def no_workers(*_):
        raise RunFailed("verification workers ended 3 times")

    monkeypatch.setattr(evaluate_model, "draw_completions", interrupted)
    monkeypatch.setattr(ExactVerifier, "score", no_workers)
    assert main(command) == 1
    assert "workers ended 3 times; parts that are done are kept" in capsys.readouterr().err
    monkeypatch.setattr(ExactVerifier, "score", score)
    assert main(command) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert len(list(tmp_path.glob("*/step_000002-*/arithmetic-*/parts/*.parquet"))) == 2
    evaluated(*command)
    assert len(calls) == 4 and len(set(calls)) == 3  # a seed for each part
    again = folder(tmp_path, "step_000002")
    assert rows(again / "completions.parquet") == rows(scored / "completions.parquet")
    assert not (again / "parts").exists()
    scores = (again / "scores.json").read_text()
    (again / "scores.json").write_text(scores.replace('"value": 0.', '"value": 9.'))
    evaluated(*command)
    assert '"value": 9.' in (again / "scores.json").read_text() and len(calls) == 4
    evaluated(*command, "overwrite=true")
    assert (again / "scores.json").read_text() == scores and len(calls) == 7


@pytest.mark.slow
def test_what_changes_the_samples_changes_the_folder(trained, evaluated, tmp_path):
    command = [f"run={trained}", "samples=1", "num_problems=2", "base=false", f"output={tmp_path}"]
    changes = (
        "temperature=0.9", "seed=1", "problems_per_part=1", "prompt=few_shot", "num_problems=1",
        "model.attn_implementation=eager",
    )  # fmt: skip
    # A longest prompt above all changes nothing.
    for change in ("dataset.max_prompt_tokens=900", *changes):
        evaluated(*command, "dataset.max_prompt_tokens=1000", "dataset.max_completion_tokens=3", change)
    assert len(list(tmp_path.glob("*/step_000002-*/*"))) == 1 + len(changes)


def test_levels_are_those_asked_for_and_not_those_of_training(trained, evaluated, tmp_path):
    few = ["samples=1", "num_problems=4", "base=false", f"output={tmp_path}"]
    evaluated(f"run={trained}", *few, "dataset.levels=[2]")
    assert {row["level"] for row in rows(folder(tmp_path, "step_000002") / "problems.parquet")} == {"2"}
    run = run_config(trained)
    run["dataset"] |= {"levels": ["2"], "max_completion_tokens": 33}
    dataset = benchmark_config("arithmetic", [], run=run).dataset
    assert (dataset.levels, dataset.max_completion_tokens) == ([], 33)
    assert benchmark_config("arithmetic", ["dataset.levels=[3]"], run=run).dataset.levels == ["3"]


def test_greedy_accuracy_is_what_training_logged(trained, evaluated, tmp_path):
    """eval.jsonl before the first and after the last step, by the checkpoint and by the base model."""
    greedy = ["samples=1", "temperature=0", "top_p=1", "num_problems=24"]
    evaluated(f"run={trained}", *greedy, f"output={tmp_path}")
    first, *_, last = [row["eval/accuracy"] for row in read_jsonl(trained / "eval.jsonl")]
    tested = [row["test/accuracy"] for row in read_jsonl(tmp_path / trained.name / "test.jsonl")]
    assert tested == pytest.approx([first, last]) and first != last


@pytest.mark.slow
def test_a_model_without_a_run_by_name_and_by_folder(evaluated, trained, scored, tmp_path):
    settings = ["benchmarks=arithmetic", *FEW, *TRAIN[-2:], "dataset.max_completion_tokens=40"]
    by_name = evaluated("model=tiny", *settings, f"output={tmp_path / 'name'}")
    path = trained / "checkpoints" / "step_000002"
    evaluated(f"model={path}", *settings, f"output={tmp_path / 'path'}")
    assert "pass@2" in by_name
    one = folder(tmp_path / "path", "step_000002")
    assert one.parent.name == scored.parent.name  # the same weights
    assert rows(one / "completions.parquet") == rows(scored / "completions.parquet")
    assert rows(folder(tmp_path / "name", "tiny") / "completions.parquet") != rows(
        one / "completions.parquet"
    )


@pytest.mark.slow
@needs_data
def test_benchmarks_of_another_kind_with_the_runs_model_and_prompt_style(trained, evaluated, tmp_path):
    shown = evaluated(
        f"run={trained}", "benchmarks=[aime24,math500]", "samples=1", "num_problems=6", "base=false",
        f"output={tmp_path}", f"dataset.path={SHARED}", "dataset.max_prompt_tokens=2000",
        "dataset.max_completion_tokens=8",
    )  # fmt: skip
    assert "TEST (mean)" in shown and "aime24" in shown
    card = json.loads((folder(tmp_path, "step_000002", "aime24") / "card.json").read_text())
    assert card["prompt"]["template"] == "{problem}\n" and not card["prompt"]["apply_chat_template"]
    assert card["grader"]["verifier"].endswith("MathVerifier")
    assert card["sampling"]["max_tokens"] == 8


def test_training_problems_in_a_benchmark_are_told(trained, evaluated, tmp_path, capsys):
    assert main([f"run={trained}", *FEW, "base=false", f"output={tmp_path}", "dataset.eval_split=train"]) == 0
    assert "arithmetic: 24 problems are also in arithmetic/train, which training drew from" in (
        capsys.readouterr().err
    )


MODEL = ["model=tiny", "benchmarks=arithmetic"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "got nothing to evaluate; expected one of run=, model=, completions="),
        (["model=tiny", "completions=x"], "got model=tiny and completions=x; expected one of"),
        (["model=tiny"], "benchmarks: no value; expected one of aime24"),
        (["model=tiny", "benchmarks=math_500"], "benchmarks=math_500: unknown; expected one of aime24"),
        ([*MODEL, "sample=3"], "sample=3: unknown key; nearest: samples"),
        ([*MODEL, "dataset=gsm8k"], "dataset=gsm8k: unknown key; expected one of run, model,"),
        ([*MODEL, "samples=0"], "samples=0: expected an integer of at least 1"),
        ([*MODEL, "temperature=0"], "samples=16: expected 1 at temperature=0"),
        ([*MODEL, "checkpoint=best"], "checkpoint=best: expected last, all or a step"),
        ([*MODEL, "dataset.max_completion_tokens=2000"],
         "max_completion_tokens = 2064: expected at most 2048, the positions of pkg://"),
        ([*MODEL, "rollout.top_x=1"], "rollout.top_x: unknown key; nearest: rollout.top_p"),
        (["model=/nowhere", "benchmarks=arithmetic"], "model.path=/nowhere: expected a directory with the c"),
        (["run=/nowhere"], "/nowhere: no such file or directory"),
        ([*MODEL, "output=/proc/x"], "no folder can be made there"),
        (["completions=x", "samples=3"], "samples=3: expected only output and reward keys"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(arguments, message, capsys):
    assert message in refused(capsys, *arguments)


@pytest.mark.slow
def test_suites_overrides_and_a_folder_of_ones_own_reach_each_benchmark(monkeypatch, tmp_path):
    (tmp_path / "dataset").mkdir()
    own = (conf_dir() / "dataset" / "gsm8k.yaml").read_text().replace("name: gsm8k", "name: mine")
    (tmp_path / "dataset" / "mine.yaml").write_text(own)
    seen: list[TrainConfig] = []

    def record(command, configs, *_, **__):
        seen.extend(configs)
        raise ConfigError("enough")

    monkeypatch.setattr(evaluate_model, "evaluate_targets", record)
    changed = ["rollout=vllm", "dataset.template='{problem} $x'"]
    assert main(["model=tiny", "benchmarks=math500,paper,mine", *changed, "--config-dir", str(tmp_path)]) == 2
    names = [config.dataset.name for config in seen]
    assert names[:3] == ["math500", "aime25", "aime24"] and names[8:] == ["mine"]
    assert {(c.rollout.is_vllm, c.dataset.template) for c in seen} == {(True, "{problem} $x")}


def test_the_base_of_a_run_that_began_with_anothers_step_has_a_label_of_its_own(
    trained, tmp_path, monkeypatch, capsys
):
    """And whose problems only its record knows: it is said that nothing is known of them."""
    seen = []

    def record(command, configs, targets, **_):
        seen.extend(target.label for target in targets)
        raise ConfigError("enough")

    monkeypatch.setattr(evaluate_model, "evaluate_targets", record)
    second = shutil.copytree(trained, tmp_path / "second", ignore=shutil.ignore_patterns("evaluations"))
    text = (second / "config.yaml").read_text()
    assert "  name: tiny\n" in text
    text = text.replace("  name: tiny\n", "  name: step_000002\n").replace("  path: null", "  path: /my/data")
    (second / "config.yaml").write_text(text)
    assert main([f"run={second}", "benchmarks=gsm8k"]) == 2
    told = "not known whether training had seen the benchmarks: dataset.path stands in the record only"
    assert told in capsys.readouterr().err
    assert seen == ["step_000002", "base step_000002"]


def test_runs_that_cannot_be_evaluated(trained, tmp_path, capsys, monkeypatch):
    steps = r"checkpoint=7: expected last, all, or one of the steps 1, 2"
    assert steps in refused(capsys, f"run={trained}", "checkpoint=7")
    damaged = tmp_path / "damaged"
    shutil.copytree(trained, damaged, ignore=shutil.ignore_patterns("evaluations"))
    with (damaged / "checkpoints" / "step_000002" / "model.safetensors").open("r+b") as file:
        file.write(b"x")
    said = "step_000002: model.safetensors is not what was written; expected a whole one"
    assert said in refused(capsys, f"run={damaged}", "checkpoint=2")
    assert main([f"run={damaged}", "samples=1", "num_problems=1", "base=false"]) == 0
    assert "step_000002 is not used: model.safetensors is not" in capsys.readouterr().err
    assert [path.name[:11] for path in (damaged / "evaluations").glob("step_*")] == ["step_000001"]
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "run.json").write_text("{}")
    assert "no readable config.yaml" in refused(capsys, f"run={bare}")
    os.mkfifo(bare / "config.yaml")  # of a stranger, which would be waited for
    assert "no readable config.yaml ([Errno 22] no regular file" in refused(capsys, f"run={bare}")
    os.mkfifo(bare / "scores.json")
    with pytest.raises(ConfigError, match="no regular file"):
        benchmark.read_scores(bare)
    (bare / "config.yaml").unlink()
    (bare / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
    monkeypatch.setattr(evaluate_model, "draw_completions", None)  # told before anything is sampled
    told = refused(capsys, f"run={trained},{bare}", "samples=3")
    assert "bare: no checkpoint there; expected a run that has saved one" in told


def test_a_checkpoint_that_training_removes_meanwhile_is_left_out(trained, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations"))
    evaluate = evaluate_model._evaluate

    def removes_it(*given):
        shutil.rmtree(run / "checkpoints" / "step_000002", ignore_errors=True)
        return evaluate(*given)

    monkeypatch.setattr(evaluate_model, "_evaluate", removes_it)
    assert main([f"run={run}", "checkpoint=all", "samples=1", "num_problems=2"]) == 0
    captured = capsys.readouterr()
    assert "step_000002 is left out: checkpoint.json is missing" in captured.err
    assert "step_000001 - base" in captured.out and "step_000002" not in captured.out


def write(path, table):
    pq.write_table(pa.Table.from_pylist(table), path)
    return path


STORED = [
    {"problem": "1+1?", "gold": "2", "completion": r"\boxed{2}", "model": "a", "label": True},
    {"problem": "1+1?", "gold": "2", "completion": r"\boxed{3}", "model": "a", "label": True},
    {"problem": "half?", "gold": "0.5", "completion": r"so $\frac{1}{2}$", "model": "a", "label": False},
    {"problem": "half?", "gold": "0.5", "completion": "0.50", "model": "a", "label": False},
    {"problem": "1+1?", "gold": "2", "completion": "The answer is 2", "model": "b", "label": True},
]


@pytest.mark.slow
def test_completions_on_disk_are_scored_by_model_against_their_labels(tmp_path, evaluated, scored):
    source, output = write(tmp_path / "all.parquet", STORED), tmp_path / "out"
    lines = evaluated(f"completions={source}", f"output={output}").splitlines()
    words = [" ".join(line.split()) for line in lines[:3]]
    head = "model problems samples avg [95 %] pass maj no answer by label false neg. false pos."
    assert words == [
        head,
        "a 2 2 75.0 [50.0, 100.0] 100.0 75.0 0.0 % 50.0 1 2",
        "b 1 1 100.0 100.0 100.0 0.0 % 100.0 0 0",
    ]
    scores = json.loads((output / "scores.json").read_text())
    assert [(each["model"], each["average"]["value"]) for each in scores] == [("a", 0.75), ("b", 1.0)]
    graded = rows(output / "completions.parquet")
    assert [row["correct"] for row in graded] == [True, False, True, True, True]
    assert [row["index"] for row in graded] == [0, 0, 1, 1, 2]
    problems = [(row["model"], row["correct"]) for row in rows(output / "problems.parquet")]
    assert problems == [("a", 1), ("a", 2), ("b", 1)]
    card = json.loads((output / "card.json").read_text())
    assert card["grader"]["style"] == "auto" and card["grader"]["packages"]["math-verify"]
    shown = evaluated(f"completions={scored / 'completions.parquet'}", "reward=exact")  # own records again
    average = json.loads((scored / "scores.json").read_text())["average"]["value"]
    assert shown.splitlines()[1].split()[2] == f"{100 * average:.1f}"


@pytest.mark.slow
def test_problems_of_benchmarks_whose_numbers_begin_again_stay_apart(tmp_path, evaluated):
    table = [
        {"index": 0, "gold": "1", "completion": r"\boxed{1}", "model": model, "benchmark": benchmark}
        for model in "ab" for benchmark in "xy"
    ]  # fmt: skip
    evaluated(f"completions={write(tmp_path / 'all.parquet', table)}", f"output={tmp_path / 'out'}")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    whole = next(each for each in scores if each["benchmark"] == "all")
    assert (whole["problems"], whole["samples"]) == (2, 1)


def test_a_reward_function_that_was_edited_is_another_grader(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    said = []
    for body in ("1.0", "0.0"):
        (tmp_path / "edited_reward.py").write_text(f"def score(text, answer, problem): return {body}\n")
        function = import_module("edited_reward").score
        monkeypatch.setattr("capo_exp.evaluation.card.locate_reward", lambda *_, found=function: found)
        said.append(describe_grader({"_target_": "capo_exp.x", "function": "edited_reward.score"}))
    assert said[0] != said[1] and said[0]["code"] == said[1]["code"]


def test_a_verifier_of_ones_own_is_another_grader_by_each_of_its_numbers_and_by_its_file(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(PLUGINS, "own_verifier")
    (tmp_path / "own_verifier.py").write_text("class Mine: ...\ndef near(text, gold): ...\n")

    def card(tolerance, target="own_verifier.Mine", **more):
        match = {"_target_": "own_verifier.near", "_partial_": True, "tolerance": tolerance}
        return describe_grader({"_target_": target, "_partial_": True, "match": match, **more})

    first = card(0.1)
    assert card(0.1, workers=9) == first != card(0.5)
    exact = "capo_exp.grading.verifier.ExactVerifier"
    assert card(0.1, exact) != card(0.5, exact)
    with (tmp_path / "own_verifier.py").open("a") as file:
        file.write("# edited\n")
    assert card(0.1) != first
    shipped = describe_grader({"_target_": exact, "_partial_": True})
    assert shipped.keys() == {"verifier", "packages", "code"}


def test_gains_are_differences_on_the_same_problems():
    def result(model, step, right):
        return BenchmarkScore(model, step, None, "b", "b-1", {}, right)

    base = result("base", 0, {"x": 0.0, "y": 1.0, "z": 0.5})
    own = result("own", 5, {"x": 0.5, "y": 1.0, "z": 1.0})
    assert gains([own], [base])["b"].value == pytest.approx(1 / 3)
    assert gains([base], [base]) == {}


def test_a_run_that_began_with_anothers_step_of_the_same_name_gains_what_it_gained():
    def result(step, accuracy):
        average = {"value": accuracy, "low": accuracy, "high": accuracy}
        scores = {"samples": 1, "problems": 2, "average": average, "pass_at": {"1": average}}
        scores |= {"majority_at": {}, "no_answer_fraction": 0.0}
        return BenchmarkScore("step_000100", step, None, "b", "b-1", scores, {"x": accuracy, "y": accuracy})

    results = [result(100, 0.75), result(0, 0.25)]
    shown = [list(column.cells) for column in results_table(results).columns[:4]]
    assert [str(cell) for cell in shown[0]] == ["step_000100", "step_000100 - base", "step_000100"]
    assert str(shown[3][1]).startswith("50.0")
    rows = [(row["counter/rollout_step"], row["test/accuracy"]) for row in rows_on_record(results, [])]
    assert rows == [(0, 0.25), (100, 0.75)]


def test_a_file_that_is_none(tmp_path, capsys):
    path = tmp_path / "all.parquet"
    for table, message in (
        ([{"problem": "1?", "completion": "1"}], "problem, completion; expected also gold or answer"),
        ([], "no row; expected completions"),
        (
            [{"problem": "1?", "gold": "1", "completion": "1", "tokens": "many"}],
            "tokens is string, expected a",
        ),
    ):
        assert message in refused(capsys, f"completions={write(path, table)}")
    path.write_text("no parquet")
    assert "expected a parquet file" in refused(capsys, f"completions={path}")


@needs_vllm
def test_vllm_answers_as_transformers_do_with_the_weights_of_each_checkpoint(trained, evaluated, tmp_path):
    """Greedy, so that both engines have one right answer; one engine takes the weights of both models."""
    command = [f"run={trained}", "samples=1", "temperature=0", "num_problems=8"]
    evaluated(*command, f"output={tmp_path / 'hf'}")
    small = ["rollout.engine.kv_cache_gib=0.25", "rollout.engine.enforce_eager=true"]
    evaluated(*command, "rollout=vllm", *small, f"output={tmp_path / 'vllm'}")
    for label in ("step_000002", "tiny"):
        one, two = (folder(tmp_path / engine, label) for engine in ("hf", "vllm"))
        assert one.name != two.name
        texts = [[row["completion"] for row in rows(path / "completions.parquet")] for path in (one, two)]
        assert texts[0] == texts[1]
