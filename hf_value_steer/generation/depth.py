"""Forwards that are judged at a decoder layer: what is above it sees tokens that are kept, and nothing else.

A forward goes through all layers and is judged on its way ([`AtDepth.run_through`]). Or it ends at the layer
([`AtDepth.run_below`]), and another one begins behind it ([`AtDepth.run_above`]): the layers that have run, or are not
to run, are stood in for by what that layer has handed on.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_value_steer.backbone.features import FINAL, Features, deepest
from hf_value_steer.backbone.parts import decoder_layers
from hf_value_steer.backbone.points import layer_points, standing_in
from hf_value_steer.errors import ScoringError
from hf_value_steer.generation.call import Call
from hf_value_steer.generation.families import AT_DEPTH
from hf_value_steer.generation.forwards import (
    Outer,
    Points,
    Reached,
    Split,
    any_hooked,
    is_compiled,
    leave,
    reading,
    require_all,
)
from hf_value_steer.generation.method import Method, all_nest
from hf_value_steer.generation.prepared import PreparedModel


def can_judge_at_depth(prepared: PreparedModel) -> bool:
    """Whether a forward of the model may be left and entered at a layer.

    Its type was verified, it is its own, and the user has neither hooks on its layers, which would run on stand-ins,
    too, nor compiled them, since a graph would take in what is done between them.
    """
    config = prepared.model.config.get_text_config(decoder=True)
    if config.model_type not in AT_DEPTH or not isinstance(prepared.forwards, Split):
        return False
    layers = decoder_layers(prepared.model)
    return not any_hooked(layers) and not any(map(is_compiled, layers))


def judged_at(call: Call, methods: Sequence[Method]) -> int | None:
    """The layer at which the tokens of a call are judged; `None` if it is behind the last one."""
    judge = next((method for method in methods if method.judges), None)
    layer = FINAL if judge is None or not judge.reads else deepest(judge.reads)
    if layer == FINAL or not can_judge_at_depth(call.prepared):
        return None
    if call.config.output_hidden_states or call.config.output_attentions:  # of a forward that is in one piece
        return None
    return layer if all_nest(methods) else None


class AtDepth:
    """The forwards of a call whose judge reads no layer above `layer`.

    Args:
        model: a shadow, which belongs to one call.
        points: where the states that are read pass, those of `layer` among them.
        layer (`int`): at which tokens are judged.
    """

    def __init__(self, model: PreTrainedModel, points: Points, layer: int):
        self.model, self.points, layers = model, points, layer_points(model)
        for point in layers:
            point.open()
        self.lower, self.last, self.upper = layers[: layer + 1], layers[layer], layers[layer + 1 :]
        self.point, self.final = points[layer], points[FINAL]
        self.below: Points = {each: point for each, point in points.items() if each != FINAL and each <= layer}

    def run_through(self, inputs: Mapping[str, Any], judge: Callable[[Reached], None]) -> Reached:
        """Run the whole forward. `judge` is shown what the layer has left, and may put other states into some rows.

        Inside `judge` other forwards of the model may run.
        """
        outer, judged = Outer(), Reached(Features())

        def stop(state: Tensor) -> Tensor:
            judged.features, judged.handed_on = features.each(Tensor.clone), state.clone()
            with outer.paused():
                judge(judged)
            return judged.handed_on

        with reading(self.points, outer) as features, self.point.shown_to(outer.unless_paused(stop)):
            outputs = self.model(**{**inputs, "return_dict": True})
        if judged.handed_on is None:
            raise ScoringError("The layer at which tokens are judged was not called: nothing was checked.")
        return Reached(require_all(Features({**features, **judged.features})), logits=outputs.logits)

    def run_below(self, inputs: Mapping[str, Any]) -> Reached:
        """Run the layers up to the one at which tokens are judged, and nothing above it."""
        end = HandedOn()
        with reading(self.below) as features, self.final.shown_to(leave):
            with standing_in([self.last], end.record), standing_in(self.upper, end.repeat):
                self.model(**{**inputs, "return_dict": True})
        return Reached(features, handed_on=end.state, rest=end)

    def run_above(self, inputs: Mapping[str, Any], below: Reached) -> Reached:
        """Run the layers above on what `below` holds now, as far as the logits.

        Args:
            inputs: of the whole forward.
            below: of the tokens in `inputs`.
        """
        begin = below.rest.with_state(below.handed_on)
        with reading(self.points) as features, standing_in(self.lower, begin.repeat):
            outputs = self.model(**{**inputs, "return_dict": True})
        return Reached(require_all(Features({**features, **below.features})), logits=outputs.logits)


class HandedOn:
    """What a layer hands on: a state, or a tuple that begins with one."""

    def __init__(self, output: Any = None):
        self.output = output

    def record(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        self.output = forward(*args, **kwargs)
        return self.output

    def repeat(self, *_args: Any, **_kwargs: Any) -> Any:
        """Hand on the same."""
        return self.output

    @property
    def state(self) -> Tensor:
        state: Tensor = self.output[0] if isinstance(self.output, tuple) else self.output
        return state

    def with_state(self, state: Tensor) -> "HandedOn":
        """The same with another state in it."""
        return HandedOn((state, *self.output[1:]) if isinstance(self.output, tuple) else state)
