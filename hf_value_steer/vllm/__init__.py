"""Value steering under vLLM: the same heads, configurations and decisions, at the speed of the server.

```python
from vllm import LLM, SamplingParams
from hf_value_steer.vllm import steered_engine_args

llm = LLM(**steered_engine_args("org/model", value_steer={"method": "filter", "value_head": "org/head"}))
```
"""

from hf_value_steer.vllm.arguments import steered_engine_args


__all__ = ["steered_engine_args"]
