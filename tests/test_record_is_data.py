"""A configuration is data, also a stranger's: it runs nothing, reads no secret and names no place."""

import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from capo_exp.cli import evaluate, evaluate_config, figures, front, status
from capo_exp.cli.compose import compose_config
from capo_exp.config.build import build_part
from capo_exp.config.checks import check
from capo_exp.config.errors import ConfigError
from capo_exp.config.places import resolve_model_path
from capo_exp.config.plugins import allow_plugins
from capo_exp.config.record import as_data, read_config, to_yaml
from capo_exp.config.schema import conf_dir, to_config
from capo_exp.evaluation import subject
from capo_exp.evaluation.command import EvaluateCommand
from capo_exp.runs.checkpoint import find_damage
from capo_exp.runs.files import write_atomic
from capo_exp.runs.lock import is_locked, locked
from capo_exp.sweep import job
from capo_exp.sweep.table import runs_table, summarise_run
from tests.figure_pieces import write_run
from tests.pieces import run_training

Values = dict[str, Any]
LISTED = """
os.system posix.system builtins.exec builtins.__import__ pickle.loads torch.hub.load importlib.import_module
logging.FileHandler hydra.utils.instantiate hydra_plugins.evil.Sweeper transformers.AutoModel.from_pretrained
evil.run capo_exp capo_exp_evil.run tests.pieces.prompt capo_exp.runs.files.write_atomic
capo_exp.config.build.os.system capo_exp.algorithms.protocols.build_part capo_exp.algorithms.grpo.os.system
capo_exp.grading.verifier.partial capo_exp.grading.verifier._grade_pair
capo_exp.rollout.vllm_server.start_server capo_exp.rollout.guard.main
capo_exp.rollout.vllm_process.subprocess.Popen capo_exp.sweep.sweep.Submission
capo_exp.data.math_problems.read_hub capo_exp.data.math_problems.ProblemSet.__call__
capo_exp.algorithms.neutral.keep_all.__globals__ capo_exp..os.system . capo_exp/algorithms/neutral.keep_all
capo_exp.algorithms.neutral.keep_all( ${oc.env:EVIL}
"""
ODD: list[Any] = ["", "os.system\n", " os.system", 42, None, ["os", "system"]]
FEW: list[Any] = ["os.system", "capo_exp.rollout.vllm_process.subprocess.Popen", "${oc.env:EVIL}", *ODD[::3]]
FUNCTION_REWARD = {
    "_target_": "capo_exp.grading.function.FunctionVerifier", "_partial_": True, "correct_from": 1.0,
    "failure_reward": 0.0, "in_process": True, "timeout_seconds": 5.0, "workers": 1, "memory_limit_gib": 4.0,
}  # fmt: skip
DEPTHS: dict[str, Callable[[Values, Values], object]] = {
    "a part": lambda values, node: values["reward"].update(verifier=node),
    "a reward function": lambda values, node: values["reward"].update(
        verifier=FUNCTION_REWARD | {"function": node["_target_"]}
    ),
    "in a part": lambda values, node: values["dataset"]["source"]["families"].update(evil=node),
    "in a list of what is no part": lambda values, node: values["dataset"].update(
        examples=[{"problem": "1", "solution": [{"deep": [node]}]}]
    ),
}
each_depth = pytest.mark.parametrize("put", DEPTHS.values(), ids=DEPTHS)


def evil(target):
    """What would leave a trace with most of the targets, if it were built."""
    trace = "touch PWNED; open('PWNED', 'w')"
    return {"_target_": target, "cmd": trace, "args": ["touch", "PWNED"], "filename": "PWNED"}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Works in an empty folder, with a secret in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVIL", "os.system")
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET")
    monkeypatch.delenv("CAPO_EXP_PLUGINS", raising=False)
    return tmp_path


@pytest.fixture
def record(here):
    """Writes the record of a run with a checkpoint, such as a stranger could send."""
    folder = write_run(here / "outputs" / "default", "capo", steps=3)
    checkpoint = folder / "checkpoints" / "step_000003"
    checkpoint.mkdir(parents=True)
    shape = Path(resolve_model_path("pkg://capo_exp/assets/tiny"), "config.json").read_bytes()
    contents = {"config.json": shape, "trainer_state.pt": b"{}"}
    files = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    for name, content in contents.items():
        (checkpoint / name).write_bytes(content)
    manifest = {"run_id": json.loads((folder / "run.json").read_text())["run_id"], "step": 3, "files": files}
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest))

    def write(values):
        (folder / "config.yaml").write_text(json.dumps(values))
        return folder

    return write


@pytest.fixture
def values(composed):
    return recorded(composed())


def recorded(config):
    plain = OmegaConf.to_container(OmegaConf.create(to_yaml(config)))
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def run_job(text, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(text))
        patch.setattr(sys, "argv", ["job", *arguments])
        return job.main()


def test_only_parts_of_the_package_are_built():
    for target in [*LISTED.split(), *ODD]:
        for part in (evil(target), evil(target) | {"_partial_": True}):
            with pytest.raises(ConfigError, match="_target_"):
                build_part(part, key="k")
    assert not Path("PWNED").exists()


@pytest.mark.slow
@each_depth
def test_no_target_of_a_record_is_run_again_evaluated_or_drawn(put, record, values, here, capsys):
    """Not even in the user's own sweep; nor is one of a user's own YAML run."""
    folder = record(values)
    keys: Any = OmegaConf.merge(
        OmegaConf.structured(EvaluateCommand), OmegaConf.load(conf_dir() / "evaluate.yaml")
    )
    command: Any = replace(OmegaConf.to_object(keys), run=[str(folder)], samples=1, num_problems=1)
    OmegaConf.set_struct(base := compose_config([]), False)
    for target in FEW:
        put(hostile := deepcopy(values), evil(target))
        record(hostile)
        assert run_job(json.dumps(hostile), "own=true") == 2, target
        assert front.exit_status(lambda: evaluate.show_scores(command)) == 2, target
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2, lines
        assert all("_target_" in line or "reward.verifier.function=" in line for line in lines), lines
        put(own := {"reward": {}, "dataset": {"source": {"families": {}}}}, evil(target))
        with pytest.raises(ConfigError, match=r"_target_|reward\.verifier\.function="):
            check(to_config(OmegaConf.merge(base, own)))
    assert status.main([str(here / "outputs")]) == 0  # of the last one
    assert figures.main([f"runs={folder}", "figure=stability", f"output={here / 'figures'}"]) in (0, 2)
    assert sorted(path.name for path in here.iterdir() if path.name != "figures") == ["outputs"]


@pytest.mark.parametrize(
    "text",
    [
        "algo: {selection: {_target_: subprocess.check_call, args: [touch, PWNED]}}",
        "dataset: {source: {families: {evil: {_target_: '${oc.env:EVIL}', command: touch PWNED}}}}",
        "dataset: {examples: [{problem: p, solution: s, x: [{_target_: os.system, command: touch PWNED}]}]}",
        "hydra: {callbacks: {evil: {_target_: subprocess.check_call, args: [touch, PWNED]}}}",
        "hydra: {launcher: {_target_: subprocess.check_call, args: [touch, PWNED]}}",
        "hydra: {sweeper: {params: {+hydra.callbacks.evil: '{_target_: os.system}'}}}",
        "hydra: {hydra_logging: {formatters: {x: {(): os.system, command: touch PWNED}}}}",
        "hydra: {job_logging: {handlers: {x: {class: logging.FileHandler, filename: PWNED}}}}",
        "hydra: {job: {env_set: {PATH: .}}}",
        "hydra: {callbacks: {evil: '${oc.create:{_target_:os.system,command:touch PWNED}}'}}",
        "hydra: {callbacks: {evil: \"\\x24{oc.decode:'{_target_: os.system, command: touch PWNED}'}\"}}",
        "defaults: [../../evil/y@_global_]",
        "defaults: [//tmp/evil/z@_global_]",
        "plugins: [subprocess]",
        "plugins: [tests]",
    ],
)
def test_no_experiment_file_runs_or_allows_anything(text, here, capsys):
    (here / "own" / "experiment").mkdir(parents=True)
    (here / "own" / "experiment" / "x.yaml").write_text(f"# @package _global_\n{text}\n")
    more = ["-m", "seed=0,1"] if re.search("launcher|sweeper", text) else []
    assert run_training("--config-dir", "own", "experiment=x", "plan_only=true", *more) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and ("expected" in err or "cannot run" in err), err
    shutil.rmtree("outputs", ignore_errors=True)
    assert [path.name for path in here.iterdir()] == ["own"]


def test_the_command_line_cannot_make_hydra_build_anything(capsys):
    assert run_training("+hydra.callbacks.x={_target_: os.system, command: touch PWNED}") == 2
    assert "expected a launcher, a sweeper" in capsys.readouterr().err
    assert run_training("plugins=[os]") == run_training("plugins=[capo_exp]") == 2
    assert "names of packages of your own, as in plugins=[mypackage]" in capsys.readouterr().err


def test_keys_by_which_hydra_would_build_something_else_are_refused():
    part = {
        "_target_": "capo_exp.algorithms.grpo.group_normalised",
        "_partial_": True,
        "eps": 1.0,
        "target_std": 1.0,
    }
    build_part(part, key="k")
    for mark, value in (("_args_", [1]), ("_recursive_", False), ("_convert_", "all"), ("_partial_", "yes")):
        with pytest.raises(ConfigError, match=rf"^k\.{mark}="):
            build_part(part | {mark: value}, key="k")


def test_a_record_allows_no_plugins(values, here, monkeypatch):
    (here / "evil_methods.py").write_text("open('PWNED', 'w')\ndef run(): ...\n")
    monkeypatch.syspath_prepend(here)
    hostile = values | {"plugins": ["evil_methods"]}
    for depth in ("in a part", "a reward function"):
        DEPTHS[depth](hostile, {"_target_": "evil_methods.run"})
        for arguments in ([], ["own=true"]):
            config = read_config(json.dumps(hostile), arguments)
            assert config.plugins == []
            with pytest.raises(ConfigError, match=r"plugins=\[evil_methods\] on the command line allows"):
                check(config)
    assert not Path("PWNED").exists() and "evil_methods" not in sys.modules
    assert read_config(json.dumps(hostile), ["plugins=[evil_methods]"]).plugins == ["evil_methods"]
    allow_plugins([])


def test_an_interpolation_in_a_record_is_text(values, record):
    for text in (
        "${oc.env:HF_TOKEN} {problem}",
        r"\${seed} {problem}",
        "${hydra:job.name}{problem}",
        "${{problem}",
    ):
        values["dataset"]["template"] = text
        config = read_config(json.dumps(values))
        assert config.dataset.template == text
        again = read_config(to_yaml(config), ["own=true"])
        assert again.dataset.template == text  # as often as it is recorded
        run = evaluate_config.run_config(record(values))
        assert evaluate_config.benchmark_config("arithmetic", [], run=run).dataset.template == text
        assert OmegaConf.to_object(OmegaConf.create({"a": as_data([text])})) == {"a": [text]}


PLACES = {
    "model.path": ["evil/model", "/etc", "pkg://capo_exp/../../etc"],
    "dataset.path": ["/etc"],
    "rollout.server_url": ["http://evil:8000"],
    "rollout.engine.server_url": ["http://evil:8000"],
    "dataset.source.hub_id": ["evil/data"],
    "dataset.source.eval_path": ["/etc/passwd"],
    "output_dir": ["/tmp/evil"],
}


def test_a_record_names_no_place(values, record, capsys):
    for key, value in [(key, value) for key, several in PLACES.items() for value in several]:
        *groups, name = key.split(".")
        node = hostile = deepcopy(values)
        for group in groups:
            node = node[group]
        node[name] = value
        line = f"{key}={value}: stands in a record only, whose servers, paths and hub ids are not used; exp"
        with pytest.raises(ConfigError) as refused:
            read_config(json.dumps(hostile))
        assert str(refused.value).startswith(line)
        if value in ("evil/model", "evil/data"):
            evaluate.main([f"run={record(hostile)}", "num_problems=1", "samples=1"])
            assert line in capsys.readouterr().err
    text = json.dumps(hostile)  # but for the command line's own word
    for own, expected in ((f"{key}={value}", value), ("own=true", value), (f"{key}=another", "another")):
        assert _at(read_config(text, [own]), key) == expected


def _at(config, key):
    for name in key.split("."):
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    return config


def test_an_evaluation_goes_on_without_the_places_of_a_record(values, record, monkeypatch):
    """The checkpoint needs no model.path; the base model, whose place only the record knows, is left out."""
    seen: list[tuple[str, list[str]]] = []

    def note(_, configs, targets, **__):
        seen.append((configs[0].model.path, [target.label for target in targets]))
        raise ConfigError("enough")

    monkeypatch.setattr(subject, "evaluate_targets", note)
    values["model"]["path"] = "evil/model"
    run = record(values)
    for more in ([], ["model.path=evil/model"]):
        assert evaluate.main([f"run={run}", *more]) == 2
    last = f"{run}/checkpoints/step_000003"
    assert seen == [(last, ["step_000003"]), ("evil/model", ["step_000003", "tiny"])]


def test_a_record_overwrites_nothing_and_takes_no_key(values):
    values |= {"overwrite": True}
    values["logger"]["wandb_mode"] = "online"
    config = read_config(json.dumps(values))
    assert (config.overwrite, config.logger.wandb_mode) == (False, "offline")
    values["logger"]["name"] = "trackio"  # whose database is the reader's
    assert read_config(json.dumps(values)).logger.name == "files"
    config = read_config(json.dumps(values), ["overwrite=true", "logger.wandb_mode=online"])
    assert (config.overwrite, config.logger.wandb_mode) == (True, "online")
    with pytest.raises(ConfigError, match=r"^seed: expected own=true, plugins"):
        read_config(json.dumps(values), ["seed=1"])


NAMES = ["../x", "..", "a/b", "/etc/x", "a\\b", "a\nb", "a\x00b", "\x1b[31m", "", "-x", "a" * 300, "x\u2028y"]


@pytest.mark.parametrize(
    "key", ["model.name", "dataset.name", "algo.name", "algo.variant", "regime.name", "experiment_name",
            "dataset.eval_split", "dataset.train_split", "algo.step_rule_name", "rollout.name"]
)  # fmt: skip
def test_a_name_that_becomes_a_path_is_one_folder(key, composed, record, here):
    optional = key in ("algo.variant", "algo.step_rule_name")
    for name in NAMES:
        if optional and not name:
            continue
        config = composed()
        *groups, last = key.split(".")
        setattr(_at(config, groups[0]) if groups else config, last, name)
        with pytest.raises(ConfigError, match=rf"^{key}="):
            check(config)
        if name == "../x" and key in ("model.name", "dataset.name", "rollout.name", "dataset.eval_split"):
            run = record(recorded(config))
            assert evaluate.main([f"run={run}", "num_problems=1", "samples=1", f"output={here / 'out'}"]) == 2
    assert not list(here.rglob("*-*/arithmetic-*"))


@pytest.mark.parametrize(
    "text", ["", "[1]", "a: [", "{model: 1}", "{model: {name: a}, dataset: 3}", "\t", "? [a]\n: b", "1: 2"]
)
def test_a_record_that_is_no_configuration_is_one_line(text, record, capsys):
    run = record({})
    (run / "config.yaml").write_text(text)
    assert evaluate.main([f"run={run}"]) == run_job(text) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and not any("Traceback" in line for line in lines), lines


def test_the_environment_of_the_processes_of_a_run_carries_what_is_allowed():
    allow_plugins(["mine", "yours.methods"])
    assert os.environ["CAPO_EXP_PLUGINS"] == "mine,yours.methods"
    allow_plugins([])


def test_a_link_in_a_record_is_not_written_through(here):
    (here / "mine").write_text("precious")
    (here / ".test.jsonl.partial").symlink_to(here / "mine")
    (here / ".lock").symlink_to(here / "mine")
    write_atomic(here / "test.jsonl", "rows")
    assert not is_locked(here)
    with pytest.raises(ConfigError, match="expected output_dir"), locked(here):
        pass
    assert (here / "mine").read_text() == "precious" and (here / "test.jsonl").read_text() == "rows"


def test_the_place_of_a_model_imports_nothing(here, monkeypatch):
    (here / "evil_package").mkdir()
    (here / "evil_package" / "__init__.py").write_text("open('PWNED', 'w')")
    monkeypatch.syspath_prepend(here)
    assert resolve_model_path("pkg://evil_package/x") == str(here / "evil_package" / "x")
    for package in ("evil_package.inside", "absent_package"):
        with pytest.raises(ConfigError, match="expected an installed package"):
            resolve_model_path(f"pkg://{package}/x")
    assert not Path("PWNED").exists()


def test_a_dotted_key_of_a_record_is_no_key(values, record):
    values["dataset"]["source.hub_id"] = "evil/data"
    with pytest.raises(ConfigError, match=r"dataset has the key 'source\.hub_id'"):
        evaluate_config.run_config(record(values))


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname"])
def test_a_checkpoint_names_no_file_outside(name, record):
    checkpoint = record({}) / "checkpoints" / "step_000003"
    assert find_damage(checkpoint, None) is None
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    manifest["files"][name] = "0" * 64
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest))
    assert find_damage(checkpoint, None) == "checkpoint.json names files outside"


def test_a_record_writes_no_escape_to_the_terminal(values, record):
    folder, out = record(values), io.StringIO()
    failed = {"status": "failed", "error": "\x1b]0;T\x07\x1b[2J"}
    told = json.loads((folder / "run.json").read_text()) | failed
    (folder / "run.json").write_text(json.dumps(told))
    Console(file=out, width=200).print(runs_table([summarise_run(folder)]))
    assert "?]0;T" in out.getvalue() and "\x1b" not in out.getvalue()
