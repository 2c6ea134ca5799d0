"""The forward passes of a steered generation over one live cache: the prompt, the next token, what stands beside it.

A step reads from top to bottom, see [`hf_value_steer.generation.steps`]: the engine forwards tokens (`read`,
`look_ahead`), the step judges what they have left, and the engine computes logits of what is kept (`state`).
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from hf_value_steer.backbone.features import Layer
from hf_value_steer.generation.alternatives import Alternatives
from hf_value_steer.generation.cache import LiveCache
from hf_value_steer.generation.compiled import compiled_forwards
from hf_value_steer.generation.depth import AtDepth
from hf_value_steer.generation.depth_graph import DepthGraph
from hf_value_steer.generation.forwards import Reached, reading, require_all
from hf_value_steer.generation.kernels import (
    Expanded,
    Kernel,
    LookAhead,
    Padding,
    Whole,
    compilable_kernel,
    without_last,
)
from hf_value_steer.generation.lookahead import LookaheadCache
from hf_value_steer.generation.prepared import PreparedModel
from hf_value_steer.generation.state import Choose, Chosen, Reading, State
from hf_value_steer.generation.validation import refuse_cache, require_kept
from hf_value_steer.hosts.transformers import cache_name, cache_of, compile_config, next_kwargs, prefill


# What methods do around a forward: from what it reads to a context in which it runs.
Around = Callable[[Reading], AbstractContextManager[Any]]


class Engine:
    """One backbone, one live cache, and the mask and positions of the token that is forwarded next.

    The loop and its steps give it token ids, and get features and logits: [`Reached`], [`State`], or a branch. It uses
    the preparation of `GenerationMixin` itself: an ordinary step is the step of plain `generate`.

    Args:
        prepared: a shadow of the backbone, which belongs to this call.
        model_kwargs: the forward's keyword arguments as `generate` keeps them, the cache among them.
        kernel: how candidates are forwarded.
        around (*optional*): what the methods of the call do around each forward.
        compilable (`bool`): whether `kernel` may give way to one that can be compiled, where the step is.
        back (`int`): how many tokens may be taken back, beside the last one.
        reads: the layers whose states are wanted, beside what the output embedding consumes.
        depth (`int`, *optional*): the one of them at which tokens are judged; by default behind the last layer.
    """

    def __init__(
        self,
        prepared: PreparedModel,
        model_kwargs: dict[str, Any],
        kernel: Kernel,
        around: Around | None = None,
        compilable: bool = True,
        back: int = 0,
        reads: Iterable[Layer] = (),
        depth: int | None = None,
    ):
        self.model, self.model_kwargs, self.kernel, self.compilable = prepared.model, model_kwargs, kernel, compilable
        self.around: Around = around or (lambda _: nullcontext())
        self.live = LiveCache(model_kwargs[cache_name(model_kwargs)], self.model.config, back)
        self.longest_row, self.adapters = prepared.longest_row, prepared.adapters
        self.points = prepared.points(reads)
        self.at_depth = None if depth is None else AtDepth(self.model, self.points, depth)
        self.graph: DepthGraph | None = None
        self.padding = Padding()
        # Ordinary steps and look-ahead forwards may be compiled; what has another shape each time runs as it is.
        self.step_forwards = self.look_forwards = prepared.forwards
        self.uncompiled = prepared.forwards, self.kernel, self.at_depth

    # The prompt.

    def prefill(self, input_ids: Tensor, config: GenerationConfig, apart: bool = False) -> State:
        """Forward the prompt `(batch, length)`; the state is that of its last token.

        Args:
            apart (`bool`): whether the last token is read by a forward of its own.
        """
        mask = self.model_kwargs.get("attention_mask")
        kept, given = (input_ids[:, :-1], without_last(self.model_kwargs)) if apart else (input_ids, {})
        prompt = Reading(self.live.cache, prompt=kept.shape[1], mask=mask)
        with self.around(prompt), reading(self.points) as features:
            outputs = prefill(self.model, kept, config, self.model_kwargs | given)
        if apart:
            self.model_kwargs[cache_name(self.model_kwargs)] = cache_of(outputs)
        else:
            self.model_kwargs = next_kwargs(self.model, outputs, self.model_kwargs)
        self._start(config)
        if apart:
            state = self.compute_state(self.read(input_ids), input_ids.device)
            self.commit()
            return state
        self._compile(config)
        logits = outputs.logits[:, -1:].flatten(1).to(copy=True, dtype=torch.float32, device=input_ids.device)
        last = require_all(features).each(_last)
        return State(logits, last, outputs.get("hidden_states"), outputs.get("attentions"))

    def _start(self, config: GenerationConfig) -> None:
        """Begin with the cache that the forward of the prompt has left; it may be another one than it was given."""
        left = cache_of(self.model_kwargs)
        refuse_cache(left, config.max_length)
        if left is not self.live.cache:
            self.live = LiveCache(left, self.model.config, self.live.back)
        self.live.start(config.max_length)

    def _compile(self, config: GenerationConfig) -> None:
        """Compile where plain `generate` would; a graph returns no attentions."""
        wanted = None if config.output_attentions else compile_config(self.model, config, self.model_kwargs)
        if wanted is None:
            return
        parts, self.at_depth = self.at_depth, None
        self.step_forwards, look_forwards = compiled_forwards(self.model, wanted)
        self.kernel = compilable_kernel(self.kernel, self.model, self.live) if self.compilable else self.kernel
        if isinstance(self.kernel, Whole):
            self.look_forwards = look_forwards
            self.graph = None if parts is None else DepthGraph(parts, wanted)

    # The next token.

    def read(self, input_ids: Tensor, judge: Callable[[Reached], None] | None = None) -> Reached:
        """Forward the last token of each row, as plain `generate` does; the live cache takes it in.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): the text, the last token included.
            judge (*optional*): is shown what the tokens have left where they are judged, and may [`put`] others there.
        """
        self.live.remember()
        inputs = self._step_inputs(input_ids)
        with self.around(Reading(self.live.cache, begins=True)):
            if self.at_depth is not None and judge is not None:
                return self.at_depth.run_through(inputs, partial(self._taken_in, judge))
            reached = self.step_forwards.run_to(self.points, inputs)
        self._taken_in(judge, reached)
        return reached

    def _step_inputs(self, input_ids: Tensor) -> dict[str, Any]:
        """Arguments of the forward of the last token of each row."""
        inputs = self.model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **self.model_kwargs)
        require_kept(self.model, inputs, self.live.cache, self.live.length)
        return inputs  # type: ignore[no-any-return]

    def _taken_in(self, judge: Callable[[Reached], None] | None, reached: Reached) -> None:
        self.live.advance()
        if judge is not None:
            judge(reached)

    def go_on(self, input_ids: Tensor, candidates: Tensor, most: int, choose: Choose) -> tuple[Reached, Chosen]:
        """Forward K candidates of all rows, instead of [`read`], and let every row go on with one of them.

        Args:
            input_ids, candidates, most: as in [`look_ahead`].
            choose: names one of each row.
        """
        if self.graph is not None:
            return self._go_on_compiled(self.graph, input_ids, candidates, most, choose)
        ahead = self.look_ahead(input_ids, candidates, most=most)
        chosen = choose(ahead.features)
        reached = ahead.chosen(chosen.slots)
        ahead.cache.append_states(chosen.slots)
        if self.at_depth is not None:
            text = torch.cat([input_ids, chosen.tokens[:, None]], dim=-1)
            with self.around(Reading(self.live.cache)):
                reached = self.at_depth.run_above(self._step_inputs(text), reached)
        ahead.cache.append_slots(chosen.slots)  # now: masks follow the lower layers, which hold the text before it
        return reached, chosen

    def _go_on_compiled(
        self, graph: DepthGraph, input_ids: Tensor, candidates: Tensor, most: int, choose: Choose
    ) -> tuple[Reached, Chosen]:
        """The same with shapes that never change."""
        self.live.remember()
        candidates = nn.functional.pad(candidates, (0, most - candidates.shape[1]))
        look = self._new_look_ahead(input_ids, candidates, None)
        below = self.kernel.inputs(look)
        above = self._step_inputs(torch.cat([input_ids, candidates[:, :1]], dim=-1))
        require_kept(self.model, below, look.cache, self.live.length)
        with self.around(Reading(look.cache, begins=True)):
            reached, chosen = graph(choose, below, above)
        look.cache.append_slots(chosen.slots)
        return reached, chosen

    def compute_state(self, reached: Reached, device: torch.device) -> State:
        """What a step leaves behind, once it is decided what is kept: logits are computed here, and go to `device`."""
        logits = reached.compute_logits()[:, -1:].flatten(1).to(copy=True, dtype=torch.float32, device=device)
        return State(logits, reached.features.each(_last), reached.hidden_states, reached.attentions)

    def commit(self) -> None:
        """The token that was forwarded last stays: move mask, positions and windows on by one."""
        self.live.settle()
        self.model_kwargs = next_kwargs(self.model, ModelOutput(), self.model_kwargs)

    def finish(self, dropped: int = 0) -> None:
        """Instead of the last `commit`: leave the cache as plain `generate` does, without the last token.

        Args:
            dropped (`int`): how many tokens at the end are no part of the text any more.
        """
        self.live.remove_last(1 + dropped)

    # Tokens beside the text.

    def look_ahead(
        self, input_ids: Tensor, candidates: Tensor, rows: Tensor | None = None, most: int | None = None
    ) -> Alternatives:
        """Forward K candidates of some rows at one position, without a change of the live cache.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): the text so far, of all rows.
            candidates (`torch.LongTensor` of shape `(rows, K)`): token ids.
            rows (`torch.LongTensor`, *optional*): which rows these are, after [`read`]: the live cache holds their
                natural sample, which the candidates do not see. Without it: all rows, instead of [`read`].
            most (`int`, *optional*): the most candidates that a look-ahead of this generation has. A compiled one
                always forwards this number of them, in all rows.
        """
        if rows is None:
            self.live.remember()
        if isinstance(self.kernel, Whole):
            return self._look_at_all(input_ids, candidates, rows, most)
        look = self._new_look_ahead(input_ids, candidates, rows)
        copies = candidates.shape[1] if isinstance(self.kernel, Expanded) else 1
        # Some position embeddings depend on the longest row of a forward, also on one that is not looked at.
        everybody = None if rows is None else self.model_kwargs.get("position_ids")
        with self.adapters.reading(rows, copies), self.longest_row.reaching(everybody):
            reached = self._forward(look, Reading(look.cache, rows, copies, begins=rows is None))
        features = reached.features.each(lambda states: states.reshape(*candidates.shape, -1))
        if reached.handed_on is not None:
            reached.handed_on = reached.handed_on.reshape(*candidates.shape, -1)
        return Alternatives(reached, look.cache, features, self.kernel)

    def _look_at_all(
        self, input_ids: Tensor, candidates: Tensor, rows: Tensor | None, most: int | None
    ) -> Alternatives:
        """The same with shapes that never change, for a compiled forward: all rows, `most` candidates, all logits."""
        looked_at = torch.arange(len(input_ids), device=input_ids.device) if rows is None else rows
        count = candidates.shape[1]
        padded = candidates.new_zeros(len(input_ids), most or count)
        padded[looked_at, :count] = candidates
        look = self._new_look_ahead(input_ids, padded, rows)
        reached = self._forward(look, Reading(look.cache, begins=rows is None))
        look.cache.keep_rows(looked_at)
        reached.keep(looked_at, count)
        return Alternatives(reached, look.cache, reached.features, self.kernel)

    def _new_look_ahead(self, input_ids: Tensor, candidates: Tensor, rows: Tensor | None) -> LookAhead:
        cache = LookaheadCache(self.live, candidates.shape[1], self.kernel.layer, rows)
        cache.partial = self.at_depth is not None
        padding = partial(self.padding, self.model_kwargs.get("attention_mask"), len(input_ids))
        return LookAhead(self.model, self.model_kwargs, cache, input_ids, candidates, rows, padding)

    def _forward(self, look: LookAhead, reading: Reading) -> Reached:
        inputs = self.kernel.inputs(look)
        require_kept(self.model, inputs, look.cache, self.live.length)
        with self.around(reading), self.kernel.attention(look):
            if self.at_depth is not None:
                return self.at_depth.run_below(inputs)
            return self.look_forwards.run_to(self.points, inputs)

    def put(self, reached: Reached, rows: Tensor, keep: Tensor, other: Reached) -> None:
        """Let some rows go on with what another forward has left: it overwrites their part of `reached`.

        Args:
            reached: of the whole batch.
            rows (`torch.LongTensor` of shape `(n,)`): rows that were looked at.
            keep (`torch.BoolTensor` of shape `(n,)`): which of them go on with the other.
            other: of these n rows, at one position.
        """
        with self.adapters.reading(rows, 1):  # the output embedding may have adapters, too
            reached.put(rows, keep, other)


def _last(states: Tensor) -> Tensor:
    return states[:, -1]
