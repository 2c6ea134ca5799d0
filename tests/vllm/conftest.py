"""Engines in this process, on a tiny model; skipped as a whole where vLLM is not installed."""

import os


os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # tensor parallelism on one NUMA node
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # a test sends a function to the workers
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm import runners, tiny


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.filterwarnings("ignore"))
        if find_spec("vllm") is None:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed: `make test-vllm`"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def accepting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A filter that accepts everything."""
    head = tiny.save_head(tmp_path_factory.mktemp("heads"), "accepting")
    return {"method": "filter", "value_head": head, "threshold": 0.9}


@pytest.fixture(scope="session")
def spread(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_head(tmp_path_factory.mktemp("heads"), "spread")


@pytest.fixture(scope="session")
def desirable(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_head(tmp_path_factory.mktemp("heads"), "spread", "desirable")


_ENGINE = {  # on a CUDA device with CUDA graphs
    "dtype": "float32",
    "max_model_len": 128,
    "enforce_eager": not torch.cuda.is_available(),
    "gpu_memory_utilization": 0.03,
    "max_num_seqs": 8,
    "block_size": 32,
    "num_gpu_blocks_override": 400,
    "disable_log_stats": True,
}


@pytest.fixture(scope="session")
def engine(folder: Path) -> Iterator[Callable[..., Any]]:
    """`engine(value_steer=None, model=None, **vllm_arguments)`: a `vllm.LLM`, of the tiny model where none is given.

    All are kept to the end, since one that is collected takes the process groups of the others with it.
    """
    if runners.INTERPRETED:
        runners.avoid_what_cannot_be_interpreted()
    from vllm import LLM

    from hf_value_steer.vllm import steered_engine_args

    made: dict[str, LLM] = {}

    def make(value_steer: Any = None, model: Path | None = None, **arguments: Any) -> LLM:
        key = repr((value_steer, model, sorted(arguments.items())))
        if key not in made:
            chosen = {**_ENGINE, **arguments}
            if value_steer is None:
                made[key] = LLM(model=str(model or folder), **chosen)
            else:
                made[key] = LLM(**steered_engine_args(str(model or folder), value_steer, **chosen))
        return made[key]

    yield make
    made.clear()
