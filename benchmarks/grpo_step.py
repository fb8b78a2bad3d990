"""Time of one GRPO step, ours against TRL's GRPOTrainer, side by side in one process.

Both train the same model on the same problems with 12 prompts x 8 completions, float32, AdamW, temperature 1,
the same length limit and learning rate; ours also predicts every token's shifts and logs them. The two take
turns, step by step, so that anything else that the machine does falls on both.

    python benchmarks/grpo_step.py --steps 12
"""

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from datasets import Dataset
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from capo_exp.config.schema import TrainConfig, conf_dir, register
from capo_exp.core import policy
from capo_exp.grading.compare import exact_match
from capo_exp.runs.identity import run_dir
from capo_exp.runs.read import load_run
from capo_exp.training import loop as train


class Alternate(TrainerCallback):
    """Times TRL's steps and takes one of ours after each."""

    def __init__(self, session: train.Session) -> None:
        self.session = session
        self.theirs: list[float] = []
        self.ours: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.theirs.append(time.perf_counter() - self.began)
        began = time.perf_counter()
        train.take_step(self.session)
        self.ours.append(time.perf_counter() - began)


def our_config(output_dir: str, steps: int, overrides: list[str]) -> TrainConfig:
    register()
    fixed = [
        "algo=grpo",
        "logger=files",
        "logger.completions_every=0",
        f"output_dir={output_dir}",
        f"num_steps={steps}",
    ]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = OmegaConf.to_object(compose("config", [*fixed, *overrides]))
    assert isinstance(config, TrainConfig)
    return config


def trl_trainer(
    config: TrainConfig, session: train.Session, output_dir: str, callback: Alternate
) -> GRPOTrainer:
    """TRL's trainer with our numbers; what it does by default beyond them (bf16, checkpointing) is off for
    both."""
    rows = [{"prompt": p.text, "answer": p.problem.answer} for p in session.inputs.data.train]

    def reward(completions: list[str], answer: list[str], **_: object) -> list[float]:
        return [
            float(exact_match(text, gold).correct) for text, gold in zip(completions, answer, strict=True)
        ]

    size = config.regime.prompts_per_step * config.regime.group_size
    arguments = GRPOConfig(
        output_dir=output_dir,
        per_device_train_batch_size=size,
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
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    model = policy.load_model(config.model, torch.device("cpu"))
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=policy.load_tokenizer(config.model),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--skip", type=int, default=2, help="first steps that are not counted")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of our config; TRL follows them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        config = our_config(folder, arguments.steps, arguments.overrides)
        directory = run_dir(config)
        directory.mkdir(parents=True)
        session = train.open_session(config, train.read_inputs(config), directory, stack)
        callback = Alternate(session)
        trainer = trl_trainer(config, session, str(Path(folder) / "trl"), callback)
        trainer.train()
        report(callback, session, directory, arguments.skip, trainer)


def report(
    callback: Alternate, session: train.Session, directory: Path, skip: int, trainer: GRPOTrainer
) -> None:
    ours, theirs = callback.ours[skip:], callback.theirs[skip:]
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    rows = load_run(directory).metrics[skip:]
    metrics = {key: [row[key] for row in rows] for key in rows[0]}
    logged = [row for row in trainer.state.log_history if "completions/mean_length" in row]
    table = Table(title=f"one GRPO step, {len(ours)} pairs, {torch.get_num_threads()} threads")
    for column in ("", "ours", "trl"):
        table.add_column(column)
    length = statistics.fmean(metrics["rollout/completion_length/mean"])
    their_length = statistics.fmean(row["completions/mean_length"] for row in logged[skip:])
    table.add_row("median seconds", f"{statistics.median(ours):.3f}", f"{statistics.median(theirs):.3f}")
    table.add_row("mean completion tokens", f"{length:.1f}", f"{their_length:.1f}")
    for name in ("rollout", "reward", "policy", "curvature", "update"):
        share = sum(metrics[f"time/{name}_seconds"]) / sum(metrics["time/total_seconds"])
        table.add_row(f"{name} share", f"{share:.3f}", "")
    console = Console()
    console.print(table)
    console.print(
        f"ratio ours / trl: median {statistics.median(ratios):.3f}, mean {statistics.fmean(ratios):.3f}"
    )


if __name__ == "__main__":
    main()
