"""Value steering for whatever takes a `LogitsProcessor`: beam search, other libraries, loops of your own."""

from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, LogitsProcessor, PreTrainedModel

from hf_value_steer.backbone.parts import underlying
from hf_value_steer.backbone.shadow import shadow
from hf_value_steer.configuration.abstain import AbstentionConfig
from hf_value_steer.configuration.filter import ValueFilterConfig
from hf_value_steer.errors import ScoringError
from hf_value_steer.generation.abstention import Abstention
from hf_value_steer.generation.candidates import random_key, sampled_alternatives, uniforms
from hf_value_steer.generation.decode_tap import DecodeTap
from hf_value_steer.generation.engine import Engine
from hf_value_steer.generation.kernels import choose_kernel
from hf_value_steer.generation.output import Stops
from hf_value_steer.generation.scorer import Scorer, bind, check_fit, load_head, require_finite
from hf_value_steer.generation.validation import (
    ending_tokens,
    eos_token,
    refuse_adapters,
    refuse_model,
    refuse_other_kind,
)
from hf_value_steer.hosts.transformers import config_of_generate
from hf_value_steer.policy import acceptable, may_insert, select


T = TypeVar("T")


class AbstentionLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    r"""Dynamic abstention (arXiv 2604.18419) as a processor: rows that will not end well get EOS, and nothing else.

    Reads the value of the text so far from the forward pass that made the scores: no extra forward. The first call
    of every generation starts afresh, and rows that beam search reorders keep their own count.

    ```python
    out = model.generate(**inputs, logits_processor=[AbstentionLogitsProcessor(model, cfg)], num_beams=4)
    ```

    Args:
        model: the model that will generate.
        config: head, threshold, patience, message.

    Raises:
        TypeError: if `config` is no [`AbstentionConfig`].
        ValueError: if the head does not fit the model, or the model's generation config has no EOS token.
    """

    def __init__(self, model: PreTrainedModel, config: AbstentionConfig):
        refuse_other_kind(config, AbstentionConfig)
        outside, model = model, underlying(model)
        refuse_adapters(outside)
        self.model, self.config = model, config
        self.head = load_head(config, model)
        self._ending()
        self.tap = DecodeTap(model)
        self.texts = WeakKeyDictionary[Cache, _AbstainingText]()

    def _ending(self) -> list[int]:
        """The message, and the EOS of the call or, outside one, of the model."""
        config = config_of_generate() or self.model.generation_config
        return ending_tokens(self.config, eos_token(config, type(self).__name__), self.model)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`(rows, length)` ids and `(rows, vocab)` scores to new scores; the given ones are left alone."""
        decoded = self.tap.read(input_ids)
        if decoded.prefill:
            check_fit(self.head, self.model, self.config.allow_backbone_mismatch)
            scorer = bind(self.config, self.head, len(input_ids), input_ids.device)
            stops = Stops.none(len(input_ids), input_ids.device)
            abstention = Abstention(self.config, scorer, stops, self._ending())
            self.texts[decoded.cache] = _AbstainingText(abstention, input_ids.shape[1], input_ids)
        text = _text_of(decoded.cache, self.texts)
        if not decoded.prefill:
            text.go_on(input_ids)
        abstention = text.abstention
        step, everyone = input_ids.shape[1] - text.prompt_length, torch.ones_like(input_ids[:, 0], dtype=torch.bool)
        values = abstention.scorer.values(decoded.feature)
        require_finite(values, everyone, step)
        abstention.observe(values, step, everyone)
        tokens, forced = abstention.prescribe(input_ids[:, -1], scores)
        prescribed = torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)
        return torch.where(forced[:, None], prescribed, scores)


def _text_of(cache: Cache, texts: WeakKeyDictionary[Cache, T]) -> T:
    """The generation that has this cache, which it does not outlive.

    Raises:
        ScoringError: if it has not been seen from its prompt on.
    """
    text = texts.get(cache)
    if text is None:
        raise ScoringError("A logits processor has to see a generation from its prompt on, with `use_cache=True`.")
    return text


@dataclass
class _AbstainingText:
    """One generation.

    Args:
        abstention: the count of each row.
        prompt_length (`int`): tokens of the prompt.
        input_ids (`torch.LongTensor` of shape `(rows, length)`): the text at the last call.
    """

    abstention: Abstention
    prompt_length: int
    input_ids: Tensor

    def go_on(self, input_ids: Tensor) -> None:
        """Take in the text of the next call, whose rows may be others: beam search reorders them."""
        if self.input_ids.shape[1] != input_ids.shape[1] - 1:
            raise ScoringError("Abstention has to see every step of a generation; this decoding method skipped one.")
        same = (self.input_ids[None] == input_ids[:, None, :-1]).all(dim=-1)
        stays = torch.arange(len(same), device=same.device)  # rows of one text may have others before it in the cache
        self.abstention.reorder(torch.where(same.diagonal(), stays, same.int().argmax(dim=-1)))
        self.input_ids = input_ids


class ValueFilterLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    r"""Value filtering (arXiv 2605.14746) as a processor: only acceptable candidates keep a finite score.

    Looks ahead with K candidates a row at every step, over the cache of the forward pass that made the scores
    (borrowed, not copied, and left as it was). If none is acceptable, the fallback's choice alone stays finite.
    What is drawn from the remaining tokens is up to the decoding method, so the law of the text is not that of the
    strategy. `generate` calls processors before temperature, top-k and top-p: candidates come from the scores as they
    are then. In greedy and beam search use `proposal="topk"`; beams that run out of acceptable tokens carry a score
    of `-inf`, so take K of at least twice the number of beams.

    Args:
        model: the model that will generate.
        config: head, threshold, K, proposal and fallback. `max_interventions` and `output_candidates` need
            [`value_steer_generate`].

    Raises:
        TypeError: if `config` is no [`ValueFilterConfig`].
        ValueError: if the head does not fit the model, or the config asks for what a processor cannot do.
    """

    def __init__(self, model: PreTrainedModel, config: ValueFilterConfig):
        refuse_other_kind(config, ValueFilterConfig)
        if config.max_interventions is not None or config.output_candidates:
            raise ValueError("`max_interventions` and `output_candidates` need `model.generate(value_steer=...)`.")
        outside, model = model, underlying(model)
        refuse_adapters(outside)
        refuse_model(model)
        self.model, self.config = model, config
        self.head = load_head(config, model)
        self._eos()
        self.tap = DecodeTap(model)
        self.texts = WeakKeyDictionary[Cache, _FilteredText]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`(rows, length)` ids and `(rows, vocab)` scores to new scores; the given ones are left alone."""
        decoded = self.tap.read(input_ids)
        if decoded.prefill:
            check_fit(self.head, self.model, self.config.allow_backbone_mismatch)
            scorer = bind(self.config, self.head, len(input_ids), input_ids.device)
            scorer.start(scorer.values(decoded.feature))
            own = shadow(self.model).eval()
            self.texts[decoded.cache] = _FilteredText(own, scorer, input_ids.shape[1], self._eos())
        text = _text_of(decoded.cache, self.texts)
        step = input_ids.shape[1] - text.prompt_length
        if step < self.config.min_new_tokens:
            return scores
        candidates = self._candidates(scores, step)
        values = self._values(text, decoded.continuation_inputs(), input_ids, candidates, step)
        keep = self._keep(candidates, values, scores, text)
        kept = torch.full_like(scores, -torch.inf)
        for tokens, wanted in zip(candidates.T.clamp(min=0)[:, :, None], keep.T[:, :, None], strict=True):
            kept = torch.where(wanted, kept.scatter(1, tokens, scores.gather(1, tokens)), kept)
        if text.eos is not None:
            kept[~keep.any(dim=-1), text.eos] = 0.0  # a row that may not end keeps the fallback's choice
        return kept

    def _eos(self) -> int | None:
        """The token that ends a row: the EOS of the call or, outside one, of the model."""
        if self.config.fallback != "abstain":
            return None
        return eos_token(config_of_generate() or self.model.generation_config, 'fallback="abstain"')

    def _candidates(self, scores: Tensor, step: int) -> Tensor:
        """Token ids, `(rows, K)`, -1 where no token is left."""
        count = min(self.config.num_candidates, scores.shape[-1])
        if self.config.proposal == "sample":
            uniform = uniforms(random_key(scores.device, self.config.seed), range(len(scores)), step, count)
            return sampled_alternatives(scores, uniform)
        top, tokens = scores.topk(count, dim=-1)
        return tokens.masked_fill(top == -torch.inf, -1)

    def _values(
        self, text: "_FilteredText", inputs: dict[str, Any], input_ids: Tensor, candidates: Tensor, step: int
    ) -> Tensor:
        values: list[Tensor] = []

        def score(features: Tensor) -> Tensor:
            values.append(text.scorer.values(features))
            return torch.zeros_like(candidates[:, 0])

        kernel = choose_kernel(self.config.lookahead, text.model, inputs["attention_mask"])
        Engine(text.model, inputs, kernel).look_ahead(input_ids, candidates.clamp(min=0), score)
        require_finite(values[0], torch.ones_like(candidates[:, 0], dtype=torch.bool), step)
        return values[0]

    def _keep(self, candidates: Tensor, values: Tensor, scores: Tensor, text: "_FilteredText") -> Tensor:
        """Which candidates stay, `(rows, K)`: the acceptable ones, else the fallback's; none in rows that end."""
        config, polarity, threshold = self.config, text.scorer.polarity, text.scorer.threshold[:, None]
        drawn = candidates >= 0
        passed = acceptable(values, threshold, polarity) & drawn
        probabilities = scores.softmax(dim=-1).gather(1, candidates.clamp(min=0))
        column, found = select(values, drawn, threshold, polarity, config.fallback, probabilities, config.prob_weight)
        chosen = torch.nn.functional.one_hot(column, candidates.shape[1]).bool()
        if text.eos is not None:
            chosen &= ~may_insert(scores[:, text.eos, None])[:, None]
        return torch.where(found[:, None], passed, chosen)


@dataclass
class _FilteredText:
    """One generation.

    Args:
        model: a shadow of the model, for its look-aheads.
        scorer: head and thresholds.
        prompt_length (`int`): tokens of the prompt.
        eos (`int`, *optional*): the token that ends a row under `fallback="abstain"`.
    """

    model: PreTrainedModel
    scorer: Scorer
    prompt_length: int
    eos: int | None
