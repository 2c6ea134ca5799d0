"""What is rehearsed: kernels and evaluations, in two dtypes, on twelve families and some hybrids, by every method."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_value_steer import (
    AbstentionConfig,
    ActivationConfig,
    GuidanceConfig,
    ValueFilterConfig,
    ValueHead,
    value_steer_generate,
)
from hf_value_steer.generation.families import MASKED, SHARED_PREFIX
from tests.families import FAMILIES, build, layered_head, prompts, random_head
from tests.parity.test_guidance import make_module
from tests.rehearsal.fake_cuda import SYNCS, FakeCuda, OnCuda, to_cuda
from tests.tiny_models import build_tiny
from tests.unit.test_steering_vectors import SEQUENCES, random_vectors


KERNELS, EVALUATIONS = ("shared_prefix", "masked", "expanded"), ("lazy", "eager")
DTYPES = (torch.float32, torch.bfloat16)
METHODS = ("filter", "abstain", "vectors")
OTHERS = ("gemma", "mixtral", "olmo2", "phi3", "starcoder2")  # with those of `tests.families` twelve
HYBRIDS = ("lfm2", "falcon_mamba", "zaya")
NEW_TOKENS = 8


@dataclass(frozen=True)
class Case:
    """One generation: `method` is the filter's company, or `"guide"`."""

    family: str
    dtype: torch.dtype
    method: str
    kernel: str = "auto"
    evaluation: str = "lazy"
    layers: tuple[Any, ...] = ("final",)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join((self.family, dtype, self.method, self.kernel, self.evaluation, *map(str, self.layers)))


def cases() -> list[Case]:
    """The whole grid, in an order in which every tenth one takes from everything."""
    steered = [
        Case(family, dtype, method, kernel, evaluation)
        for family, kernel, evaluation, dtype, method in product(
            (*FAMILIES, *OTHERS, *HYBRIDS), KERNELS, EVALUATIONS, DTYPES, METHODS
        )
        if _has(family, kernel)
    ]
    at_a_layer = [
        Case(case.family, case.dtype, case.method, case.kernel, case.evaluation, (0,))
        for case in steered
        if case.family in ("llama", "gemma3", "lfm2") and case.dtype == torch.float32
    ]
    going_back = [
        Case(family, torch.float32, "rollback", "auto", evaluation, layers)
        for family, evaluation, layers in product((*FAMILIES, *HYBRIDS), EVALUATIONS, (("final",), (0,)))
    ]
    return (
        steered + at_a_layer + going_back + [Case(family, dtype, "guide") for family in FAMILIES for dtype in DTYPES]
    )


def _has(family: str, kernel: str) -> bool:
    kind = {"gemma3": "gemma3_text"}.get(family, family)
    return {"shared_prefix": kind in SHARED_PREFIX, "masked": kind in MASKED, "expanded": True}[kernel]


def make(family: str, dtype: torch.dtype) -> PreTrainedModel:
    model = build(family) if family in FAMILIES else build_tiny(family)
    return model.to(dtype)


def configs(case: Case, model: PreTrainedModel, head: ValueHead) -> list[Any]:
    """What is passed as `value_steer`; its artefacts are those of a model on the CPU."""
    if case.method == "guide":
        return [GuidanceConfig(module=make_module(model.float()))]
    filtering = ValueFilterConfig(
        value_head=head, threshold=0.4, num_candidates=4, lookahead=case.kernel, evaluation=case.evaluation, seed=1
    )
    if case.method == "rollback":
        return [replace(filtering, num_candidates=2, rollback=3)]
    company = {
        "filter": [],
        "abstain": [AbstentionConfig(value_head=head, threshold=0.999)],
        "vectors": [ActivationConfig(vectors=random_vectors(model).scale(model, SEQUENCES), multiplier=[2.0, -2.0])],
    }
    return [filtering, *company[case.method]]


def run(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], new_tokens: int = NEW_TOKENS, **arguments: Any
) -> Tensor:
    with torch.no_grad():
        tokens: Tensor = model.generate(
            **inputs, do_sample=False, max_new_tokens=new_tokens, eos_token_id=2, **arguments
        )
    return tokens


@contextmanager
def on_cuda(*parts: Any) -> Iterator[Callable[[Mapping[str, Tensor]], dict[str, Tensor]]]:
    """Models that are moved; yields what moves the inputs of a call."""
    for part in parts:
        to_cuda(part)
    plain = mock.patch("hf_value_steer.generation.forwards.is_plain", return_value=True)  # as it is on a GPU
    with OnCuda(), mock.patch("torch.cuda._lazy_init"), plain:
        yield lambda inputs: {name: FakeCuda(tensor) for name, tensor in inputs.items()}


def rehearse(case: Case) -> None:
    """Generate on the CPU and in disguise.

    Raises:
        AssertionError: if the texts differ, in float32.
        RuntimeError: if devices are mixed.
    """
    model = make(case.family, torch.float32)
    head = random_head(model) if case.layers == ("final",) else layered_head(model, list(case.layers), "mean")
    steer = configs(case, model, head)
    model.to(case.dtype)
    arguments = {"custom_generate": value_steer_generate, "value_steer": steer}
    expected = run(model, prompts(2), **arguments)
    artefacts = [getattr(config, "module", None) or getattr(config, "value_head", None) for config in steer]
    with on_cuda(model, *{id(part): part for part in artefacts if part is not None}.values()) as move:
        found = run(model, move(prompts(2)), **arguments)
    assert isinstance(found, FakeCuda)
    assert case.dtype != torch.float32 or torch.equal(found.inner, expected), "other text than on the CPU"


def waits(model: PreTrainedModel, inputs: Mapping[str, Tensor], **arguments: Any) -> Counter[tuple[str, str]]:
    """How often the host waits in eight more steps of a generation, by kind and place."""
    counted = []
    for new_tokens in (4, 12):
        SYNCS.clear()
        text = run(model, inputs, new_tokens, **arguments)
        assert text.shape[1] == inputs["input_ids"].shape[1] + new_tokens, "rows have ended early"
        counted.append(Counter(SYNCS))
    return counted[1] - counted[0]
