"""How much of a CPU's memory vLLM is asked to take, on machines that are made up, without vLLM."""

import math
import sys
from types import SimpleNamespace

import pytest

from hf_value_steer.vllm.memory import cpu_memory


GIB = 2**30


@pytest.fixture
def machine(monkeypatch):
    """`machine((total, available), ...)`: the memory nodes of a CPU, in GiB; `cpu=False` for another device."""
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)

    def make(*nodes, cpu=True):
        infos = [SimpleNamespace(total_memory=int(t * GIB), available_memory=int(a * GIB)) for t, a in nodes]
        resources = {
            "get_visible_memory_node": lambda: list(range(len(nodes))),
            "get_memory_node_info": infos.__getitem__,
        }
        platform = SimpleNamespace(is_cpu=lambda: cpu)
        for name in ("vllm", "vllm.utils"):
            monkeypatch.setitem(sys.modules, name, SimpleNamespace())
        monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
        monkeypatch.setitem(sys.modules, "vllm.utils.cpu_resource_utils", SimpleNamespace(**resources))

    return make


@pytest.mark.parametrize("total", [8, 24, 512])
@pytest.mark.parametrize("used", [0.0, 0.07, 0.25, 0.5, 0.7])
def test_what_is_asked_for_is_free_when_the_engine_asks(machine, total, used):
    free = total * (1 - used)
    machine((total, free))
    asked = math.ceil(cpu_memory()["gpu_memory_utilization"] * total * GIB) / GIB  # as vLLM's worker asks
    assert 0.9 * (free - 1.5) - total / 100 <= asked <= min(free - 1.2, 0.9 * free)


def test_the_fullest_node_decides(machine):
    machine((64, 60), (64, 33.5), (128, 120))
    assert cpu_memory() == {"gpu_memory_utilization": 0.45}


def test_elsewhere_and_where_it_is_said_otherwise_nothing_is_asked_for(machine, monkeypatch):
    machine((24, 12), cpu=False)
    assert cpu_memory() == {}
    machine((24, 12))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert cpu_memory() == {}


def test_a_full_memory_is_still_a_share_that_vllm_can_refuse(machine):
    machine((24, 1))
    assert cpu_memory() == {"gpu_memory_utilization": 0.01}
