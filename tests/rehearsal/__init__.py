"""The engine on tensors that say that they are on a GPU: `python -m tests.rehearsal` runs all of it."""
