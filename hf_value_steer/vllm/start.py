"""Starts vLLM for `collect`, with a clear error where it is not installed."""

from collections.abc import Sequence

from hf_value_steer.arguments.collect import CollectArguments
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.training.continuation import Continuation


def vllm_engine(arguments: CollectArguments, prompts: Sequence[Prompt]) -> Continuation:
    """The engine that continues `prompts`, for `collect(..., serve=vllm_engine)`.

    Raises:
        ImportError: if vLLM is not installed.
        ValueError: for a model or an argument with which features cannot be kept, or a prompt that is too long.
    """
    try:
        from hf_value_steer.vllm.collecting import VllmEngine
    except ImportError as error:
        raise ImportError(f'`engine="vllm"` needs vLLM: pip install "hf-value-steer[vllm]" ({error}).') from error
    return VllmEngine(arguments, prompts)
