"""Steered decoding for `transformers`: the loop of `generate`, and the logits processors."""
