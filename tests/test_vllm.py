"""The real vLLM, in its process and behind HTTP: its tokens, log-probs, weights and failures."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from dataclasses import fields, replace
from datetime import timedelta
from importlib.util import find_spec
from math import isnan
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints
from unittest.mock import create_autospec

import pytest
import requests
import torch
import torch.distributed as dist

from capo_exp.config.build import build_part
from capo_exp.config.checks import check
from capo_exp.config.errors import ConfigError
from capo_exp.config.ranges import Rule
from capo_exp.core import policy
from capo_exp.core.batch import collate
from capo_exp.core.types import Problem, Prompt
from capo_exp.data.prompts import render_prompts
from capo_exp.distributed.sharding import local, shard
from capo_exp.distributed.world import SINGLE, World
from capo_exp.rollout import EngineFailed, SamplingRequest, vllm, weight_transfer
from capo_exp.rollout.dealt import sample
from capo_exp.rollout.vllm import VLLMRollout
from capo_exp.rollout.vllm_process import (
    OUT_OF_MEMORY,
    Elsewhere,
    Enduring,
    EngineProcess,
    Request,
    engine_environment,
    explain_failure,
)
from capo_exp.rollout.vllm_server import Server, start_server
from capo_exp.rollout.vllm_settings import VLLMSettings
from capo_exp.rollout.weight_proof import MOVED, WeightProbe, WeightProof
from capo_exp.rollout.weight_transfer import (
    EngineWeights,
    WeightClient,
    choose_backend,
    describe_ipc,
    make_weight_source,
    run_within,
)
from capo_exp.training import rollout_step
from tests.conftest import compose_config
from tests.pieces import logged, run_training
from tests.process_pieces import alive, needs_vllm, together, wait_for

ROOT = Path(__file__).parents[1]

SMALL_KV = "rollout.engine.kv_cache_gib=0.25"
SHORT = "rollout.engine.max_model_len=400"
EAGER = "rollout.engine.enforce_eager=true"
"""Starts in a third of the time; tests/test_doctor.py compares what is compiled."""


class Setup:
    """The tiny model, its prompts, and a running engine."""

    def __init__(self, config, directory, world=SINGLE):
        self.config = config
        self.directory = directory
        self.tokenizer = policy.load_tokenizer(config.model)
        self.model = policy.load_model(config.model, torch.device("cpu"))
        source = build_part(config.dataset.source, key="dataset.source")
        self.prompts = render_prompts(source("train", path=None), self.tokenizer, config.dataset)[0][:12]
        build = build_part(config.rollout.engine, key="rollout.engine")
        self.engine: VLLMRollout = build(self.model, self.tokenizer, torch.float32, world)
        self.version = 0

    def __enter__(self):
        self.engine.start(self.directory, self.prompts)
        return self

    def __exit__(self, *_):
        self.engine.close()

    def sample(self, prompts=None, **changes):
        return self.engine.generate(self.request(prompts, **changes))

    def request(self, prompts=None, **changes):
        asked = SamplingRequest(prompts or self.prompts, 4, 48, 0.7, 0, 1.0, 3, self.version)
        return replace(asked, **changes)

    def learn(self):
        """Moves the weights as an optimiser step of a very high rate would."""
        for parameter in self.model.parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
        self.version += 1


def batch_of(groups):
    return collate(groups, pad_token_id=0, device=torch.device("cpu"))


def differences(setup, groups, temperature=1.0):
    batch = batch_of(groups)
    own = policy.log_probs(setup.model, batch, policy.ForwardSettings(temperature, 1000, torch.float32))
    return (own - batch.sampler_log_probs).abs()[batch.completion_mask]


def tokens(groups):
    return [completion.token_ids for group in groups for completion in group.completions]


def nearly_the_same(expected, found):
    pairs = [(a, b) for one, other in zip(expected, found, strict=True) for a, b in zip(one, other)]  # noqa: B905
    return sum(a == b for a, b in pairs) >= 0.99 * sum(map(len, expected))


def compose_vllm(*overrides):
    return compose_config("rollout=vllm", SMALL_KV, *overrides)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """An engine process that all tests share which leave it alive; closed, it is gone."""
    config = compose_vllm(SHORT, EAGER)
    with Setup(config, tmp_path_factory.mktemp("vllm")) as setup:
        engine = setup.engine.running()
        assert isinstance(engine, EngineProcess) and engine.process.poll() is None
        yield setup
    assert not Path(f"/proc/{engine.process.pid}").exists()
    setup.engine.close()  # again does no harm


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server of the run's own, whose training rollouts are cut by top_k."""
    config = compose_vllm("rollout.server_url=start", "rollout.top_k=5", EAGER)
    with Setup(config, tmp_path_factory.mktemp("server")) as setup:
        yield setup


@needs_vllm
def test_sampled_log_probs_are_the_learners(running):
    for temperature in (0.7, 1.0):
        groups = running.sample(temperature=temperature)
        assert differences(running, groups, temperature).max() < 1e-4
        assert running.engine.metrics()["mismatch/probe_difference"] < 1e-5


@needs_vllm
def test_the_seed_decides_the_tokens(running):
    first, again, other = running.sample(), running.sample(), running.sample(seed=4)
    assert [group.completions for group in first] == [group.completions for group in again]
    assert tokens(first) != tokens(other)
    same_prompt = running.sample([running.prompts[0]] * 3, temperature=2.0)
    assert len(set(tokens(same_prompt))) == 12  # prompts and completions have seeds of their own


@needs_vllm
def test_completions_end_at_the_end_token_or_the_limit(running):
    end = running.tokenizer.eos_token_id
    groups = running.sample(max_tokens=24, group_size=8, temperature=1.0)
    seen = [completion for group in groups for completion in group.completions]
    assert {completion.truncated for completion in seen} == {True, False}
    for completion in seen:
        assert completion.truncated == (completion.token_ids[-1] != end)
        assert end not in completion.token_ids[:-1]
        assert len(completion.token_ids) == len(completion.sampler_log_probs) <= 24
        assert completion.truncated is False or len(completion.token_ids) == 24
        assert completion.text == running.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    assert [group.prompt for group in groups] == running.prompts
    assert {group.weight_version for group in groups} == {running.version}


@needs_vllm
def test_completions_go_on_from_where_they_were_cut(running):
    """As budgets and values of states ask; what had begun has no log-probs of this call."""
    ask = {"temperature": 0.0, "group_size": 2}
    whole = tokens(running.sample(**ask))[::2]
    begun = [row[: i % 6] for i, row in enumerate(whole)]
    rest, again = zip(*(group.completions for group in running.sample(**ask, begun=begun)), strict=True)
    assert rest == again  # greedy ones are sampled once
    assert nearly_the_same(whole, [completion.token_ids for completion in rest])
    cut = running.sample(begun=begun, new_tokens=7, temperature=1.0)
    for first, group in zip(begun, cut, strict=True):
        for completion in group.completions:
            ids, known = completion.token_ids, len(first)
            assert ids[:known] == first and known < len(ids) <= known + 7
            assert completion.truncated == (ids[-1] != running.tokenizer.eos_token_id)
            unknown = [isnan(value) for value in completion.sampler_log_probs]
            assert unknown == [place < known for place in range(len(ids))]
    difference = differences(running, cut)
    assert difference.isnan().any() and difference.nan_to_num().max() < 1e-4


@needs_vllm
def test_prompts_longer_together_than_a_batch_of_the_engine(running):
    """vLLM's CPU build fails where a seeded request's prompt is computed in two parts."""
    first = running.prompts[0]
    many = [replace(first, token_ids=(5 + i % 90, 6 + i // 90, *first.token_ids * 8)) for i in range(200)]
    assert sum(len(prompt.token_ids) for prompt in many) > 2 * 4096
    groups = running.sample(many, group_size=1, max_tokens=4)
    assert [group.prompt for group in groups] == many


def fail_to_take(engine, method, **_):
    if not isinstance(engine, Elsewhere) and method == "start_weight_update":
        raise EngineFailed("no weights today")
    return True


def share_engine(rank, folder, config, weights):
    """One of two processes with a sharded model and an engine of the first one's, which shares it."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=200)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=limit)
    world = World(rank, 2, block=2)
    setup = Setup(config, folder, world)
    setup.model.load_state_dict(weights)
    shard(setup.model, world, gather="float32", body=policy.score_tokens)
    with setup, torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        assert isinstance(setup.engine.running(), Elsewhere) != world.is_first
        requests = [setup.request(seed=seed) for seed in (3, 4)]
        groups = sample(setup.engine, requests, world)
        assert bool(setup.engine.generate(requests[0])) == world.is_first
        setup.version += 1
        for weight in setup.model.parameters():
            local(weight).mul_(1.1)
        with patch.context() as broken:  # before the first weight is gathered, in one of the two
            broken.setattr(type(setup.engine.running()), "call", fail_to_take)
            with pytest.raises(EngineFailed, match="no weights today"):
                sample(setup.engine, [setup.request()], world)
        setup.version += 1
        lose_weights(patch, setup)
        with pytest.raises(EngineFailed, match=r"its weights are not the learner's"):
            sample(setup.engine, [setup.request()], world)
    torch.save(groups, folder / f"groups_{rank}.pt")
    dist.destroy_process_group()


@needs_vllm
def test_two_processes_share_an_engine(running, tmp_path):
    """It samples what an engine of one part does; both learn that it takes no weights, or loses them."""
    shared = compose_vllm(SHORT, EAGER, "rollout.engine.tensor_parallel_size=2")
    together(2, share_engine, tmp_path, shared, running.model.state_dict())
    first, second = (torch.load(tmp_path / f"groups_{rank}.pt", weights_only=False) for rank in range(2))
    assert first == second and differences(running, first, temperature=0.7).max() < 1e-4
    assert nearly_the_same(tokens([*running.sample(), *running.sample(seed=4)]), tokens(first))


def lose_weights(patch, setup):
    for call in ("start_weight_update", "update_weights", "finish_weight_update"):
        patch.setattr(WeightClient, call, lambda *_: None)


@needs_vllm
def test_new_weights_reach_the_engine_with_an_empty_prefix_cache(running):
    """The long prompt's cached keys and values of the old weights would show in the log-probs."""
    long = replace(running.prompts[0], token_ids=running.prompts[0].token_ids * 24)
    assert len(long.token_ids) > 256  # two blocks of the CPU's cache
    before = running.sample([long], temperature=0.0, group_size=1)
    running.engine.metrics()
    running.learn()
    after = running.sample([long], temperature=0.0, group_size=1)
    metrics = running.engine.metrics()
    assert differences(running, after).max() < 1e-4
    assert after[0].completions[0].sampler_log_probs != before[0].completions[0].sampler_log_probs
    assert metrics["time/transfer_seconds"] > 0
    assert running.engine.metrics()["time/transfer_seconds"] == 0  # nothing new, nothing sent
    assert after[0].weight_version == running.version


@needs_vllm
def test_stale_weights_stop_the_run(running, monkeypatch):
    """The transfer is lost; the engine goes on with the weights it has."""
    running.sample()
    running.learn()
    with monkeypatch.context() as patch:
        lose_weights(patch, running)
        patch.setattr(WeightProbe, "only_learner_moved", lambda *_, **__: False)  # by the size alone
        with pytest.raises(EngineFailed) as stopped:
            running.sample()
    message = str(stopped.value)
    assert f"after optimiser step {running.version} " in message
    assert "expected on average at most rollout.engine.max_probe_difference.float32=0.0001" in message
    mean = running.engine.metrics()["mismatch/probe_difference"]
    assert mean > 0.01 and f"{mean:.3g} nats" in message
    running.sample()  # an honest transfer, and the engine is as good as before


@needs_vllm
def test_stale_weights_are_seen_however_small_the_difference(running, monkeypatch):
    """As in bfloat16, where rounding hides a step of a low rate: the engine's do not move at all."""
    running.sample()
    with torch.no_grad():
        running.model.get_input_embeddings().weight[:, 0] += 1e-3
    running.version += 1
    with monkeypatch.context() as patch:
        lose_weights(patch, running)
        loose = replace(running.engine.settings, max_probe_difference={"float32": 0.005})
        patch.setattr(running.engine, "settings", loose)
        with pytest.raises(EngineFailed, match="expected the engine's to change with the learner's"):
            running.sample()
    running.sample()
    running.version += 1
    running.sample()  # nothing has changed, for either: no reason to stop


def test_stale_weights_are_seen_however_slowly_the_learner_moves(small_model):
    """Two lost steps, of which neither is enough alone; between them the engine said the same."""
    prompt = Prompt(Problem("0", "", ""), "", (2, 5))
    proof, step, tolerance = WeightProof(small_model, torch.float32, [prompt]), 0.6 * MOVED, 1.0
    probes = [WeightProbe(torch.tensor([number * step]), torch.zeros(1)) for number in range(3)]
    for number in (0, 1):
        proof.judge(probes[number], number, "float32", tolerance)
    with pytest.raises(EngineFailed, match=r"step 2 .* expected the engine's to change with the learner's"):
        proof.judge(probes[2], 2, "float32", tolerance)
    proof.judge(WeightProbe(torch.ones(1), torch.ones(1)), 3, "float32", tolerance)  # they have come


def test_a_sleeping_engine_finds_what_the_learner_no_longer_needs(tmp_path, monkeypatch):
    """Its weights what an optimiser step took, its KV cache the copies that were made to be sent; all
    processes wait for each other there, and hear of a transfer that failed in one."""
    engine, calls = Setup(compose_vllm(), tmp_path).engine, []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(World, "together", lambda _, action: calls.append("all:") or [action()])
    call = lambda name, tags=(), **_: calls.extend([name, *tags]) or True  # noqa: E731
    engine._engine, engine._asleep = SimpleNamespace(call=call, generate=None), True
    engine._send, engine._proof = lambda: calls.append("send"), create_autospec(WeightProof, instance=True)
    engine._proof.look.return_value = WeightProbe(torch.zeros(1), torch.zeros(1))
    engine._synchronise(1)
    assert calls == [
        "all:", "empty", "wake_up", "weights", "all:", "send", "update_weight_version", "all:", "empty",
        "wake_up", "kv_cache", "reset_prefix_cache",
    ]  # fmt: skip


@needs_vllm
def test_completions_of_another_version_stop_the_run(running):
    running.sample()
    running.engine.running().call("update_weight_version", new_version="999")
    with pytest.raises(EngineFailed, match=r"sampled with weights \['999'\]: expected"):
        running.sample()
    running.version += 1  # which is sent, and so is its name


@needs_vllm
def test_a_server_samples_what_the_learner_scores(served):
    """Also with top_k: its log-probs are those before the cut, as the learner's."""
    groups = served.sample(temperature=1.0, top_k=5)
    assert differences(served, groups).max() < 1e-4
    assert {group.weight_version for group in groups} == {0}
    batch = batch_of(groups)
    output = policy.forward(served.model, batch, policy.ForwardSettings(1.0, 1000, torch.float32), top_k=5)
    among = (output.topk_ids == batch.token_ids[..., None]).any(-1)[batch.completion_mask]
    assert among.all()
    first, again = tokens(served.sample()), tokens(served.sample())
    assert nearly_the_same(first, again)  # batched as requests come in


@needs_vllm
def test_new_weights_reach_a_server_and_stale_ones_are_seen(served, monkeypatch):
    served.sample()
    served.learn()
    assert differences(served, served.sample(temperature=1.0)).max() < 1e-4
    served.learn()
    with monkeypatch.context() as patch:
        lose_weights(patch, served)
        with pytest.raises(EngineFailed, match=f"after optimiser step {served.version} "):
            served.sample()


@needs_vllm
def test_a_server_is_found_by_its_url(served, tmp_path):
    """As one that the user started; a second learner then sends its own weights."""
    server = served.engine.running()
    assert isinstance(server, Server)
    config = compose_vllm(f"rollout.server_url={server.url}", "rollout.top_k=5")
    with Setup(config, tmp_path) as guest:
        guest.learn()
        assert differences(guest, guest.sample(temperature=1.0)).max() < 1e-4
    assert server.call("reset_prefix_cache")  # it is still there
    # Without top_k the learner's temperature has to be in the log-probs.
    with pytest.raises(ConfigError, match="--logprobs-mode raw_logprobs: expected processed_logprobs"):
        Setup(compose_vllm(f"rollout.server_url={server.url}"), tmp_path).__enter__()


@needs_vllm
def test_a_server_that_dies_is_named(served):
    """The last test of this server."""
    served.learn()  # others have sent theirs
    served.sample()
    server = served.engine.running()
    assert isinstance(server, Server) and server.process is not None
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()
    with pytest.raises(EngineFailed, match="the server ended with exit code -9"):
        served.sample()


START_SERVER = """
import sys; from pathlib import Path; from types import SimpleNamespace
from capo_exp.rollout import vllm_server
vllm_server.API_SERVER, place = "stub_server", Path(sys.argv[1])
limits, environment = SimpleNamespace(start_seconds=600), {"PYTHONPATH": f"{place}:{sys.argv[2]}"}
vllm_server.start_server({}, environment=environment, limits=limits, log_file=place / "vllm.log")
print("ready", flush=True); sys.stdin.read()
"""


def test_a_server_ends_with_a_run_that_is_killed(tmp_path):
    """Nobody is left to close it then."""
    (tmp_path / "stub_server.py").write_text(STUB)
    command, pipe = [sys.executable, "-c", START_SERVER, str(tmp_path), str(ROOT)], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as run:
        assert run.stdout is not None and run.stdout.readline() == "ready\n"
        [guard] = children_of(run.pid, "stub_server")
        [server] = children_of(guard, "stub_server")
        assert alive(server)
        run.kill()
    wait_for(lambda: not alive(server))


STUB = """
import os, socketserver, sys
from http.server import BaseHTTPRequestHandler

class Handler(BaseHTTPRequestHandler):
    address_string = lambda self: ""
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "17")
        self.end_headers()
        self.wfile.write(b'{"world_size": 3}')

socketserver.UnixStreamServer(sys.argv[sys.argv.index("--uds") + 1], Handler).serve_forever()
"""


def test_a_server_of_the_run_answers_its_user_alone(tmp_path, monkeypatch):
    """At a socket in a folder that nobody else can enter, and not where the path would be too long; it opens
    no port, and its folder goes with it."""
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    (tmp_path / "stub_server.py").write_text(STUB)
    monkeypatch.setattr("capo_exp.rollout.vllm_server.API_SERVER", "stub_server")
    environment = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    log = tmp_path / "vllm.log"
    server = start_server({}, environment=environment, limits=settings_of(), log_file=log)
    socket_file = Path(server.url.removeprefix("unix:"))
    assert socket_file.is_socket() and socket_file.parent.stat().st_mode & 0o777 == 0o700
    assert server.world_size() == 3
    assert server.process is not None and not listens(server.process.pid)
    server.close()
    assert not socket_file.parent.exists() and not any(long.iterdir())


def listens(pid):
    """Whether the process or one that it has started has a port open."""
    found = subprocess.run(["pgrep", "-g", str(pid)], capture_output=True, text=True)
    links = {os.readlink(link) for one in found.stdout.split() for link in Path(f"/proc/{one}/fd").iterdir()}
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.splitlines()[1:]]
    return any(row[3] == "0A" and f"socket:[{row[9]}]" in links for row in rows)


def test_a_server_that_is_not_there(tmp_path):
    config = compose_vllm("rollout.server_url=http://127.0.0.1:9", "rollout.engine.start_seconds=0.5")
    with pytest.raises(
        EngineFailed, match=r"no server at http://127.0.0.1:9 within rollout.engine.start_seconds=0.5"
    ):
        Setup(config, tmp_path).__enter__()
    with Setup(config, tmp_path, World(1, 2, block=2)) as second:  # which only the first one asks
        assert isinstance(second.engine.running(), Elsewhere)


@pytest.mark.parametrize(
    ("text", "missing"),
    [("<html>", "JSONDecodeError"), ("{}", "KeyError"), ("", "TypeError"),
     ('{"choices": [{"token_ids": [1], "logprobs": null}], "world_size": null}', "TypeError")],
)  # fmt: skip
def test_an_answer_in_another_form_is_the_engines_failure(text, missing, tmp_path, monkeypatch):
    """As of another version of vLLM: what was learned is saved then."""
    answer = requests.Response()
    answer.status_code, answer._content = 200, text.encode()
    monkeypatch.setattr(Server, "_request", lambda *_, **__: answer)
    server = Server("http://node7:8000", limits=settings_of(), log_file=tmp_path / "none")
    asked = {"get_world_size": server.world_size, "generate": lambda: server.generate([Request((1,), {})])}
    for route, ask in asked.items():
        with pytest.raises(EngineFailed, match=f"{route}: http://node7:8000 answered in .* {missing}: "):
            ask()


def test_a_worker_that_is_busy_ends_with_its_parent(tmp_path):
    """Which was killed, and so could not end it."""
    code = "import pathlib, time; pathlib.Path(__file__).with_name('busy').touch(); time.sleep(300)"
    (tmp_path / "vllm.py").write_text(code)
    environment, (ours, theirs) = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}, multiprocessing.Pipe()
    command = [sys.executable, "-m", "capo_exp.rollout.vllm_worker", str(theirs.fileno())]
    with subprocess.Popen(
        command, pass_fds=[theirs.fileno()], env=environment, start_new_session=True
    ) as worker:
        try:
            theirs.close()
            ours.send(("start", ({},)))
            wait_for((tmp_path / "busy").exists)
            ours.close()
            assert worker.wait(60) == -signal.SIGKILL
        finally:
            worker.kill()


@needs_vllm
def test_out_of_memory_is_told_by_vllms_words():
    """Each phrase stands in its sources; that of torch is none of them."""
    (place,) = find_spec("vllm").submodule_search_locations
    sources = Path(place, "v1").rglob("*.py")
    text = "\n".join(file.read_text() for file in sources if file.parent.name in ("core", "worker")).lower()
    assert all(phrase in text for phrase in OUT_OF_MEMORY)


def test_a_start_that_fails_names_the_keys(tmp_path):
    """And its process is gone. What stands in vLLM's place fails as it does."""
    said = "allocation is less than requested memory for kv"
    (tmp_path / "vllm.py").write_text(f"raise ValueError('{said}')")
    environment, before = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}, children_of(os.getpid(), "vllm_worker")
    with pytest.raises(EngineFailed, match=f"vLLM: starting: ValueError: {said}; out of memory: ") as failed:
        EngineProcess({}, environment=environment, limits=settings_of(), log_file=tmp_path / "vllm.log")
    for key in ("engine.gpu_memory_utilization", "engine.max_num_seqs", "model.micro_batch_size"):
        assert key in str(failed.value)
    assert children_of(os.getpid(), "vllm_worker") == before


def children_of(pid, name):
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", name], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


@pytest.fixture(scope="module")
def engines(running):
    """Those that runs get, the shared one first; one serves until it is dead. No other test can use it."""
    shared = running.engine.running()
    assert isinstance(shared, EngineProcess)
    started, close = [shared], EngineProcess.close

    def start(*args, **kwargs):
        if started[-1].process.poll() is not None:
            started.append(EngineProcess(*args, **kwargs))
        return started[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm, "EngineProcess", start)
        patch.setattr(EngineProcess, "close", lambda engine: None)
        yield started
    for engine in started:
        close(engine)


RUN = [
    "rollout=vllm", SMALL_KV, SHORT, EAGER, "num_steps=4", "regime.prompts_per_step=4", "regime.group_size=4",
    "evaluation.num_problems=4", "checkpoint.every=100", "logger=files", "dataset.max_completion_tokens=24",
    "dataset.source.num_train=64", "dataset.source.num_eval=8",
]  # fmt: skip


@needs_vllm
def test_an_engine_that_dies_ends_the_run_which_goes_on_from_there(tmp_path, monkeypatch, capsys, engines):
    """Killed in step 3: one clear message, a checkpoint, and the end of a run never interrupted."""
    whole, killed = ([*RUN, f"output_dir={tmp_path / name}"] for name in ("whole", "killed"))
    assert run_training(*whole) == 0
    draw, calls = rollout_step.sample_rollout, []

    def sample_until_killed(*args, **kwargs):
        calls.append(len(calls))
        if calls[-1] == 2:
            os.kill(engines[0].process.pid, signal.SIGKILL)
        return draw(*args, **kwargs)

    monkeypatch.setattr(rollout_step, "sample_rollout", sample_until_killed)
    capsys.readouterr()
    assert run_training(*killed) == 1
    errors = capsys.readouterr().err
    assert "ended with exit code -9" in errors
    assert "step 2 is saved; the same command goes on from there" in errors
    assert "vllm.log:" in errors and "Traceback" not in errors  # the log's last lines
    assert not Path(f"/proc/{engines[0].process.pid}").exists()
    assert run_training(*killed) == 0 and len(engines) == 2 and len(calls) == 5
    assert "goes on after step 2" in capsys.readouterr().out
    unbroken, resumed = (next((tmp_path / name).glob("*/*/metrics.jsonl")) for name in ("whole", "killed"))
    assert logged(resumed) == logged(unbroken)


@needs_vllm
def test_a_difference_that_is_not_a_number_stops_the_run(engines, tmp_path):
    """The last test that samples with these engines: the cache keeps the NaN."""
    with Setup(compose_vllm(SHORT), tmp_path) as setup:
        setup.sample()
        with torch.no_grad():
            next(setup.model.parameters()).fill_(float("nan"))
        setup.version += 1
        with pytest.raises(EngineFailed, match="log-probs differ by nan"):
            setup.sample()


@needs_vllm
def test_an_engine_that_does_not_answer_is_given_up(engines):
    engine = engines[-1]
    engine.limits = replace(engine.limits, generate_seconds=1)
    os.killpg(engine.process.pid, signal.SIGSTOP)
    said = r"sampling for 1 prompts: no answer within rollout.engine.generate_seconds=1"
    with pytest.raises(EngineFailed, match=said):
        engine.generate([Request((5, 6), {"max_tokens": 2})])
    assert engine.process.poll() == -signal.SIGKILL


def test_the_last_log_lines_are_in_the_message(tmp_path):
    log = tmp_path / "vllm.log"
    assert str(explain_failure("starting", "no", log)) == "vLLM: starting: no"
    log.write_text("\n".join(f"line {i}" for i in range(40)))
    message = str(explain_failure("starting", "CUDA out of memory", log))
    assert "line 39" in message and "line 28" in message and "line 27" not in message
    assert "lower rollout.engine.gpu_memory_utilization" in message
    log.write_text("ValueError: No available memory for the cache blocks.")
    message = str(explain_failure("starting", "its process ended with exit code 1", log))
    assert "raise rollout.engine.gpu_memory_utilization" in message and "or lower" in message


def test_what_hangs_is_left_behind():
    """vLLM's senders call the engine from a thread and wait for the GPU meanwhile; a dead one is said."""
    dead, release = EngineFailed("vLLM: update_weights: its process ended"), threading.Event()
    with pytest.raises(EngineFailed, match="its process ended"):
        run_within(60, "sending", release.wait, failed=lambda: dead)
    with pytest.raises(EngineFailed, match=r"sending: no answer within rollout.engine.transfer_seconds=0.1"):
        run_within(0.1, "sending", release.wait)
    release.set()
    assert run_within(5, "adding", lambda: 2) == 2
    with pytest.raises(EngineFailed, match="vLLM: dividing: ZeroDivisionError: division by zero"):
        run_within(5, "dividing", lambda: 1 / 0)


def test_a_refusal_that_is_kept_ends_a_transfer_that_waits_in_vain():
    """As of a server elsewhere, where several processes gather: the sender waits for what never comes."""

    def refuse(method, **_):
        raise EngineFailed(f"vLLM: {method}: no")

    kept, release = Enduring(SimpleNamespace(call=refuse)), threading.Event()
    client = WeightClient(lambda: kept)
    send = lambda: client.update_weights({}) or release.wait()  # noqa: E731
    with pytest.raises(EngineFailed, match="vLLM: update_weights: no"):
        run_within(20, "sending", send, failed=lambda: client.failure)
    release.set()


def test_a_tied_last_layer_is_sent_under_both_names_in_the_engines_dtype(small_model):
    sent = dict(EngineWeights(small_model, torch.bfloat16))
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= sent.keys()
    assert {weight.dtype for weight in sent.values()} == {torch.bfloat16}


@needs_vllm
def test_vllms_senders_are_told_what_they_then_get(small_model, monkeypatch):
    """Before any weight is gathered: each transfer asks for it."""
    source = make_weight_source(EngineWeights(small_model, torch.float32))
    for _ in range(2):  # one pass for each transfer
        sent = [(name, weight.dtype, tuple(weight.shape)) for name, weight in source]
        with monkeypatch.context() as patch:
            patch.delattr(weight_transfer, "full")
            assert [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()] == sent
    assert "lm_head.weight" in [name for name, *_ in sent]
    small_model.get_input_embeddings().weight.data.fill_(7)
    assert (dict(source)["lm_head.weight"] == 7).all()  # the weights as they are, not as they were


@needs_vllm
@pytest.mark.slow
def test_a_sharded_model_goes_through_one_buffer_that_its_largest_tensor_fits(small_model, monkeypatch):
    """Two bytes a number; a model of one tensor stands for one of 152,064 x 8,192."""
    weights = EngineWeights(small_model, torch.bfloat16)
    plain = describe_ipc(weights)
    assert (plain.rank, plain.packed) == (0, False)
    # Each process adds what it exports of its own GPU; the first of those that share an engine tells it.
    assert [describe_ipc(weights, rank).is_sender for rank in range(3)] == [True, False, False]
    large = torch.nn.ParameterList([torch.empty(152_064, 8_192, device="meta")])
    monkeypatch.setattr(weight_transfer, "is_sharded", lambda model: model is large)
    info = describe_ipc(EngineWeights(large, torch.bfloat16))
    assert info.packed and info.packed_buffer_size_bytes == 2 * 152_064 * 8_192 > 2**30


def test_backends():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    shares = ({"shares_memory": a, "other_gpu": b} for a, b in ((True, False), (False, True), (False, False)))
    beside, elsewhere, server_here = shares
    for wanted, device, where, chosen in (
        ("auto", cpu, beside, "safetensors"), ("auto", cpu, elsewhere, "safetensors"),
        ("auto", gpu, beside, "ipc"), ("auto", gpu, elsewhere, "nccl"),
        ("auto", gpu, server_here, "safetensors"), ("safetensors", gpu, beside, "safetensors"),
    ):  # fmt: skip
        assert choose_backend(wanted, device, **where) == chosen
    for wanted, device, where in (
        ("nccl", cpu, elsewhere), ("ipc", gpu, elsewhere), ("nccl", gpu, beside), ("ipc", gpu, server_here)
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"rollout.engine.weight_transfer={wanted}: expected auto or "):
            choose_backend(wanted, device, **where)


def test_cut_log_probs_are_comparable_at_temperature_1_alone():
    for cut in ("rollout.top_k=5", "rollout.top_p=0.9"):
        with pytest.raises(ConfigError, match=r"rollout.temperature=0.9: expected 1 with"):
            check(compose_vllm(cut, "rollout.temperature=0.9"))
    settings = settings_of("rollout.top_k=5")
    numbers = {"dtype": "float32", "backend": "ipc", "on_cpu": False}
    assert settings.engine_arguments(**numbers)["logprobs_mode"] == "raw_logprobs"
    assert settings_of().engine_arguments(**numbers)["logprobs_mode"] == "processed_logprobs"


def settings_of(*overrides):
    return build_part(compose_vllm(*overrides).rollout.engine, key="rollout.engine")


def test_every_setting_has_a_range_or_is_free_text_a_flag_or_null():
    free = {"revision", "server_url", "enforce_eager", "weight_transfer_address"}
    hints = get_type_hints(VLLMSettings, include_extras=True)
    ranged = {name for name, hint in hints.items() if any(isinstance(x, Rule) for x in get_args(hint))}
    assert ranged | free == {field.name for field in fields(VLLMSettings)}


def test_impossible_combinations_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"rollout.engine.sleep_level=1: expected 0 on a CPU"):
        Setup(compose_vllm("rollout.engine.sleep_level=1"), tmp_path)
    far = ["rollout.server_url=http://node7:8000", "rollout.engine.weight_transfer=nccl"]
    with pytest.raises(ConfigError, match=r"weight_transfer=nccl: expected auto or safetensors between"):
        Setup(compose_vllm(*far), tmp_path)  # the learner is on a CPU


def test_an_engine_sees_its_own_gpu_or_the_learners(monkeypatch):
    """Also one that is given as a number."""
    check(compose_vllm("rollout.engine.visible_devices=0"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    for index, visible, expected in ((0, 0, "0"), (0, "3,4", "3,4"), (0, None, "5"), (1, None, "6")):
        seen = engine_environment(torch.device("cuda", index), visible)
        assert seen["CUDA_VISIBLE_DEVICES"] == expected
    assert engine_environment(torch.device("cuda", 0), None, 2)["CUDA_VISIBLE_DEVICES"] == "5,6"
    assert "CUDA_VISIBLE_DEVICES" not in engine_environment(torch.device("cpu"), None)
