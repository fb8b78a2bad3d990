"""Two processes and one give the same numbers; see distributed_job.py."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from inspect import Signature, signature
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, create_autospec

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig

from capo_exp.cli.compose import find_choices
from capo_exp.config.checks import check
from capo_exp.config.errors import ConfigError, RunFailed
from capo_exp.config.memory import estimate_memory
from capo_exp.config.schema import DistributedConfig
from capo_exp.core import policy
from capo_exp.core.batch import CutSize, deal_cuts, split
from capo_exp.distributed.world import SINGLE, World, count_sharing, own_device, torchrun_size
from capo_exp.rollout.dealt import sample
from capo_exp.rollout.hf import HFRollout
from capo_exp.runs.identity import run_id
from capo_exp.runs.record import run_status
from capo_exp.sweep import launch
from capo_exp.training import inputs, session
from tests.conftest import ALGORITHMS
from tests.distributed_job import expect, train_as_given, work
from tests.pieces import SMALL
from tests.process_pieces import together
from tests.test_selection import SELECTIONS, partly

PARTS = {2: ["learners", "sums", "engines", "blocks", "runs"], 4: ["four", "blocks"]}
"""Number of processes -> what they do; four go on from what `runs` left."""
RUN = (
    "distributed=fsdp2", "device=cpu", "logger=files", "num_steps=2", "regime.prompts_per_step=4",
    "regime.group_size=4", "model.micro_batch_size=8", "dataset.max_completion_tokens=24",
    "checkpoint.every=1", "evaluation.num_problems=3", "evaluation.every=0",
    "dataset.source.num_train=64", "dataset.source.num_eval=8",
)  # fmt: skip
CORRECTIONS, RULES = find_choices("rollout/correction"), find_choices("step_rule")


def small(composed, *overrides):
    """Three micro-batches of a batch of 10, and an optimiser that does not blow up what is near 0."""
    rate = ("regime.learning_rate=1e-3", "optimizer.eps=1e-3", "optimizer.max_grad_norm=0.1")
    return composed(*SMALL, *rate, "model.micro_batch_size=4", *overrides)


def learners(composed):
    chosen = {name: (f"algo={name}",) for name in ALGORITHMS}
    chosen |= {f"selection {name}": ("algo=grpo", *partly(name)) for name in SELECTIONS}
    bounds = dict.fromkeys(RULES, "policy_shift_max=1e-5") | {"evidence": "share=1e-3"}
    chosen |= {
        f"step rule {name}": ("algo=capo", f"step_rule={name}", f"algo.step_rule.{bounds[name]}")
        for name in RULES
    }
    chosen |= {f"correction {name}": ("algo=grpo", f"rollout/correction={name}") for name in CORRECTIONS}
    for name in ("adam_live", "sgd"):
        chosen[name] = ("algo=capo", f"curvature.optimizer_model={name}")
    budget = "model.max_tokens_per_micro_batch=30"  # four micro-batches, then three that are packed
    chosen |= {"tokens": ("algo=capo", budget), "packed": ("algo=prorl", budget, "model.pack=true")}
    instruments = ("curvature.calibrate_every=1", "model.gradient_checkpointing=true")
    chosen["untied"] = ("algo=capo", *instruments, "model.logits_chunk_tokens=3", "curvature.hidden_shift=1")
    return {name: small(composed, *overrides) for name, overrides in chosen.items()}


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(composed, small_model, random_batch, tmp_path):
    """Each method, selection, rule, optimiser model; a run that stops and goes on, also in four."""
    untied = type(small_model)(
        type(small_model.config)(**small_model.config.to_dict() | {"tie_word_embeddings": False})
    )
    job = {
        "learners": learners(composed),
        "exact": small(composed, "algo=grpo", "model.micro_batch_size=5", "optimizer.max_grad_norm=inf"),
        "run": composed(*RUN, "algo=prorl", "algo.reference_reset_every=1"),
        "tied": small_model,
        "untied": untied.eval(),
        "batches": [random_batch(rows=10), random_batch(rows=2, seed=2)],
    }
    torch.save(job | {"expected": expect(job)}, tmp_path / "job.pt")
    for size, parts in PARTS.items():
        together(size, work, tmp_path, size, *parts)
        for rank in range(size):
            faults = json.loads((tmp_path / f"rank_{rank}.json").read_text())
            assert not any(faults.values()), json.dumps(faults, indent=1)[:6000]


@pytest.mark.slow
def test_a_killed_process_ends_the_run_in_one_line(tmp_path):
    """And no process is left; the checkpoint is what the same command goes on from."""
    command = [sys.executable, "-m", "capo_exp", *RUN, "num_steps=1000", f"output_dir={tmp_path}"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    until = time.monotonic() + 300
    while not list(tmp_path.glob("*/*/checkpoints/step_000001")):
        assert run.poll() is None and time.monotonic() < until, run.communicate(timeout=60)[1]
        time.sleep(0.1)
    first, second = workers_of(run.pid)
    os.kill(second, signal.SIGKILL)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 1
    assert said.splitlines()[-1].startswith("process 1 was ended by SIGKILL; the same command goes on from")
    assert "Traceback" not in said
    assert not Path(f"/proc/{first}").exists()
    (directory,) = tmp_path.glob("*/*")
    assert run_status(directory) in ("failed", "interrupted")


def workers_of(launcher):
    """Process numbers by rank."""
    children = subprocess.run(["pgrep", "-P", str(launcher)], capture_output=True, text=True).stdout.split()
    environments = {int(child): Path(f"/proc/{child}/environ").read_bytes() for child in children}
    return sorted(child for child, variables in environments.items() if b"LOCAL_RANK=" in variables)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_two_tasks_of_submitit_are_the_nodes_of_one_run(tmp_path):
    command = [
        sys.executable, "-m", "capo_exp", "-m", *RUN, "hydra/launcher=submitit_local", "seed=0",
        "hydra.launcher.tasks_per_node=2", "distributed.nodes=2", "distributed.processes=1",
        f"output_dir={tmp_path}",
    ]  # fmt: skip
    where = os.environ | {"MASTER_PORT": str(free_port())}
    done = subprocess.run(command, env=where, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (record,) = tmp_path.glob("*/*/run.json")
    assert run_status(record.parent) == "finished"
    shards = [*record.parent.glob("checkpoints/step_000002/trainer_state/shard-*")]
    assert len(shards) == 2  # each process writes its own


@pytest.mark.slow
def test_processes_of_a_given_torchrun_are_one_run(tmp_path):
    """The first writes."""
    port, command = free_port(), [*RUN, f"output_dir={tmp_path}"]
    together(2, train_as_given, tmp_path, port, command)
    (record,) = tmp_path.glob("*/*/run.json")
    assert run_status(record.parent) == "finished"
    said = [(tmp_path / f"said_{rank}").read_text() for rank in range(2)]
    assert ["held-out accuracy" in each for each in said] == [True, False], said


def test_the_oldest_torchrun_gets_no_settings_that_came_later(composed, monkeypatch):
    """torch 2.11's LaunchConfig has no shutdown_timeout."""
    older, taken = create_autospec(LaunchConfig), dict(signature(LaunchConfig).parameters)
    del taken["shutdown_timeout"]
    older.__signature__ = Signature(list(taken.values()))
    monkeypatch.setattr("torch.distributed.launcher.api.LaunchConfig", older)
    config = composed("distributed=fsdp2", "distributed.processes=2").distributed
    assert launch._meeting(config) is older.return_value
    assert older.call_args.kwargs["nproc_per_node"] == 2 and set(older.call_args.kwargs) <= set(taken)


def test_a_given_torchrun_says_how_many_there_are(composed, monkeypatch):
    """Whatever the configuration says; without sharding each would train the whole run."""
    for name, number in (("WORLD_SIZE", 4), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(number))
    found = torchrun_size(composed("distributed=fsdp2", "distributed.processes=7").distributed)
    assert (found.processes, found.nodes) == (2, 2)
    with pytest.raises(ConfigError, match=r"^distributed=single: expected fsdp2 under torchrun"):
        torchrun_size(composed().distributed)


@pytest.mark.parametrize(
    "overrides",
    ["model.micro_batch_size=96", "rollout.chunking=per_step", "curvature.diagnose_every=5", "device=cuda:1",
     "model.compile=true",
     "rollout=vllm rollout.server_url=start", "rollout=vllm rollout.engine.weight_transfer=nccl",
     "rollout=vllm rollout.engine.visible_devices=1", "rollout=vllm rollout.engine.tensor_parallel_size=3",
     "rollout=vllm distributed.nodes=2 rollout.engine.tensor_parallel_size=4"],
)  # fmt: skip
def test_what_several_processes_cannot_do_is_refused(composed, overrides):
    """In a line that begins with the key; without it the same passes."""
    *chosen, refused = overrides.split()
    common = ["distributed=fsdp2", "rollout.chunking=per_micro_batch", *chosen]
    check(composed(*common))
    with pytest.raises(ConfigError, match=refused.partition("=")[0].replace(".", r"\.")):
        check(composed(*common, refused))


def test_engines_are_shared_by_the_gpus_they_take_and_a_server_by_all(composed):
    eight = ("distributed=fsdp2", "distributed.processes=8", "model.micro_batch_size=12", "rollout=vllm",
             "rollout.chunking=per_micro_batch")  # fmt: skip
    for chosen, count in (((), 1), (("rollout.engine.tensor_parallel_size=2",), 2),
                          (("rollout.server_url=http://node7:8000",), 8)):  # fmt: skip
        config = composed(*eight, *chosen)
        check(config)
        assert count_sharing(config.rollout, 8) == count
    assert count_sharing(composed().rollout, 8) == 1


def test_the_number_of_processes_makes_no_other_run(composed):
    """Nor how many share an engine; only what layers are gathered in does."""
    one = composed("rollout.chunking=per_micro_batch")
    several = [composed("distributed=fsdp2", f"distributed.processes={n}") for n in (2, 8)]
    assert {run_id(config) for config in several} == {run_id(one)}
    assert run_id(composed("distributed=fsdp2", "distributed.gather=bfloat16")) != run_id(one)
    own, shared = (
        composed("distributed=fsdp2", "rollout=vllm", f"rollout.engine.tensor_parallel_size={n}")
        for n in (1, 2)
    )
    check(shared)
    assert run_id(own) == run_id(shared)


def test_processes_share_what_is_sharded(composed):
    """Weights, gradients and Adam; each has the optimiser model's moments and its micro-batch's logits."""
    one, eight = (
        estimate_memory(composed("model=tiny", "rollout=vllm", *more), gpu=True)
        for more in ([], ["distributed=fsdp2", "distributed.processes=8"])
    )
    for part in ("weights", "gradients", "adam", "records"):
        assert getattr(eight, part) == getattr(one, part) // 8
    assert (eight.moments, eight.logits) == (one.moments, one.logits)
    assert one.gathered == 0 < eight.gathered < one.weights


def test_the_gpu_of_a_process_is_torchs_current_one(monkeypatch):
    """Which is what it synchronises; also the second GPU of a single process."""
    seen, alone, spread = [], DistributedConfig(), DistributedConfig(name="fsdp2")
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for config, name in ((alone, "cuda:1"), (spread, "cuda"), (alone, "cuda"), (spread, "cpu")):
        seen.append(own_device(config, torch.device(name)))
    assert seen == [torch.device(name) for name in ("cuda:1", "cuda:1", "cuda:3", "cuda:3", "cuda", "cpu")]


def test_no_gpu_holds_two_whole_models_beside_an_engine(composed, tmp_path, monkeypatch):
    config, calls = composed(*RUN, "algo.kl_coefficient=0.1"), []
    load = policy.load_model
    monkeypatch.setattr(policy, "load_model", lambda *a, **k: calls.append("load") or load(*a, **k))
    monkeypatch.setattr(inputs, "shard", lambda *_, **__: calls.append("shard"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty cache"))
    monkeypatch.setattr(HFRollout, "start", lambda *_: calls.append("start"))
    with ExitStack() as stack:
        session.open_session(config, inputs.read_inputs(config), tmp_path, stack)
    assert calls == ["load", "shard", "load", "shard", "empty cache", "start"]


def test_an_engine_that_is_asked_for_nothing_samples_nothing():
    engine = create_autospec(HFRollout)
    assert sample(engine, [], SINGLE) == [] and not engine.mock_calls


class Unportable(Exception):
    """Pickle would rebuild it from its text alone."""

    def __init__(self, key, number):
        super().__init__(f"{key} {number}")


def test_what_pickle_cannot_rebuild_fails_in_every_process(monkeypatch):
    """With its name and text; what pickle can rebuild is what it was."""

    def gather(said, own):
        said[:] = [pickle.loads(pickle.dumps(own)), (None, None)]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for failure, kind, text in ((Unportable("a", 1), RuntimeError, r"test_distributed\.Unportable: a 1$"),
                                (ConfigError("b=2"), ConfigError, "^b=2$")):  # fmt: skip
        with pytest.raises(kind, match=text):
            World(1, 2).together(Mock(side_effect=failure))


def end_as(rank, error, folder, patch):
    """What a process returns whose training ends so, and whether it waits until the first one has ended."""
    slept = Mock(side_effect=lambda _: (folder / launch.ENDED).touch())
    patch.setattr("capo_exp.training.loop.run", Mock(side_effect=error))
    for name in ("read_config", "end_with_parent"):
        patch.setattr(launch, name, Mock())
    patch.setattr("time.sleep", slept)
    patch.setattr(sys, "argv", ["", "train"])
    patch.setenv(launch.FOLDER, str(folder))
    patch.setenv("LOCAL_RANK", str(rank))
    (folder / launch.CONFIG).touch()
    return launch.main(), slept.called


@pytest.mark.parametrize(
    ("error", "status", "waits", "told"),
    [(KeyboardInterrupt(), 130, True, False), (ConfigError("a=1: NCCL"), 2, True, True),
     (RunFailed("vLLM: NCCL"), 1, True, True), (RuntimeError("NCCL error"), 1, False, False),
     (RuntimeError("a bug"), 1, False, True)],
)  # fmt: skip
def test_the_first_process_ends_first(error, status, waits, told, tmp_path, monkeypatch):
    """It closes what it has opened; torchrun ends all others as soon as one has ended."""
    assert end_as(1, error, tmp_path, monkeypatch) == (status, waits)
    assert (tmp_path / launch.FAILURE).exists() == told
    (tmp_path / launch.ENDED).unlink(missing_ok=True)
    assert end_as(0, error, tmp_path, monkeypatch) == (status, False)
    assert (tmp_path / launch.ENDED).exists() == waits


def test_a_stopped_run_is_no_killed_one(tmp_path):
    """Although torchrun ends the other processes."""
    ends = {0: SimpleNamespace(exitcode=-signal.SIGTERM), 1: SimpleNamespace(exitcode=launch.INTERRUPTED)}
    assert isinstance(launch._explain(ends, tmp_path, ""), KeyboardInterrupt)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("cut", [CutSize(3), CutSize(1, 24), CutSize(1, 24, packed=True)])
def test_dealt_cuts_are_all_cuts_and_all_make_equally_many_passes(random_batch, cut, size):
    batch = random_batch(rows=10)
    shares = [deal_cuts(batch, cut, World(rank, size)) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    real = [[rows.tolist() for rows, _ in share if len(rows)] for share in shares]
    assert SINGLE.collect([[rows.tolist() for rows, _ in split(batch, cut)]]) == World(0, size).collect(real)
    idle = [one for share in shares for rows, one in share if not len(rows)]
    assert all(one.input_ids.shape == (1, 2) and not one.completion_mask.any() for one in idle)
