"""`guidance train`: a guidance module from a labelled collection."""

import json

from hf_value_steer.arguments.guidance import GuidanceTrainArguments
from hf_value_steer.training.guidance.train import train_guidance


def train(arguments: GuidanceTrainArguments) -> None:
    """Train, and say how each stage ended."""
    module = train_guidance(arguments)
    print(f"{arguments.output}: {json.dumps(module.config.training['stages'])}")
