"""The memory estimate: parameter counts against transformers', the arithmetic of phases and shards by hand,
and the peak of real steps."""

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from benchmarks.memory import CHECKPOINTING, LARGE, measure
from capo_exp.config.build import resolve_model_path
from capo_exp.config.checks import check
from capo_exp.config.errors import ConfigError
from capo_exp.config.memory import Memory, count_parameters, estimate, human
from capo_exp.config.plan import plan
from capo_exp.config.ranges import RULES
from capo_exp.config.schema import ARCHITECTURE, ModelConfig, TrainConfig, conf_dir
from capo_exp.core import policy

Composed = Callable[..., TrainConfig]
MODELS = sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml"))
PARTS = dict.fromkeys(vars(Memory)["__dataclass_fields__"], 0)


def memory(config: TrainConfig, gpu: bool = False) -> Memory:
    return estimate(config, reference=config.algo.needs_reference, gpu=gpu)


def without_weights(model: ModelConfig) -> int:
    """Parameters of transformers' own model of this architecture."""
    kind = {"qwen2": Qwen2Config, "llama": LlamaConfig}[model.model_type]
    numbers = {name: getattr(model, name) for name in ARCHITECTURE if name != "model_type"}
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(kind(**numbers)).parameters())


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_transformers(name: str, composed: Composed) -> None:
    model = composed(f"model={name}").model
    assert count_parameters(model) == without_weights(model)


def test_parameters_of_the_shipped_weights(composed: Composed) -> None:
    model = composed().model
    # 1024 x 128 embedding, 4 layers of 2 x 128^2 + 2 x 128 x 64 + 3 x 128 x 384 weights, 128 + 2 x 64 biases
    # and 2 x 128 norms, and 128 of the last norm.
    assert count_parameters(model) == 1024 * 128 + 4 * (196_608 + 256 + 256) + 128 == 919_680
    with safe_open(f"{resolve_model_path(model.path)}/model.safetensors", "pt") as file:
        assert sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118 == 919_680


def test_published_sizes(composed: Composed) -> None:
    published = {
        "qwen2_5_0_5b": 494_032_768,
        "qwen2_5_7b": 7_615_616_512,
        "llama_3_1_8b_instruct": 8_030_261_248,
    }
    for name, count in published.items():
        assert count_parameters(composed(f"model={name}").model) == count


def test_weights_are_float32_and_adam_has_two_moments(composed: Composed) -> None:
    config = composed()
    parts = estimate(config, reference=True, gpu=True)
    assert parts.parameters == parts.gradients == parts.reference == parts.optimizer // 2 == 4 * 919_680
    assert estimate(config, reference=False, gpu=True).reference == 0


def test_a_step_rule_that_looks_holds_the_weights_once_more(composed: Composed) -> None:
    plain, looking = (
        estimate(composed(*rule), reference=False, gpu=False).update for rule in ((), ("step_rule=measured",))
    )
    assert looking - plain == 4 * (919_680 + 2 * 1024 * 128 + 2048 * 1024)


def test_activations_by_hand(composed: Composed) -> None:
    """float32, one layer of width 8 with 2 heads and an MLP of 16: a token keeps two inputs and two
    normalised inputs (32), two outputs of norms (16), queries, keys, values and attention's output (32), four
    of the MLP (64), two scales, two log-sum-exps, and its row of the mask (10 + 6); after the layer the last
    norm's two (16) and a completion token's state (8)."""
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    overrides = [f"model.{key}={value}" for key, value in size.items()]
    config = composed(
        *overrides,
        "model.num_key_value_heads=1",
        "dataset.max_prompt_tokens=10",
        "dataset.max_completion_tokens=6",
    )
    tokens, completion_tokens = 16 * 16, 16 * 6
    kept = 32 + 16 + 32 + 64 + 2 + 2 + 16
    assert memory(config).activations == 4 * (tokens * (kept + 16) + completion_tokens * 8)
    checkpointed = replace(config, model=replace(config.model, gradient_checkpointing=True))
    assert memory(checkpointed).activations == 4 * (tokens * (8 + 16) + completion_tokens * 8)


def test_logits_are_chunked(composed: Composed) -> None:
    """Five copies of [tokens, V], and from the second chunk on the first one's gradient of [V, H]."""
    whole, chunked = (memory(composed(f"model.logits_chunk_tokens={n}")).logits for n in (1536, 512))
    assert (whole, chunked) == (4 * 5 * 1536 * 1024, 4 * (5 * 512 * 1024 + 1024 * 128))


def test_records_and_moments(composed: Composed) -> None:
    config = composed()
    record = 96 * 96 * (4 * 128 + 12 * 50 + 44) + 96 * 160 * 16
    assert memory(config).records == memory(config).joined == record
    assert memory(composed("algo.num_minibatches=2")).joined == record // 2
    assert memory(composed("algo.num_iterations=2")).records == 2 * record
    assert memory(config).moments == 2 * 1024 * 128 * 4 + 8 * 1024
    assert memory(composed("regime.prompts_per_step=1", "dataset.max_completion_tokens=1", "num_steps=1",
                           "curvature.top_k=3")).moments == 2 * 8 * 3 * 128 * 4 + 8 * 1024  # fmt: skip
    for other in ("sgd", "adam_live"):
        assert memory(composed(f"curvature.optimizer_model={other}")).moments == 0


def test_kv_cache_of_a_call(composed: Composed) -> None:
    """4 layers x 2 heads of 32 (256) and one layer repeated (128), 160 tokens of both; 5 x logits."""
    row = 2 * 4 * 160 * (256 + 128) + 5 * 4 * 1024
    sizes = {"evaluation.num_problems=96": 96, "evaluation.num_problems=200": 200, "regime=conservative": 512}
    for override, rows in sizes.items():
        assert memory(composed(override)).kv_cache == rows * row
    small = ["evaluation.num_problems=1", "rollout.engine.max_sequences_per_call=20"]
    assert memory(composed(*small)).kv_cache == 16 * row  # whole groups of 8
    assert memory(composed(small[0], "rollout.chunking=per_micro_batch")).kv_cache == 16 * row


def test_the_total_is_that_of_the_fullest_phase() -> None:
    weights = {"parameters": 4, "gradients": 4, "optimizer": 8}
    parts = Memory(**PARTS | weights | {"activations": 50, "layer": 5, "logits": 7, "kv_cache": 40})
    assert parts.phases == {"rollout": 52, "scoring": 12, "backward": 69, "curvature": 16, "update": 16}
    assert parts.total == 69
    assert replace(parts, kv_cache=60).total == 72  # activations and cache never meet
    assert replace(parts, accumulated=4).total == 73
    assert (
        replace(parts, activations=0, layer=5, logits=6).phases["backward"] == 21
    )  # all gradients, one layer


def test_sharding() -> None:
    shared = {"parameters": 100, "gradients": 100, "optimizer": 200, "records": 40, "kv_cache_of_all": 80}
    parts = Memory(**PARTS | shared | {"activations": 50, "logits": 7, "kv_cache": 30, "unit": 9})
    assert parts.per_gpu(1) == parts
    four = parts.per_gpu(4)
    assert (four.parameters, four.gradients, four.optimizer, four.records) == (25 + 9, 25, 50, 10)
    assert (four.activations, four.logits, four.kv_cache) == (50, 7, 20)
    assert parts.per_gpu(2).kv_cache == 30  # a call is no larger than the engine allows


def test_a_gpu_computes_in_bfloat16(composed: Composed) -> None:
    config = composed("model=qwen2_5_0_5b")
    here, gpu = memory(config), memory(config, gpu=True)
    assert gpu.activations < here.activations and gpu.copies > 0 == here.copies
    same = replace(config, model=replace(config.model, compute_dtype="float32"))
    assert memory(same, gpu=True).activations == here.activations


def test_the_plan_says_what_vllm_takes_beside_the_learner(composed: Composed) -> None:
    lines = plan(composed("device=cpu", "rollout=vllm"))
    assert "KV cache" not in lines[-3]  # not the learner's any more
    expected = "vLLM beside it, in a process of its own: weights 3.7 MB, KV cache 1 GiB"
    assert lines[-1] == expected
    on_gpu = plan(composed("device=cuda", "rollout=vllm", "rollout.engine.gpu_memory_utilization=0.3"))
    assert on_gpu[-1].endswith("weights 1.8 MB, KV cache up to 30% of its GPU in all")
    assert plan(composed("rollout=vllm", "rollout.server_url=http://a:1"))[-1] == "vLLM at http://a:1"


def test_the_plan_says_it(composed: Composed) -> None:
    lines = plan(composed("device=cpu"))[-3:]
    assert lines[0].startswith("919,680 parameters; estimated peak of tensors 184 MB on a CPU in float32, ")
    assert lines[0].endswith("fullest in the backward phase")
    assert lines[1].startswith("not all at once: weights 3.7 MB, gradients 3.7 MB, Adam 7.4 MB, ")
    assert "this build trains on one device" in lines[2]


@pytest.mark.parametrize(("size", "text"), [(0, "0.0 MB"), (3_680_000, "3.7 MB"), (183_600_000, "184 MB"),
                                            (1_230_000_000, "1.2 GB"), (323e9, "323 GB")])  # fmt: skip
def test_units(size: int, text: str) -> None:
    assert human(size) == text


@pytest.mark.parametrize("name", [name for name in ARCHITECTURE if name != "tie_word_embeddings"])
def test_every_number_has_a_rule(name: str, composed: Composed) -> None:
    value = "''" if name == "model_type" else "0"
    assert f"model.{name}" in RULES
    with pytest.raises(ConfigError, match=rf"model\.{name}=.*: expected"):
        check(composed(f"model.{name}={value}"))


def test_another_architecture_is_refused(composed: Composed) -> None:
    model = composed().model
    policy.check_architecture(model)
    for name in ARCHITECTURE:
        other = {"model_type": "llama", "tie_word_embeddings": False}.get(name, 7)
        with pytest.raises(
            ConfigError, match=rf"^model\.{name}={other}: expected \w+, as {model.path} says$"
        ):
            policy.check_architecture(replace(model, **{name: other}))


def test_all_differences_are_one_line(composed: Composed) -> None:
    wrong = replace(composed().model, hidden_size=64, num_hidden_layers=2)
    with pytest.raises(ConfigError) as error:
        policy.check_architecture(wrong)
    assert str(error.value) == (
        "model.hidden_size=64: expected 128; model.num_hidden_layers=2: expected 4, "
        "as pkg://capo_exp/assets/tiny says"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "overrides",
    [
        ["regime.prompts_per_step=4"],
        [
            *LARGE,
            CHECKPOINTING,
            "model.hidden_size=512",  # with fewer layers: 30 M parameters
            "model.num_attention_heads=8",
            "model.num_hidden_layers=4",
            "model.micro_batch_size=4",
            "regime.group_size=4",
            "dataset.max_completion_tokens=32",
        ],
    ],
    ids=["tiny", "large"],
)
def test_real_steps_take_what_was_estimated(overrides: list[str]) -> None:
    measured, estimated = measure(overrides)
    assert estimated == pytest.approx(measured, rel=0.25), (measured, estimated)
