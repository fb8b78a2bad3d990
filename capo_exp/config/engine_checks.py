"""What keys forbid each other where vLLM samples, and where a run is spread over processes."""

import re

from capo_exp.config.errors import error
from capo_exp.config.schema import TrainConfig


def check_distributed(config: TrainConfig) -> None:
    """Refuses what a run of several processes cannot do, or what would leave some without work.

    Raises:
        ConfigError: one line, `key=value: expected ...`.
    """
    size, micro = config.distributed.world_size, config.model.micro_batch_size
    batch = config.regime.prompts_per_step * config.regime.group_size
    if micro * size > batch:
        wanted = f"at most {batch // size}, so that each of {size} processes has a micro-batch"
        raise error("model.micro_batch_size", micro, wanted)
    tokens, positions = config.model.max_tokens_per_micro_batch or 0, batch * config.dataset.longest_row
    if tokens * size > positions:
        wanted = f"at most {positions // size}, so that long rows make {size} micro-batches"
        raise error("model.max_tokens_per_micro_batch", tokens, wanted)
    if config.rollout.chunking != "per_micro_batch":
        wanted = "per_micro_batch with distributed=fsdp2, whose processes share the calls out"
        raise error("rollout.chunking", config.rollout.chunking, wanted)
    if config.model.load_dtype != "float32":
        wanted = "float32 with distributed=fsdp2; distributed.gather=bfloat16 saves traffic"
        raise error("model.load_dtype", config.model.load_dtype, wanted)
    if config.model.compile:
        raise error("model.compile", True, "false with distributed=fsdp2, whose layers are sharded")
    if config.model.share_prompts:
        wanted = "false with distributed=fsdp2, whose sharded layers make one pass a micro-batch"
        raise error("model.share_prompts", True, wanted)
    if config.curvature.diagnose_every:
        wanted = "0 with distributed=fsdp2, which has no second gradient beside the first"
        raise error("curvature.diagnose_every", config.curvature.diagnose_every, wanted)
    if config.device not in ("auto", "cpu", "cuda"):
        wanted = "auto, cpu or cuda: process i takes GPU i of CUDA_VISIBLE_DEVICES"
        raise error("device", config.device, wanted)
    if config.rollout.is_vllm:
        _check_shared_engines(config)


def _check_shared_engines(config: TrainConfig) -> None:
    engine, server, processes = config.rollout.engine, config.rollout.server_url, config.distributed.processes
    if server == "start":
        raise error("rollout.server_url", server, "null or the URL of a server with distributed=fsdp2")
    if engine["visible_devices"] is not None:
        wanted = "null with distributed=fsdp2: engines are on their processes' own GPUs"
        raise error("rollout.engine.visible_devices", engine["visible_devices"], wanted)
    if server is None and processes % engine["tensor_parallel_size"]:
        wanted = (
            f"a divisor of distributed.processes={processes}: consecutive processes of a node share an engine"
        )
        raise error("rollout.engine.tensor_parallel_size", engine["tensor_parallel_size"], wanted)
    if server is None and engine["weight_transfer"] == "nccl":
        wanted = "auto, ipc or safetensors with distributed=fsdp2 and engines of its own"
        raise error("rollout.engine.weight_transfer", engine["weight_transfer"], wanted)


def check_vllm(config: TrainConfig) -> None:
    """Refuses what vLLM cannot do with these keys, or could not do on these devices.

    Raises:
        ConfigError: one line, `key=value: expected ...`.
    """
    rollout, dataset, engine = config.rollout, config.dataset, config.rollout.engine
    if rollout.server_url is not None and not re.match(r"https?://[^/]|start$", rollout.server_url):
        wanted = "null, start, or a URL such as http://node7:8000"
        raise error("rollout.server_url", rollout.server_url, wanted)
    longest = dataset.longest_row
    if engine["max_model_len"] < longest:
        wanted = f"at least dataset.max_prompt_tokens + dataset.max_completion_tokens = {longest}"
        raise error("rollout.engine.max_model_len", engine["max_model_len"], wanted)
    if (rollout.top_k or rollout.top_p < 1) and rollout.temperature != 1:
        wanted = (
            "1 with rollout=vllm and top_k or top_p: vLLM then renormalises log-probs over what is left of "
            "the vocabulary, or gives those of temperature 1; neither can be compared with the learner's"
        )
        raise error("rollout.temperature", rollout.temperature, wanted)
    size, devices = engine["tensor_parallel_size"], engine["visible_devices"]
    alone = config.distributed.name == "single"
    if alone and size > 1 and devices is None and rollout.server_url in (None, "start"):
        wanted = "1, or rollout.engine.visible_devices, since the learner has one GPU"
        raise error("rollout.engine.tensor_parallel_size", size, wanted)
    for name, group in (("rollout", rollout), ("evaluation", config.evaluation)):
        if group.temperature > 2:
            raise error(f"{name}.temperature", group.temperature, "at most 2, the limit of vLLM")
