"""What cannot go back, and is refused by name."""

from collections.abc import Sequence

from transformers import LogitsProcessorList

from hf_value_steer.errors import UnsupportedError
from hf_value_steer.generation.call import Call
from hf_value_steer.generation.method import Method


# Processors of `transformers` that remember the text which they have seen.
_REMEMBER = ("SynthIDTextWatermarkLogitsProcessor", "UnbatchedClassifierFreeGuidanceLogitsProcessor")


def refuse_going_back(call: Call, methods: Sequence[Method], processors: LogitsProcessorList) -> None:
    """Raise an `UnsupportedError` if something of this call cannot follow where tokens are taken back."""
    follows = {
        "`output_attentions`": not call.config.output_attentions,
        "`inputs_embeds`": call.model_kwargs.get("inputs_embeds") is None,
        'rope of type "longrope" or "dynamic", which follows the longest row,': not call.prepared.longest_row.modules,
        **{f"{type(each).__name__}, whose state is not in its `rowwise`,": each.follows for each in methods},
        **{type(each).__name__: type(each).__name__ not in _REMEMBER for each in processors},
    }
    for name, can in follows.items():
        if not can:
            raise UnsupportedError(f"Tokens cannot be taken back beside {name}: pass `rollback=0`.")
