"""Checkpoints: weights in transformers' own format, and everything else that the next step depends on.

A checkpoint is written to a temporary folder and renamed, so that it is whole or not there. Its
checkpoint.json names the run and a digest of every file: what a broken disk, a copy or a hand has changed
since is not gone on from. Sampling and data order are functions of the seed and the step, so neither needs to
be stored. Imports torch only to write and read states.
"""

import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capo_exp.config.errors import printable
from capo_exp.distributed.world import SINGLE, World
from capo_exp.runs.files import list_checkpoints, name_disk_error, remove, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_MANIFEST = "checkpoint.json"
_STATE = "trainer_state.pt"
_SHARDS = "trainer_state"
"""Folder with the optimiser's moments where several processes hold them."""
_REFERENCE = "reference"


def find_damage(checkpoint: Path, run_id: str | None) -> str | None:
    """Reads all of a checkpoint and says what is wrong with it; run_id=None takes that of any run."""
    said = _find_damage(checkpoint, run_id)
    return None if said is None else printable(said.replace("\n", "?"))[:200]  # a stranger's, maybe


def _find_damage(checkpoint: Path, run_id: str | None) -> str | None:
    try:
        if not stat.S_ISREG((checkpoint / _MANIFEST).stat().st_mode):
            return f"{_MANIFEST} is no file"
        manifest = json.loads((checkpoint / _MANIFEST).read_bytes())
        files, step, owner = manifest["files"], manifest["step"], manifest["run_id"]
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
            return f"{_MANIFEST} names files outside"
        for name in files:
            if not stat.S_ISREG((checkpoint / name).stat().st_mode):
                return f"{name} is no file"
        changed = [] if _STATE in files else [_STATE]
        changed += [name for name, digest in files.items() if _digest(checkpoint / name) != digest]
    except FileNotFoundError as error:
        return f"{os.path.relpath(error.filename, checkpoint)} is missing"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{_MANIFEST} cannot be read"
    if changed:
        return f"{changed[0]} is not what was written"
    if run_id not in (None, owner) or step != int(checkpoint.name.removeprefix("step_")):
        return f"it is step {step} of run {owner}"
    return None


def find_reference(checkpoint: Path | None) -> Path | None:
    """Returns the reference model of a checkpoint; None where it is still the base model."""
    saved = checkpoint / _REFERENCE if checkpoint else None
    return saved if saved and saved.is_dir() else None


class Checkpointer:
    """Owns the checkpoints/ folder of one run."""

    def __init__(self, run_dir: Path, *, keep: int, run_id: str, world: World = SINGLE) -> None:
        self._world = world
        self._run_dir = run_dir
        self._folder = run_dir / "checkpoints"
        self._keep = keep
        self._run_id = run_id
        self._damaged: set[Path] = set()
        if world.is_first:
            self._folder.mkdir(parents=True, exist_ok=True)
            for unfinished in self._folder.glob(".step_*"):
                remove(unfinished)

    def latest(self, before: int | None = None) -> Path | None:
        """Returns the newest whole checkpoint, older than a step if one is given; transformers can load it.

        Damaged ones are named in a warning, once. They stay until a new one of their step takes their place.
        """
        return self._world.first(lambda: self._find_latest(before))

    def _find_latest(self, before: int | None) -> Path | None:
        for step, path in reversed(list_checkpoints(self._run_dir).items()):
            if path in self._damaged or (before is not None and step >= before):
                continue
            damage = find_damage(path, self._run_id)
            if damage is None:
                return path
            self._damaged.add(path)
            log.warning("%s is not used: %s", path, damage)
        if before is None and self._damaged:
            log.warning("%s: no whole checkpoint is left, so the run begins again", self._run_dir)
        return None

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        reference: "PreTrainedModel | None" = None,
    ) -> Path:
        """Writes checkpoints/step_<step>, then removes all older ones but the newest, `keep` in all.

        `state` is what else the next step depends on: numbers, texts, tensors, and dicts of them; `reference`
        is the reference model where it is no longer the base model. Every process calls it; the first writes,
        and each its part of the moments.

        Raises:
            OSError: The disk takes no more. What was written is removed, the older ones are there.
        """
        from capo_exp.distributed.sharding import is_sharded, save_shards, take_shards

        target = self._folder / f"step_{step:06d}"
        partial = self._folder / f".{target.name}"
        plain, shards = dict(state), {}
        if is_sharded(model):
            plain["optimizer"], shards = take_shards(state["optimizer"])
        try:
            with name_disk_error(target):
                self._save_model(model, partial)
                if reference is not None:
                    self._save_model(reference, partial / _REFERENCE)
                if shards:
                    self._world.together(lambda: save_shards(shards, partial / _SHARDS))
                self._world.first(lambda: self._write(step, plain, tokenizer, partial, target))
        except OSError:
            if self._world.is_first:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self._damaged.discard(target)
        known = list_checkpoints(self._run_dir).items()
        whole = [path for number, path in known if number <= step and path not in self._damaged]
        for old in whole[: -self._keep] if self._world.is_first else ():
            remove(old)
        return target

    def _save_model(self, model: "PreTrainedModel", folder: Path) -> None:
        from capo_exp.distributed.sharding import is_sharded, whole_state

        if not is_sharded(model):
            model.save_pretrained(folder)
            return
        weights = whole_state(model, self._world)
        self._world.first(lambda: model.save_pretrained(folder, state_dict=weights))

    def _write(
        self,
        step: int,
        state: Mapping[str, Any],
        tokenizer: "PreTrainedTokenizerBase",
        partial: Path,
        target: Path,
    ) -> None:
        """Writes what is not the model's, and lets the checkpoint count."""
        import torch

        tokenizer.save_pretrained(partial)
        with (partial / _STATE).open("wb") as file:  # torch alone would not say why it cannot write
            torch.save(dict(state), file)
        files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
        digests = {str(path.relative_to(partial)): _digest(path) for path in files}
        write_json(partial / _MANIFEST, {"run_id": self._run_id, "step": step, "files": digests})
        _flush(*partial.rglob("*"), partial)  # before the rename makes them count
        remove(target)
        partial.rename(target)
        _flush(self._folder)

    def restore(self, path: Path, model: "PreTrainedModel | None" = None) -> dict[str, Any]:
        """Reads the state of a checkpoint, without the weights; its tensors are on the CPU, for a GPU would
        hold them twice while they are taken over. The optimiser's moments are shared out as the weights of
        `model` are, however many processes wrote them."""
        import torch

        from capo_exp.distributed.sharding import place_moments

        state = torch.load(path / _STATE, map_location="cpu", weights_only=True)
        if model is not None:
            shards = path / _SHARDS
            place_moments(state["optimizer"], model, shards if shards.is_dir() else None)
        return state


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
