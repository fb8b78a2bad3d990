"""What tests/test_distributed.py has each process do; what differs from one goes to FOLDER/RANK."""

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import replace
from datetime import timedelta
from traceback import format_exc
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import PreTrainedModel

from capo_exp.cli import front
from capo_exp.config.errors import RunFailed
from capo_exp.config.schema import DistributedConfig
from capo_exp.core import policy
from capo_exp.core.batch import CutSize, deal_cuts
from capo_exp.distributed.sharding import full, shard
from capo_exp.distributed.world import FOLDER, SINGLE, STOP, World
from capo_exp.rollout import EngineFailed
from capo_exp.rollout.dealt import sample
from capo_exp.rollout.hf import HFRollout
from capo_exp.training import inputs as reading
from capo_exp.training import loop
from capo_exp.training.learner import Learner
from capo_exp.training.probe import probe
from capo_exp.training.sampler import make_requests
from tests.pieces import make_learner, run_updates

EXACT = ("policy/grad_norm", "loss/total", "optim/step_scale", "selection/rejection_rate", "loss/kl")


"""The metrics of optimiser steps, which tokens the last of them kept, and the weights after it."""


def take(learner, batch, step):
    metrics, record = run_updates(learner, batch, step)
    return metrics, record.selection.keep_mask, [full(p.detach()).clone() for p in learner.model.parameters()]


def start(job, name):
    model = job["untied" if "untied" in name else "tied"]
    return make_learner(job["learners"][name], model, distance=0.05)


def expect(job):
    """What a whole learner of each configuration does with each batch."""
    wholes = {name: start(job, name) for name in job["learners"]}
    return {
        name: [take(one, batch, i) for i, batch in enumerate(job["batches"])] for name, one in wholes.items()
    }


def compare_learners(job, world):
    """Two optimiser steps of each configuration, over batches of which one leaves the second process idle."""
    for name, config in job["learners"].items():
        shared = share(start(job, name), config, world)
        for number, (batch, expected) in enumerate(zip(job["batches"], job["expected"][name], strict=True)):
            for fault in compare_step(expected, take(shared, batch, number)):
                yield f"{name}, batch {number}: {fault}"
            table = shared.optimizer_model
            sums = world.together(lambda table=table: table and (table.first.sum(), table.second.sum()))
            if sums[0] != sums[1]:
                yield f"{name}, batch {number}: moments of the processes {sums}"


def share(whole, config, world):
    """A learner that starts as another, on sharded copies of its models."""
    models = [None if m is None else copy.deepcopy(m) for m in (whole.model, whole.reference)]
    for model in models:
        if model is not None:
            shard(model, world, gather="float32", body=policy.score_tokens)
    model, reference = models
    assert isinstance(model, PreTrainedModel)
    return Learner(model, reference, whole.algorithm, config, torch.float32, world)


def compare_step(expected, seen):
    (metrics, mask, weights), (others, other_mask, other_weights) = expected, seen
    if not torch.equal(mask, other_mask):
        yield "another mask"
    for one, two in zip(metrics, others, strict=True):
        for key in EXACT + tuple(
            key for key in one if key.startswith(("curvature/", "step/", "calibration/"))
        ):
            if not close(one[key], two[key], scale=1e-3 if key.startswith("step/") else 1e-4):
                yield f"{key} {one[key]} {two[key]}"
    for p, q in zip(weights, other_weights, strict=True):
        if not torch.allclose(p, q, rtol=1e-5, atol=2e-6):
            yield f"weights by {(p - q).abs().max().item()}"
            return


def close(one, two, scale):
    return (
        one == two or (one != one and two != two) or abs(one - two) <= scale * max(abs(one), abs(two)) + 1e-10
    )


def compare_sums(job, world):
    """With one micro-batch a process and nothing clipped the weights are equal to the bit: a + b = b + a."""
    config, batch = job["exact"], job["batches"][0]
    whole = make_learner(config, job["tied"])
    shared = share(whole, config, world)
    assert len(deal_cuts(batch, CutSize.of(config.model), world)) == 1
    for learner in (whole, shared):
        run_updates(learner, batch)
    for p, q in zip(whole.model.parameters(), shared.model.parameters(), strict=True):
        if not torch.equal(p, full(q.detach())):
            yield "weights are not equal to the bit"
            return


def compare_runs(job, world, folder):
    """A run that is stopped and goes on in as many processes, in one, or in two after one; one whose second
    engine fails."""
    wanted = train(job, folder / "whole")
    stopped(job, folder / "two", folder)
    for name in ("one", "four"):
        copied(folder / "two", folder / name, world)
    stopped(job, folder / "mixed", folder, alone=True)
    dist.barrier()
    again = train(job, folder / "two")
    yield from differ("resumed", wanted, again, exact=True)
    one = train(job, folder / "one", alone=True)
    yield from differ("2 -> 1", wanted, one, exact=False)
    dist.barrier()
    mixed = train(job, folder / "mixed")
    yield from differ("1 -> 2", wanted, mixed, exact=False)
    yield from fail_in_second(job, folder / "failing", world)


def cache_of(prepare):
    """The same data for every run of the job, read once."""
    made: list[Any] = []
    return lambda *given: made[0] if made else made.append(prepare(*given)) or made[0]


def train(job, place, *, alone=False):
    """Rows without their times and the last checkpoint of a run; `alone` in the first process only."""
    config = replace(job["run"], output_dir=str(place))
    config = replace(config, distributed=DistributedConfig()) if alone else config
    try:
        if not (alone and dist.get_rank()):
            loop.run(config)
    finally:
        dist.barrier()
    return read_back(place)


def read_back(place):
    (directory,) = place.glob("*/*")
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]
    return rows, directory / "checkpoints" / "step_000002"


def stopped(job, place, folder, *, alone=False):
    """The run as a stop after its first step leaves it."""
    dist.barrier()
    (folder / STOP).touch()
    with suppress(KeyboardInterrupt):
        train(job, place, alone=alone)
    dist.barrier()
    (folder / STOP).unlink(missing_ok=True)
    dist.barrier()


def copied(source, target, world):
    world.first(lambda: shutil.copytree(source, target) and None)


def differ(name, wanted, got, *, exact):
    (rows, checkpoint), (others, other) = wanted, got
    for one, two in zip(rows, others, strict=True):
        for key, value in one.items():
            if key.startswith("mismatch/") or key == "policy/sampler_kl_k3":
                continue  # of rounding alone
            if value != two[key] if exact else value is not None and not close(value, two[key], scale=1e-3):
                yield f"{name}: {key} {value} {two[key]}"
    pairs = (load_file(each / "model.safetensors") for each in (checkpoint, other))
    for (key, one), (_, two) in zip(*(sorted(pair.items()) for pair in pairs), strict=True):
        if not (torch.equal(one, two) if exact else torch.allclose(one, two, rtol=1e-4, atol=2e-5)):
            yield f"{name}: {key} of the weights"


def fail_in_second(job, place, world):
    plain = HFRollout.generate

    def failing(self, request):
        if world.rank == 1 and request.weight_version == 1:
            raise EngineFailed("the second engine is tired")
        return plain(self, request)

    HFRollout.generate = failing
    try:
        train(job, place)
        yield "an engine that fails in one process ends the run of none"
    except EngineFailed as error:
        if str(error).splitlines() != [
            "the second engine is tired", "step 1 is saved; the same command goes on from there",
        ]:  # fmt: skip
            yield f"said {error}"
    finally:
        HFRollout.generate = plain
    if not list(place.glob("*/*/checkpoints/step_000001")):
        yield "the step before the failure is not saved"


def compare_blocks(job, world):
    """Three calls, dealt to an engine a process, or one for every two, give what a process alone samples."""
    config = job["run"]
    with (inputs := reading.read_inputs(config, world)).verifier:
        model = policy.load_model(config.model, inputs.device)
        engine = reading.build_engine(config, inputs, model, world)
        reading.share_out(config, world, model)
        asked = {"group_size": 2, "seed": (0, 0, 0), "weight_version": 0}
        requests = make_requests(config, inputs.data.train[:9], **asked)
        wanted = sample(engine, requests, SINGLE)
        for block in (1, 2):
            if len(requests) != 3 or sample(engine, requests, replace(world, block=block)) != wanted:
                yield f"{len(requests)} calls, {block} processes an engine: other completions"


def doubt_engines(job, world):
    """What the doctor says of engines that take new weights, and of a second one that does not."""
    said = probe(job["run"], world, torch.device("cpu"))
    if not said.startswith("2 processes on cpu; ") or "each one's engine takes new weights" not in said:
        yield f"said {said}"
    plain = reading.copy_weights
    if world.rank == 1:  # gathers them, for the first waits for that, and keeps its own
        reading.copy_weights = lambda model, _: [full(weight) for weight in model.parameters()]
    try:
        yield f"said {probe(job['run'], world, torch.device('cpu'))}"
    except RunFailed as failure:
        if "the engine of process 1 samples with other weights: largest difference" not in str(failure):
            yield f"said {failure}"
    finally:
        reading.copy_weights = plain


def work(rank, folder, size, *chosen):
    """One of `size` processes that meet at a file."""
    torch.set_num_threads(1)
    place, limit = f"file://{folder}/meet_{size}", timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=size, timeout=limit)
    world = World(rank, size)
    job = torch.load(folder / "job.pt", weights_only=False)
    parts: dict[str, Callable[[], Iterator[str]]] = {
        "learners": lambda: compare_learners(job, world),
        "sums": lambda: compare_sums(job, world),
        "engines": lambda: doubt_engines(job, world),
        "blocks": lambda: compare_blocks(job, world),
        "runs": lambda: compare_runs(job, world, folder),
        "four": lambda: differ(
            "2 -> 4", read_back(folder / "whole"), train(job, folder / "four"), exact=False
        ),
    }
    reading.prepare = cache_of(reading.prepare)
    loop.open_world = lambda config, _: nullcontext(
        world if config.distributed.name == "fsdp2" else World(0, 1)
    )
    os.environ[FOLDER] = str(folder)
    try:
        faults = {name: list(parts[name]()) for name in chosen}
    except Exception:
        faults = {"error": [format_exc()]}
    (folder / f"rank_{rank}.json").write_text(json.dumps(faults))
    dist.destroy_process_group()


def train_as_given(rank, folder, port, command):
    """One of two processes that a torchrun has started, which says so by these variables alone."""
    numbers = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
    place = {"TORCHELASTIC_RUN_ID": "given", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(place | {name: str(number) for name, number in numbers.items()})
    sys.argv = ["capo_exp", *command]
    with (folder / f"said_{rank}").open("w") as file, redirect_stdout(file):
        sys.exit(front.run_training())
