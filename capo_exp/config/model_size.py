"""How many numbers a decoder of the Qwen2 and Llama kind has, from its configuration."""

from capo_exp.config.schema import ModelConfig


def count_parameters(model: ModelConfig) -> int:
    """Embedding, decoder layers, last norm, and the last layer unless it is the embedding."""
    embeddings = embedding(model) * (1 if model.tie_word_embeddings else 2)
    return embeddings + model.num_hidden_layers * layer_parameters(model) + model.hidden_size


def embedding(model: ModelConfig) -> int:
    """V x H, also of the last layer."""
    return model.vocab_size * model.hidden_size


def layer_parameters(model: ModelConfig) -> int:
    """Matrices, two norms, and in Qwen2 the biases of queries, keys and values."""
    biases = model.hidden_size + 2 * kv_width(model) if model.model_type == "qwen2" else 0
    return layer_matrices(model) + biases + 2 * model.hidden_size


def layer_matrices(model: ModelConfig) -> int:
    """Queries and output, keys and values, and three of the MLP."""
    width = model.hidden_size
    return width * (2 * width + 2 * kv_width(model) + 3 * model.intermediate_size)


def kv_width(model: ModelConfig) -> int:
    """Numbers of one token's keys, as many as of its values."""
    return model.hidden_size // model.num_attention_heads * model.num_key_value_heads
