import json
import math
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from capo_exp import logger as logger_module
from capo_exp import metric_names as names
from capo_exp.config import ConfigError, TrainConfig
from capo_exp.figures.load import read_jsonl
from capo_exp.logger import RunLogger, has_key, resolve_mode

KEY = "0123456789abcdef0123456789abcdef01234567"
CREDENTIALS = ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL")


@pytest.fixture(autouse=True)
def no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CREDENTIALS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def files_only(composed: Callable[..., TrainConfig]) -> TrainConfig:
    return composed("algo=grpo", "logger=files")


@pytest.fixture
def offline(composed: Callable[..., TrainConfig]) -> TrainConfig:
    return composed("algo=grpo", "logger=wandb", "logger.wandb_mode=offline", "logger.tags=[a]")


def row(step: int, **more: float) -> dict[str, float]:
    return {
        "counter/rollout_step": step,
        "counter/completions": 96 * step,
        "reward/accuracy": 0.1 + 0.2 * step,
        **{key.replace("__", "/"): value for key, value in more.items()},
    }


def open_logger(run_dir: Path, config: TrainConfig, resume_step: int = 0) -> RunLogger:
    return RunLogger(run_dir, config, run_id="1a2b3c4d", resume_step=resume_step)


# --- files ---


def test_metrics_are_exact_sorted_and_there_at_once(run_dir: Path, files_only: TrainConfig) -> None:
    with open_logger(run_dir, files_only) as logger:
        logger.log_step(row(1, loss__total=0.1 + 0.2))
        text = (run_dir / "metrics.jsonl").read_text()
    assert text == (
        '{"counter/completions": 96, "counter/rollout_step": 1, '
        '"loss/total": 0.30000000000000004, "reward/accuracy": 0.30000000000000004}\n'
    )


def test_a_number_that_is_not_finite_is_null(run_dir: Path, files_only: TrainConfig) -> None:
    with open_logger(run_dir, files_only) as logger:
        logger.log_step(row(1, policy__ratio_max=math.inf, loss__kl=math.nan))
    [line] = read_jsonl(run_dir / "metrics.jsonl")
    assert line["policy/ratio_max"] is None
    assert line["loss/kl"] is None


def test_an_undocumented_key_is_refused(run_dir: Path, files_only: TrainConfig) -> None:
    with open_logger(run_dir, files_only) as logger, pytest.raises(AssertionError, match="reward/typo"):
        logger.log_step(row(1, reward__typo=1.0))
    assert read_jsonl(run_dir / "metrics.jsonl") == []


def test_a_row_needs_its_counters(run_dir: Path, files_only: TrainConfig) -> None:
    with open_logger(run_dir, files_only) as logger, pytest.raises(AssertionError, match=names.COMPLETIONS):
        logger.log_step({"reward/accuracy": 1.0})


def test_every_key_of_the_contract_is_documented() -> None:
    contract = """
    counter/optimizer_step counter/completions counter/generated_tokens reward/accuracy reward/mean
    eval/accuracy advantage/std loss/total loss/clip_fraction policy/entropy policy/grad_norm
    mismatch/kl_k3 rollout/completion_length/mean rollout/truncated_fraction
    curvature/token/policy_shift/mean curvature/token/policy_shift/p99 curvature/token/policy_shift/max
    curvature/token/objective_shift/mean curvature/token/objective_shift/p99
    curvature/token/objective_shift/max curvature/batch/policy_shift curvature/batch/objective_shift
    selection/rejection_rate selection/rejection_rate_policy selection/rejection_rate_objective
    optim/learning_rate optim/step_scale time/rollout_seconds time/reward_seconds time/policy_seconds
    time/curvature_seconds time/update_seconds time/total_seconds loss/kl reward/timeouts reward/crashes
    reward/no_answer_fraction reward/gold_unparsable policy/ratio_max eval/truncated_fraction
    time/tokens_per_second data/dropped_prompts
    """
    names.check_known(contract.split())
    names.check_known(["selection/rejection_rate_entropy"])
    with pytest.raises(AssertionError):
        names.check_known(["selection/rejection_rate_"])
    assert all(text.endswith(".") and "\n" not in text for text in names.METRICS.values())


def test_a_resume_drops_what_came_after_the_checkpoint(run_dir: Path, files_only: TrainConfig) -> None:
    with open_logger(run_dir, files_only) as logger:
        logger.log_evaluation(row(0, eval__accuracy=0.2))
        for step in (1, 2, 3):
            logger.log_step(row(step))
            logger.log_completions(step, [{"prompt": "a"}])
        logger.log_evaluation(row(3, eval__accuracy=0.3))
    before = (run_dir / "metrics.jsonl").read_text().splitlines()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"counter/rollout_step": 4, "counter/compl')  # killed while writing
    with open_logger(run_dir, files_only, resume_step=2) as logger:
        logger.log_step(row(3))
    assert (run_dir / "metrics.jsonl").read_text().splitlines() == before
    assert [line["counter/rollout_step"] for line in read_jsonl(run_dir / "eval.jsonl")] == [0]
    samples = sorted(path.name for path in (run_dir / "completions").iterdir())
    assert samples == ["step_000001.parquet", "step_000002.parquet"]


def test_a_fresh_start_drops_everything(run_dir: Path, files_only: TrainConfig) -> None:
    with open_logger(run_dir, files_only) as logger:
        logger.log_evaluation(row(0, eval__accuracy=0.2))
        logger.log_step(row(1))
    with open_logger(run_dir, files_only):
        pass
    assert (run_dir / "metrics.jsonl").read_text() == (run_dir / "eval.jsonl").read_text() == ""


def test_completions_come_back(run_dir: Path, files_only: TrainConfig) -> None:
    sample = {
        "prompt": "1+1=",
        "completion": "2",
        "answer": "2",
        "reward": 1.0,
        "advantage": 0.5,
        "truncated": False,
        "token_ids": [5, 1],
        "policy_shift": [0.25, 0.5],
        "objective_shift": [-0.25, 0.0],
        "keep": [True, False],
    }
    empty = {**sample, "token_ids": [], "policy_shift": [], "objective_shift": [], "keep": []}
    with open_logger(run_dir, files_only) as logger:
        logger.log_completions(10, [sample, empty])
        assert logger.wandb_location is None
    path = run_dir / "completions" / "step_000010.parquet"
    assert pq.read_table(path).to_pylist() == [sample, empty]
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert str(pq.read_schema(path).field("keep").type).startswith("list<") and len(sample) == 10


def test_disabled_does_not_import_wandb(run_dir: Path) -> None:
    code = """
import sys
from pathlib import Path
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from capo_exp.config import conf_dir, register
from capo_exp.logger import RunLogger
register()
with initialize_config_dir(str(conf_dir()), version_base="1.3"):
    config = OmegaConf.to_object(compose("config", ["algo=grpo", "logger=files"]))
with RunLogger(Path(sys.argv[1]), config, run_id="a", resume_step=0) as logger:
    logger.log_step({"counter/rollout_step": 1, "counter/completions": 96})
assert not {"wandb", "torch"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(run_dir)], check=True)


# --- Weights & Biases ---


def test_auto_is_online_only_with_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_mode("auto") == "offline"
    (tmp_path / "netrc").write_text(f"machine other.example login user password {KEY}\n")
    assert not has_key()
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert resolve_mode("auto") == "online"
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert resolve_mode("auto") == "online"
    assert resolve_mode("offline") == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode("auto") == "disabled"
    with pytest.raises(ConfigError, match=r"logger\.wandb_mode"):
        resolve_mode("onlin")


class FakeRun:
    """Stands for an online run, which tests cannot have."""

    def __init__(self, *, offline: bool, resumed: bool, folder: Path) -> None:
        self.offline, self.resumed, self.id, self.url = (
            offline,
            resumed,
            "1a2b3c4d",
            "https://wandb.example/run",
        )
        self.dir = str(folder / "wandb" / "run-now-1a2b3c4d" / "files")
        self.rows: list[dict[str, float]] = []
        self.exit_codes: list[int] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        del name, step_metric

    def log(self, metrics: dict[str, float]) -> None:
        self.rows.append(metrics)

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


def test_auto_goes_on_offline_when_the_server_is_away(
    run_dir: Path, composed: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    modes: list[str] = []

    def init(*_: Any, mode: str, **__: Any) -> FakeRun:
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no route")
        return FakeRun(offline=True, resumed=False, folder=run_dir)

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(logger_module, "_init", init)
    open_logger(run_dir, composed("algo=grpo", "logger=wandb")).finish(0)
    assert modes == ["online", "offline"]
    with pytest.raises(ConfigError, match="wandb_mode=offline"):
        open_logger(run_dir, composed("algo=grpo", "logger=wandb", "logger.wandb_mode=online"))


@pytest.mark.parametrize("resumed", [True, False])
def test_a_server_that_has_the_run_gets_only_what_is_new(
    run_dir: Path, offline: TrainConfig, monkeypatch: pytest.MonkeyPatch, resumed: bool
) -> None:
    online = FakeRun(offline=False, resumed=resumed, folder=run_dir)
    (run_dir / "metrics.jsonl").write_text(json.dumps(row(1)) + "\n")
    monkeypatch.setattr(logger_module, "start_wandb", lambda *_, **__: online)
    with pytest.raises(RuntimeError), open_logger(run_dir, offline, resume_step=1) as logger:
        assert logger.wandb_location == online.url
        logger.log_step(row(2))
        raise RuntimeError
    assert online.rows == ([row(2)] if resumed else [row(1), row(2)])
    assert online.exit_codes == [1]


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of an offline .wandb file: 7 bytes, then protobuf messages in LevelDB log blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, position, message = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole record, or its last part
            yield wandb_internal_pb2.Record.FromString(message)
            message = b""


def finished_wandb_records(path: Path) -> list[Any]:
    """Waits for the last record, which W&B writes a moment after finish() returns."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        records = list(wandb_records(path))
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.05)
    raise TimeoutError(f"no end in {path}")


def history(records: list[Any]) -> list[dict[str, float]]:
    """Logged rows without what W&B adds."""
    rows: list[dict[str, float]] = []
    for record in records:
        items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        if items:
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


def in_order(rows: list[dict[str, float]]) -> list[str]:
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


def test_the_offline_run_has_what_the_files_have_also_after_a_resume(
    run_dir: Path, offline: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with open_logger(run_dir, offline) as logger:
        logger.log_evaluation(row(0, eval__accuracy=0.2))
        for step in (1, 2, 3):
            logger.log_step(row(step, loss__total=1 / 3, curvature__token__policy_shift__p99=1.2345e-7))
    with open_logger(run_dir, offline, resume_step=2) as logger:
        logger.log_step(row(3, loss__total=2 / 3, policy__ratio_max=math.inf))
        logger.log_evaluation(row(3, eval__accuracy=0.4))
        location = logger.wandb_location
    [file] = (run_dir / "wandb").glob("offline-run-*/run-1a2b3c4d.wandb")
    assert location == f"wandb sync {file.parent}"
    records = finished_wandb_records(file)
    logged = [*read_jsonl(run_dir / "metrics.jsonl"), *read_jsonl(run_dir / "eval.jsonl")]
    finite = [{key: value for key, value in line.items() if value is not None} for line in logged]
    assert in_order(history(records)) == in_order(finite)

    [run, *_] = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.run_group, run.job_type) == ("1a2b3c4d", "default", "train")
    assert run.display_name.startswith("grpo-tiny-arithmetic-aggressive-lr0.0001-12x8-s0-")
    assert list(run.tags) == ["a"]
    assert run.host == ""
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["regime"]["prompts_per_step"] == 12
    metrics = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
    assert any(m.glob_name == "*" and m.step_metric == "counter/completions" for m in metrics)

    written = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(written) > 3
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
