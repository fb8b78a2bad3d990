"""capo_exp: a research harness for reinforcement learning of language models with curvature-aware token
selection."""
