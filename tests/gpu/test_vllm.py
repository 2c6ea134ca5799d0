"""Steered vLLM on a CUDA device, with CUDA graphs: the tests of tests/vllm that compare tokens, decisions and values.

    pytest -m gpu tests/gpu/test_vllm.py                       # once more with VLLM_USE_V2_MODEL_RUNNER=0 and =1

Throughput there: `python -m benchmarks.serving --shape Llama-3.1-8B`.
"""

from typing import Any

import pytest
import torch

from tests.vllm import tiny
from tests.vllm.conftest import accepting, desirable, engine, folder, spread  # noqa: F401
from tests.vllm.helpers import reports, run, runner, tokens
from tests.vllm.test_failing import llm, test_a_broken_head  # noqa: F401
from tests.vllm.test_identity import LENGTHS, test_preemption, test_prompts_in_chunks  # noqa: F401
from tests.vllm.test_identity import _params as params_of
from tests.vllm.test_parity import model, test_every_decision_recomputed, test_same_tokens_as_generate  # noqa: F401


pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
pytest.importorskip("vllm")


@pytest.mark.parametrize("kind", ["greedy", "nucleus", "penalties", "mixed"])
def test_same_tokens_as_stock(engine: Any, accepting: dict[str, Any], kind: str) -> None:  # noqa: F811
    from vllm.config import CUDAGraphMode

    prompts, params = tiny.prompts(len(LENGTHS)), params_of(kind)
    stock, ours = engine(), engine(accepting)
    assert runner(ours).vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE
    answers = run(ours, prompts, params)
    assert tokens(answers) == tokens(run(stock, prompts, params))
    assert not any(told["interventions"] for told in reports(answers))
