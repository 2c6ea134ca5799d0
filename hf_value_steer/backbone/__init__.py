"""The frozen model: its parts, its points, and what stands beside it for one call."""
