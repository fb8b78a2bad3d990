"""One GRPO step, ours against TRL's GRPOTrainer, in turns in one process, on a GPU or a CPU.

Both train the same model on the same problems with the same batch, length limit, temperature, learning rate,
precision and reward, with AdamW and without checkpointing; ours also predicts every token's shifts, updates
the moments and logs them. The sides take turns step by step, so that anything else that the machine does
falls on all. Sampling: ours with each --engine, TRL with transformers, and with --trl-vllm once more with
vLLM in its process, whose engine gets the same share of memory. Peak memory is what torch holds for a side at
once: the engine of rollout=vllm is another process, TRL's is part of its own.

    python benchmarks/gpu_step.py --trl-vllm       # one GPU: SmolLM2-135M, and a random Qwen2 of 0.5 B
    python benchmarks/gpu_step.py --device cpu --steps 22       # the table in docs/BENCHMARKS.md
    python benchmarks/gpu_step.py --device cpu --model DIR --engine hf --engine vllm regime.learning_rate=1e-6
"""

import argparse
import copy
import statistics
import tempfile
import time
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PrinterCallback, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from capo_exp.cli.words import as_overrides
from capo_exp.config.places import resolve_model_path
from capo_exp.config.schema import TrainConfig, conf_dir, register
from capo_exp.core import policy
from capo_exp.runs.identity import run_dir
from capo_exp.runs.read import load_run
from capo_exp.training import loop as train

RANDOM = "random_qwen2"
QWEN2 = {
    "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
"""The shape of 0.5 B parameters."""
ENGINE_SHARE = 0.2
"""Of the GPU's memory, for a vLLM engine of either side."""
STAGES = ("rollout", "reward", "policy", "curvature", "update")


class Side:
    """What the steps of one side took: seconds, and the most bytes that torch held for it at once."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.held, self.peak = cuda, 0, 0
        self.seconds: list[float] = []

    def begin(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        self.began = time.perf_counter()

    def end(self, *, step: bool = True) -> None:
        """Ends what has begun: a step, or the making of what it needs."""
        if self.cuda:
            torch.cuda.synchronize()
        if step:
            self.seconds.append(time.perf_counter() - self.began)
        if self.cuda:
            if step:
                self.peak = max(self.peak, self.held + torch.cuda.max_memory_allocated() - self.before)
            self.held += torch.cuda.memory_allocated() - self.before


class Turns(TrainerCallback):
    """Times TRL's steps, and takes one of each of ours after each."""

    def __init__(self, ours: list[tuple[train.Session, Side]], theirs: Side) -> None:
        self.ours, self.theirs = ours, theirs

    def on_step_begin(self, args, state, control, **kwargs):
        self.theirs.begin()

    def on_step_end(self, args, state, control, **kwargs):
        self.theirs.end()
        for session, side in self.ours:
            side.begin()
            train.take_step(session)
            side.end()


def make_random(folder: str) -> str:
    """Writes a random Qwen2 with the shipped model's tokenizer, and returns its place."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_path("pkg://capo_exp/assets/tiny"))
    Qwen2ForCausalLM(Qwen2Config(**QWEN2, eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def our_config(words: list[str]) -> TrainConfig:
    register()
    fixed = ["algo=grpo", "logger=files", "logger.completions_every=0", "checkpoint.every=1000"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = OmegaConf.to_object(compose("config", as_overrides([*fixed, *words])))
    assert isinstance(config, TrainConfig)
    return config


def our_session(words: list[str], stack: ExitStack) -> train.Session:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    config = our_config([*words, f"output_dir={folder}"])
    directory = run_dir(config)
    directory.mkdir(parents=True)
    return train.open_session(config, train.read_inputs(config), directory, stack)


def trl_trainer(session: train.Session, turns: Turns, folder: str, *, vllm: bool, rows: int | None) -> Any:
    """Returns TRL's trainer with our numbers. What it does by default beyond them is off: checkpointing, and
    with vLLM another pass that corrects for the sampler, which ours does not make either."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config, inputs = session.config, session.inputs
    problems = [{"prompt": p.text, "golds": list(p.problem.golds)} for p in inputs.data.train]

    def reward(completions: list[str], golds: list[list[str]], **_: object) -> list[float]:
        scored = inputs.verifier.score([[text] for text in completions], [tuple(each) for each in golds])
        return [one for (one,) in scored.rewards]

    model = policy.load_model(config.model, inputs.device)
    tokenizer = policy.load_tokenizer(config.model)
    engine: dict[str, Any] = {}
    if vllm:  # takes its dtype from a config.json, and the weights from the trainer
        copy.deepcopy(model).to(inputs.compute_dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model.name_or_path = folder
        engine = {
            "use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": ENGINE_SHARE,
            "vllm_max_model_length": config.dataset.longest_row, "vllm_importance_sampling_correction": False,
        }  # fmt: skip
    size = config.regime.prompts_per_step * config.regime.group_size
    arguments = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=rows or size,
        gradient_accumulation_steps=size // (rows or size),
        num_generations=config.regime.group_size,
        max_completion_length=config.dataset.max_completion_tokens,
        temperature=config.rollout.temperature,
        learning_rate=config.regime.learning_rate,
        lr_scheduler_type=config.optimizer.schedule,
        warmup_steps=config.optimizer.warmup_ratio,
        max_grad_norm=config.optimizer.max_grad_norm,
        max_steps=config.num_steps,
        beta=0.0,
        loss_type="grpo",
        scale_rewards="group",
        bf16=inputs.compute_dtype == torch.bfloat16,
        gradient_checkpointing=False,
        use_cpu=inputs.device.type == "cpu",
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **engine,
    )
    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, args=arguments, train_dataset=Dataset.from_list(problems),
        processing_class=tokenizer, callbacks=[turns],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def compare(
    words: list[str], engines: list[str], given: argparse.Namespace, *, vllm: bool, console: Console
) -> None:
    """Lets ours with each engine and TRL in one of its modes take turns, and shows what they took."""
    cuda, ours, theirs = (
        given.device == "cuda",
        list[tuple[train.Session, Side]](),
        Side(given.device == "cuda"),
    )
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for engine in engines:
            share = f"rollout.engine.gpu_memory_utilization={ENGINE_SHARE}"
            own = [f"rollout={engine}", *([share] if engine == "vllm" else [])]
            side = Side(cuda)
            side.begin()
            ours.append((our_session([*own, f"num_steps={given.steps}", *words], stack), side))
            side.end(step=False)
        theirs.begin()
        turns = Turns(ours, theirs)
        trainer = trl_trainer(ours[0][0], turns, folder, vllm=vllm, rows=given.trl_rows)
        theirs.end(step=False)
        trainer.train()
        console.print(report(turns, trainer, given.skip, "vLLM" if vllm else "transformers"))


def report(turns: Turns, trainer: Any, skip: int, mode: str) -> Table:
    config = turns.ours[0][0].config
    size = config.regime.prompts_per_step * config.regime.group_size
    names = [f"ours, {session.config.rollout.name}" for session, _ in turns.ours]
    title = f"{config.model.name}, {size} completions, {len(turns.theirs.seconds) - skip} turns"
    table = Table("", *names, f"trl, {mode}", title=f"{title}, {torch.get_num_threads()} threads")
    logged = [
        row["completions/mean_length"]
        for row in trainer.state.log_history
        if "completions/mean_length" in row
    ]
    metrics = [load_run(session.directory).metrics[skip:] for session, _ in turns.ours]
    lengths = [statistics.fmean(row["rollout/completion_length/mean"] for row in rows) for rows in metrics]
    lengths.append(statistics.fmean(logged[skip:]))
    sides = [side for _, side in turns.ours] + [turns.theirs]
    spent = [side.seconds[skip:] for side in sides]
    rates = [size * length / statistics.fmean(taken) for length, taken in zip(lengths, spent, strict=True)]
    ratios = [[a / b for a, b in zip(taken, spent[-1], strict=True)] for taken in spent]
    rows: dict[str, list[str]] = {
        "median seconds": [f"{statistics.median(taken):.3f}" for taken in spent],
        "ratio to trl, median": [f"{statistics.median(each):.3f}" for each in ratios],
        "ratio to trl, mean": [f"{statistics.fmean(each):.3f}" for each in ratios],
        "mean completion tokens": [f"{length:.1f}" for length in lengths],
        "tokens/s": [f"{rate:,.0f}" for rate in rates],
        "ratio of tokens/s": [f"{rate / rates[-1]:.3f}" for rate in rates],
    }
    if turns.theirs.cuda:
        rows["peak GiB"] = [f"{side.peak / 2**30:.2f}" for side in sides]
        rows["ratio of peaks"] = [f"{side.peak / turns.theirs.peak:.3f}" for side in sides]
    for stage in STAGES:
        sums = [
            [sum(row[f"time/{name}_seconds"] for row in each) for name in (stage, "total")]
            for each in metrics
        ]
        rows[f"{stage} share"] = [f"{part / whole:.3f}" for part, whole in sums]
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", action="append", help=f"as model=, or {RANDOM}; can be given again")
    parser.add_argument(
        "--engine", action="append", choices=("hf", "vllm"), help="of ours; can be given again"
    )
    parser.add_argument("--trl-vllm", action="store_true", help="TRL's vLLM colocate mode, too")
    parser.add_argument(
        "--trl-rows", type=int, help="completions of a pass of TRL's; all of a step without it"
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--skip", type=int, default=2, help="first steps that are not counted")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of our config; TRL follows them")
    given, console = parser.parse_intermixed_args(), Console(width=110)
    cuda = given.device == "cuda"
    models = given.model or (["smollm2_135m", RANDOM] if cuda else ["tiny"])
    engines = given.engine or (["hf", "vllm"] if cuda else ["hf"])
    modes = [False, True] if given.trl_vllm else [False]
    if cuda and not torch.cuda.is_available():
        theirs = " and ".join("vLLM" if vllm else "transformers" for vllm in modes)
        how = f"{given.steps} steps each, ours with {' and '.join(engines)} against TRL with {theirs}"
        console.print(f"no GPU: would run {' and '.join(models)}, {how}; --device cpu runs here")
        return
    lacking = [name for name in ("trl", "accelerate") if find_spec(name) is None]
    if "vllm" in engines and find_spec("vllm") is None:
        lacking.append("vllm")
    if lacking:
        raise SystemExit(f'no {", ".join(lacking)}: pip install -e ".[bench,vllm]", or name one --engine hf')
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            own = (
                [f"model={make_random(folder)}", "regime.learning_rate=1e-6"]
                if model == RANDOM
                else [f"model={model}"]
            )
            for vllm in modes:
                words = [*own, f"device={given.device}", *given.overrides]
                compare(words, engines, given, vllm=vllm, console=console)


if __name__ == "__main__":
    main()
