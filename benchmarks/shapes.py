"""Shapes of real models, for random weights, and a tiny one to try a benchmark with."""

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig


_SEVEN = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
MODELS: dict[str, PreTrainedConfig] = {
    "Mistral-7B": MistralConfig(**_SEVEN, num_hidden_layers=32, vocab_size=32000, sliding_window=None,
                                max_position_embeddings=32768),
    "Llama-3.1-8B": LlamaConfig(**_SEVEN, num_hidden_layers=32, vocab_size=128256, max_position_embeddings=32768),
    "Llama-3.2-1B": LlamaConfig(hidden_size=2048, intermediate_size=8192, num_attention_heads=32,
                                num_key_value_heads=8, num_hidden_layers=16, vocab_size=128256,
                                tie_word_embeddings=True, max_position_embeddings=32768),
    "tiny": LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1,
                        num_hidden_layers=2, vocab_size=500, max_position_embeddings=32768),
}  # fmt: skip
