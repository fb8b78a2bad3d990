"""The memory estimate: parameters against transformers', its parts by hand, peaks of real steps; the plan."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.memory import BFLOAT16_WEIGHTS, CHECKPOINTING, LARGE, LARGE_SHAPE, measure
from capo_exp.config import memory
from capo_exp.config.architecture import ARCHITECTURE, Architecture
from capo_exp.config.errors import ConfigError
from capo_exp.config.memory import (
    KINDS,
    Memory,
    check_memory,
    count_parameters,
    estimate_memory,
    human,
    measure_memory,
)
from capo_exp.config.places import resolve_model_path
from capo_exp.config.plan import plan
from capo_exp.config.schema import conf_dir
from capo_exp.sweep.job import execute
from tests.pieces import one_line
from tests.shapes import SHAPES, write_shape

PARAMETERS = 919_680
"""Of the tiny model."""


def test_parameters_are_those_of_transformers_and_of_the_files(composed):
    for repository, stated in SHAPES.items():
        shape = Architecture(**stated)
        known = {name: value for name, value in stated.items() if value is not None}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**known))
        assert count_parameters(shape) == sum(p.numel() for p in model.parameters()), repository
    # 1024 x 128 embedding, 4 layers of 2 x 128^2 + 2 x 128 x 64 + 3 x 128 x 384 weights, 128 + 2 x 64 biases
    # and 2 x 128 norms, and 128 of the last norm.
    counted = count_parameters(composed().model.architecture)
    assert counted == 1024 * 128 + 4 * (196_608 + 256 + 256) + 128 == PARAMETERS
    with safe_open(f"{resolve_model_path('pkg://capo_exp/assets/tiny')}/model.safetensors", "pt") as file:
        assert sum(file.get_tensor(key).numel() for key in file.keys()) == PARAMETERS  # noqa: SIM118


@pytest.mark.parametrize("kind", KINDS)
def test_the_kinds_are_counted_exactly(kind):
    size = dict(zip(ARCHITECTURE[1:], (500, 32, 48, 3, 4, 2, kind == "qwen3", 16), strict=True))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **size))
    assert count_parameters(Architecture(kind, **size)) == sum(p.numel() for p in model.parameters())


def test_weights_are_float32_and_adam_has_two_moments(composed):
    parts = estimate_memory(composed("algo.kl_coefficient=0.1"), gpu=True)
    assert parts.weights == parts.gradients == parts.reference == parts.adam // 2 == 4 * PARAMETERS
    assert estimate_memory(composed("algo=grpo"), gpu=True).reference == 0


def test_bfloat16_weights_leave_the_rest_of_their_bits_to_the_optimiser(composed):
    """2 bytes of a weight, 2 of its gradient, 2 x 4 of moments, 2 of its other bits; no further copy."""
    whole, half = (
        estimate_memory(composed("algo.kl_coefficient=0.1", f"model.load_dtype={kind}"), gpu=True)
        for kind in ("float32", "bfloat16")
    )
    assert half.weights == half.gradients == half.reference == 2 * PARAMETERS
    assert half.adam == 10 * PARAMETERS
    assert whole.activations - half.activations == 2 * PARAMETERS
    assert whole.logits - half.logits == 2 * 1024 * 128
    assert (whole.moments, whole.records, whole.kv_cache) == (half.moments, half.records, half.kv_cache)


def test_activations_by_hand(composed):
    """float32, layers of width 8 with an MLP of 16: of a token each keeps two inputs and two normalised
    inputs (32), two outputs of norms (16), queries, keys, values and attention's output (32), four of the
    MLP (64), and its row of the mask (10 + 6)."""
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    overrides = [f"model.{key}={value}" for key, value in size.items()]
    lengths = ["dataset.max_prompt_tokens=10", "dataset.max_completion_tokens=6"]
    config = composed(*overrides, *lengths, "model.num_key_value_heads=1")
    tokens, kept = 16 * 16, 32 + 16 + 32 + 64 + 16
    assert estimate_memory(config, gpu=False).activations == 4 * tokens * 3 * kept
    checkpointed = replace(config, model=replace(config.model, gradient_checkpointing=True))
    assert estimate_memory(checkpointed, gpu=False).activations == 4 * tokens * (3 * 8 + kept)
    flash = replace(config, model=replace(config.model, attn_implementation="flash_attention_2"))
    assert estimate_memory(flash, gpu=False).activations == 4 * tokens * 3 * (kept - 16)
    # five copies of [a chunk's tokens, V], and the gradient of [V, H]
    logits = estimate_memory(composed("model.logits_chunk_tokens=512"), gpu=False).logits
    assert logits == 4 * (5 * 512 * 1024 + 1024 * 128)


def test_what_curvature_holds(composed):
    """Of each of 96 x 96 tokens the hidden state and a float and an int64 of each of 50; and two tables."""
    tables = 2 * 4 * 1024 * 128
    remembered = 96 * 96 * (4 * 128 + 12 * 50)
    parts = estimate_memory(composed(), gpu=False)
    assert (parts.records, parts.moments) == (remembered, tables)
    assert estimate_memory(composed("curvature.optimizer_model=sgd"), gpu=False).moments == 0
    assert estimate_memory(composed("curvature.moments_dtype=bfloat16"), gpu=False).moments == tables // 2


def test_kv_cache_of_a_call(composed):
    """4 layers x 2 heads of 32 (256) and one layer repeated (128), 160 tokens of both; 5 x logits."""
    row = 2 * 4 * 160 * (256 + 128) + 5 * 4 * 1024
    one_problem, limit = "evaluation.num_problems=1", "rollout.engine.max_sequences_per_call=20"
    for overrides, rows in (
        (["evaluation.num_problems=96"], 96),
        (["evaluation.num_problems=200"], 200),
        (["regime=conservative"], 512),
        ([one_problem, limit], 16),  # whole groups of 8
        ([one_problem, "rollout.chunking=per_micro_batch"], 16),
        (["algo=a_star_po", "regime.group_size=1"], 512),  # of the reference, 8 a prompt
    ):
        assert estimate_memory(composed(*overrides), gpu=False).kv_cache == rows * row
    longer = 2 * 4 * (160 + 96) * (256 + 128) + 5 * 4 * 1024  # a state's tokens, and a completion of another
    assert estimate_memory(composed("algo=vineppo", one_problem, limit), gpu=False).kv_cache == 18 * longer
    assert estimate_memory(composed("rollout=vllm"), gpu=False).kv_cache == 0


def test_rows_of_parts_of_solutions_are_as_long_as_both(composed):
    """A prompt, what its solution begins with, and a whole solution in the same micro-batch: 64 + 2 x 96."""
    pairs = (
        "rollout=pairs",
        "regime.group_size=2",
        "model.micro_batch_size=2",
        "model.attn_implementation=none",
    )
    whole, parts = (estimate_memory(composed(f"algo={name}", *pairs), gpu=False) for name in ("dpo", "mdpo"))
    assert parts.activations * (64 + 96) == whole.activations * (64 + 2 * 96)


def test_sampling_and_differentiating_never_meet():
    kept = {"weights": 4, "gradients": 4, "adam": 8, "reference": 4, "moments": 0, "records": 1}
    parts = Memory(**kept, activations=50, logits=7, kv_cache=40)
    assert parts.total == 21 + 57
    assert replace(parts, kv_cache=60).total == 21 + 60


def test_a_gpu_computes_in_bfloat16(composed):
    config = composed()
    here, gpu = estimate_memory(config, gpu=False), estimate_memory(config, gpu=True)
    assert gpu.activations < here.activations and gpu.kv_cache < here.kv_cache
    same = replace(config, model=replace(config.model, compute_dtype="float32"))
    assert estimate_memory(same, gpu=True) == here


def with_memory(monkeypatch, free, total=80e9):
    monkeypatch.setattr(memory, "measure_memory", lambda device: (int(free), int(total)))


def test_what_does_not_fit_is_refused_in_one_line(composed, monkeypatch, tmp_path):
    large = ["model=qwen2_5_7b", f"model.path={write_shape(tmp_path, 'Qwen/Qwen2.5-Math-7B')}"]
    for overrides, free, needed, keys in (
        ([], 100e6, "180 MB", "lower model.micro_batch_size or set model.gradient_checkpointing=true"),
        (["model.gradient_checkpointing=true"], 50e6, "128 MB", "rollout.engine.max_sequences_per_call"),
        (large, 80e9, "GB", "choose a smaller model="),
        (["rollout=vllm"], 9e8, "engine 1.1 GB", "rollout.engine.gpu_memory_utilization or kv_cache_gib"),
    ):
        with_memory(monkeypatch, free)
        config = composed(*overrides)
        message = one_line(partial(check_memory, config, "cpu"))
        assert message.startswith("estimated peak ")
        for expected in (needed, f"free {human(int(free))} on cpu", keys, "allow_overcommit=true"):
            assert expected in message
        with_memory(monkeypatch, 1e15)
        assert needed in check_memory(config, "cpu")


def test_a_gpu_is_shared_with_vllm(composed, monkeypatch):
    with_memory(monkeypatch, 39e9)  # half of 80 GB is vLLM's
    wanted = r"engine 40 GB; free 39 GB on cuda: lower rollout\.engine\.gpu_mem"
    with pytest.raises(ConfigError, match=wanted):
        check_memory(composed("rollout=vllm"), "cuda")
    for elsewhere in ("rollout.server_url=http://a:1", "rollout.engine.visible_devices='1'"):
        assert "engine" not in check_memory(composed("rollout=vllm", elsewhere), "cuda")
    asleep = composed("rollout=vllm", "rollout.engine.sleep_level=1")
    used = estimate_memory(asleep, gpu=True)
    awake = 40e9 - used.gradients - used.activations - used.logits  # which a step no longer has
    with pytest.raises(ConfigError, match=f"engine {awake / 1e9:.0f} GB; free 39 GB"):
        check_memory(asleep, "cuda")
    with_memory(monkeypatch, 1e15)
    known = ["rollout=vllm", "distributed=fsdp2", "rollout.engine.kv_cache_gib=0.001"]
    for size, engine in ((1, "4.8 MB"), (2, "2.9 MB")):  # 3.7 MB of weights, and a KV cache on each GPU
        shared = composed(*known, f"rollout.engine.tensor_parallel_size={size}")
        assert f"engine {engine} for each of 2" in check_memory(shared, "cuda")


def test_nothing_is_loaded_for_a_run_that_does_not_fit(composed, monkeypatch, tmp_path):
    with_memory(monkeypatch, 100e6)
    started = []
    monkeypatch.setattr("capo_exp.training.loop.run", lambda config, _: started.append(config))
    monkeypatch.setattr("capo_exp.sweep.job.show", lambda *_, **__: None)
    with pytest.raises(ConfigError, match=r"^estimated peak 180 MB; free 100 MB on cpu"):
        execute(composed("device=cpu", f"output_dir={tmp_path}"), lambda _: [])
    execute(composed("device=cpu", f"output_dir={tmp_path}", "plan_only=true"), lambda _: [])
    assert not started
    execute(composed("device=cpu", f"output_dir={tmp_path}", "allow_overcommit=true"), lambda _: [])
    assert len(started) == 1


def test_the_memory_of_this_machine_and_of_a_container(monkeypatch):
    free, total = measure_memory("cpu")
    assert 2**20 < free <= total
    read = Path.read_text
    files = {"/sys/fs/cgroup/memory.max": "12345678\n", "/proc/meminfo": "MemAvailable:  5000000 kB\n"}
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: files.get(str(self)) or read(self, *a, **k))
    assert measure_memory("cpu") == (12345678, 12345678)
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert measure_memory("cpu")[0] == min(total, 1024 * 5_000_000)


def test_the_plan_is_five_short_lines(composed, tmp_path):
    changed = ["device=cpu", "algo=grpo", "model.micro_batch_size=24", "algo.num_iterations=2"]
    assert plan(composed(*changed)) == [
        "grpo on arithmetic with tiny, aggressive, seed 0",
        "12 prompts x 8 = 96 completions a step = 4 micro-batches of 24",
        "100 steps x 2 iterations = 200 optimiser steps, lr 0.0001",
        "9,600 completions of at most 96 tokens; 6 evaluations of 200",
        "about 257 MB on cpu; the most: activations 183 MB, KV cache 102 MB, logits 48 MB",
    ]
    wide = write_shape(tmp_path, "Qwen/Qwen2.5-0.5B", model_type="gemma")
    parts = plan(composed("device=cpu", "model.micro_batch_size=96", f"model.path={wide}"))[-1]
    assert parts == "about 77 GB on cpu (gemma counted as llama); the most: activations 42 GB"  # no more room
    several = ["algo=cpgd_unprocessed", "selection=capo", "algo.num_minibatches=4", "rollout=vllm"]
    long = plan(composed("experiment=paper/capo", "device=cpu", *several))
    assert len(long) == 5 and max(map(len, long)) <= 80
    assert long[-1] == "memory: config.json cannot be read; needs the hub, HF_HOME or model.path=DIR"
    tokens = composed("model.max_tokens_per_micro_batch=2000", "model.micro_batch_size=7")  # no divisor
    assert plan(tokens)[1].endswith("a step = micro-batches of 2,000 tokens")
    on_gpu = plan(composed("device=cuda", "rollout=vllm", "rollout.engine.gpu_memory_utilization=0.3"))
    assert on_gpu[-1].endswith("; vLLM: weights of at most 3.7 MB, up to 30% of its GPU")


SMALLER = LARGE_SHAPE | {"hidden_size": 384, "num_attention_heads": 4, "num_hidden_layers": 2}
"""14 M parameters."""
FEW = ["model.micro_batch_size=2", "regime.group_size=2", "dataset.max_completion_tokens=16"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "overrides", [[CHECKPOINTING], BFLOAT16_WEIGHTS], ids=["checkpointing", "bfloat16 weights"]
)
def test_real_steps_take_what_was_estimated(overrides):
    measured, estimated = measure([*LARGE, *overrides, *FEW], SMALLER)
    assert estimated == pytest.approx(measured, rel=0.25), (measured, estimated)


def test_the_table_of_what_fits_is_the_plans(composed, tmp_path):
    few = ["model.gradient_checkpointing=true", "rollout.engine.max_sequences_per_call=16", "dataset=gsm8k"]
    text = (conf_dir().parent / "docs" / "MODELS.md").read_text()
    for repository in SHAPES:
        place = ["model=auto", f"model.path={write_shape(tmp_path, repository)}", "regime.learning_rate=1e-6"]
        cells = [repository, ""]
        for kind in ("float32", "bfloat16"):
            config = composed(*place, *few, f"model.load_dtype={kind}")
            needed = estimate_memory(config, gpu=True).total
            card = next((f"{size} GB" for size in (24, 80, 141) if needed < 0.9e9 * size), "none")
            cells += [human(needed), card]
        cells[1] = f"{count_parameters(config.model.architecture) / 1e6:,.0f} M"
        assert f"| {' | '.join(cells)} |" in text, " | ".join(cells)
