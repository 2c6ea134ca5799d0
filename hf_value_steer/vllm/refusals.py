"""What cannot be steered exactly, refused by name: engines at start-up, requests at admission."""

import os
from collections.abc import Mapping
from typing import Any

import vllm
from vllm.config import ModelConfig, VllmConfig
from vllm.sampling_params import SamplingParams

from hf_value_steer.configuration.abstain import AbstentionConfig
from hf_value_steer.configuration.filter import ValueFilterConfig
from hf_value_steer.configuration.methods import SteeringConfig
from hf_value_steer.vllm.fingerprint import checkpoint_fingerprint
from hf_value_steer.vllm.served import ServedMethods


VALIDATED = ("0.32", "0.33")
ANY_VERSION = "HF_VALUE_STEER_ANY_VLLM"


def refuse_engine(config: VllmConfig) -> None:
    """Raise a `ValueError` that names everything in the configuration that steering cannot honour."""
    model, parallel = config.model_config, config.parallel_config
    found = {
        "async scheduling with the V1 model runner": config.scheduler_config.async_scheduling
        and not config.use_v2_model_runner,
        "speculative decoding": config.speculative_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "decode or prefill context parallelism": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "data parallelism inside one engine (start several)": parallel.data_parallel_size > 1,
        "LoRA": config.lora_config is not None,
        "a KV connector": config.kv_transfer_config is not None,
        "a model with recurrent state": model.is_hybrid or model.is_attention_free,
        "an encoder-decoder model": model.is_encoder_decoder,
        "a multimodal model": model.supports_multimodal_inputs,
        "prompt embeddings": model.enable_prompt_embeds,
        "a pooling model": model.runner_type == "pooling",
        "a replayed sampling distribution": model.return_sampling_mask,
        "replayed tokens": model.enable_trace_replay,
        "watermarks": config.watermark_config is not None,
        "sampling that is sharded over the ranks": parallel.enable_batch_sharded_sampling,
        "dual-batch overlap": parallel.use_ubatching,
    }
    refused = [name for name, there in found.items() if there]
    if refused:
        raise ValueError(f"Value steering under vLLM does not support {', '.join(refused)}.")
    if not vllm.__version__.startswith(VALIDATED) and not os.environ.get(ANY_VERSION):
        raise ValueError(
            f"Value steering was validated with vLLM {', '.join(VALIDATED)}, but this is {vllm.__version__}; set "
            f"{ANY_VERSION}=1 to try it all the same."
        )


def refuse_head(served: ServedMethods, model: ModelConfig) -> None:
    """Raise a `ValueError` for a head of another width, or of another backbone."""
    for config, head in zip(served.methods.values(), served.heads.values(), strict=True):
        if head.config.hidden_size != model.get_hidden_size():
            raise ValueError(
                f"`value_head` {head.name_or_path!r} was trained on hidden_size={head.config.hidden_size}, but "
                f"{model.model!r} has {model.get_hidden_size()}; load the matching head."
            )
        expected = head.config.backbone_fingerprint
        if expected is None or config.allow_backbone_mismatch:
            continue
        found = checkpoint_fingerprint(model.model, model.revision)
        if found != expected:
            raise ValueError(
                f"`value_head` {head.name_or_path!r} was trained on backbone {head.config.backbone!r} with "
                f"fingerprint {expected}, but {model.model!r} has {found}: its values would mean nothing. Load the "
                "matching head, or set `allow_backbone_mismatch` if you know that they fit."
            )


def refuse_message(served: ServedMethods, model: ModelConfig) -> None:
    """Raise a `ValueError` for a message of abstention with tokens that the model does not have."""
    if served.abstain is None:
        return
    vocabulary = model.get_vocab_size()
    if unknown := [token for token in served.abstain.message_ids or () if token >= vocabulary]:
        raise ValueError(
            f"Abstention would end requests with tokens {unknown} of `message_ids`, but {model.model!r} has only "
            f"{vocabulary}: use ids of its own tokenizer."
        )


def refuse_request(params: SamplingParams, methods: Mapping[str, SteeringConfig]) -> None:
    """Raise a `ValueError` that names everything in a request that its `methods` cannot honour."""
    ends = any(isinstance(each, AbstentionConfig) or _ends_rows(each) for each in methods.values())
    found: dict[str, Any] = {
        "structured outputs": params.structured_outputs,
        "`logprobs=-1`": params.logprobs == -1,
        "`logprob_token_ids`": params.logprob_token_ids,
        "`thinking_token_budget`": params.thinking_token_budget,
        "`ignore_eos` with a method that ends texts": params.ignore_eos and ends,
    }
    refused = [name for name, there in found.items() if there]
    if refused and methods:
        raise ValueError(f"Value steering under vLLM does not support {', '.join(refused)}.")


def _ends_rows(config: SteeringConfig) -> bool:
    return isinstance(config, ValueFilterConfig) and config.fallback == "abstain"
