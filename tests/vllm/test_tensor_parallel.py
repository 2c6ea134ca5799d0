"""Several ranks over gloo: the tokens of one rank, also where the ranks' heads do not agree."""

from typing import Any

import pytest

from tests.vllm import tiny
from tests.vllm.helpers import reports, run, tokens
from tests.vllm.runners import INTERPRETED, SCALE


def _disagree(worker: Any) -> None:
    """Turn the head of every rank but the first upside down."""
    if worker.rank > 0:
        head = worker.model_runner.served.heads["filter"]
        for parameter in head.parameters():
            parameter.data.neg_()


def test_ranks_decide_alike(engine: Any, spread: str) -> None:
    from vllm import SamplingParams

    value_steer = {"method": "filter", "value_head": spread, "threshold": 0.3}
    prompts = tiny.prompts(4 if INTERPRETED else 8)
    params = [
        SamplingParams(seed=index, temperature=index % 2, max_tokens=24 // SCALE) for index in range(len(prompts))
    ]
    alone = run(engine(value_steer), prompts, params)
    for ranks in (3,) if INTERPRETED else (2, 3):
        several = engine(value_steer, tensor_parallel_size=ranks)
        assert tokens(run(several, prompts, params)) == tokens(alone)
        several.collective_rpc(_disagree)
        disagreeing = run(several, prompts, params)
        assert tokens(disagreeing) == tokens(alone)
        for told, expected in zip(reports(disagreeing), reports(alone), strict=True):
            assert told["interventions"] == expected["interventions"]
            assert told["values"] == pytest.approx(expected["values"], abs=1e-4)
        several.llm_engine.engine_core.shutdown()
