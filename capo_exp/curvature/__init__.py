"""The last-layer model that predicts what a token's update does, and instruments that measure what it did.

These three functions are the contract for tests and programs from outside.
"""

from capo_exp.curvature.model import init_adam_state, token_shifts, update_adam_state

__all__ = ["init_adam_state", "token_shifts", "update_adam_state"]
