"""What a user is told when a run fails on its way, and what of it is kept."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from capo_exp.config.errors import RunFailed, same_command
from capo_exp.config.places import typed
from capo_exp.grading import GradingFailed
from capo_exp.rollout import EngineFailed
from capo_exp.training.optimizer_step import TrainingDiverged
from capo_exp.training.session import Session


@contextmanager
def explained(session: Session) -> Iterator[None]:
    """Lets a failure say what to do next.

    An engine or a verifier that fails does so between two of the learner's updates: what it has learned is
    saved.
    """
    try:
        yield
    except (EngineFailed, GradingFailed) as error:
        if session.step > session.saved:
            session.save()
        kept = f"step {session.step} is saved" if session.step else "nothing was trained yet"
        again = same_command(session.config.overwrite)
        raise type(error)(f"{error}\n{kept}; {again} goes on from there") from error
    except TrainingDiverged as error:
        raise TrainingDiverged(f"{error}; {_advise(session)}") from error
    except torch.OutOfMemoryError as error:
        raise RunFailed(
            f"{str(error).splitlines()[0]} Lower {session.config.model.cut_key}, "
            "model.logits_chunk_tokens or what sampling takes: rollout.engine.max_sequences_per_call (hf) or "
            "gpu_memory_utilization (vllm)"
        ) from error


def _advise(session: Session) -> str:
    """Says what to do about a step that was not finite.

    Weights whose very next step is not finite are the trouble already, so the checkpoint to go back to is one
    that was followed by a finite step. The same command goes on from the newest, and samples the same again.
    """
    regime, optimizer = session.config.regime, session.config.optimizer
    good = session.checkpointer.latest(before=session.step)
    back = (
        f"go on from before it with {typed('model.path', good)}"
        if good
        else "begin again from the base model"
    )
    return (
        f"the same command would end here again: lower regime.learning_rate={regime.learning_rate:g} or "
        f"optimizer.max_grad_norm={optimizer.max_grad_norm:g}, and {back}"
    )
