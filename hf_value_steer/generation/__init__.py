"""The engines: the decoding loop for `transformers` and the logits processors."""
