"""How W&B is started: online or offline, and what of the machine it may see. No API key is read here."""

import logging
import netrc
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from capo_exp.config.errors import ConfigError
from capo_exp.config.schema import TrainConfig
from capo_exp.runs.record import as_dict, run_name

log = logging.getLogger(__name__)

MACHINE_SECONDS = 300.0
"""Between W&B's looks at the machine: at its own 15 s they outgrow the metrics of a run with long steps."""


def resolve_mode(mode: str) -> str:
    """online | offline | disabled; `auto` follows WANDB_MODE, else asks whether a key is there.

    Raises:
        ConfigError: The mode is unknown.
    """
    chosen = os.environ.get("WANDB_MODE", "auto") if mode == "auto" else mode
    if chosen == "auto":
        chosen = "online" if has_key() else "offline"
    if chosen not in ("online", "offline", "disabled"):
        raise ConfigError(f"logger.wandb_mode is {chosen!r}; expected auto, online, offline or disabled")
    return chosen


def has_key() -> bool:
    """True if W&B credentials are configured; looks at the environment and ~/.netrc, asks no server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    servers = {os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url, "https://api.wandb.ai"}
    with suppress(OSError, netrc.NetrcParseError):
        known = netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc")
        return any((known.authenticators(urlsplit(url).netloc) or ("", "", ""))[2] for url in servers)
    return False


def start(run_dir: Path, config: TrainConfig, wandb_id: Callable[[str], str]) -> Any:
    """Starts or resumes a W&B run; `auto` falls back to offline when the server cannot be reached.

    Args:
        run_dir: W&B writes to its `wandb`.
        config: Only `logger`, names and the values that W&B shows are read.
        wandb_id: online | offline -> the id to start with.

    Raises:
        ConfigError: W&B refuses, or cannot be reached and logger.wandb_mode is online.
    """
    import wandb

    mode = resolve_mode(config.logger.wandb_mode)
    try:
        return _init(run_dir, config, wandb_id(mode), mode)
    except wandb.Error as error:
        if config.logger.wandb_mode == "online" or mode == "offline":
            raise ConfigError(f"W&B did not start ({error}); or use logger.wandb_mode=offline") from error
        reason = str(error).splitlines()[0]
        log.warning("no W&B (%s): the run goes on offline, upload it later with `wandb sync`", reason)
        wandb.teardown()  # the failed attempt still owns its id
        return _init(run_dir, config, wandb_id("offline"), "offline")


def _init(run_dir: Path, config: TrainConfig, wandb_id: str, mode: Any) -> Any:
    import wandb

    return wandb.init(
        id=wandb_id,
        resume="allow" if mode == "online" else None,  # offline W&B would only warn
        reinit="create_new",  # two runs in one process never share
        mode=mode,
        project=config.logger.project,
        group=config.experiment_name,
        job_type="train",
        name=run_name(config),
        tags=list(config.logger.tags),
        config=as_dict(config),
        dir=run_dir,
        settings=wandb.Settings(
            silent=True,
            console="off",  # wrapped pipes have hung runs
            init_timeout=30,
            disable_code=True,
            disable_git=True,  # run.json has the git state
            host="",
            x_disable_meta=True,
            x_save_requirements=False,
            x_stats_sampling_interval=MACHINE_SECONDS,
        ),
    )
