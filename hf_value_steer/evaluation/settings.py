"""Which runs an evaluation makes: the grid of the filter, a placebo, and baselines."""

from hf_value_steer.arguments.evaluate import EvaluateArguments
from hf_value_steer.configuration.filter import ValueFilterConfig
from hf_value_steer.evaluation.runs import (
    Runner,
    Setting,
    Texts,
    args_reranking,
    best_of,
    placebo,
    shuffled,
    value_filter,
)
from hf_value_steer.evaluation.trade_off import candidates, in_the_loop, trade_off
from hf_value_steer.generation.scorer import fitting_calibration
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.training.prompts import load_prompts


def filter_runs(runner: Runner, head: ValueHead, arguments: EvaluateArguments) -> list[tuple[Setting, Texts]]:
    """The grid, the placebo that intervenes as often as its last setting, and the baselines."""
    settings = [*_grid(head, arguments), *in_the_loop(head, arguments)]
    runs = [(setting, runner.run(setting)) for setting in settings]
    most = max(candidates(head, arguments))
    steered = [texts for setting, texts in runs if setting.method in ("filter", "rollback", "soft")]
    if arguments.placebo and steered:
        rate = sum(steered[-1].interventions) / sum(map(len, steered[-1].ids))
        setting = placebo(runner, shuffled(head, seed=1), most, rate)
        runs.append((setting, runner.run(setting)))
    for baseline in arguments.baselines:
        runs.append(baseline_run(runner, head, baseline, most, arguments))
    return runs


def _grid(head: ValueHead, arguments: EvaluateArguments) -> list[Setting]:
    thresholds = filter_thresholds(head, arguments)
    if arguments.alphas:
        return trade_off(head, arguments, thresholds)
    named = len(thresholds) > 1
    return [value_filter(head, c, k, named) for k in candidates(head, arguments) for c in thresholds]


def filter_thresholds(head: ValueHead, arguments: EvaluateArguments) -> list[float]:
    """The grid of thresholds, those of the promises, or the head's own; a `ValueError` if it has none."""
    if arguments.alphas:
        return [_promised(head, alpha) for alpha in arguments.alphas]
    if arguments.thresholds:
        return arguments.thresholds
    if head.config.threshold is not None:
        return [head.config.threshold]
    if alpha := (head.config.operating_point or {}).get("alpha"):
        return [_promised(head, alpha)]
    raise ValueError("`thresholds` is empty, and the head has no default threshold: calibrate it, or pass some.")


def _promised(head: ValueHead, alpha: float) -> float:
    """The threshold of the value that a config with this `alpha` takes."""
    calibration = fitting_calibration(ValueFilterConfig(value_head=head, alpha=alpha), head)
    if calibration.mode == "martingale":
        raise ValueError(
            "The calibration of this head has the mode 'martingale', which promises growth and not values: pass "
            "`thresholds`, or calibrate in another mode."
        )
    return calibration.promised_threshold(alpha)


def baseline_run(
    runner: Runner, head: ValueHead, baseline: str, count: int, arguments: EvaluateArguments
) -> tuple[Setting, Texts]:
    """One baseline; `count` is its K."""
    if baseline == "best_of_n":
        n = arguments.best_of
        return Setting(f"best of {n}", "best_of_n", num_candidates=n), best_of(runner, head, n)
    if baseline == "args":
        setting = args_reranking(head, count)
    elif baseline == "bad_words":
        setting = Setting("bad words", "bad_words", options={"bad_words_ids": bad_words_ids(runner, arguments)})
    else:
        setting = Setting("system prompt", "system_prompt", system_prompt=arguments.system_prompt)
    return setting, runner.run(setting)


def forbidden_words(arguments: EvaluateArguments) -> list[str]:
    """The words of the baseline `bad_words`; none without it."""
    if "bad_words" not in arguments.baselines:
        return []
    return [prompt.text for prompt in load_prompts(str(arguments.bad_words), argument="bad_words")]


def bad_words_ids(runner: Runner, arguments: EvaluateArguments) -> list[list[int]]:
    """Token ids of the forbidden words, at the start of a text and after a space."""
    tokenizer = runner.formatter.tokenizer
    forms = [form for word in forbidden_words(arguments) for form in (word, f" {word}")]
    return [ids for ids in tokenizer(forms, add_special_tokens=False)["input_ids"] if ids]
