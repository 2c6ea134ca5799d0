"""The loop of steered generation: draw, let the methods act, commit, stop. It knows methods by their protocol only."""

import itertools
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from hf_value_steer.generation.cache import make_room
from hf_value_steer.generation.call import Call
from hf_value_steer.generation.candidates import natural_sample
from hf_value_steer.generation.costs import break_even
from hf_value_steer.generation.decode_tap import refuse_watching
from hf_value_steer.generation.depth import judged_at
from hf_value_steer.generation.engine import Engine
from hf_value_steer.generation.going_back import refuse_going_back
from hf_value_steer.generation.history import History
from hf_value_steer.generation.kernels import choose_kernel
from hf_value_steer.generation.method import Method, Moment, around, recorded
from hf_value_steer.generation.output import Record, ValueSteerDecoderOnlyOutput
from hf_value_steer.generation.rollback import Rollback
from hf_value_steer.generation.scores import Scores
from hf_value_steer.generation.state import Draw, Outcome, State
from hf_value_steer.generation.steps import Beforehand, Lazy, choose_step
from hf_value_steer.generation.streaming import LaggingStream, Streaming
from hf_value_steer.generation.trail import Scene
from hf_value_steer.hosts.transformers import CACHE, cache_name, pad_token, rows_can_end


class Loop:
    """One steered call: [`run`] returns the text, or the whole output. Made and run by `value_steer_generate`.

    Args:
        call: what is generated from what.
        methods: bound to the call, in the order in which they act.
        processors, criteria: of the call.
        streamer: is given each token once it cannot be taken back.
    """

    def __init__(
        self,
        call: Call,
        methods: Sequence[Method],
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        streamer: Streaming,
    ):
        self.call, self.config, self.methods = call, call.config, methods
        self.scores = Scores(processors)
        self.criteria, self.pads = criteria, rows_can_end(criteria)
        self.judge = judge = next((method for method in methods if method.judges), None)
        self.reporter = judge or next((method for method in methods if method.values_texts), None)
        self.back = 0 if judge is None else judge.back
        if self.back:
            refuse_going_back(call, methods, processors)
        if judge is not None:
            refuse_watching(processors)
        depth = judged_at(call, methods)
        self.engine = self._engine(depth)
        auto = judge is not None and judge.reads and judge.evaluation == "auto"
        changes_at = break_even(call, methods, self.engine.kernel, depth) if auto else math.inf
        self.step = choose_step(self.engine, judge, self.reporter, changes_at)
        self.record = Record(call.config)
        self.history = History(methods, call.stops, self.back)
        self.stream = LaggingStream(streamer, self.back)
        self.rollback = self._rollback(judge) if judge is not None and self.back else None

    def _rollback(self, judge: Method) -> Rollback:
        pad = pad_token(self.config) if self.pads else None
        step = Lazy if judge.reads else Beforehand
        scene = Scene(self.engine, self.record, self.history, judge, self.scores, self.criteria, step, pad)
        return Rollback(scene, self.back, self.call.rows)

    def _engine(self, depth: int | None) -> Engine:
        model_kwargs, model = self.call.model_kwargs, self.call.model
        lookahead = next((each.lookahead for each in self.methods[::-1] if each.lookahead != "auto"), "auto")
        make_room(model_kwargs[cache_name(model_kwargs)], model.config)
        mask = model_kwargs.get("attention_mask")
        kernel = choose_kernel(lookahead, model, mask, bool(self.config.output_attentions))
        compilable = lookahead in ("auto", "masked")
        reads = [layer for method in self.methods for layer in method.reads]
        how = (partial(around, self.methods), compilable, self.back, reads, depth)
        return Engine(self.call.prepared, model_kwargs, kernel, *how)

    def run(self) -> Tensor | ValueSteerDecoderOnlyOutput:
        """Generate."""
        input_ids = self.call.input_ids
        self.unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        apart = any(method.last_token_apart for method in self.methods)
        state = self.engine.prefill(input_ids, self.config, apart)
        moment = Moment(0, state.features, self.unfinished, self.unfinished)
        # A judge of text knows nothing of prompts.
        prompt_values = moment.values_of(self.reporter) if self.reporter is not None and self.reporter.reads else None
        self._tell(moment)
        for step in itertools.count():
            draw = self._draw(step, input_ids, state)
            state, outcome = self.step(draw)
            input_ids = torch.cat([input_ids, outcome.tokens[:, None]], dim=-1)
            self._commit(draw, outcome, state, input_ids)
            going, dead = self._goes_on(outcome)
            over = 0
            if dead and self.rollback is not None:
                input_ids, state, over = self._go_back(self.rollback, input_ids, state)
                going = bool(self.unfinished.any())
            else:
                self.stream.put(outcome.tokens)
            if not going:
                break
            self.engine.commit()
        self.engine.finish(over)
        self.stream.end()
        return self._output(input_ids, prompt_values)

    def _go_back(self, rollback: Rollback, input_ids: Tensor, state: State) -> tuple[Tensor, State, int]:
        """Look for another way in rows that have come to a dead end.

        Returns:
            The text, the state after it, and how many tokens at the end of the text were left out, since every row has
            ended before them.
        """
        for row in rollback.dead_ends():
            found = rollback(row, input_ids, state)
            if found is not None:
                changed, input_ids, state = found
                self.stream.rewrite(row, input_ids[row, -changed:-1])
        self.unfinished = self.history.pasts[-1].moment.unfinished
        over = 0 if bool(self.unfinished.any()) else self.history.over()
        if over:
            self.record.drop(over)
            self.stream.drop(over - 1)
            return input_ids[:, :-over], state, over
        self.stream.put(input_ids[:, -1])
        return input_ids, state, 0

    def _draw(self, step: int, input_ids: Tensor, state: State) -> Draw:
        """The natural samples, or what methods prescribe in their place."""
        live = self.unfinished if self.pads else torch.ones_like(self.unfinished)
        permitted, scores = self.scores(input_ids, state.logits)
        self.record.add(
            scores=scores, logits=state.logits, attentions=state.attentions, hidden_states=state.hidden_states
        )
        tokens, possible = natural_sample(scores, self.config.do_sample)
        nowhere = torch.zeros_like(live)
        draw = Draw(step, input_ids, state.logits, permitted, scores, tokens, live, nowhere, live & ~possible)
        for method in self.methods:
            method.prescribe(draw)
        if self.pads:
            draw.tokens = torch.where(live, draw.tokens, pad_token(self.config).to(tokens.device))
        return draw

    def _commit(self, draw: Draw, outcome: Outcome, state: State, input_ids: Tensor) -> None:
        """The tokens of a step are part of the text: say so to criteria, methods and record."""
        if outcome.room is not None:
            self.call.stops.mark(outcome.room.ended, draw.step, outcome.natural)
        self.unfinished = self.unfinished & ~self.criteria(input_ids, self.record.scores)
        moment = Moment(draw.step + 1, state.features, draw.live, self.unfinished, draw, outcome)
        if self.reporter is not None:
            moment.know(self.reporter, outcome.values)
        self._tell(moment)
        if self.record.wanted:
            self.record.add(**recorded(self.methods, moment))

    def _goes_on(self, outcome: Outcome) -> tuple[bool, bool]:
        """Whether a row goes on, and whether one has come to a dead end.

        Here the host waits for the device, once in each step.

        Raises:
            ScoringError, ValueError: if a token of this step could not be checked, or there was none.
        """
        room = outcome.room
        flags = [self.unfinished.any(), torch.zeros_like(self.unfinished[0]) if room is None else room.dead_ends.any()]
        flags += [flag for flag, _ in outcome.refusals]
        going, at_dead_end, *refused = torch.stack([flag.to(self.unfinished.device) for flag in flags]).tolist()
        for wrong, (_, refuse) in zip(refused, outcome.refusals, strict=True):
            if wrong:
                refuse()
        return bool(going), bool(at_dead_end)

    def _tell(self, moment: Moment) -> None:
        for method in self.methods:
            method.observe(moment)
        self.history.keep(moment)

    def _output(self, input_ids: Tensor, prompt_values: Tensor | None) -> Tensor | ValueSteerDecoderOnlyOutput:
        if not self.record.wanted:
            return input_ids
        stops = self.call.stops
        totals = {name: total for method in self.methods for name, total in method.totals().items()}
        if self.rollback is not None:
            totals |= self.rollback.totals()
        return ValueSteerDecoderOnlyOutput(
            sequences=input_ids,
            prompt_values=prompt_values,
            abstained=stops.step >= 0,
            abstention_step=stops.step,
            abstention_value=stops.value,
            **{CACHE: self.engine.live.cache},
            **self.record.fields(),
            **totals,
        )
