"""Value steering for whatever takes a `LogitsProcessor`: beam search, other libraries, loops of your own."""

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from hf_value_steer.configuration import AbstentionConfig, ValueFilterConfig
from hf_value_steer.generation.abstention import Abstention
from hf_value_steer.generation.candidates import random_key, sampled_alternatives, uniforms
from hf_value_steer.generation.decode_tap import DecodeTap
from hf_value_steer.generation.engine import Engine
from hf_value_steer.generation.kernels import choose_kernel
from hf_value_steer.generation.output import Stops
from hf_value_steer.generation.scorer import bind, load_head, require_finite
from hf_value_steer.generation.validation import eos_token, refuse_model
from hf_value_steer.policy import acceptable, select


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
        ValueError: if the head does not fit the model, or the model's generation config has no EOS token.
    """

    def __init__(self, model: PreTrainedModel, config: AbstentionConfig):
        self.config = config
        self.head = load_head(config, model)
        self.eos = eos_token(model.generation_config, type(self).__name__)
        self.tap = DecodeTap(model)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`(rows, length)` ids and `(rows, vocab)` scores to new scores; the given ones are left alone."""
        feature = self.tap.read(input_ids)
        if self.tap.prefill:
            self.prompt_length = input_ids.shape[1]
            scorer = bind(self.config, self.head, len(input_ids), input_ids.device)
            stops = Stops.none(len(input_ids), input_ids.device)
            self.abstention = Abstention(self.config, scorer, stops, self.eos, self.config.min_new_tokens)
        else:
            self.abstention.reorder(self._parents(input_ids))
        self.previous = input_ids
        step, everyone = input_ids.shape[1] - self.prompt_length, torch.ones_like(input_ids[:, 0], dtype=torch.bool)
        values = self.abstention.scorer.values(feature)
        require_finite(values, everyone, step)
        self.abstention.observe(values, step, everyone)
        tokens, forced = self.abstention.prescribe(input_ids[:, -1])
        prescribed = torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)
        return torch.where(forced[:, None], prescribed, scores)

    def _parents(self, input_ids: Tensor) -> Tensor:
        """Which row of the previous call each row continues, `(rows,)`."""
        if self.previous.shape[1] != input_ids.shape[1] - 1:
            raise RuntimeError("Abstention has to see every step of a generation; this decoding method skipped one.")
        same = (self.previous[None] == input_ids[:, None, :-1]).all(dim=-1)
        return same.int().argmax(dim=-1)


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
        ValueError: if the head does not fit the model, or the config asks for what a processor cannot do.
    """

    def __init__(self, model: PreTrainedModel, config: ValueFilterConfig):
        if config.max_interventions is not None or config.output_candidates:
            raise ValueError("`max_interventions` and `output_candidates` need `model.generate(value_steer=...)`.")
        refuse_model(model)
        self.model, self.config = model, config
        self.head = load_head(config, model)
        self.eos = eos_token(model.generation_config, 'fallback="abstain"') if config.fallback == "abstain" else None
        self.tap = DecodeTap(model)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`(rows, length)` ids and `(rows, vocab)` scores to new scores; the given ones are left alone."""
        feature = self.tap.read(input_ids)
        if self.tap.prefill:
            self.prompt_length = input_ids.shape[1]
            self.scorer = bind(self.config, self.head, len(input_ids), input_ids.device)
            self.scorer.start(self.scorer.values(feature))
        step = input_ids.shape[1] - self.prompt_length
        if step < self.config.min_new_tokens:
            return scores
        candidates = self._candidates(scores, step)
        keep = self._keep(candidates, self._values(input_ids, candidates, step), scores)
        kept = torch.full_like(scores, -torch.inf)
        for tokens, wanted in zip(candidates.T.clamp(min=0)[:, :, None], keep.T[:, :, None], strict=True):
            kept = torch.where(wanted, kept.scatter(1, tokens, scores.gather(1, tokens)), kept)
        if self.eos is not None:
            kept[~keep.any(dim=-1), self.eos] = 0.0
        return kept

    def _candidates(self, scores: Tensor, step: int) -> Tensor:
        """Token ids, `(rows, K)`, -1 where no token is left."""
        count = min(self.config.num_candidates, scores.shape[-1])
        if self.config.proposal == "sample":
            uniform = uniforms(random_key(scores.device, self.config.seed), range(len(scores)), step, count)
            return sampled_alternatives(scores, uniform)
        top, tokens = scores.topk(count, dim=-1)
        return tokens.masked_fill(top == -torch.inf, -1)

    def _values(self, input_ids: Tensor, candidates: Tensor, step: int) -> Tensor:
        values: list[Tensor] = []

        def score(features: Tensor) -> Tensor:
            values.append(self.scorer.values(features))
            return torch.zeros_like(candidates[:, 0])

        inputs = self.tap.continuation_inputs()
        kernel = choose_kernel(self.config.lookahead, self.model, inputs["attention_mask"])
        Engine(self.model, inputs, kernel).look_ahead(input_ids, candidates.clamp(min=0), score)
        require_finite(values[0], torch.ones_like(candidates[:, 0], dtype=torch.bool), step)
        return values[0]

    def _keep(self, candidates: Tensor, values: Tensor, scores: Tensor) -> Tensor:
        """Which candidates stay, `(rows, K)`: the acceptable ones, else the fallback's choice."""
        config, polarity, threshold = self.config, self.scorer.polarity, self.scorer.threshold[:, None]
        drawn = candidates >= 0
        passed = acceptable(values, threshold, polarity) & drawn
        if config.fallback == "abstain":
            return passed
        probabilities = scores.softmax(dim=-1).gather(1, candidates.clamp(min=0))
        column, found = select(values, drawn, threshold, polarity, config.fallback, probabilities, config.prob_weight)
        chosen = torch.nn.functional.one_hot(column, candidates.shape[1]).bool()
        return torch.where(found[:, None], passed, chosen)
