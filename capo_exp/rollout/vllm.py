"""Rollouts with vLLM, and the proof that it samples with the learner's weights.

Before it samples with weights that it has not seen, the engine gets them, its prefix cache is emptied, and
its log-probs of some prompts are compared with the learner's. It starts with random weights, so that nothing
but the learner's can pass.
"""

import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from capo_exp.config.build import resolve_model_path
from capo_exp.config.errors import ConfigError
from capo_exp.core.types import Completion, Prompt, RolloutGroup
from capo_exp.rollout import EngineFailed
from capo_exp.rollout.hf import end_token_ids
from capo_exp.rollout.vllm_process import EngineProcess, Limits, Request, Response
from capo_exp.rollout.vllm_server import Server, start_server
from capo_exp.rollout.weight_proof import Probe, choose_prompts, take_probe
from capo_exp.rollout.weight_transfer import WeightClient, choose_backend, make_sender

LOG_FILE = "vllm.log"
MOVED = 0.1
"""Share of max_probe_difference by which the learner's log-probs have moved for certain, rounding apart."""


class Engine(WeightClient, Protocol):
    """A running vLLM: EngineProcess or Server."""

    def generate(self, requests: Sequence[Request]) -> list[Response]: ...
    def update_weight_version(self, new_version: str) -> None: ...
    def reset_prefix_cache(self) -> bool: ...
    def sleep(self, level: int) -> None: ...
    def wake_up(self, tags: list[str]) -> None: ...
    def close(self) -> None: ...


class VLLMRollout:
    """Samples completions with vLLM, on the learner's device or another."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        compute_dtype: torch.dtype,
        *,
        model_path: str,
        revision: str | None,
        server_url: str | None,
        visible_devices: str | int | None,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
        gpu_memory_utilization: float,
        kv_cache_gib: float | None,
        tensor_parallel_size: int,
        enforce_eager: bool,
        sleep_level: int,
        top_k: int,
        top_p: float,
        weight_transfer: str,
        weight_transfer_address: str,
        start_seconds: float,
        generate_seconds: float,
        transfer_seconds: float,
        max_probe_difference: dict[str, float],
    ) -> None:
        """Nothing runs until start().

        Args:
            model: the learner's; only its weights are read.
            tokenizer: decodes completions; the engine sees token ids only.
            compute_dtype: of the learner, which `dtype: auto` follows.
            model_path: for the architecture; the weights are the learner's.
            revision: of model_path on the hub.
            server_url: null = an engine process of this run; start = a server of it; else a server's URL.
            visible_devices: CUDA_VISIBLE_DEVICES of an engine of this run; null = the learner's GPU.
            dtype: auto, float32, bfloat16 or float16.
            max_model_len: longest prompt and completion together, in tokens.
            max_num_seqs: completions sampled at the same time.
            gpu_memory_utilization: share of the GPU's memory that the engine may take.
            kv_cache_gib: size of the KV cache; null = what that share leaves (on a CPU 1).
            tensor_parallel_size: GPUs of the engine.
            enforce_eager: no CUDA graphs: a faster start, slower sampling.
            sleep_level: between rollouts the engine keeps (0) its GPU memory, (1) its weights in CPU memory,
                (2) nothing.
            top_k: of training rollouts; 0 = off.
            top_p: of training rollouts; 1 = off. Where either cuts, vLLM's processed log-probs are
                renormalised over what is left; the learner's are not, so raw ones are asked for (at
                temperature 1 the learner's; checks.py).
            weight_transfer: auto, ipc, nccl or safetensors.
            weight_transfer_address: nccl only: this machine's name or address for the engine's workers.
            start_seconds: limit of the start.
            generate_seconds: limit of one call that samples.
            transfer_seconds: limit of each step of a weight transfer.
            max_probe_difference: dtype -> mean difference [nats] of the probe's log-probs above which weights
                count as stale.
        """
        self._model = model
        self._tokenizer = tokenizer
        self._compute_dtype = compute_dtype
        self._server_url = server_url
        self._visible_devices = None if visible_devices is None else str(visible_devices)
        self._dtype = str(compute_dtype).removeprefix("torch.") if dtype == "auto" else dtype
        self._limits = Limits(start_seconds, generate_seconds, transfer_seconds)
        self._tolerance = max_probe_difference[self._dtype]
        self._sleep_level = sleep_level
        self._address = weight_transfer_address
        self._ends = end_token_ids(model, tokenizer)
        self._on_cpu = model.device.type == "cpu"
        if sleep_level and self._on_cpu:
            wanted = "0 on a CPU, which has no sleep mode"
            raise ConfigError(f"rollout.engine.sleep_level={sleep_level}: expected {wanted}")
        url = server_url not in (None, "start")
        self._backend = choose_backend(
            weight_transfer,
            model.device,
            shares_memory=server_url is None and visible_devices is None,
            other_gpu=url or visible_devices is not None,
        )
        address = weight_transfer_address
        if url and self._backend == "nccl" and _is_local(address) and not _is_local(str(server_url)):
            wanted = "this machine's name as the server's node reaches it"
            raise ConfigError(f"rollout.engine.weight_transfer_address={address}: expected {wanted}")
        self._world_size = tensor_parallel_size
        kv_cache_gib = 1 if kv_cache_gib is None and self._on_cpu else kv_cache_gib
        self._arguments: dict[str, Any] = {
            "model": resolve_model_path(model_path),
            "revision": revision,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # not the model's own, which can hold a repetition penalty
            "dtype": self._dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "gpu_memory_utilization": gpu_memory_utilization,
            "kv_cache_memory_bytes": None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
            "tensor_parallel_size": tensor_parallel_size,
            "enforce_eager": enforce_eager,
            "enable_sleep_mode": sleep_level > 0,
            "logprobs_mode": "raw_logprobs" if top_k or top_p < 1 else "processed_logprobs",
            "weight_transfer_config": {"backend": self._backend},
        }
        if self._on_cpu:
            # After part of a prefill vLLM 0.32 rewinds the request's generator, which torch cannot on a CPU.
            whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, max_model_len)}
            self._arguments |= whole
        self._name = uuid.uuid4().hex[:8]
        self._engine: Engine | None = None
        self._version: int | None = None
        """Of the weights that the engine is proven to hold."""
        self._asleep = False
        self._probe_prompts: list[Prompt] = []
        self._last_probe: Probe | None = None
        self._metrics = {"time/transfer_seconds": 0.0, "mismatch/probe_difference": 0.0}

    def start(self, directory: Path, prompts: Sequence[Prompt]) -> None:
        """Starts the engine, or finds the server, and agrees with it on how weights travel.

        Raises:
            EngineFailed: if it cannot be started within its limit.
        """
        self._probe_prompts = choose_prompts(prompts)
        log = directory / LOG_FILE
        if self._server_url is None:
            self._engine = EngineProcess(
                self._arguments, environment=self._environment(), limits=self._limits, log_file=log
            )
        elif self._server_url == "start":
            self._engine = start_server(
                self._arguments, environment=self._environment(), limits=self._limits, log_file=log
            )
        else:
            self._engine = Server(self._server_url, limits=self._limits, log_file=log)
            self._world_size = self._engine.world_size()
            found, wanted = self._engine.log_probs_mode(), self._arguments["logprobs_mode"]
            if found != wanted:
                raise ConfigError(f"{self._server_url} runs with --logprobs-mode {found}: expected {wanted}")
        self._send = make_sender(
            self._backend, self._engine, self._model,
            address=self._address, world_size=self._world_size, seconds=self._limits.transfer_seconds,
        )  # fmt: skip

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        max_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
        weight_version: int,
    ) -> list[RolloutGroup]:
        """Completions of every prompt; arguments as of hf.HFRollout.generate.

        Each prompt has a seed of its own, from `seed` and its place; its completions share its prefix.

        Raises:
            EngineFailed: if the engine fails, or is not proven to hold the learner's weights.
        """
        self._synchronise(weight_version)
        params = {
            "n": 1 if temperature == 0 else group_size,  # greedy completions are all the same
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "max_tokens": max_tokens,
            "stop_token_ids": self._ends,
            "ignore_eos": True,  # _ends has it
        }
        seeds = [int(np.random.SeedSequence([seed, i]).generate_state(1)[0]) for i in range(len(prompts))]
        requests = [Request(p.token_ids, params | {"seed": s}) for p, s in zip(prompts, seeds, strict=True)]
        responses = self._running().generate(requests)
        return [
            self._group(prompt, response, group_size, weight_version)
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    def rest(self) -> None:
        """Puts the engine to sleep, if it may; generate wakes it."""
        if self._sleep_level and not self._asleep:
            self._running().sleep(self._sleep_level)
            self._asleep = True
            self._version = self._version if self._sleep_level == 1 else None

    def metrics(self) -> dict[str, float]:
        latest = dict(self._metrics)
        self._metrics["time/transfer_seconds"] = 0.0
        return latest

    def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _label(self, version: int) -> str:
        """Of weights that are this learner's, on whichever server."""
        return f"{self._name}:{version}"

    def _running(self) -> Engine:
        assert self._engine is not None, "start() comes first, close() last"
        return self._engine

    def _group(self, prompt: Prompt, response: Response, size: int, version: int) -> RolloutGroup:
        versions = {label for sampled in response.completions for label in sampled.weight_versions}
        if versions != {self._label(version)}:
            wanted = f"expected {self._label(version)}; does another run use this server?"
            raise EngineFailed(f"vLLM: sampled with weights {sorted(versions)}: {wanted}")
        rows = [sampled.token_ids for sampled in response.completions]
        texts = self._tokenizer.batch_decode(rows, skip_special_tokens=True)
        completions = [
            Completion(tuple(s.token_ids), tuple(s.log_probs), text, s.token_ids[-1] not in self._ends)
            for s, text in zip(response.completions, texts, strict=True)
        ]
        return RolloutGroup(prompt, tuple(completions * (size // len(completions))), version)

    def _synchronise(self, version: int) -> None:
        """Sends the learner's weights if the engine has not got them, and proves that it has."""
        engine, start = self._running(), time.perf_counter()
        stale = self._version != version
        if self._asleep:  # the documented order: weights first, the KV cache when they are in place
            torch.cuda.empty_cache()  # what the learner's last step left, and another process cannot use
            engine.wake_up(["weights"])
        if stale:
            self._send()
            engine.update_weight_version(self._label(version))
        if self._asleep:
            engine.wake_up(["kv_cache"])
            self._asleep = False
        if not stale:
            return
        if not engine.reset_prefix_cache():
            raise EngineFailed("vLLM: its prefix cache could not be reset after new weights")
        self._prove(version)
        self._version = version
        self._metrics["time/transfer_seconds"] += time.perf_counter() - start

    def _prove(self, version: int) -> None:
        """Raises EngineFailed, with step and size of the difference, if weights are not the learner's."""
        generate = self._running().generate
        probe = take_probe(generate, self._model, self._compute_dtype, self._probe_prompts)
        before, self._last_probe = self._last_probe, probe
        mean, largest = probe.difference.mean().item(), probe.difference.max().item()
        self._metrics["mismatch/probe_difference"] = mean
        expected = f"on average at most rollout.engine.max_probe_difference.{self._dtype}={self._tolerance:g}"
        if before is not None and probe.only_learner_moved(before, by=MOVED * self._tolerance):
            expected = "the engine's to change with the learner's"
        elif mean <= self._tolerance:
            return
        raise EngineFailed(
            f"vLLM: its weights are not the learner's: after optimiser step {version} log-probs differ by "
            f"{mean:.3g} nats on average, {largest:.3g} at most; expected {expected}"
        )

    def _environment(self) -> dict[str, str]:
        """Of an engine that belongs to the run; what the user has set stays."""
        wanted = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        environment = {name: os.environ.get(name, value) for name, value in wanted.items()}
        if not self._on_cpu:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            here = self._model.device.index or 0
            own = visible[here] if visible != [""] else str(here)
            chosen = self._visible_devices
            environment["CUDA_VISIBLE_DEVICES"] = own if chosen is None else chosen
        return environment


def _is_local(address: str) -> bool:
    return any(name in address for name in ("127.0.0.1", "localhost"))
