"""`value_steer_generate`: the decoding loop of steered generation, for `model.generate(custom_generate=...)`."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import BaseStreamer

from hf_value_steer.activation.apply import Steering, injected
from hf_value_steer.activation.steering_vectors import vectors_of
from hf_value_steer.backbone.shadow import shadow
from hf_value_steer.configuration.abstain import AbstentionConfig
from hf_value_steer.configuration.activate import ActivationConfig
from hf_value_steer.configuration.filter import ValueFilterConfig
from hf_value_steer.configuration.guide import GuidanceConfig
from hf_value_steer.configuration.methods import MethodConfig, SteeringConfig
from hf_value_steer.configuration.parse import ValueSteer, parse_value_steer
from hf_value_steer.generation.abstention import Abstention
from hf_value_steer.generation.adapters import unmerge_what_is_off
from hf_value_steer.generation.attention import tidied
from hf_value_steer.generation.cache import make_room
from hf_value_steer.generation.candidates import natural_sample
from hf_value_steer.generation.engine import Engine, State
from hf_value_steer.generation.gate import Gate
from hf_value_steer.generation.guidance import Guidance, load_module
from hf_value_steer.generation.kernels import choose_kernel
from hf_value_steer.generation.output import Record, Stops, ValueSteerDecoderOnlyOutput
from hf_value_steer.generation.scorer import Scorer, bind, load_head, require_finite
from hf_value_steer.generation.streaming import Streaming, streaming
from hf_value_steer.generation.validation import (
    ending_tokens,
    eos_token,
    refuse_dropped_arguments,
    refuse_unguidable,
    refuse_unsupported,
)
from hf_value_steer.generation.value_filter import Draw, Outcome, ValueFilter
from hf_value_steer.hosts.transformers import (
    CACHE,
    bans_and_warpers,
    cache_name,
    decoding,
    pad_token,
    rows_can_end,
    sample,
)


def value_steer_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    value_steer: ValueSteer | None = None,
    token_streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Tensor | ValueSteerDecoderOnlyOutput:
    r"""Generate while a value head decides which tokens are kept.

    ```python
    out = model.generate(**inputs, custom_generate=value_steer_generate, value_steer=cfg, do_sample=True)
    ```

    With the same seed the output equals that of plain `generate`, row by row, up to the row's first intervention.

    Args:
        model: the backbone; `generate` fills this in, and the four arguments that follow.
        input_ids (`torch.LongTensor` of shape `(batch, length)`): prompt.
        logits_processor: every processor and warper of the call; candidates come from the processed distribution.
        stopping_criteria: criteria of the call.
        generation_config: prepared config of the call.
        value_steer: a [`ValueFilterConfig`], an [`AbstentionConfig`], an [`ActivationConfig`], a
            [`GuidanceConfig`], their dict form, or a list of several; that of `generation_config` if left out.
        token_streamer (`BaseStreamer`, *optional*): receives the prompt, then each token after it was checked.
            (`streamer=` reaches us only through [`enable_value_steer`].)
        model_kwargs: what `generate` prepared for the model's forward.

    Returns:
        `torch.LongTensor` of shape `(batch, length + new_tokens)`, or, with `return_dict_in_generate=True`, a
        [`ValueSteerDecoderOnlyOutput`].

    Raises:
        ValueError: before the first token, for anything that cannot be honoured.
        ScoringError: in mid-text, if a token could not be checked, for instance because the head or the module
            returns NaN; the token is not emitted.
    """
    value_steer = configured([generation_config]) if value_steer is None else value_steer
    if value_steer is None:
        raise ValueError(
            "`value_steer` is missing: pass a ValueFilterConfig, an AbstentionConfig, an ActivationConfig, a "
            "GuidanceConfig or their dict form."
        )
    with streaming(token_streamer) as streamer:
        refuse_dropped_arguments()
        methods = parse_value_steer(value_steer)
        unmerge_what_is_off(model)
        model_kwargs = tidied(model_kwargs, len(input_ids))
        refuse_unsupported(model, generation_config, model_kwargs)
        model = shadow(model)  # hooks, attention, classes and modes of this call are seen by no other
        model.eval()  # under dropout a token and its alternatives would be read by different models
        with _activated(model, methods, len(input_ids)) as steering:
            chunked = generation_config.prefill_chunk_size is not None
            if steering is not None and steering.mode == "last_token" and chunked:
                raise ValueError('A prompt in chunks (`prefill_chunk_size`) is not steered with mode="last_token".')
            if all(isinstance(config, ActivationConfig) and not config.value_head for config in methods.values()):
                streamer.put(input_ids)
                reader = streamer if token_streamer is not None else None
                return sample(  # type: ignore[no-any-return]
                    model, input_ids, logits_processor, stopping_criteria, generation_config, reader, model_kwargs
                )
            loop = _Loop(model, input_ids, generation_config, model_kwargs, methods, steering)
            streamer.put(input_ids)
            with decoding(model):
                return loop.run(input_ids, logits_processor, stopping_criteria, streamer)


def configured(configs: Iterable[GenerationConfig | None]) -> ValueSteer | None:
    """The `value_steer` of the first of these generation configs that has one."""
    found = (getattr(config, "value_steer", None) for config in configs)
    return next((each for each in found if each is not None), None)


@contextmanager
def _activated(model: PreTrainedModel, methods: Mapping[str, MethodConfig], rows: int) -> Iterator[Steering | None]:
    """Vectors on the shadow `model`, if the call asks for them."""
    config = methods.get(ActivationConfig.method)
    if not isinstance(config, ActivationConfig):
        yield None
        return
    if isinstance(config.multiplier, tuple) and len(config.multiplier) != rows:
        raise ValueError(f"`multiplier` has {len(config.multiplier)} entries, but the returned batch has {rows} rows.")
    vectors, how = vectors_of(config.vectors), (config.multiplier, config.mode, config.tokens)
    with injected(model, vectors, *how, config.allow_backbone_mismatch) as steering:
        yield steering


class _Loop:
    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
        methods: Mapping[str, MethodConfig],
        steering: Steering | None,
    ):
        self.config = config
        filtering, guiding = methods.get(ValueFilterConfig.method), methods.get(GuidanceConfig.method)
        kernel = filtering.lookahead if isinstance(filtering, ValueFilterConfig) else "auto"
        self.guidance: Guidance | None = None
        if isinstance(guiding, GuidanceConfig):
            if steering is not None:
                raise ValueError("Steering vectors and guidance do not go together: pass one of them.")
            refuse_unguidable(input_ids, config, model_kwargs, kernel)
            kernel = "expanded"
            self.guidance = Guidance(model, load_module(guiding, model), guiding)
        make_room(model_kwargs[cache_name(model_kwargs)], model.config)
        mask = model_kwargs.get("attention_mask")
        chosen = choose_kernel(kernel, model, mask, bool(config.output_attentions))
        compilable = kernel in ("auto", "masked")
        self.engine = Engine(model, model_kwargs, chosen, steering, self.guidance, compilable)
        self.record = Record()
        self.stops = Stops.none(len(input_ids), input_ids.device)
        self.filter: ValueFilter | None = None
        self.abstention: Abstention | None = None
        self.gate: Gate | None = None
        self.output_candidates = False
        if steering is not None:
            steering.told = True
        for method in methods.values():
            if not isinstance(method, SteeringConfig) or (
                isinstance(method, ActivationConfig) and method.value_head is None
            ):
                continue
            scorer = bind(method, load_head(method, model), len(input_ids), input_ids.device)
            if isinstance(method, ValueFilterConfig):
                self.output_candidates = method.output_candidates
                eos = eos_token(config, 'fallback="abstain"') if method.fallback == "abstain" else None
                sampled = config.do_sample and method.proposal == "sample"
                self.filter = ValueFilter(method, scorer, self.stops, self.engine, sampled, eos)
            elif isinstance(method, AbstentionConfig):
                ending = ending_tokens(method, eos_token(config, "Abstention"), model)
                self.abstention = Abstention(method, scorer, self.stops, ending)
            elif steering is not None:
                self.gate = Gate(scorer, steering, method.min_new_tokens)

    @property
    def scorer(self) -> Scorer | None:
        """The scorer whose values are reported; without one, those of the guidance are."""
        method = self.filter or self.abstention or self.gate
        return None if method is None else method.scorer

    def run(
        self,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        streamer: Streaming,
    ) -> Tensor | ValueSteerDecoderOnlyOutput:
        """The loop: draw, let the methods decide, commit, stop."""
        unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        self.pads = rows_can_end(criteria)
        bans, warpers, late = bans_and_warpers(processors)
        state = self.engine.prefill(input_ids, self.config)
        prompt_values = self._score(self.scorer, state, 0, unfinished)
        if self.scorer is not None:
            self.scorer.start(prompt_values)
        if self.abstention is not None:
            self.abstention.observe(self._score(self.abstention.scorer, state, 0, unfinished), 0, unfinished)
        if self.gate is not None:
            self.gate.start(self._score(self.gate.scorer, state, 0, unfinished))
        for step in itertools.count():
            live = unfinished if self.pads else torch.ones_like(unfinished)
            permitted = bans(input_ids, state.logits)
            scores = warpers(input_ids, permitted)
            draw = self._draw(step, input_ids, late(input_ids, permitted), scores, state, live)
            state, outcome = self._step(draw)
            tokens = outcome.tokens
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            unfinished = unfinished & ~criteria(input_ids, tuple(self.record.scores) or None)
            if self.abstention is not None:
                values = self._score(self.abstention.scorer, state, step, live) if self.filter else outcome.values
                self.abstention.observe(values, step + 1, unfinished)
            if self.gate is not None:
                alone = self.gate.scorer is self.scorer
                values = outcome.values if alone else self._score(self.gate.scorer, state, step, live)
                self.gate.observe(values, step + 1)
            self._observe(draw, outcome)
            streamer.put(tokens)
            if not bool(unfinished.any()):
                break
            self.engine.commit()
        self.engine.finish()
        streamer.end()
        return self._output(input_ids, prompt_values)

    def _draw(
        self, step: int, input_ids: Tensor, permitted: Tensor, scores: Tensor, state: State, live: Tensor
    ) -> Draw:
        self._record_state(scores, state)
        tokens, possible = natural_sample(scores, self.config.do_sample)
        forced = torch.zeros_like(live)
        if self.abstention is not None:
            tokens, forced = self.abstention.prescribe(tokens, permitted)
        if self.pads:
            tokens = torch.where(live, tokens, pad_token(self.config).to(tokens.device))
        return Draw(step, input_ids, permitted, scores, tokens, live, forced, live & ~possible)

    def _step(self, draw: Draw) -> tuple[State, Outcome]:
        if self.filter is not None:
            return self.filter.step(draw)
        draw.refuse_impossible()
        state = self.engine.advance(torch.cat([draw.input_ids, draw.tokens[:, None]], dim=-1))
        values = self._score(self.scorer, state, draw.step, draw.live)
        return state, Outcome(draw.tokens, draw.live.long(), values, draw.tokens[:, None], values[:, None])

    def _record_state(self, scores: Tensor, state: State) -> None:
        if not self.config.return_dict_in_generate:
            return
        if self.config.output_scores:
            self.record.scores.append(scores)
        if self.config.output_logits:
            self.record.logits.append(state.logits)
        if self.config.output_attentions and state.attentions is not None:
            self.record.attentions.append(state.attentions)
        if self.config.output_hidden_states and state.hidden_states is not None:
            self.record.hidden_states.append(state.hidden_states)

    def _score(self, scorer: Scorer | None, state: State, step: int, live: Tensor) -> Tensor:
        if scorer is None:
            assert self.guidance is not None and self.guidance.state is not None  # there is at least one method
            values = self.guidance.state.values.to(live.device)
        else:
            values = scorer.values(state.feature)
        values = values.masked_fill(~live, torch.nan)
        require_finite(values, live, step)
        return values

    def _observe(self, draw: Draw, outcome: Outcome) -> None:
        if not self.config.return_dict_in_generate:
            return
        record = self.record
        record.token_values.append(outcome.values)
        record.interventions.append(outcome.tokens != draw.tokens)
        record.candidates_evaluated.append(outcome.evaluated)
        if self.guidance is not None and self.guidance.state is not None:
            record.guided.append(self.guidance.state.shown.to(draw.live.device) & draw.live)
        if self.output_candidates:
            record.candidates.append(outcome.candidates)
            record.candidate_values.append(outcome.candidate_values)

    def _output(self, input_ids: Tensor, prompt_values: Tensor) -> Tensor | ValueSteerDecoderOnlyOutput:
        if not self.config.return_dict_in_generate:
            return input_ids
        return ValueSteerDecoderOnlyOutput(
            sequences=input_ids,
            prompt_values=prompt_values,
            abstained=self.stops.step >= 0,
            abstention_step=self.stops.step,
            abstention_value=self.stops.value,
            **{CACHE: self.engine.live.cache},
            **self.record.fields(),
        )
