"""Which rows of a collection are for what: by prompt, so that no prompt is in two splits."""

import torch

from hf_value_steer.arguments.train import SplitArguments
from hf_value_steer.training.prompts import share
from hf_value_steer.training.shards import Collection


def split_rows(collection: Collection, arguments: SplitArguments) -> dict[str, list[int]]:
    """Rows of the splits `"held_out"`, `"calibration"`, `"validation"` and `"train"`; a prompt is in one of them.

    Where a prompt belongs follows from its text. Generations with forced words are in `"train"` only.
    """
    shares = torch.tensor([share(prompt.text) for prompt in collection.prompts], dtype=torch.float64)
    shares = ((shares - arguments.rotation) % 1.0)[collection.rows.prompt]
    chosen, lower = {}, 0.0
    for name in ("held_out", "calibration", "validation"):
        upper = lower + getattr(arguments, name)
        chosen[name] = (shares >= lower) & (shares < upper) & collection.rows.natural
        lower = upper
    chosen["train"] = shares >= lower
    return {name: mask.nonzero().flatten().tolist() for name, mask in chosen.items()}
