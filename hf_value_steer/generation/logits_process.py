"""Value steering for whatever takes a `LogitsProcessor`: beam search, other libraries, loops of your own."""

from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, LogitsProcessor, PreTrainedModel

from hf_value_steer.activation.apply import is_steered
from hf_value_steer.backbone.parts import underlying
from hf_value_steer.configuration.abstain import AbstentionConfig
from hf_value_steer.configuration.filter import ValueFilterConfig
from hf_value_steer.errors import ScoringError, UnsupportedError
from hf_value_steer.generation.abstention import Abstention
from hf_value_steer.generation.candidates import random_key, sampled_alternatives, uniforms
from hf_value_steer.generation.decode_tap import Decoded, DecodeTap
from hf_value_steer.generation.engine import Engine
from hf_value_steer.generation.kernels import choose_kernel
from hf_value_steer.generation.output import Stops
from hf_value_steer.generation.prepared import PreparedModel
from hf_value_steer.generation.scorer import (
    Scorer,
    bind,
    layers_read,
    load_head,
    refuse_broken,
    require_finite,
    require_fit,
)
from hf_value_steer.generation.validation import (
    ending_tokens,
    eos_token,
    refuse_adapters,
    refuse_model,
    refuse_other_kind,
)
from hf_value_steer.hosts.transformers import config_of_generate
from hf_value_steer.policy import Candidates, Decision, decide, has_begun, may_insert


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
        self.reads = layers_read(self.head, model)
        self.tap = DecodeTap(model, self.reads)
        # By cache: nobody tells a processor when a generation ends, and there may be several at once.
        self.texts = WeakKeyDictionary[Cache, _AbstainingText]()

    def _ending(self) -> list[int]:
        """The message, and the EOS of the call or, outside one, of the model."""
        config = config_of_generate() or self.model.generation_config
        return ending_tokens(self.config, eos_token(config, type(self).__name__), self.model)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`(rows, length)` ids and `(rows, vocab)` scores to new scores; the given ones are left alone."""
        decoded = self.tap.read(input_ids)
        if decoded.prefill:
            require_fit(self.head, self.model, self.config.allow_backbone_mismatch)
            scorer = bind(self.config, self.head, len(input_ids), input_ids.device, self.reads)
            stops = Stops.none(len(input_ids), input_ids.device)
            abstention = Abstention(self.config, scorer, stops, self._ending())
            self.texts[decoded.cache] = _AbstainingText(abstention, input_ids.shape[1], input_ids)
        text = _text_of(decoded.cache, self.texts)
        if not decoded.prefill:
            text.go_on(input_ids)
        abstention = text.abstention
        step, everyone = input_ids.shape[1] - text.prompt_length, torch.ones_like(input_ids[:, 0], dtype=torch.bool)
        features = decoded.features.of(self.reads)
        values = abstention.scorer.values(features)
        require_finite(values, everyone, step)
        abstention.scorer.remember(features)
        abstention.observe_values(values, step, everyone)
        tokens, forced = abstention.next_tokens(input_ids[:, -1], scores)
        prescribed = torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)
        return torch.where(forced[:, None], prescribed, scores)


def _text_of(cache: Cache, texts: WeakKeyDictionary[Cache, T]) -> T:
    """What a processor knows of the generation that has this cache; it is forgotten with the cache.

    Raises:
        ScoringError: if it has not been seen from its prompt on.
    """
    text = texts.get(cache)
    if text is None:
        raise ScoringError("A logits processor has to see a generation from its prompt on, with `use_cache=True`.")
    return text


@dataclass
class _AbstainingText:
    """One generation as the abstention processor knows it: made at the prompt, changed at each call.

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
        self.abstention.reorder(_parents(self.input_ids, input_ids))
        self.input_ids = input_ids


def _parents(before: Tensor, now: Tensor) -> Tensor:
    """Which row `(rows,)` of the text `(rows, length - 1)` of the last call each row of `(rows, length)` goes on."""
    if before.shape[1] != now.shape[1] - 1:
        raise ScoringError(
            "Abstention and heads over time have to see every step of a generation; this decoding method skipped one."
        )
    same = (before[None] == now[:, None, :-1]).all(dim=-1)
    if not bool(same.any(dim=-1).all()):
        raise ScoringError("A row goes on with no text of the step before: this decoding method cannot be followed.")
    stays = torch.arange(len(same), device=same.device)  # equal texts: each row keeps its own
    return torch.where(same.diagonal(), stays, same.int().argmax(dim=-1))


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
        config: head, threshold, K, proposal and fallback. `rollback`, `max_interventions`, `output_candidates` and
            `selection="soft"` need [`value_steer_generate`].

    Raises:
        TypeError: if `config` is no [`ValueFilterConfig`].
        ValueError: if the head does not fit the model, or the config asks for what a processor cannot do.
    """

    def __init__(self, model: PreTrainedModel, config: ValueFilterConfig):
        refuse_other_kind(config, ValueFilterConfig)
        outside, model = model, underlying(model)
        refuse_adapters(outside)
        refuse_model(model)
        self.model, self.head = model, load_head(config, model)
        self.config = config = config.settled(self.head.config.operating_point)
        cannot = {
            "`max_interventions`": config.max_interventions is not None,
            "`output_candidates`": config.output_candidates,
            '`selection="soft"` (pass `selection="first"` if the head asks for it)': config.selection != "first",
            f"`rollback`={config.rollback} (pass `rollback=0`, or take a head that was calibrated without it, such as "
            "that of model_cards/smollm2-135m-toxicity-final)": config.rollback > 0,
        }
        if asked := [name for name, is_asked in cannot.items() if is_asked]:
            raise UnsupportedError(
                f"A processor cannot do {', '.join(asked)}: call `model.generate(value_steer=...)`."
            )
        self._eos()
        self.reads = layers_read(self.head, model)
        self.tap = DecodeTap(model, self.reads)
        self.texts = WeakKeyDictionary[Cache, _FilteredText]()  # as above

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`(rows, length)` ids and `(rows, vocab)` scores to new scores; the given ones are left alone."""
        decoded = self.tap.read(input_ids)
        if decoded.prefill:
            require_fit(self.head, self.model, self.config.allow_backbone_mismatch)
            self._refuse_vectors_of(decoded.model)
            scorer = bind(self.config, self.head, len(input_ids), input_ids.device, self.reads)
            scorer.start(scorer.values(decoded.features.of(self.reads)))
            prepared, eos = PreparedModel(self.model), self._eos()
            self.texts[decoded.cache] = _FilteredText(prepared, scorer, input_ids.shape[1], eos, input_ids)
        text = _text_of(decoded.cache, self.texts)
        text.remember(decoded.features.of(self.reads), input_ids)
        step = input_ids.shape[1] - text.prompt_length
        if not has_begun(step, self.config.min_new_tokens):
            return scores
        decision, candidates = self._decide(text, decoded, input_ids, scores, step)
        keep = torch.where(decision.found[:, None], decision.passed, _only(decision.column, decision.passed))
        keep &= ~decision.ends[:, None]
        kept = torch.full_like(scores, -torch.inf)
        # One column at a time: the same token may stand in a column that is kept and in one that is not.
        for tokens, wanted in zip(candidates.tokens.T.clamp(min=0)[:, :, None], keep.T[:, :, None], strict=True):
            kept = torch.where(wanted, kept.scatter(1, tokens, scores.gather(1, tokens)), kept)
        if text.eos is not None:
            kept[decision.ends, text.eos] = 0.0
        return kept

    def _decide(
        self, text: "_FilteredText", decoded: Decoded, input_ids: Tensor, scores: Tensor, step: int
    ) -> tuple[Decision, Candidates]:
        """Look ahead with candidates of every row, and decide as `generate` does."""
        everyone = torch.arange(len(input_ids), device=input_ids.device)
        nowhere = torch.zeros_like(everyone, dtype=torch.bool)
        candidates = Candidates(self._candidates(scores, step), nowhere)
        width, inputs = max(int(candidates.needed.sum(dim=-1).max()), 1), decoded.continuation_inputs()
        kernel = choose_kernel(self.config.lookahead, text.prepared.model, inputs["attention_mask"])
        engine = Engine(text.prepared, inputs, kernel, reads=self.reads)
        ahead = engine.look_ahead(input_ids, candidates.to_forward(width))
        unknown = torch.full(nowhere.shape, torch.nan, device=nowhere.device)
        values = candidates.spread(text.scorer.values(ahead.features.of(self.reads)), unknown)
        may_end = nowhere if text.eos is None else may_insert(scores[:, text.eos, None])
        rule = (text.scorer.threshold, text.scorer.polarity, self.config.fallback, may_end)
        decision = decide(candidates, values, *rule, scores.softmax(dim=-1), self.config.prob_weight)
        refuse_broken(decision.broken, everyone, step)
        return decision, candidates

    def _refuse_vectors_of(self, running: PreTrainedModel) -> None:
        """Vectors of `value_steer` act in a shadow that belongs to the call, and not where this looks ahead."""
        if running is not self.model and _has_vectors(running) and not _has_vectors(self.model):
            raise UnsupportedError(
                "The vectors that `value_steer` adds do not reach the look-ahead of a ValueFilterLogitsProcessor: "
                "pass the filter in `value_steer`, too, or put the vectors on by `with vectors.apply(model):`."
            )

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


def _has_vectors(model: PreTrainedModel) -> bool:
    try:
        return is_steered(model)
    except ValueError:  # no layers are found, to which vectors could be added
        return False


def _only(column: Tensor, like: Tensor) -> Tensor:
    """A mask of the shape of `like` `(rows, K)` with one column `(rows,)` a row."""
    return torch.nn.functional.one_hot(column, like.shape[1]).bool()


@dataclass
class _FilteredText:
    """One generation as the filter processor knows it: made at the prompt, used at each call.

    Args:
        prepared: a shadow of the model, for its look-aheads.
        scorer: head and thresholds.
        prompt_length (`int`): tokens of the prompt.
        eos (`int`, *optional*): the token that ends a row under `fallback="abstain"`.
        input_ids (`torch.LongTensor` of shape `(rows, length)`): the text at the last call.
    """

    prepared: PreparedModel
    scorer: Scorer
    prompt_length: int
    eos: int | None
    input_ids: Tensor

    def remember(self, features: Tensor, input_ids: Tensor) -> None:
        """Let a head over time take in the last token of each row, whose features these are, `(rows, width)`."""
        scorer = self.scorer
        if scorer.head.remembers:
            if input_ids.shape[1] > self.prompt_length:
                scorer.memory = scorer.memory[_parents(self.input_ids, input_ids).to(scorer.memory.device)]
            scorer.remember(features)
            self.input_ids = input_ids
