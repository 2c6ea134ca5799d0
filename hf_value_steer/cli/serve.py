"""`serve`: vLLM's OpenAI-compatible server, steered."""

from collections.abc import Sequence
from importlib.util import find_spec

from hf_value_steer.arguments.steer import ServeArguments


def serve(arguments: ServeArguments, others: Sequence[str]) -> None:
    """Serve until the process is told to stop; `others` go to vLLM."""
    if find_spec("vllm") is None:
        raise ImportError('vLLM is not installed: pip install "hf-value-steer[vllm]".')
    from hf_value_steer.vllm import server

    server.serve(arguments.model, arguments.configuration(), others)
