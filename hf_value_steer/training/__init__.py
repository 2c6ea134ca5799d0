"""From prompts to a value head: collect and label generations, train on them.

The steps are functions in modules of their names, which they would hide here: `collect.collect`, `label.label`,
`train.train` and `calibrate.calibrate`.
"""

from hf_value_steer.arguments.collect import CollectArguments, LabelArguments
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.training.layers import LayerProbe, LayerSuggestion, suggest_feature_layers
from hf_value_steer.training.shards import Collection
from hf_value_steer.training.vectors import vectors_from_collection, vectors_from_pairs, vectors_from_value_head


__all__ = [
    "CollectArguments",
    "Collection",
    "LabelArguments",
    "LayerProbe",
    "LayerSuggestion",
    "Prompt",
    "suggest_feature_layers",
    "vectors_from_collection",
    "vectors_from_pairs",
    "vectors_from_value_head",
]
