"""Values of features. If a head fails, requests end with an error, and the engine lives on."""

import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger

from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.policy import answered


logger = init_logger(__name__)


def values_of(head: ValueHead, features: Tensor) -> Tensor:
    """Values of features `(rows, width)`, float32 on the CPU, NaN where there is none.

    If the head raises, all values are NaN. With tensor parallelism all ranks take the values of the first rank, so
    that all of them decide alike.
    """
    try:
        values = answered(head(features).value)
    except Exception:
        logger.exception("The value head raised; the requests in question end with an error.")
        values = torch.full(features.shape[:1], torch.nan, device=features.device)
    group = get_tp_group()
    if group.world_size > 1:
        values = group.broadcast(values.contiguous(), src=0)
    return values.cpu()
