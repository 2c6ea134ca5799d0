"""How the tests ask engines, and what they read off the answers."""

from collections.abc import Sequence
from typing import Any

import pytest


def run(llm: Any, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Any]:
    """Outputs in the order of the prompts."""
    return llm.generate([{"prompt_token_ids": list(each)} for each in prompts], list(params), use_tqdm=False)


def tokens(outputs: Sequence[Any]) -> list[list[int]]:
    return [list(each.outputs[0].token_ids) for each in outputs]


def reports(outputs: Sequence[Any]) -> list[dict[str, Any]]:
    return [each.kv_transfer_params["value_steer"] for each in outputs]


def alike(report: dict[str, Any]) -> dict[str, Any]:
    """Equal to a report of the same decisions in other batches, where additions have another order."""
    close = {name: pytest.approx(report[name], abs=1e-5) for name in ("prompt_value", "values")}
    abstained = report["abstained"]
    if abstained is not None:
        close["abstained"] = {**abstained, "value": pytest.approx(abstained["value"], abs=1e-5)}
    return {**report, **close}


def scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def runner(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
