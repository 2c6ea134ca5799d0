"""Which runs draw a trade-off: each way to use a head, at the thresholds of several promises, and judges of text."""

from typing import Any

from hf_value_steer.arguments.evaluate import EvaluateArguments
from hf_value_steer.choices import Way
from hf_value_steer.configuration.filter import ValueFilterConfig
from hf_value_steer.configuration.operating_point import DEFAULTS
from hf_value_steer.evaluation.runs import Setting
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.judges.in_the_loop import TextJudge


# By way: its name, and what it asks of the filter.
_WAYS: dict[Way, tuple[str, dict[str, Any]]] = {
    "filter": ("filter", {"rollback": 0, "selection": "first"}),
    "rollback": ("filter, going back", {"selection": "first"}),
    "soft": ("soft selection, going back", {"selection": "soft"}),
    "end": ("ending instead", {"rollback": 0, "selection": "first", "num_candidates": 1, "fallback": "abstain"}),
}


def trade_off(head: ValueHead, arguments: EvaluateArguments, thresholds: list[float]) -> list[Setting]:
    """The ways to use the head, at the threshold of every `alpha`."""
    count, settings = max(candidates(head, arguments)), []
    for way in arguments.ways or _WAYS:
        name, asked = _WAYS[way]
        for alpha, threshold in zip(arguments.alphas, thresholds, strict=True):
            how: dict[str, Any] = {"num_candidates": count, "rollback": _rollback(head, arguments), **asked}
            config = ValueFilterConfig(value_head=head, threshold=threshold, **how)
            settings.append(Setting(f"{name}, alpha={alpha:g}", way, config, count, threshold, alpha=alpha))
    return settings


def in_the_loop(head: ValueHead, arguments: EvaluateArguments) -> list[Setting]:
    """Judges of text in the place of the head, with the same way back."""
    count, back, settings = max(candidates(head, arguments)), _rollback(head, arguments), []
    for name in arguments.in_the_loop:
        judge = TextJudge(name, polarity=head.config.polarity)
        config = ValueFilterConfig(value_head=judge, num_candidates=count, rollback=back)
        title = f"{name} in the loop" + (", going back" if back else "")
        settings.append(Setting(title, "in_the_loop", config, count))
    return settings


def candidates(head: ValueHead, arguments: EvaluateArguments) -> list[int]:
    """How many candidates the runs have: those that are asked for, or as many as the head is used with."""
    return arguments.num_candidates or [{**DEFAULTS, **(head.config.operating_point or {})}["num_candidates"]]


def _rollback(head: ValueHead, arguments: EvaluateArguments) -> int:
    """How many tokens the runs that go back may take back; 6 if neither the arguments nor the head say it."""
    if arguments.rollback is not None:
        return arguments.rollback
    return int((head.config.operating_point or {}).get("rollback") or 6)
