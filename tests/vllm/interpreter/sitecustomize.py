"""Lets the V2 model runner run without a GPU, its Triton kernels interpreted: a start-up file of Python.

`PYTHONPATH=$PWD/tests/vllm/interpreter VLLM_USE_V2_MODEL_RUNNER=1 python -m pytest tests/vllm`. Only for tests:
interpreted kernels are slow.
"""

import os
from importlib import import_module
from types import SimpleNamespace


os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it while it is imported
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # Inductor would compile what vLLM needs for several ranks with this backend
active = SimpleNamespace(is_active=lambda: True)
import_module("triton.backends").backends["cpu"] = SimpleNamespace(driver=active, compiler=None)
