"""The checks of the doctor, each a function of one context."""

import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_value_steer.backbone.features import ONLY_FINAL, features_width
from hf_value_steer.backbone.parts import output_embedding
from hf_value_steer.configuration.filter import ValueFilterConfig
from hf_value_steer.configuration.operating_point import PLAIN
from hf_value_steer.doctor.context import NEW_TOKENS, PROMPT, Check, Context, Status
from hf_value_steer.doctor.probes import alone_and_among, held_and_fresh, relative, standardized, step_by_step
from hf_value_steer.doctor.speed import check_evaluation, check_speed
from hf_value_steer.generation.kernels import KERNELS, choose_kernel
from hf_value_steer.generation.validation import refuse_model
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.hosts.transformers import CACHE, VERSION, differences_of_transformers, size_of_tables
from hf_value_steer.policy import acceptable


EVALUATIONS: tuple[Literal["lazy", "eager"], ...] = ("lazy", "eager")
POSITIONS = 16
NORM_FACTOR = 4.0  # random tokens are no training text


def diagnose(model: PreTrainedModel, head: ValueHead | str | None = None, num_candidates: int = 8) -> list[Check]:
    """Check that steering `model` will be exact, on random tokens; takes some hundred forwards of one token.

    Args:
        model: the backbone, in evaluation mode, where it will run.
        head ([`ValueHead`] or `str`, *optional*): the head, or its folder or Hub id. Without one that fits, a random
            linear head stands in for it in the checks that need values.
        num_candidates (`int`): K.

    Returns:
        One [`Check`] each, in the order of `CHECKS`. A check that raises has failed; the others still run.
    """
    context = Context(model, head, num_candidates)
    with torch.no_grad():
        return [_attempt(check, context) for check in CHECKS]


def check_host(_context: Context) -> Check:
    """Every internal name of transformers that steering uses is there."""
    if found := differences_of_transformers():
        return Check("host", "FAIL", f"transformers {VERSION} differs: {', '.join(found)}")
    return Check("host", "ok", f"transformers {VERSION}; {size_of_tables()}")


def check_feature(context: Context) -> Check:
    """What the output embedding consumes is `last_hidden_state`, and nothing non-linear follows."""
    input_ids, module = context.prompts(2), output_embedding(context.model)
    feature = context.features(input_ids, ONLY_FINAL)
    expected = context.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state.float()
    if feature.shape != expected.shape:
        return Check("feature", "FAIL", f"has shape {_shape(feature)}, but last_hidden_state {_shape(expected)}")
    probe = feature.to(module.weight.dtype)  # type: ignore[arg-type]
    doubled, once, bias = (module(factor * probe).float() for factor in (2, 1, 0))
    numbers = {
        "width": feature.shape[-1],
        "difference": relative(feature, expected),
        "nonlinearity": relative(doubled + bias, 2 * once),
    }
    if not numbers["difference"] <= context.tolerance:
        detail = "the output embedding does not consume last_hidden_state: a head trained on that reads another tensor"
        return Check("feature", "FAIL", f"{detail} (relative difference {numbers['difference']:.2g})", numbers)
    if not numbers["nonlinearity"] <= context.tolerance:
        return Check("feature", "FAIL", "the output embedding is not linear: a norm follows the feature?", numbers)
    return Check("feature", "ok", f"last_hidden_state, after the final norm, width {feature.shape[-1]}", numbers)


def check_head(context: Context) -> Check:
    """The head loads, fits the width, is finite, and was trained on this backbone."""
    if context.given is None:
        return Check("head", "n.a.", "none given; a random linear head stands in for it below")
    try:
        config = context.loaded.config
    except (OSError, TypeError, ValueError) as error:
        return Check("head", "FAIL", f"{type(error).__name__}: {error} Below, a random linear head stands in for it.")
    if config.backbone_fingerprint is None:
        return Check("head", "info", "fits the width; its config holds no fingerprint, so the backbone is not known")
    return Check("head", "ok", f"fits; backbone {config.backbone}, fingerprint {config.backbone_fingerprint}")


def check_kernel(context: Context) -> Check:
    """Which kernel `lookahead="auto"` takes, and why none that is faster."""
    refuse_model(context.model)
    chosen = type(choose_kernel("auto", context.model)).__name__
    reasons = [_refusal(name, context.model) for name in KERNELS]
    faster = itertools.takewhile(bool, reasons)
    return Check("kernel", "info", ". ".join([chosen, *map(str, faster)]))


def check_identity(context: Context) -> Check:
    """With a head that accepts everything, greedy search writes what plain greedy search writes."""
    input_ids = context.prompts(2, seed=1)
    plain, steered = context.generate(input_ids), context.steer(input_ids, context.accepting())
    different = int((plain.sequences != steered.sequences).sum())
    numbers = {"tokens": 2 * NEW_TOKENS, "different": different}
    if different:
        return Check("identity", "FAIL", f"{different} of {2 * NEW_TOKENS} tokens differ from plain generate", numbers)
    return Check("identity", "ok", f"{2 * NEW_TOKENS} tokens are those of plain generate", numbers)


def check_layers(context: Context) -> Check:
    """What the head reads in steps of decoding is what a forward without a cache has there, of the recorded size."""
    layers, recorded = context.layers, context.head.config.feature_norms
    text, stepped = context.generate(context.prompts(2, seed=1), custom_generate=step_by_step(layers))
    whole = context.features(text, layers)[:, PROMPT:]
    widths = [features_width(context.model, [layer]) for layer in layers]
    pairs = zip(*(torch.split(each, widths, dim=-1) for each in (stepped.float(), whole)), strict=True)
    numbers: dict[str, float] = {}
    faults = []
    for index, (layer, (step, state)) in enumerate(zip(layers, pairs, strict=True)):
        norm = float(state.norm(dim=-1).mean())
        difference = float((step - state).norm(dim=-1).max()) / norm
        numbers |= {f"norm_{layer}": norm, f"difference_{layer}": difference}
        if not difference <= context.tolerance:
            faults.append(f"layer {layer} differs by {difference:.2g} of its norm from a forward without a cache")
        if recorded and not 1 / NORM_FACTOR <= norm / recorded[index] <= NORM_FACTOR:
            faults.append(f"the norm at layer {layer} is {norm:.3g}, but was {recorded[index]:.3g} in training")
    if faults:
        return Check("layers", "FAIL", "; ".join(faults), numbers)
    worst = max(numbers[f"difference_{layer}"] for layer in layers)
    where = ", ".join(f"{layer} (norm {numbers[f'norm_{layer}']:.3g})" for layer in layers)
    return Check("layers", "ok", f"{where}: steps are up to {worst:.2g} of the norm from a forward alone", numbers)


def check_cache(context: Context) -> Check:
    """After interventions, the returned cache goes on as a fresh prefill of the committed text does."""
    input_ids = context.prompts(2, seed=1)
    threshold = _median_threshold(context, context.generate(input_ids).sequences)
    numbers: dict[str, float] = {}
    for evaluation in EVALUATIONS:
        config = ValueFilterConfig(
            value_head=context.head,
            threshold=threshold,
            evaluation=evaluation,
            num_candidates=context.num_candidates,
            **PLAIN,
        )
        out = context.steer(input_ids, config)
        numbers[f"interventions_{evaluation}"] = int(out.interventions.sum())
        held = context.generate(out.sequences, 1, custom_generate=held_and_fresh(out[CACHE], context.layers))
        numbers[f"difference_{evaluation}"] = standardized(held[0], held[1], context.moments[1])
    interventions = min(numbers[f"interventions_{evaluation}"] for evaluation in EVALUATIONS)
    differences = [numbers[f"difference_{evaluation}"] for evaluation in EVALUATIONS]
    if interventions == 0:
        return Check("cache", "FAIL", "the head never intervened, so nothing was checked: is it constant?", numbers)
    measured = f"the next feature differs from that of a fresh prefill by {max(differences):.2g} standard deviations"
    if not all(difference <= 4 * context.tolerance for difference in differences):
        return Check("cache", "FAIL", f"{measured} after {interventions} interventions: rollback fails", numbers)
    return Check("cache", "ok", f"{measured} after {interventions} interventions", numbers)


def check_drift(context: Context) -> Check:
    """How far the value of a token forwarded alone is from its value among K candidates."""
    alone, among = context.generate(
        context.prompts(1, seed=2),
        POSITIONS,
        custom_generate=alone_and_among(context.num_candidates, context.layers),
    )
    values = [_values_of_candidates(context, features) for features in (alone, among)]
    drift = float((values[0] - values[1]).abs().max())
    threshold = context.head.config.threshold or float(values[0].median())
    verdicts = [acceptable(value, torch.tensor(threshold), context.head.config.polarity) for value in values]
    flips = int((verdicts[0] != verdicts[1]).sum())
    numbers = {"max_abs_dvalue": drift, "flips": flips, "tokens": values[0].numel(), "threshold": threshold}
    status: Status = "FAIL" if not drift <= 1e-4 and context.model.dtype == torch.float32 else "info"
    detail = f"one row against {context.num_candidates}: max |dvalue| {drift:.2g}; {flips} of {values[0].numel()}"
    which = "the head's threshold" if context.head.config.threshold else "the median value"
    return Check("drift", status, f"{detail} decisions flip at {which}, {threshold:.3g}", numbers)


def check_padding(context: Context) -> Check:
    """A left-padded batch has the values and the greedy tokens of its rows alone."""
    whole, padding = context.prompts(3, seed=3), (0, 5, 9)
    mask = torch.stack([torch.arange(PROMPT, device=whole.device) >= count for count in padding]).long()
    together = context.steer(whole, context.reading(), attention_mask=mask, output_logits=True)
    values, gaps = [], []
    for row, count in enumerate(padding):
        alone = context.steer(whole[row : row + 1, count:], context.reading(), output_logits=True)
        value, gap = _row_difference(together, alone, row)
        values.append(value)
        gaps.append(gap)
    numbers = {"max_abs_dvalue": max(values), "token_gap": max(gaps)}
    measured = f"max |dvalue| {max(values):.2g}, other tokens up to {max(gaps):.2g} below the best"
    if not (max(values) <= context.tolerance and max(gaps) <= context.tolerance):
        return Check("padding", "FAIL", f"{measured}: pass prompts of one length", numbers)
    return Check("padding", "ok", f"rows of a left-padded batch are as alone: {measured}", numbers)


CHECKS: tuple[Callable[[Context], Check], ...] = (
    check_host,
    check_feature,
    check_head,
    check_kernel,
    check_identity,
    check_layers,
    check_cache,
    check_drift,
    check_padding,
    check_evaluation,
    check_speed,
)


def _attempt(check: Callable[[Context], Check], context: Context) -> Check:
    try:
        return check(context)
    except Exception as error:
        return Check(check.__name__.removeprefix("check_"), "FAIL", f"{type(error).__name__}: {error}")


def _refusal(name: str, model: PreTrainedModel) -> str | None:
    """Why the kernel of that name cannot be used, or `None`."""
    try:
        choose_kernel(name, model)
    except ValueError as error:
        return str(error)
    return None


def _row_difference(together: Any, alone: Any, row: int) -> tuple[float, float]:
    """Largest difference of values up to the first other token, and how far that token is below the best.

    The second number is in standard deviations of the logits: 0 where all tokens are the same, and next to nothing
    where rounding broke a tie.
    """
    steps = len(alone.logits)
    tokens = [out.sequences[index, -steps:] for out, index in ((together, row), (alone, 0))]
    different = (tokens[0] != tokens[1]).nonzero().flatten().tolist()
    end = different[0] if different else steps
    values = (together.token_values[row, :end] - alone.token_values[0, :end]).abs().tolist()
    if not different:
        return max(values), 0.0
    logits = alone.logits[end][0]
    return max(values, default=0.0), float((logits.max() - logits[tokens[0][end]]) / logits.std())


def _median_threshold(context: Context, sequences: Tensor) -> float:
    """The median value of the new tokens: about half of them are rejected."""
    features = context.features(sequences, context.layers)[:, PROMPT - 1 :]
    values = context.scorer(len(sequences)).values_of_tokens(features, [0] * len(sequences))[:, 1:]
    return min(max(float(values.median()), 1e-6), 1 - 1e-6)


def _values_of_candidates(context: Context, features: Tensor) -> Tensor:
    """Values `(positions, K)` of candidates by their features, where a text goes on with the first of each K."""
    scorer, values = context.scorer(1), []
    for candidates in features:
        values.append(scorer.values(candidates[None]))
        scorer.remember(candidates[:1])
    return torch.cat(values)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
