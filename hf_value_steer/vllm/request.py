"""One steered request, as a model runner remembers it between steps."""

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams

from hf_value_steer.configuration import AbstentionConfig, ValueFilterConfig
from hf_value_steer.generation.scorer import Scorer
from hf_value_steer.vllm.refusals import refuse_request
from hf_value_steer.vllm.report import StepRecord
from hf_value_steer.vllm.steering import Steering


@dataclass
class Filtering:
    """The filter of one request.

    Args:
        config: its configuration.
        scorer: the head, and a threshold of shape `(1,)`.
        sampled (`bool`): whether alternatives are drawn, or the next most likely tokens.
        eos (`int`): the token that ends the request under `fallback="abstain"`, else -1.
        key (`bytes`): of the alternatives' random stream.
        interventions (`int`): so far.
        ahead (`bool`): whether the runner is one token ahead of the scheduler: the last token that it knows is
            *pending*, drawn but neither checked nor emitted.
        scores (`torch.FloatTensor` of shape `(vocab,)`): processed scores that the pending token was drawn from.
        logprobs (`torch.FloatTensor` of shape `(vocab,)`, *optional*): what its logprobs are read from.
        generator_state (`torch.ByteTensor`, *optional*): of the request's generator, before that draw.
    """

    config: ValueFilterConfig
    scorer: Scorer
    sampled: bool
    eos: int
    key: bytes
    interventions: int = 0
    ahead: bool = False
    scores: Tensor | None = None
    logprobs: Tensor | None = None
    generator_state: Tensor | None = None

    def checks(self, step: int) -> bool:
        """Whether the token after `step` others may be replaced."""
        most = self.config.max_interventions
        return step >= self.config.min_new_tokens and (most is None or self.interventions < most)


@dataclass
class Abstaining:
    """The abstention of one request.

    Args:
        config: its configuration.
        scorer: the head, and a threshold of shape `(1,)`.
        ending (`list` of `int`): the message and EOS, prescribed from `since` on.
        min_new_tokens (`int`): the larger of the config's and the request's `min_tokens`.
        streak (`int`): consecutive unacceptable values.
        observed (`int`): number of new tokens of the last text that was looked at; a text is looked at once, although
            after a preemption its state is computed again.
        since (`int`, *optional*): number of new tokens when it fired.
    """

    config: AbstentionConfig
    scorer: Scorer
    ending: list[int]
    min_new_tokens: int
    streak: int = 0
    observed: int = -1
    since: int | None = None

    def prescribed(self, step: int) -> int | None:
        """The token that has to follow `step` new tokens, if it is prescribed."""
        if self.since is None or step < self.since:
            return None
        return self.ending[min(step - self.since, len(self.ending) - 1)]


@dataclass
class SteeredRequest:
    """What is steered in one request, and what the present step has to report about it."""

    filtering: Filtering | None
    abstaining: Abstaining | None
    record: StepRecord = field(default_factory=StepRecord)

    @classmethod
    def start(cls, steering: Steering, params: SamplingParams, request_id: str) -> "SteeredRequest":
        """Read what the request asks for; raises a `ValueError` if it cannot be honoured."""
        methods, scorers = steering.choose(params.extra_args)
        refuse_request(params, methods)
        request = cls(None, None)
        for name, config in methods.items():
            if isinstance(config, ValueFilterConfig):
                sampled = params.temperature > 0 and config.proposal == "sample"
                eos = eos_token(params) if config.fallback == "abstain" else -1
                key = _key(config.seed, params.seed, request_id)
                request.filtering = Filtering(config, scorers[name], sampled, eos, key)
            elif isinstance(config, AbstentionConfig):
                least = max(config.min_new_tokens, params.min_tokens)
                ending = [*(config.message_ids or ()), eos_token(params)]
                request.abstaining = Abstaining(config, scorers[name], ending, least)
        return request

    def prescribed(self, step: int) -> int | None:
        """The token that abstention prescribes after `step` new tokens, if any."""
        return self.abstaining.prescribed(step) if self.abstaining else None

    def start_at(self, scorer: Scorer, prompt_value: Tensor) -> None:
        """Set the threshold that may follow the value `()` of the prompt; the first one that comes is reported."""
        scorer.start(prompt_value[None])
        if self.record.prompt_value is None:
            self.record.prompt_value = float(prompt_value)

    def take_record(self) -> StepRecord:
        """What there is to report, once."""
        record, self.record = self.record, StepRecord()
        return record


def eos_token(params: SamplingParams) -> int:
    """The token that ends a request; raises a `ValueError` if the model has none."""
    if params.eos_token_id is None:
        raise ValueError("Abstention ends requests with EOS, but this model has none, or `ignore_eos` is on.")
    return int(params.eos_token_id)


def _key(engine_seed: int | None, request_seed: int | None, request_id: str) -> bytes:
    """A request with a seed has the same alternatives each time; every rank of a tensor-parallel engine agrees."""
    own = request_id if request_seed is None else f"seed {request_seed}"
    return hashlib.blake2b(f"{engine_seed}/{own}".encode(), digest_size=16).digest()


def stack_thresholds(scorers: list[Scorer]) -> Tensor:
    """Thresholds of several requests, `(requests,)`."""
    return torch.cat([scorer.threshold for scorer in scorers])
