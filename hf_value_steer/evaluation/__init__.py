"""Looking at what steering did: pages of generations with the value of every token.

A head is evaluated by `evaluate.evaluate`, a function in a module of its name, which it would hide here.
"""

from hf_value_steer.arguments.evaluate import EvaluateArguments
from hf_value_steer.evaluation.trace import PromptTrace, TokenTrace, render_page, trace_tokens


__all__ = ["EvaluateArguments", "PromptTrace", "TokenTrace", "render_page", "trace_tokens"]
