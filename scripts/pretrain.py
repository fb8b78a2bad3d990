"""Makes a small model: a tokenizer and a warm start on completions of problems that are made here.

    python scripts/pretrain.py                       # model=tiny, as shipped
    python scripts/pretrain.py warm_start=keywords   # model=keywords, as shipped

Everything is drawn from the train split of the dataset; test problems are only used for the accuracies
printed at the end. Deterministic for one seed, machine and number of threads. What there is to choose:
conf/warm_start.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
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

from capo_exp.config.build import build_part
from capo_exp.config.errors import ConfigError
from capo_exp.config.schema import conf_dir
from capo_exp.core.types import Problem
from capo_exp.sweep.job import report as report_error

Numbers = dict[str, Any]
"""Numbers of conf/warm_start."""
Pairs = Iterator[tuple[str, str]]
"""Endless (rendered prompt, completion)."""

EOS, PAD, IM_START, IM_END = SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
console = Console()


def draw_pairs(numbers: Numbers, template: str, seed: int) -> Pairs:
    """Draws what the warm start imitates from the train split."""
    for problem, completion in build_part(numbers["imitations"], key="warm_start.imitations")(seed):
        yield template.format(problem=problem), completion


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains byte-level BPE over every byte, digits one by one.

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
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (size := tokenizer.get_vocab_size()) != vocab_size:
        key = "warm_start.shape.vocab_size"
        raise ConfigError(f"got {size} tokens of the corpus, expected {vocab_size}; change {key}")
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


def make_model(
    shape: Numbers, initializer_range: float, tokenizer: PreTrainedTokenizerFast
) -> Qwen2ForCausalLM:
    """Makes a model with random weights, in a shape as config.json words it."""
    config = Qwen2Config(
        **shape,
        max_position_embeddings=2048,
        initializer_range=initializer_range,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, chunk: list[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Returns (token ids, prompt length) per pair; prompt and completion are encoded apart, as RL does."""
    prompts, completions = (tokenizer(list(texts))["input_ids"] for texts in zip(*chunk, strict=True))
    return [(p + c + [tokenizer.eos_token_id], len(p)) for p, c in zip(prompts, completions, strict=True)]


def collate(rows: list[tuple[list[int], int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Returns right-padded ids [B, S] and the mask [B, S] of completion tokens."""
    ids = torch.full((len(rows), max(len(tokens) for tokens, _ in rows)), pad_id)
    is_completion = torch.zeros_like(ids, dtype=torch.bool)
    for i, (tokens, prompt_length) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        is_completion[i, prompt_length : len(tokens)] = True
    return ids, is_completion


def compute_loss(
    model: Qwen2ForCausalLM, rows: list[tuple[list[int], int]], pad_id: int, micro_batch: int
) -> float:
    """Returns the mean cross-entropy [nats] of the completion tokens; leaves its gradient in the parameters.

    Micro-batches hold rows of similar length, so that little time goes into padding.
    """
    rows = sorted(rows, key=lambda row: len(row[0]))
    total = sum(len(tokens) - prompt_length for tokens, prompt_length in rows)
    sum_of_losses = 0.0
    for start in range(0, len(rows), micro_batch):
        ids, is_completion = collate(rows[start : start + micro_batch], pad_id)
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1][is_completion[:, 1:]]
        targets = ids[:, 1:][is_completion[:, 1:]]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), targets, reduction="sum") / total
        loss.backward()
        sum_of_losses += loss.item()
    return sum_of_losses


def train(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Pairs, numbers: Numbers) -> None:
    """Trains with AdamW and a cosine schedule."""
    steps = numbers["steps"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=numbers["learning_rate"], betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    for step in track(range(1, steps + 1), "warm start", console=console):
        rows = encode(tokenizer, list(islice(data, numbers["batch_size"])))
        loss = compute_loss(model, rows, tokenizer.pad_token_id, numbers["micro_batch_size"])
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
    """Samples completions of at most 96 tokens, with special tokens, padding removed."""
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
    """Saves bfloat16 weights and a compact tokenizer, without a trace of this machine's paths."""
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output)
    compact = json.loads((output / "tokenizer.json").read_text())
    (output / "tokenizer.json").write_text(json.dumps(compact, ensure_ascii=False, separators=(",", ":")))
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(**ids)
    model.to(torch.bfloat16).save_pretrained(output)


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="pretrain")
def main(cfg: DictConfig) -> None:
    """Makes the model of the configuration; a mistake in it is one line and exit status 2."""
    try:
        make(OmegaConf.to_container(cfg, resolve=True))
    except ConfigError as error:
        sys.exit(report_error(error))


def make(config: Numbers) -> None:
    """Makes tokenizer, warm start and files, and says how good the model is."""
    numbers, template, output = config["warm_start"], config["dataset"]["template"], Path(config["output"])
    torch.set_num_threads(numbers["threads"])
    torch.manual_seed(numbers["seed"])
    corpus = islice(draw_pairs(numbers, template, numbers["seed"]), numbers["corpus_tasks"])
    tokenizer = train_tokenizer(("".join(pair) for pair in corpus), numbers["shape"]["vocab_size"])
    model = make_model(numbers["shape"], numbers["initializer_range"], tokenizer)
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    train(model, tokenizer, draw_pairs(numbers, template, numbers["seed"] + 2), numbers)
    save(model, tokenizer, output)
    source = config["dataset"]["source"] | {"num_eval": numbers["eval_problems"]}
    problems = build_part(source, key="dataset.source")("test", path=None)
    shipped = Qwen2ForCausalLM.from_pretrained(output, dtype=torch.float32)
    report(shipped, tokenizer, problems, template)


if __name__ == "__main__":
    main()
