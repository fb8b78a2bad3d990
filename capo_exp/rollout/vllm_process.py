"""A vLLM engine that belongs to the run, in a process of its own.

A process, because that is what can be given a time limit, can be killed, keeps its log apart, and returns its
memory for certain. Inside it vLLM schedules in one thread (no second engine process), so that the same
requests are batched in the same way and give the same tokens.

The parent writes (method, arguments) into a pipe and reads (worked, result) out of it; vllm_worker.py is the
child.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from capo_exp.rollout import EngineFailed
from capo_exp.rollout.vllm_settings import VLLMSettings

if TYPE_CHECKING:
    import torch

REQUESTS = ("init_weight_transfer_engine", "update_weights")
"""Methods of vLLM's `LLM` that take their arguments as one dict."""
LAST_LINES = 12
OUT_OF_MEMORY = {
    "no available memory for the cache blocks": "raise rollout.engine.gpu_memory_utilization, or lower "
    "rollout.engine.max_model_len or model.micro_batch_size",
    **dict.fromkeys(
        ("out of memory", "less than desired", "less than requested"),
        "lower rollout.engine.gpu_memory_utilization (or kv_cache_gib), rollout.engine.max_num_seqs or "
        "model.micro_batch_size",
    ),
}
"""What torch and vLLM say, in lower case -> what helps."""


@dataclass(frozen=True)
class Request:
    """One prompt, and arguments of vLLM's SamplingParams."""

    token_ids: tuple[int, ...]
    params: dict[str, Any]


@dataclass(frozen=True)
class Sampled:
    """One completion as vLLM returns it."""

    token_ids: list[int]
    log_probs: list[float]
    weight_versions: list[str]
    """Labels of the weights that sampled its tokens, in order."""


@dataclass(frozen=True)
class Response:
    """What vLLM returns for one request."""

    completions: list[Sampled]
    prompt_log_probs: list[float]
    """Log-probs of prompt tokens 1, 2, ...; empty unless the request asks for them."""


def complete_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Adds to a request's arguments what all of them ask for: token ids and their log-probs, no text."""
    return {"logprobs": 0, "detokenize": False, **params}


def explain_failure(what: str, reason: str, log_file: Path) -> EngineFailed:
    """Returns the error for a call that did not work, with the end of vLLM's own log."""
    lines = log_file.read_text(errors="replace").splitlines()[-LAST_LINES:] if log_file.is_file() else []
    said = "\n".join([reason, *lines]).lower()
    if remedy := next((remedy for phrase, remedy in OUT_OF_MEMORY.items() if phrase in said), None):
        reason += f"; out of memory: {remedy}"
    log = f"; the last lines of {log_file}:" if lines else ""
    return EngineFailed("\n    ".join([f"vLLM: {what}: {reason}{log}", *lines]))


class Engine(Protocol):
    """A running vLLM: EngineProcess or Server."""

    def generate(self, requests: Sequence[Request]) -> list[Response]: ...
    def call(self, method: str, **arguments: Any) -> Any: ...
    def close(self) -> None: ...


class Elsewhere:
    """Stands for an engine that another process of the block owns: knows no log-prob, agrees to all else."""

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        return [Response([], [nan] * (len(request.token_ids) - 1)) for request in requests]

    def call(self, method: str, **arguments: Any) -> Any:
        del method, arguments
        return True

    def close(self) -> None:
        pass


class Enduring(Elsewhere):
    """Asks an engine until it fails, and keeps the error: from then on it is as if it were elsewhere."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.failure: EngineFailed | None = None

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        found = self._ask(lambda: self.engine.generate(requests))
        return super().generate(requests) if found is None else found

    def call(self, method: str, **arguments: Any) -> Any:
        found = self._ask(lambda: self.engine.call(method, **arguments))
        return found if self.failure is None else super().call(method, **arguments)

    def _ask(self, action: Callable[[], Any]) -> Any:
        try:
            return action() if self.failure is None else None
        except EngineFailed as error:
            self.failure = error


def engine_environment(
    device: "torch.device", visible_devices: str | int | None, count: int = 1
) -> dict[str, str]:
    """Returns the variables of an engine that belongs to the run; what the user has set stays.

    Args:
        device: the learner's.
        visible_devices: GPUs of the engine; None = the learner's, and those behind it.
        count: how many the engine takes.
    """
    import torch

    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    if count > 1:
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else its CPU build wants a NUMA node for each part
    environment = {name: os.environ.get(name, value) for name, value in wanted.items()}
    if device.type != "cpu":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        here = device.index or 0
        known = list(map(str, range(here + count))) if visible == [""] else visible
        own = ",".join(known[here : here + count])
        environment["CUDA_VISIBLE_DEVICES"] = str(own if visible_devices is None else visible_devices)
    return environment


class EngineProcess:
    """vLLM's `LLM` in a process of its own.

    Every call raises EngineFailed if vLLM reports an error, dies, or does not answer within its limit; the
    process is gone then.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        *,
        environment: Mapping[str, str],
        limits: VLLMSettings,
        log_file: Path,
    ) -> None:
        """Starts vLLM and waits until it is ready.

        Args:
            arguments: those of vLLM's LLM.
            environment: variables for the child alone.
            limits: has the seconds that a call may take before the engine is given up.
            log_file: takes all that vLLM prints.
        """
        self.limits = limits
        self._log_file = log_file
        self._connection, theirs = multiprocessing.Pipe()
        descriptor = theirs.fileno()
        with log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "capo_exp.rollout.vllm_worker", str(descriptor)],
                pass_fds=[descriptor],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is for the parent, which finishes its step first
            )
        theirs.close()
        try:
            self._call("start", (dict(arguments),), "start_seconds", "starting")
        except BaseException:  # a Ctrl-C as well: nobody has this object yet, so nobody could close it
            self.close()
            raise

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        """Returns all completions of all requests, in order."""
        what = f"sampling for {len(requests)} prompts"
        return self._call("generate", (list(requests),), "generate_seconds", what)

    def call(self, method: str, **arguments: Any) -> Any:
        """Calls any other method of `LLM`, and returns its result."""
        args = (arguments,) if method in REQUESTS else tuple(arguments.values())
        return self._call(method, args, "transfer_seconds", method)

    def close(self) -> None:
        """Ends the process and whatever it started; its memory is free afterwards. Twice does no harm."""
        if self._connection.closed:
            return
        self._connection.close()
        self._kill()
        self.process.wait()

    def _call(self, method: str, args: tuple[Any, ...], limit: str, what: str) -> Any:
        """Calls a method of the child; `limit` names the setting with its seconds, `what` is for people."""
        seconds, expired = getattr(self.limits, limit), threading.Event()

        def give_up() -> None:
            expired.set()
            self._kill()  # which ends a blocked send as well as a blocked recv

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            self._connection.send((method, args))
            worked, result = self._connection.recv()
        except (EOFError, OSError):
            ended = f"its process ended with exit code {self.process.wait()}"
            late = f"no answer within rollout.engine.{limit}={seconds:g}"
            worked, result = False, late if expired.is_set() else ended
        finally:
            timer.cancel()
        if not worked:
            self.close()
            raise explain_failure(what, result, self._log_file)
        return result

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its own group: tensor-parallel workers are in it
