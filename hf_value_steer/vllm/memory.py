"""How much memory vLLM may take on a CPU. By default it asks for 92 % of all there is, and dies where less is free."""

import math
import os


PROCESSES = 1.5 * 2**30  # bytes that the engine's processes take before they ask for more; measured: 1.2 GiB
ASKED = 0.9  # share of what is free then: other processes need memory, too


def share_of(total: int, available: int) -> float:
    """The share of a memory that vLLM may ask for, in whole hundredths and at least one.

    Args:
        total (`int`): its bytes.
        available (`int`): how many of them are free.
    """
    return max(math.floor(100 * ASKED * (available - PROCESSES) / total), 1) / 100


def cpu_memory() -> dict[str, float]:
    """What to pass to vLLM where its default may not fit: `gpu_memory_utilization`, which vLLM also reads on a CPU.

    Empty on other devices, and if `VLLM_CPU_KVCACHE_SPACE` sets the size of the cache.
    """
    from vllm.platforms import current_platform
    from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

    if not current_platform.is_cpu() or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return {}
    nodes = [get_memory_node_info(node) for node in get_visible_memory_node()]
    return {"gpu_memory_utilization": min(share_of(node.total_memory, node.available_memory) for node in nodes)}
