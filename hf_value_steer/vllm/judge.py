"""Values of features, such that whatever goes wrong with a head ends requests instead of the engine."""

import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger

from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.policy import answered


logger = init_logger(__name__)


def values_of(head: ValueHead, features: Tensor) -> Tensor:
    """Values of features `(rows, width)`, float32 on the CPU, NaN where there is none.

    A head that raises has no values. With tensor parallelism all ranks go on with those of the first rank, so that
    none of them decides otherwise than the rest.
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
