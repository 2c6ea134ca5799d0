"""One forward of the backbone, in two parts: through its layers to the feature, and from there to the logits.

Between the two parts nothing runs. There tokens are judged and replaced, in code that reads from top to bottom, and
the output embedding is computed once, for what was kept.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_value_steer.backbone.parts import layer_stack, output_embedding
from hf_value_steer.backbone.points import Point, feature_point
from hf_value_steer.backbone.user_hooks import UserHooks
from hf_value_steer.errors import ScoringError


@dataclass
class Reached:
    """What a forward has left at the feature.

    Args:
        feature (`torch.FloatTensor` of shape `(rows, positions, width)`): what the output embedding consumes.
        hidden_states, attentions (`tuple` of `torch.FloatTensor`, *optional*): as in the model's output.
        logits (`torch.FloatTensor` of shape `(rows, positions, vocab)`, *optional*): where the
            forward was not left there.
        rest (*optional*): what [`Forwards.resume_from`] goes on from.
    """

    feature: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None
    logits: Tensor | None = None
    rest: Any = None


class Forwards(Protocol):
    """How the engine runs the backbone: [`run_to`] takes arguments of a forward, [`resume_from`] gives logits."""

    def run_to(self, point: Point, inputs: dict[str, Any]) -> Reached:
        """Run the forward with these arguments as far as `point`, which today is the feature."""

    def resume_from(self, reached: Reached) -> Tensor:
        """Logits `(rows, positions, vocab)` of `reached.feature`, which may hold others than were reached."""


def choose_forwards(model: PreTrainedModel) -> Forwards:
    """[`Split`], or [`Undivided`] where a forward cannot be left in the middle."""
    sharded = any(isinstance(weight, DTensor) for weight in output_embedding(model).parameters())
    return Undivided(model) if sharded or _compiled(model) else Split(model)


def _compiled(model: PreTrainedModel) -> bool:
    """Whether the user has compiled what is around the layers: a graph does not see that a module is stood in for."""
    outer = [model, layer_stack(model)]
    return any(hasattr(each.forward, "_torchdynamo_orig_callable") or each._compiled_call_impl for each in outer)


class Split:
    """Leaves the forward at the feature ([`run_to`]), and enters it there again ([`resume_from`]).

    It is left by handing no position on to the output embedding: so the model itself ends its forward, and hidden
    states and attentions are in its output. It is entered by a second forward in which the layers are stood in for by
    what they have returned in the first: whatever a family does behind its output embedding is done. A hook of the
    user runs in one of the two, that which it is about.

    Args:
        model: a shadow, which belongs to one call.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.point, self.stack = model, feature_point(model), layer_stack(model)
        self.point.open()
        head = self.point.module
        self.after = UserHooks([(model, "_forward_hooks"), (head, "_forward_hooks")])
        before = [(each, "_forward_pre_hooks") for each in (model, self.stack, head)]
        self.before = UserHooks([*before, (self.stack, "_forward_hooks")])

    def run_to(self, point: Point, inputs: dict[str, Any]) -> Reached:
        features: list[Tensor] = []
        stand_in = _StandIn(self.stack.forward)

        def leave(feature: Tensor) -> Tensor:
            features.append(feature)
            return feature[:, :0]

        with point.shown_to(leave), stand_in.on(self.stack), self.after.muted():
            outputs = self.model(**{**inputs, "return_dict": True})
        return _reached(features, outputs, None, (inputs, stand_in))

    def resume_from(self, reached: Reached) -> Tensor:
        inputs, stand_in = reached.rest
        with self.point.shown_to(lambda _: reached.feature), stand_in.on(self.stack), self.before.muted():
            logits: Tensor = self.model(**{**inputs, "return_dict": True}).logits
        return logits


class Undivided:
    """Runs the whole forward: [`run_to`] computes logits of every position, and [`resume_from`] returns them."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        feature_point(model).open()

    def run_to(self, point: Point, inputs: dict[str, Any]) -> Reached:
        features: list[Tensor] = []
        with point.shown_to(features.append):
            outputs = self.model(**{**inputs, "return_dict": True})
        return _reached(features, outputs, outputs.logits, None)

    def resume_from(self, reached: Reached) -> Tensor:
        assert reached.logits is not None  # as it was run as a whole
        return reached.logits


def _reached(features: list[Tensor], outputs: ModelOutput, logits: Tensor | None, rest: Any) -> Reached:
    return Reached(passed(features), outputs.get("hidden_states"), outputs.get("attentions"), logits, rest)


def passed(features: list[Tensor]) -> Tensor:
    """The last of the features that passed in a forward, or with chunks of a prompt in several."""
    if not features:
        raise ScoringError(
            "The output embedding was called where it cannot be watched: if `model.forward` was compiled, compile "
            "it anew, and steer with it before anything else runs."
        )
    return features[-1]


class _StandIn:
    """Returns what a module returned the first time, without running it again."""

    def __init__(self, forward: Callable[..., Any]):
        self.forward, self.output = forward, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.output is None:
            self.output = self.forward(*args, **kwargs)
        return self.output

    @contextmanager
    def on(self, module: nn.Module) -> Iterator[None]:
        """Stand in for `module`, of a shadow, inside the `with` block."""
        own, before = vars(module), vars(module).get("forward")
        own["forward"] = self
        try:
            yield
        finally:
            if before is None:
                del own["forward"]
            else:
                own["forward"] = before
