"""A shadow of the backbone, and what forwards have to know of its modules."""

from collections.abc import Iterable

from transformers import PreTrainedModel

from hf_value_steer.backbone.features import FINAL, Layer, points_of
from hf_value_steer.backbone.shadow import shadow
from hf_value_steer.generation.adapters import AdaptersOfRows, unmerge_what_is_off
from hf_value_steer.generation.forwards import Points, choose_forwards
from hf_value_steer.generation.rope import LongestRow


class PreparedModel:
    """A shadow of the backbone, ready to be run by an engine.

    `generate` makes one for each call, and a logits processor one for each text: modules are searched once, and not at
    every step.

    Args:
        model: the backbone, which stays as it is.

    Attributes:
        model: a shadow of it, in evaluation mode: under dropout a token and its alternatives would be read by
            different models. Hooks, attention, classes and modes that are set on it are seen by no other call.
        forwards: how it is run where nothing is compiled.
        longest_row, adapters: what depends on which rows a forward reads.
        known (`dict`): what [`points`] has answered.
    """

    def __init__(self, model: PreTrainedModel):
        unmerge_what_is_off(model)
        self.model: PreTrainedModel = shadow(model).eval()
        self.forwards = choose_forwards(self.model)
        self.longest_row, self.adapters = LongestRow(self.model), AdaptersOfRows(self.model)
        self.known: dict[tuple[Layer, ...], Points] = {}

    def points(self, layers: Iterable[Layer] = ()) -> Points:
        """Where the states of these layers pass, and what the output embedding consumes; open to be watched."""
        wanted = tuple(dict.fromkeys([*layers, FINAL]))
        if wanted not in self.known:
            self.known[wanted] = points_of(self.model, wanted)
            for point in self.known[wanted].values():
                point.open()
        return self.known[wanted]
