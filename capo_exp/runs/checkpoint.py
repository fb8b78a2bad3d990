"""Checkpoints: weights in transformers' own format, and everything else that the next step depends on.

A checkpoint is written to a temporary folder and renamed, so that it is whole or not there. Sampling and data
order are functions of the seed and the step, so neither needs to be stored.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from capo_exp.runs.files import name_disk_error

_STATE = "trainer_state.pt"
_REFERENCE = "reference"


class Checkpointer:
    """Owns the checkpoints/ folder of one run."""

    def __init__(self, run_dir: Path, *, keep: int) -> None:
        self._folder = run_dir / "checkpoints"
        self._keep = keep
        self._folder.mkdir(parents=True, exist_ok=True)
        for unfinished in self._folder.glob(".*"):
            shutil.rmtree(unfinished)

    def latest(self) -> Path | None:
        """Returns the newest checkpoint, which transformers can load as a model; None before the first."""
        return max(self._folder.glob("step_*"), default=None)

    def latest_reference(self) -> Path | None:
        """Returns the reference model of the newest checkpoint; None where it is still the base model."""
        latest = self.latest()
        saved = latest / _REFERENCE if latest else None
        return saved if saved and saved.is_dir() else None

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reference: PreTrainedModel | None = None,
    ) -> Path:
        """Writes checkpoints/step_<step>, then removes all but the newest `keep`.

        Args:
            step: The rollout step that is done.
            state: What else the next step depends on: numbers, texts, tensors, and dicts of them.
            model: The model whose weights are saved.
            tokenizer: The tokenizer that is saved beside them.
            reference: The reference model where it is no longer the base model, else None.

        Raises:
            OSError: The disk takes no more. What was written is removed, the older ones are there.
        """
        target = self._folder / f"step_{step:06d}"
        partial = self._folder / f".{target.name}"
        try:
            with name_disk_error(target):
                model.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
                if reference is not None:
                    reference.save_pretrained(partial / _REFERENCE)
                with (partial / _STATE).open("wb") as file:  # torch alone would not say why it cannot write
                    torch.save(dict(state), file)
                _flush(partial)
                shutil.rmtree(target, ignore_errors=True)
                partial.rename(target)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for old in sorted(self._folder.glob("step_*"))[: -self._keep]:
            shutil.rmtree(old)
        return target

    def restore(self, path: Path, device: torch.device) -> dict[str, Any]:
        """Reads the state of a checkpoint, without the weights; its tensors are on `device`."""
        return torch.load(path / _STATE, map_location=device, weights_only=True)


def _flush(folder: Path) -> None:
    """Forces the files to disk before the rename makes them count."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
