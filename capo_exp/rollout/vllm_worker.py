"""The process around vLLM's `LLM`: answers the calls of vllm_process.EngineProcess."""

import os
import select
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

from capo_exp.rollout.vllm_process import Request, Response, Sampled, complete_params


class Worker:
    """vLLM's LLM with our requests and responses; everything else goes to it as it is."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        from capo_exp.rollout.vllm_plugin import register

        register()  # for a package that runs without being installed
        self._llm = LLM(**arguments)

    def generate(self, requests: list[Request]) -> list[Response]:
        from vllm import SamplingParams

        outputs = self._llm.generate(
            [{"prompt_token_ids": list(request.token_ids)} for request in requests],
            [SamplingParams(**complete_params(request.params), flat_logprobs=True) for request in requests],
            use_tqdm=False,
        )
        return [_response(output) for output in outputs]

    def __getattr__(self, method: str) -> Any:
        return getattr(self._llm, method)


def serve(connection: Connection) -> None:
    """Answers calls until the parent closes the pipe or dies, and then ends its process group."""
    # Schedulers signal all processes of a job; the parent ends its step first, and then this one.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    worker = None
    try:
        while True:
            method, args = connection.recv()
            try:
                if method == "start":
                    worker, result = Worker(*args), None
                else:
                    result = getattr(worker, method)(*args)
                connection.send((True, result))
            except Exception as error:
                traceback.print_exc()
                connection.send((False, f"{type(error).__name__}: {error}"))
    except (EOFError, OSError):
        pass
    os.killpg(0, signal.SIGKILL)  # vLLM's own shutdown can hang, and its workers can outlive it


def _end_with_parent(connection: Connection) -> None:
    """Ends the process group in the middle of a call, whose answer nobody waits for any more."""
    pipe = select.poll()
    pipe.register(connection, 0)  # wakes up when the other end is closed, not when it says something
    pipe.poll()
    os.killpg(0, signal.SIGKILL)


def _response(output: Any) -> Response:
    """Reads vLLM's RequestOutput. With logprobs=0 there is one log-prob a token: that of the token itself."""
    completions = [
        Sampled(
            list(completion.token_ids),
            list(completion.logprobs.logprobs),
            [span.version for span in completion.weight_versions or ()],
        )
        for completion in output.outputs
    ]
    prompt = output.prompt_logprobs
    return Response(completions, list(prompt.logprobs) if prompt is not None else [])


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
