"""Rollouts with vLLM, and the proof that it samples with the learner's weights.

Before it samples with weights that it has not seen, the engine gets them, its prefix cache is emptied, and
its log-probs of some prompts are compared with the learner's. It starts with random weights, so that nothing
but the learner's can pass.
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import nan
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from capo_exp.config.errors import ConfigError, error
from capo_exp.core.seeds import derive_seed
from capo_exp.core.types import Completion, Prompt, RolloutGroup
from capo_exp.distributed.world import SINGLE, World
from capo_exp.rollout import EngineFailed, SamplingRequest
from capo_exp.rollout.hf import find_end_token_ids
from capo_exp.rollout.vllm_process import (
    Elsewhere,
    Enduring,
    Engine,
    EngineProcess,
    Request,
    Response,
    engine_environment,
)
from capo_exp.rollout.vllm_server import Server, start_server
from capo_exp.rollout.vllm_settings import VLLMSettings
from capo_exp.rollout.weight_proof import WeightProof
from capo_exp.rollout.weight_transfer import EngineWeights, WeightClient, choose_backend, make_sender

LOG_FILE = "vllm.log"
GENERATION_CONFIG = "vllm_generation_config"
"""Folder in the run's directory."""


class VLLMRollout:
    """Samples completions with vLLM, on the learner's device or another.

    Where several processes share an engine, on the GPUs of all of them or elsewhere, it is their first one's.
    The others make the same calls, in which sharded weights are gathered, and get no groups.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        compute_dtype: torch.dtype,
        settings: VLLMSettings,
        world: World = SINGLE,
    ) -> None:
        """Checks the settings against the learner's device; nothing runs until start().

        Args:
            model: the learner's; only its weights are read.
            tokenizer: decodes completions; the engine sees token ids only.
            compute_dtype: the learner's.
            settings: see VLLMSettings.
            world: the processes of the run, all of which make each call.

        Raises:
            ConfigError: for a sleep level or a weight transfer that is impossible here.
        """
        self.settings = settings
        self._world = world
        self._model = model
        self._tokenizer = tokenizer
        self._compute_dtype = compute_dtype
        self._dtype = (
            str(compute_dtype).removeprefix("torch.") if settings.dtype == "auto" else settings.dtype
        )
        self._ends = find_end_token_ids(model, tokenizer)
        on_cpu = model.device.type == "cpu"
        if settings.sleep_level and on_cpu:
            wanted = "0 on a CPU, which has no sleep mode"
            raise error("rollout.engine.sleep_level", settings.sleep_level, wanted)
        self._backend = choose_backend(
            settings.weight_transfer,
            model.device,
            shares_memory=settings.server_url is None
            and settings.visible_devices is None
            and settings.tensor_parallel_size == world.block,
            other_gpu=settings.is_remote or settings.visible_devices is not None,
        )
        address, url = settings.weight_transfer_address, str(settings.server_url)
        here, there = (any(name in text for name in ("127.0.0.1", "localhost")) for text in (address, url))
        if settings.is_remote and self._backend == "nccl" and here and not there:
            wanted = "this machine's name as the server's node reaches it"
            raise error("rollout.engine.weight_transfer_address", address, wanted)
        self._arguments = settings.engine_arguments(dtype=self._dtype, backend=self._backend, on_cpu=on_cpu)
        self._name = uuid.uuid4().hex[:8]  # Names weights that are this learner's, on whichever server
        self._engine: Engine | None = None
        self._version: int | None = None
        """Of the weights that the engine is proven to hold."""
        self._asleep = False
        self._metrics = {"time/transfer_seconds": 0.0, "mismatch/probe_difference": 0.0}

    def start(self, directory: Path, prompts: Sequence[Prompt]) -> None:
        """Starts the engine, or finds the server, and agrees with it on how weights travel.

        Raises:
            EngineFailed: if it cannot be started within its limit.
        """
        settings, log = self.settings, directory / LOG_FILE
        self._proof = WeightProof(self._model, self._compute_dtype, prompts)
        world_size = settings.tensor_parallel_size
        if not self._world.leads:
            self._engine = Elsewhere()
        elif settings.is_remote:
            self._engine = Server(str(settings.server_url), limits=settings, log_file=log)
            world_size = self._engine.world_size()
            found, wanted = self._engine.log_probs_mode(), self._arguments["logprobs_mode"]
            if found != wanted:
                said = f"{settings.server_url} runs with --logprobs-mode {found}: expected {wanted}"
                raise ConfigError(said)
        else:
            # In the place of the model's own file, which vLLM reads otherwise, whatever stands there.
            own = directory / GENERATION_CONFIG
            self._model.generation_config.save_pretrained(own)  # pyright: ignore[reportOptionalMemberAccess]
            self._arguments["generation_config"] = str(own)
            start_engine = EngineProcess if settings.server_url is None else start_server
            environment = engine_environment(self._model.device, settings.visible_devices, world_size)
            self._engine = start_engine(
                self._arguments, environment=environment, limits=settings, log_file=log
            )
        self._send = make_sender(
            self._backend,
            WeightClient(self.running),
            EngineWeights(self._model, getattr(torch, self._dtype)),
            address=settings.weight_transfer_address,
            world_size=world_size,
            rank=self._world.rank % self._world.block,
            seconds=settings.transfer_seconds,
        )

    def generate(self, request: SamplingRequest) -> list[RolloutGroup]:
        """Returns one group per prompt; none where another process owns the engine.

        Each prompt has a seed of its own, from the request's and its place; its completions share its prefix.

        Raises:
            EngineFailed: if the engine fails, or is not proven to hold the learner's weights.
        """
        self._synchronise(request.weight_version)
        if not self._world.leads:
            return []
        params = {
            "n": 1 if request.temperature == 0 else request.group_size,  # greedy ones are all the same
            "temperature": request.temperature,
            "top_k": request.top_k,
            "top_p": request.top_p,
            "stop_token_ids": self._ends,
            "ignore_eos": True,  # _ends has it
        }
        known = zip(request.prompts, request.beginnings(), request.room(), strict=True)
        requests = [
            Request((*p.token_ids, *ids), params | {"max_tokens": room, "seed": derive_seed(request.seed, i)})
            for i, (p, ids, room) in enumerate(known)
        ]
        responses = self.running().generate(requests)
        triples = zip(request.prompts, request.beginnings(), responses, strict=True)
        return [self._to_group(request, *triple) for triple in triples]

    def rest(self) -> None:
        """Puts the engine to sleep, if it may; generate wakes it."""
        level = self.settings.sleep_level
        if level and not self._asleep:  # nobody needs the memory before it is free on all GPUs of the engine
            self._world.together(lambda: self.running().call("sleep", level=level))
            self._asleep = True
            self._version = self._version if level == 1 else None

    def metrics(self) -> dict[str, float]:
        """Returns the seconds of transfers since the last call, and the last probe's mean difference."""
        latest = dict(self._metrics)
        self._metrics["time/transfer_seconds"] = 0.0
        return latest

    def close(self) -> None:
        """Ends an engine of this run; a second call does no harm."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def running(self) -> Engine:
        """Returns the engine that start() has started."""
        assert self._engine is not None, "start() comes first, close() last"
        return self._engine

    def _to_group(
        self, request: SamplingRequest, prompt: Prompt, begun: tuple[int, ...], response: Response
    ) -> RolloutGroup:
        label = f"{self._name}:{request.weight_version}"
        versions = {version for sampled in response.completions for version in sampled.weight_versions}
        if versions != {label}:
            wanted = f"expected {label}; does another run use this server?"
            raise EngineFailed(f"vLLM: sampled with weights {sorted(versions)}: {wanted}")
        rows = [[*begun, *sampled.token_ids] for sampled in response.completions]
        scores = [(*[nan] * len(begun), *sampled.log_probs) for sampled in response.completions]
        texts = self._tokenizer.batch_decode(rows, skip_special_tokens=True)
        completions = [
            Completion(tuple(row), score, text, truncated=row[-1] not in self._ends)
            for row, score, text in zip(rows, scores, texts, strict=True)
        ]
        copies = request.group_size // len(completions)
        return RolloutGroup(prompt, tuple(completions * copies), request.weight_version)

    @contextmanager
    def _enduring(self) -> Iterator[None]:
        """Raises what the engine fails with only at the end, where other processes gather weights with this
        one until then: they would wait for it."""
        if self._world.size == 1:
            yield
            return
        kept = Enduring(self.running())
        self._engine = kept
        try:
            yield
        except EngineFailed as error:
            raise kept.failure or error from None
        finally:
            self._engine = kept.engine
        if kept.failure is not None:
            raise kept.failure

    def _synchronise(self, version: int) -> None:
        """Sends the learner's weights if the engine has not got them, and proves that it has."""
        start, stale = time.perf_counter(), self._version != version
        with self._enduring():
            self._wake_and_send(version, stale=stale)
        if stale:
            self._version = version
            self._metrics["time/transfer_seconds"] += time.perf_counter() - start

    def _wake_and_send(self, version: int, *, stale: bool) -> None:
        engine = self.running()
        if self._asleep:  # the documented order: weights first, the KV cache when they are in place
            # What the learner's last step left, and another process cannot use; an engine has several GPUs.
            self._world.together(torch.cuda.empty_cache)
            engine.call("wake_up", tags=["weights"])
        if stale:
            self._world.together(self._send)  # if it fails in one, nobody waits for that one later
            engine.call("update_weight_version", new_version=f"{self._name}:{version}")
        if self._asleep:
            self._world.together(torch.cuda.empty_cache)  # the copies that were sent
            engine.call("wake_up", tags=["kv_cache"])
            self._asleep = False
        if stale:
            cleared = engine.call("reset_prefix_cache")
            probe = self._proof.look(engine.generate)
            if self._world.leads:  # the others have forwarded their part
                self._metrics["mismatch/probe_difference"] = probe.difference.mean().item()
                tolerance = self.settings.max_probe_difference[self._dtype]
                self._proof.judge(probe, version, self._dtype, tolerance)
            if not cleared:
                raise EngineFailed("vLLM: its prefix cache could not be reset after new weights")
