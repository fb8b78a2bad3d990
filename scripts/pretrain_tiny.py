"""Makes the shipped tiny model: a tokenizer and a warm start on worked solutions with slips.

    python scripts/pretrain_tiny.py

Everything is drawn from the train split of conf/dataset/arithmetic.yaml; test problems are only used for the
accuracies printed at the end. Deterministic for one seed, machine and number of threads.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    get_cosine_schedule_with_warmup,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from capo_exp.config import conf_dir
from capo_exp.data import arithmetic
from capo_exp.types import Problem

ASSETS = Path(__file__).resolve().parents[1] / "capo_exp" / "assets" / "tiny"
EOS, PAD, IM_START, IM_END = SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 1024
MICRO_BATCH = 16
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
console = Console()


def parse_args() -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--output", type=Path, default=ASSETS)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument(
        "--slip-rate", type=float, default=0.08, help="of an easy step; hard ones slip more often"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus-tasks", type=int, default=40_000, help="tasks the tokenizer is trained on")
    parser.add_argument("--eval-problems", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1, help="another number gives slightly other weights")
    return parser.parse_args()


def pairs(source: dict, template: str, seed: int, slip_rate: float) -> Iterator[tuple[str, str]]:
    """Endless (rendered prompt, worked solution with slips) of the train split."""
    rng = random.Random(seed)
    for task in arithmetic.tasks("train", random.Random(seed + 1), source["families"]):
        yield template.format(problem=task.text), arithmetic.demonstration_with_slips(task, rng, slip_rate)


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over every byte, digits one by one.

    AutoTokenizer makes a Qwen2Tokenizer of whatever stands beside a Qwen2 model, with its own normaliser
    (NFC) and pieces; the same are used here, so that every way to load these files gives the same tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (size := tokenizer.get_vocab_size()) != VOCAB_SIZE:
        raise ValueError(f"got {size} tokens, expected {VOCAB_SIZE}; enlarge the lexicon")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[IM_START, IM_END],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.05,  # near 1 / sqrt(hidden_size); the usual 0.02 is for wider models
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, chunk: list[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """(token ids, prompt length) per pair; prompt and completion are encoded apart, as RL does."""
    prompts, completions = (tokenizer(list(texts))["input_ids"] for texts in zip(*chunk, strict=True))
    return [(p + c + [tokenizer.eos_token_id], len(p)) for p, c in zip(prompts, completions, strict=True)]


def collate(rows: list[tuple[list[int], int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids [B, S] and the mask [B, S] of completion tokens."""
    ids = torch.full((len(rows), max(len(tokens) for tokens, _ in rows)), pad_id)
    is_completion = torch.zeros_like(ids, dtype=torch.bool)
    for i, (tokens, prompt_length) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        is_completion[i, prompt_length : len(tokens)] = True
    return ids, is_completion


def batch_loss(model: Qwen2ForCausalLM, rows: list[tuple[list[int], int]], pad_id: int) -> float:
    """Mean cross-entropy [nats] of the completion tokens; leaves its gradient in the parameters.

    Micro-batches hold rows of similar length, so that little time goes into padding.
    """
    rows = sorted(rows, key=lambda row: len(row[0]))
    total = sum(len(tokens) - prompt_length for tokens, prompt_length in rows)
    sum_of_losses = 0.0
    for start in range(0, len(rows), MICRO_BATCH):
        ids, is_completion = collate(rows[start : start + MICRO_BATCH], pad_id)
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1][is_completion[:, 1:]]
        targets = ids[:, 1:][is_completion[:, 1:]]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), targets, reduction="sum") / total
        loss.backward()
        sum_of_losses += loss.item()
    return sum_of_losses


def train(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Iterator, args: argparse.Namespace
) -> None:
    """AdamW with a cosine schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    model.train()
    for step in track(range(1, args.steps + 1), "warm start", console=console):
        rows = encode(tokenizer, list(islice(data, args.batch_size)))
        loss = batch_loss(model, rows, tokenizer.pad_token_id)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            console.print(f"step {step}: loss {loss:.4f}")


@torch.no_grad()
def complete(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], **sampling: Any
) -> list[str]:
    """Completions with special tokens, padding removed; at most 96 tokens."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    out = model.generate(**inputs, max_new_tokens=96, **sampling)
    texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :])
    return [text.replace(PAD, "") for text in texts]


def report(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[Problem], template: str
) -> None:
    """Prints accuracy per family, sampled and greedy, and the share of completions that end."""
    model.eval()
    prompts = [template.format(problem=p.problem) for p in problems]
    right: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    sampled = complete(model, tokenizer, prompts, do_sample=True, top_k=0)
    greedy = complete(model, tokenizer, prompts, do_sample=False)
    for problem, *texts in zip(problems, sampled, greedy, strict=True):
        hits = tuple(text.endswith(f"\\boxed{{{problem.answer}}}{EOS}") for text in texts)
        right[problem.family].append(hits)
        right["all"].append(hits)
    table = Table("family", "problems", "sampled", "greedy")
    for family, rows in sorted(right.items()):
        accuracies = (f"{sum(column) / len(rows):.3f}" for column in zip(*rows, strict=True))
        table.add_row(family, str(len(rows)), *accuracies)
    console.print(table)
    ended = sum(text.endswith(EOS) for text in sampled) / len(sampled)
    console.print(f"sampled completions that end: {ended:.3f}; for example:")
    for prompt, text in zip(prompts[:5], sampled, strict=False):
        console.print(prompt + text, markup=False, highlight=False)


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """bfloat16 weights, compact tokenizer, no trace of this machine's paths."""
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output)
    compact = json.loads((output / "tokenizer.json").read_text())
    (output / "tokenizer.json").write_text(json.dumps(compact, ensure_ascii=False, separators=(",", ":")))
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(**ids)
    model.to(torch.bfloat16).save_pretrained(output)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    dataset = OmegaConf.to_container(OmegaConf.load(conf_dir() / "dataset" / "arithmetic.yaml"))
    source = {key: value for key, value in dataset["source"].items() if not key.startswith("_")}
    corpus = islice(pairs(source, dataset["template"], args.seed, args.slip_rate), args.corpus_tasks)
    tokenizer = train_tokenizer("".join(pair) for pair in corpus)
    model = make_model(tokenizer)
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    data = pairs(source, dataset["template"], args.seed + 2, args.slip_rate)
    train(model, tokenizer, data, args)
    save(model, tokenizer, args.output)
    source["num_eval"] = args.eval_problems
    shipped = Qwen2ForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    report(shipped, tokenizer, arithmetic.problems("test", path=None, **source), dataset["template"])


if __name__ == "__main__":
    main()
