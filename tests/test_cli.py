"""The command line as a user meets it: a wrong configuration is one line, and no torch before training."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import MISSING, OmegaConf

from capo_exp.cli import front
from capo_exp.cli.compose import compose_config, find_choices
from capo_exp.cli.evaluate import LINE as EVALUATE
from capo_exp.config.errors import ConfigError
from capo_exp.config.places import quoted, resolve_model_path, typed
from capo_exp.config.ranges import AT_LEAST_1
from capo_exp.config.schema import TrainConfig
from tests.conftest import ALGORITHMS, KEYS
from tests.pieces import run_training

DOCTOR = front.CommandLine("config", TrainConfig, str)
ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = len(find_choices("experiment"))
NO_CAPOO = f"algo=capoo: unknown choice; expected one of {len(ALGORITHMS)} choices; nearest: capo, "
HEAVY = ("torch", "transformers", "datasets", "vllm", "wandb", "matplotlib")
NO_HEAVY = f"""
import contextlib, io, json, runpy, sys
for module, *arguments in json.loads(sys.argv[1]):
    wrong = False
    sys.argv = [module, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            wrong = "regime.prompts_per_step=7" in arguments
            assert (end.code or 0) == 2 * wrong, (sys.argv, end.code)
    assert wrong or out.getvalue(), sys.argv
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    assert not loaded, (sys.argv, loaded)
sys.argv = ["capo_exp", "plan_only=true"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
    runpy.run_module("capo_exp", run_name="__main__")
assert "completions a step" in out.getvalue() and "transformers" not in sys.modules
"""


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


@pytest.fixture
def model_dir(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(f"{resolve_model_path('pkg://capo_exp/assets/tiny')}/config.json", folder)
    return folder


@pytest.fixture
def work_dir(tmp_path, monkeypatch):
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(model_dir, work_dir, capsys):
    """Runs the command line in this process, in an empty directory."""

    def run_here(*arguments):
        status = run_training(*arguments, f"model.path={model_dir}")
        return Result(status, *capsys.readouterr())

    return run_here


@pytest.fixture
def trained(monkeypatch):
    """Replaces training by a list of what it was called with."""
    calls: list[TrainConfig] = []

    def record(config, _):
        calls.append(config)
        if config.seed == 13:
            raise RuntimeError("seed 13")
        if config.seed == 14:
            raise KeyboardInterrupt
        if config.seed == 15:
            raise ConfigError("model.vocab_size=1: expected 2")

    fake = SimpleNamespace(run=record)
    monkeypatch.setitem(sys.modules, "capo_exp.training.loop", fake)
    monkeypatch.setattr("capo_exp.sweep.job.show", lambda *_, **__: None)
    return calls


def subprocess_run(*arguments, cwd, code="", **env):
    start = ["-c", code] if code else ["-m", "capo_exp"]
    variables = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    variables |= {"PYTHONPATH": str(ROOT), **env}
    command = [sys.executable, *start, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("foo=1", f"foo=1: unknown key; expected one of {len(KEYS)} choices; nearest: "),
        ("learning_rate=1", "learning_rate=1: unknown key; nearest: regime.learning_rate"),
        ("temperature=1", "temperature=1: unknown key; nearest: rollout.temperature"),
        ("lr=1e-5", "lr=1e-5: unknown key; nearest: regime.learning_rate"),
        ("data.train_batch_size=8", "data.train_batch_size=8: unknown key; nearest: regime.prompts_per_step"),
        ("dataset=x/y.csv", "dataset=x/y.csv: unknown choice; a file is dataset=file dataset.path=x/y.csv; "),
        ("+algo.selection.bound=1", "algo.selection.bound: unknown parameter of capo_exp.algorithms.capo"),
        ("regime.group_size=null", "regime.group_size=null: expected an integer"),
        ("algo=capoo", NO_CAPOO),
        ("experiment=paper/x", f"experiment=paper/x: unknown choice; expected one of {EXPERIMENTS} cho"),
        ("~seed", "seed: no value; expected an integer"),
        ("+seed=1", "Could not append to config. An item is already at 'seed'"),
        ("seed", "seed: expected key=value"),
        ("algo.label=модель", "algo.label=модель: expected quotes around such text, as in algo.label='\"мод"),
        ("~algo.selection", "~algo.selection: a key that cannot be left out; expected algo.selection=, a"),
        ("~algo ~algo.advantage", "algo.advantage: ~algo leaves nothing that holds it; expected one"),
        ("~algo=capo algo.label=x", "algo.label: ~algo=capo leaves nothing that holds it; expected one"),
        ("algo.name.x.y=1", "algo.name.x.y=1: expected algo.name=, text, with no keys in it"),
        ("prompt=123", "prompt=123: expected one of few_shot, plain"),
        ("reward=[exact]", "reward=[exact]: expected a choice of reward; expected one of exact"),
        ("hydra.job.chdir=true", "hydra.job.chdir=true: expected output_dir=..., below which each run makes"),
        ("hydra.run.dir=X", "hydra.run.dir=X: expected output_dir=..., below which each run makes"),
        ("-m seed=0,1 output_dir=/proc/x", "/proc/x: No such file or directory; expected output_dir"),
        ("seed=0,1", "Ambiguous value for argument 'seed=0,1'"),
        ("-m algo=grpo,capoo", "algo=capoo: unknown choice"),
        ("-m algo=grpo,capo algo.selection.policy_shift_max=1",
         "algo.selection.policy_shift_max=1: expected a key of every job"),
        ("scale=tiny ~experiment", "~experiment: expected the name of a choice"),
        ("-m setting=${seed},keywords", "setting=${seed},keywords: expected the name of a choice"),
        ("algo.shaping={cache:9}",
         "algo.shaping={cache:9}: brings keys that are not there yet; expected +algo.shaping={cache:9}"),
        ("algo=vineppo +algo.shaping={_target_:capo_exp.algorithms.rloo.kl_in_reward,kl_coefficient:1}",
         "algo.shaping._target_=capo_exp.algorithms.rloo.kl_in_reward: expected capo_exp.algorithms.neutral"),
        ("algo=grpo selection=random algo.selection.score._target_=os.system",
         "algo.selection.score._target_=os.system: expected a function of capo_exp"),
        ("algo.num_minibatches=97", "algo.num_minibatches=97: expected at most"),
        ("seed=15", "model.vocab_size=1: expected 2"),
        ("-m rollout/correction=none,mask",
         "rollout/correction=mask: unknown choice; expected one of geometric_mask, none, sequence_mask"),
        ("-m reward=1,x", "reward=1,x: expected one of exact, function"),
        ("~regime=[1,[2]]", "~regime=[1,[2]]: expected one of aggressive, conservative"),
        ("curvature.top_k=1;2", "curvature.top_k=1;2: expected key=value, in quotes where"),
        ("model.tie_word_embeddings=nan", "model.tie_word_embeddings=nan: expected true, false or null"),
        ("+seed=" + "x" * 2000, "Could not append to config. An item is already at 'seed'"),
        ("hydra.job.env_copy=[X]", "hydra.job.env_copy=[X] model.path="),
        ("-m seed=range(nan)", "-m seed=range(nan) model.path="),
        ("-m seed=range(3),4", "seed=range(3),4 model.path="),
        ("-m seed=range(0,inf)", "seed=range(0,inf): expected a sweep of fewer than 1,000,000 jobs"),
        ("--info nope", "--info nope: expected all, config, defaults"),
        ("--multirun=1", "--multirun=1: expected --multirun, which takes no value"),
        ("--config-dir " + "x" * 300, "--config-dir xxx"),
    ],
)  # fmt: skip
def test_wrong_configuration_is_one_line_and_status_2(run, trained, arguments, line):
    result = run(*arguments.split())
    assert result.err.startswith(line), result.err
    assert result.err.count("\n") == 1 and result.err.endswith("\n") and len(result.err) < 1500
    assert result.status == 2
    assert [config.seed for config in trained] == ([15] if "seed=15" in arguments else [])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "regime: {group_sise: 3}",
            "regime.group_sise: unknown key; nearest: regime.group_size (In 'experiment/x')",
        ),
        ("num_step: 3", "num_step: unknown key; nearest: num_steps (In 'experiment/x')"),
        ("algo: grpo", "In 'experiment/x': ValidationError raised while composing config: Merge error: str"),
        (
            "hydra: {run: {dir: X}}",
            "experiment/x.yaml: hydra.run.dir=X: expected output_dir=..., below",
        ),
        ("regime: {group_size: abc}", "regime.group_size: In 'experiment/x': ValidationError"),
        ("regime: [", "while parsing a flow node"),
        ("defaults: [{override /algo: grppo}]", "algo=grppo: unknown choice"),
        ("defaults: [{override /algoo: grpo}]", "In 'experiment/x': Could not override 'algoo'"),
    ],
)
def test_wrong_yaml_is_one_line_too(run, trained, tmp_path, text, line):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "x.yaml").write_text(f"# @package _global_\n{text}\n")
    result = run("-cd", str(tmp_path / "conf"), "experiment=x")
    assert result.err.startswith(line) and result.err.count("\n") == 1, result.err
    assert (result.status, trained) == (2, [])


def test_a_choice_without_its_package_is_told_what_it_lacks(run, tmp_path):
    (tmp_path / "selection").mkdir()
    (tmp_path / "selection" / "mine.yaml").write_text("_target_: x.y\n")
    result = run("-cd", str(tmp_path), "selection=mine")
    assert result.status == 2 and "which has to begin with the line `# @package`" in result.err


def test_experiments_that_each_sweep_are_no_jobs_of_another_sweep(run, trained, work_dir):
    several = run("-m", "experiment=paper/figure_1,paper/figure_5", "scale=tiny", "plan_only=true")
    assert several.status != 0 and not trained
    assert "job 0 cannot run: seed=range(5): expected one of them, since this is one run\n" in several.err


def test_trains_with_the_typed_configuration_and_ends_with_the_status_of_what_came(run, trained, work_dir):
    plan = run("plan_only=true")
    assert (plan.status, plan.err, trained) == (0, "", [])
    assert "12 prompts x 8 = 96 completions a step" in plan.out
    assert run("algo=grpo", "seed=3").status == 0
    assert [(type(c), c.algo.name, c.seed) for c in trained] == [(TrainConfig, "grpo", 3)]
    assert run("seed=14").status == 130  # interrupted
    failed = run("seed=13")
    assert failed.status == 1
    assert failed.err.startswith("Traceback") and "RuntimeError: seed 13" in failed.err
    assert list(work_dir.iterdir()) == []  # no .hydra, no log file, no dated directory
    assert Path.cwd() == work_dir


def test_the_choice_of_a_nested_group_can_be_typed_like_a_key(run, trained):
    assert run("rollout.correction=token_mask", "rollout.correction.ratio_high=4").status == 0
    assert trained[0].rollout.correction["_target_"].endswith(".mask_tokens")
    assert trained[0].rollout.correction["ratio_high"] == 4
    swept = run("-m", "rollout.correction=none,sequence_mask", "plan_only=true")
    assert (swept.status, swept.out.count("\njob 1/2: rollout/correction=sequence_mask\n")) == (0, 1)


@pytest.mark.parametrize(
    ("gpu", "vllm", "words", "engine"),
    [(True, True, (), "vllm"), (True, False, (), "hf"), (False, True, (), "hf"),
     (True, True, ("device=cpu",), "hf"), (True, True, ("device=cpu", "device=cuda:1"), "vllm")],
)  # fmt: skip
def test_rollout_auto_is_an_engine_before_anything_is_composed(
    gpu, vllm, words, engine, run, trained,
    monkeypatch,
):  # fmt: skip
    installed = ModuleType("vllm")
    installed.__spec__ = ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", installed if vllm else None)
    there, glob = [Path("/dev/nvidia1")] * gpu, Path.glob  # a container's only one need not be the first
    monkeypatch.setattr(Path, "glob", lambda path, *a: there if str(path) == "/dev" else glob(path, *a))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("capo_exp.sweep.job.check_memory", lambda *_: "")
    monkeypatch.setattr("capo_exp.sweep.job.plan", lambda _: [])  # both ask a GPU
    done = run("rollout=auto", *words)
    told = "device= is given 2 times; the last one counts\n" if len(words) > 1 else ""
    assert (done.status, done.err) == (0, told) and [c.rollout.name for c in trained] == [engine]
    line = ["run=somewhere", "rollout=auto", *words]  # evaluation composes later, for each benchmark
    assert front.compose_command(EVALUATE, line).overrides == [f"rollout={engine}", *words]


@pytest.mark.slow
def test_looking_imports_nothing_heavy_and_writes_nothing(tmp_path):
    training = [
        ["--help"],
        ["--cfg", "job", "--resolve"],
        ["-sc", "install=bash"],
        ["regime.prompts_per_step=7"],
    ]
    calls = [["capo_exp", *arguments] for arguments in training]
    for command in ("status", "evaluate", "doctor"):
        calls += [[f"capo_exp.{command}", "--help"], [f"capo_exp.{command}", "--cfg", "job"]]
    done = subprocess_run(json.dumps(calls), cwd=tmp_path, code=NO_HEAVY)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("model.micro_batch_size=16: expected a divisor of")
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class ShowKeys:
    runs: list[str] = MISSING
    model: str | None = MISSING
    count: int = field(default=MISSING, metadata={"range": AT_LEAST_1})
    overrides: list[str] = MISSING
    config_dir: str | None = MISSING


@pytest.fixture
def shown(work_dir, monkeypatch):
    """Runs a command line; gives its typed keys, or the exit status of one that does not get so far."""
    (work_dir / "conf").mkdir()
    (work_dir / "conf" / "show.yaml").write_text(
        "# Shows.\n\nruns: [outputs]  # folders\nmodel: null\ncount: 3\noverrides: []\nconfig_dir: null\n"
    )
    monkeypatch.setattr(front, "conf_dir", lambda: work_dir / "conf")

    def show(*arguments):
        got: list[ShowKeys] = []
        line = front.CommandLine("show", ShowKeys, lambda: "Usage\n{keys}", ("model.", "algo"), "runs")
        status = front.run_command(lambda keys: got.append(keys) or 0, line, arguments)
        return got[0] if got else status

    return show


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["runs=[a,seed[01]*/x=1]"], {"runs": ["a", "seed[01]*/x=1"]}),
        (["it's", "out/x (1)"], {"runs": ["it's", "out/x (1)"]}),
        (["model=org/Name-1.5B", "count=7"], {"model": "org/Name-1.5B", "count": 7}),
        (["model=tiny", "model.path='/a b'", "algo=${x}"],
         {"model": "tiny", "overrides": ["model.path='/a b'", "algo=${x}"]}),
        (["count=4", "--config-dir", "conf"], {"count": 4, "config_dir": "HERE/conf"}),
    ],
)  # fmt: skip
def test_paths_lists_and_flags_need_no_quotes(shown, work_dir, arguments, expected):
    found = asdict(shown(*arguments))
    neutral = {"runs": ["outputs"], "model": None, "count": 3, "overrides": [], "config_dir": None}
    if folder := expected.get("config_dir"):
        expected["config_dir"] = folder.replace("HERE", str(work_dir))
    assert found == neutral | expected
    assert shown(*arguments, "cuont=1") == shown(*arguments, "-m") == 2


@pytest.mark.slow
def test_module_ends_in_one_line_from_another_directory_or_in_full_on_request(tmp_path):
    done = subprocess_run("algo=capoo", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(NO_CAPOO)
    done = subprocess_run("algo=capoo", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert done.returncode == 2
    assert done.stderr.startswith("Traceback") and "MissingConfigException" in done.stderr


@pytest.mark.slow
def test_help_names_groups_and_commands(run):
    text = run("--help").out
    for expected in ("plan_only=true", "--cfg job --resolve", "algo: a_star_po, c3po, c3po_pp,", "model: "):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 80
    listed = re.findall(r"[\w/]+(?=[,\n])", text[text.index("experiment:") : text.index("hparams_search:")])
    assert len(listed) == len(set(listed)) == EXPERIMENTS and not [one for one in listed if "/_" in one]


@pytest.mark.slow
def test_completion_script_completes(tmp_path):
    script = f"""
    export PATH={Path(sys.executable).parent}:$PATH
    eval "$(python -m capo_exp -sc install=bash)"
    COMP_LINE="python -m capo_exp algo=dr_"; COMP_POINT=${{#COMP_LINE}}
    COMP_WORDS=(python -m capo_exp algo=dr_); COMP_CWORD=3
    _capo_exp_complete; echo "${{COMPREPLY[*]}}"
    """
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["algo=dr_capo", "algo=dr_grpo"]


@given(st.text(st.sampled_from("\\${}'\"a,=[]:() \n\té~"), max_size=8), st.text(max_size=6))
def test_a_printed_key_gives_the_same_value_back(some, more):
    """Pasted into a shell, read by Hydra, resolved by OmegaConf; so does a text in a list."""
    text = some + more.replace("\0", "")
    [word] = shlex.split(typed("key", text))
    parser = OverridesParser.create()
    for value in (word, f"key=[{quoted(text)},b]"):
        read = OmegaConf.create({"key": parser.parse_override(value).value()})["key"]
        assert (read if value is word else list(read)) == (text if value is word else [text, "b"])
    assert typed("model.path", "outputs/a-1/step_000002") == "model.path=outputs/a-1/step_000002"


@pytest.mark.slow
def test_a_users_file_comes_before_the_packaged_one_and_is_told(work_dir, capsys):
    """For a run, the jobs of a sweep, another command and from Python; an equal file, or none, is no news."""
    packaged = (front.conf_dir() / "regime" / "aggressive.yaml").read_text()
    for folder, text in (("own", packaged.replace("mul:5", "mul:7")), ("same", packaged)):
        (work_dir / folder / "regime").mkdir(parents=True)
        (work_dir / folder / "regime" / "aggressive.yaml").write_text(text)
    told = "own: in place of the file of this package: regime/aggressive.yaml\n"

    def rate(*arguments):
        assert run_training(*arguments, "plan_only=true") == 0
        printed = capsys.readouterr()
        return set(re.findall(r"lr (\S+)", printed.out)), printed.err

    assert rate("--config-dir", "own") == ({"0.00014"}, told)
    assert rate("--config-dir=own", "-m", "seed=0,1") == ({"0.00014"}, told)
    assert rate("--config-dir", "same") == ({"0.0001"}, "")
    assert compose_config([], config_dir="own").regime.learning_rate == pytest.approx(1.4e-4)
    assert front.run_command(lambda config: round(config.regime.learning_rate * 1e6), DOCTOR,
                             ["--config-dir", "own"]) == 140  # fmt: skip
    assert run_training(f"hydra.searchpath=[file://{work_dir}/own]") == 2
    assert "expected --config-dir, for conf/ has regime/aggressive.yaml" in capsys.readouterr().err
