"""Which model runner the tests are about: V1, or V2 under `VLLM_USE_V2_MODEL_RUNNER=1`.

Without a GPU the kernels of V2 are interpreted (`interpreter/sitecustomize.py`), and the tests smaller by `SCALE`.
"""

import os


V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SCALE = 4 if INTERPRETED else 1


def avoid_what_cannot_be_interpreted() -> None:
    """Top-k and top-p by PyTorch, steered or not: their kernel has no interpretation."""
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False
