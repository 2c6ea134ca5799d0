"""One steered request, as a model runner remembers it between steps."""

import hashlib
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams

from hf_value_steer.configuration.abstain import AbstentionConfig
from hf_value_steer.configuration.filter import ValueFilterConfig
from hf_value_steer.generation.scorer import Scorer
from hf_value_steer.policy import next_of_ending
from hf_value_steer.vllm.permissions import Permitted
from hf_value_steer.vllm.refusals import refuse_request
from hf_value_steer.vllm.report import TokenReport
from hf_value_steer.vllm.served import ServedMethods


@dataclass
class Filtering:
    """The filter of one request: its configuration, and what the runner keeps from step to step.

    Args:
        config: its configuration.
        scorer: the head, and a threshold of shape `(1,)`.
        sampled (`bool`): whether alternatives are drawn, or the next most likely tokens.
        ending (`list` of `int`): EOS under `fallback="abstain"`, else nothing.
        key (`bytes`): of the alternatives' random stream.
        interventions (`int`): so far.
        ahead (`bool`): whether the runner is one token ahead of the scheduler: the last token that it knows is
            *pending*, drawn but neither checked nor emitted.
        scores (`torch.FloatTensor` of shape `(vocab,)`): processed scores that the pending token was drawn from.
        logprobs (`torch.FloatTensor` of shape `(vocab,)`, *optional*): the scores that its logprobs are read from.
        permitted (*optional*): gives the scores of tokens that could be inserted in its place.
        generator_state (`torch.ByteTensor`, *optional*): of the request's generator, before that draw.
    """

    config: ValueFilterConfig
    scorer: Scorer
    sampled: bool
    ending: list[int]
    key: bytes
    interventions: int = 0
    ahead: bool = False
    scores: Tensor | None = None
    logprobs: Tensor | None = None
    permitted: Permitted | None = None
    generator_state: Tensor | None = None


@dataclass
class Abstaining:
    """The abstention of one request: its configuration, and what the runner keeps from step to step.

    Args:
        config: its configuration.
        scorer: the head, and a threshold of shape `(1,)`.
        ending (`list` of `int`): the message and EOS, prescribed from `since` on.
        streak (`int`): consecutive unacceptable values, up to the one at which it fired.
        due (`bool`): whether its patience is over.
        value (`float`): the last value that was counted.
        observed (`int`): number of new tokens of the last text that was counted. After a preemption a text is computed
            again, but it counts once.
        since (`int`, *optional*): number of new tokens when it fired.
        inserted (`set` of `int`): the steps (number of new tokens before) at which a token of the ending was inserted.
    """

    config: AbstentionConfig
    scorer: Scorer
    ending: list[int]
    streak: int = 0
    due: bool = False
    value: float = math.nan
    observed: int = -1
    since: int | None = None
    inserted: set[int] = field(default_factory=set)

    def prescribe(self, step: int, permitted: Permitted) -> int | None:
        """The token that has to follow `step` new tokens, if one is prescribed."""
        due = self.since is None and self.observed == step and self.due
        begun = self.since is not None and step >= self.since
        if not (due or begun):
            self.inserted.discard(step)  # drawn again after a preemption, from scores that may differ by rounding
            return None
        written = sum(each < step for each in self.inserted) if begun else -1
        begins, place, forced = next_of_ending(
            torch.tensor([due]), torch.tensor([written]), permitted(self.ending).cpu()
        )
        if bool(begins):
            self.since = step
        if not bool(forced):
            self.inserted.discard(step)
            return None
        self.inserted.add(step)
        return self.ending[int(place)]


@dataclass
class SteeredRequest:
    """What is steered in one request, and the report of the present step.

    The runner makes one when it meets the request ([`start`]), asks it for prescribed tokens, and takes the report at
    the end of each step.
    """

    filtering: Filtering | None
    abstaining: Abstaining | None
    report: TokenReport = field(default_factory=TokenReport)

    @classmethod
    def start(
        cls, served: ServedMethods, params: SamplingParams, request_id: str, vocabulary: int
    ) -> "SteeredRequest":
        """Read what the request asks for; raises a `ValueError` if a model of `vocabulary` tokens cannot honour it."""
        methods, scorers = served.choose(params.extra_args)
        refuse_request(params, methods)
        request = cls(None, None)
        for name, config in methods.items():
            if isinstance(config, ValueFilterConfig):
                sampled = params.temperature > 0 and config.proposal == "sample"
                ending = [eos_token(params, vocabulary)] if config.fallback == "abstain" else []
                key = _key(config.seed, params.seed, request_id)
                request.filtering = Filtering(config, scorers[name], sampled, ending, key)
            elif isinstance(config, AbstentionConfig):
                ending = [*(config.message_ids or ()), eos_token(params, vocabulary)]
                request.abstaining = Abstaining(config, scorers[name], ending)
        return request

    def insertable(self) -> list[int]:
        """The tokens that its methods may insert."""
        return [token for method in (self.filtering, self.abstaining) if method for token in method.ending]

    def prescribe(self, step: int, permitted: Permitted) -> int | None:
        """The token that abstention prescribes after `step` new tokens, if any."""
        if self.abstaining is None:
            return None
        token = self.abstaining.prescribe(step, permitted)
        if self.abstaining.since == step:
            self.report.abstained = {"step": step, "value": self.abstaining.value, "method": "abstain"}
        return token

    def is_prescribed(self, step: int) -> bool:
        """Whether the token after `step` others was prescribed."""
        return self.abstaining is not None and step in self.abstaining.inserted

    def start_at(self, scorer: Scorer, prompt_value: Tensor) -> None:
        """Set the threshold, which may depend on the value `()` of the prompt; the first of both are reported."""
        scorer.start(prompt_value[None])
        if self.report.prompt_value is None:
            self.report.prompt_value = float(prompt_value)
            self.report.threshold = round(float(scorer.threshold), 7)  # as it was said, not as float32 keeps it

    def take_report(self) -> TokenReport:
        """The report of this step; that of the next one begins empty."""
        report, self.report = self.report, TokenReport()
        return report


def eos_token(params: SamplingParams, vocabulary: int) -> int:
    """The token that ends a request; raises a `ValueError` if the model, of `vocabulary` tokens, has none."""
    eos = params.eos_token_id
    if eos is None:
        raise ValueError("Abstention ends requests with EOS, but this model has none, or `ignore_eos` is on.")
    if eos >= vocabulary:
        raise ValueError(
            f"Abstention ends requests with EOS, which is {eos} for this tokenizer, but the model has only "
            f"{vocabulary} tokens: serve it with its own tokenizer."
        )
    return int(eos)


def _key(engine_seed: int | None, request_seed: int | None, request_id: str) -> bytes:
    """A request with a seed has the same alternatives each time; every rank of a tensor-parallel engine agrees."""
    own = request_id if request_seed is None else f"seed {request_seed}"
    return hashlib.blake2b(f"{engine_seed}/{own}".encode(), digest_size=16).digest()


def stack_thresholds(scorers: list[Scorer]) -> Tensor:
    """Thresholds of several requests, `(requests,)`."""
    return torch.cat([scorer.threshold for scorer in scorers])
