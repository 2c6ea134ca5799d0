"""`value_steer_generate`: the decoding loop of steered generation, for `model.generate(custom_generate=...)`."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer

from hf_value_steer.configuration.parse import ValueSteer, parse_value_steer
from hf_value_steer.generation.attention import tidied
from hf_value_steer.generation.binding import bind_methods
from hf_value_steer.generation.call import Call
from hf_value_steer.generation.loop import Loop
from hf_value_steer.generation.output import Stops, ValueSteerDecoderOnlyOutput
from hf_value_steer.generation.prepared import PreparedModel
from hf_value_steer.generation.streaming import streaming
from hf_value_steer.generation.validation import refuse_dropped_arguments, refuse_unsupported
from hf_value_steer.hosts.transformers import decoding, sample


def value_steer_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    value_steer: ValueSteer | None = None,
    token_streamer: BaseStreamer | None = None,
    text_tokenizer: PreTrainedTokenizerBase | None = None,
    **model_kwargs: Any,
) -> Tensor | ValueSteerDecoderOnlyOutput:
    r"""Generate while a value head decides which tokens are kept.

    ```python
    out = model.generate(**inputs, custom_generate=value_steer_generate, value_steer=cfg, do_sample=True)
    ```

    With the same seed the output equals that of plain `generate`, row by row, up to the row's first intervention.

    Args:
        model: the backbone; `generate` fills this in, and the four arguments that follow.
        input_ids (`torch.LongTensor` of shape `(batch, length)`): prompt.
        logits_processor: every processor and warper of the call; candidates come from the processed distribution.
        stopping_criteria: criteria of the call.
        generation_config: prepared config of the call.
        value_steer: a [`ValueFilterConfig`], an [`AbstentionConfig`], an [`ActivationConfig`], a
            [`GuidanceConfig`], their dict form, a method of your own
            ([`~hf_value_steer.generation.method.Bindable`]), or a list of several; that of `generation_config` if left
            out.
        token_streamer (`BaseStreamer`, *optional*): receives the prompt, then each token after it was checked.
            (`streamer=` reaches us only through [`enable_value_steer`].)
        text_tokenizer (*optional*): of the model, for judges of text. (So it is with `tokenizer=`.)
        model_kwargs: what `generate` prepared for the model's forward.

    Returns:
        `torch.LongTensor` of shape `(batch, length + new_tokens)`, or, with `return_dict_in_generate=True`, a
        [`ValueSteerDecoderOnlyOutput`].

    Raises:
        ValueError: before the first token, for anything that cannot be honoured.
        ScoringError: in mid-text, if a token could not be checked, for instance because the head or the module
            returns NaN; the token is not emitted.
    """
    value_steer = configured([generation_config]) if value_steer is None else value_steer
    if value_steer is None:
        raise ValueError(
            "`value_steer` is missing: pass a ValueFilterConfig, an AbstentionConfig, an ActivationConfig, a "
            "GuidanceConfig or their dict form."
        )
    with streaming(token_streamer) as streamer, ExitStack() as contexts:
        refuse_dropped_arguments()
        asked = parse_value_steer(value_steer)
        model_kwargs = tidied(model_kwargs, len(input_ids))
        refuse_unsupported(model, generation_config, model_kwargs)
        prepared, stops = PreparedModel(model), Stops.none(len(input_ids), input_ids.device)
        call = Call(prepared, generation_config, input_ids, model_kwargs, asked, stops, contexts, text_tokenizer)
        methods = bind_methods(call)
        if not any(method.needs_loop for method in methods):
            streamer.put(input_ids)
            reader = streamer if token_streamer is not None else None
            return sample(  # type: ignore[no-any-return]
                call.model, input_ids, logits_processor, stopping_criteria, generation_config, reader, model_kwargs
            )
        loop = Loop(call, methods, logits_processor, stopping_criteria, streamer)
        streamer.put(input_ids)
        with decoding(call.model):
            return loop.run()


def configured(configs: Iterable[GenerationConfig | None]) -> ValueSteer | None:
    """The `value_steer` of the first of these generation configs that has one."""
    found = (getattr(config, "value_steer", None) for config in configs)
    return next((each for each in found if each is not None), None)
