"""Reports on the steering of a request, from the model runner to the scheduler and into the response."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TokenReport:
    """What one step of the engine adds to the report of one request. The runner fills it in, the scheduler adds it up.

    Args:
        prompt_value (`float`, *optional*), threshold (`float`, *optional*): in the step that completed the prompt.
        value (`float`, *optional*): value of a token, see [`SteeringReport`].
        tokens (`int`): number of emitted tokens, 0 or 1.
        intervened (`bool`): whether the emitted token is not the natural sample.
        unacceptable (`bool`): whether the emitted token is not acceptable.
        candidates (`int`): distinct candidates that were forwarded.
        abstained (`dict`, *optional*): see [`SteeringReport`].
    """

    prompt_value: float | None = None
    threshold: float | None = None
    value: float | None = None
    tokens: int = 0
    intervened: bool = False
    unacceptable: bool = False
    candidates: int = 0
    abstained: dict[str, Any] | None = None


@dataclass
class SteeringReport:
    """The steering of one request, in the response as `value_steer`.

    Args:
        tokens (`int`): number of new tokens.
        prompt_value (`float`, *optional*): value of the prompt, by the filter's head if there is one.
        threshold (`float`, *optional*): what values are compared with, also where the request asked for an alpha.
        values (`list` of `float`): value of each new token by the same head. Abstention alone does not know that of
            the last token, which vLLM never forwards; nor does the filter that of an EOS of `fallback="abstain"`.
        interventions (`list` of `int`): which new tokens are not the natural sample.
        unacceptable (`list` of `int`): which new tokens the filter let pass although they are not acceptable: no
            candidate was (a dead end), or the filter did not act there (`min_new_tokens`, `max_interventions`).
        candidates_evaluated (`int`): distinct candidates that were forwarded, over all tokens.
        abstained (`dict`, *optional*): if the row was ended: after how many new tokens (`"step"`), because of which
            `"value"`, and by which `"method"`.
        error (`str`, *optional*): why the request ended with finish reason `"error"`.
    """

    tokens: int = 0
    prompt_value: float | None = None
    threshold: float | None = None
    values: list[float] = field(default_factory=list)
    interventions: list[int] = field(default_factory=list)
    unacceptable: list[int] = field(default_factory=list)
    candidates_evaluated: int = 0
    abstained: dict[str, Any] | None = None
    error: str | None = None

    def add(self, token: TokenReport) -> None:
        """Take in the report of one step."""
        if token.intervened:
            self.interventions.append(self.tokens)
        if token.unacceptable:
            self.unacceptable.append(self.tokens)
        if token.value is not None:
            self.values.append(token.value)
        if token.prompt_value is not None:
            self.prompt_value, self.threshold = token.prompt_value, token.threshold
        self.tokens += token.tokens
        self.candidates_evaluated += token.candidates
        self.abstained = self.abstained or token.abstained

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


@dataclass
class RunnerReport:
    """What a model runner tells the scheduler beside the tokens of a step.

    Args:
        reports (`dict`): from request id to its [`TokenReport`].
        failures (`dict`): from request id to the reason why the request ends with an error.
    """

    reports: dict[str, TokenReport] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
