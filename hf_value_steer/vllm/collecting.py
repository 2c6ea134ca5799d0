"""vLLM as the engine of `collect`: its tokens, and the features that its model runner sees under its own kernels."""

import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
import vllm
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from vllm import LLM, SamplingParams

from hf_value_steer.arguments.collect import CollectArguments
from hf_value_steer.backbone.features import FINAL, Features
from hf_value_steer.files.references import model_name
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.training.continuation import Batch, seed_of, shard_tensors, until_end
from hf_value_steer.training.prompts import Formatter
from hf_value_steer.vllm.fingerprint import checkpoint_fingerprint
from hf_value_steer.vllm.memory import cpu_memory
from hf_value_steer.vllm.recording import ROW


WORKER = "hf_value_steer.vllm.recording.RecordingWorker"
# These arguments change the model, but not the checkpoint, whose fingerprint is recorded.
CHANGING = {"hf_overrides", "load_format", "quantization", "revision", "tokenizer", "tokenizer_revision"}


class VllmEngine:
    """Continues prompts with vLLM; an [`~hf_value_steer.training.continuation.Continuation`].

    `collect` calls [`tensors`] with a batch of prompts, and gets the tensors of a shard. The engine runs in this
    process and without prefix caching, so that a shard does not depend on the shards before it. Every row is drawn to
    its full length and cut at its end, as the feature of an EOS appears one step after it.

    Args:
        arguments: what to generate.
        prompts: all that will be continued.

    Raises:
        ValueError: for a model or an argument with which features cannot be kept, or a prompt that is too long.
    """

    def __init__(self, arguments: CollectArguments, prompts: Sequence[Prompt]):
        name, self.arguments = model_name(arguments.model), arguments
        self.formatter = Formatter(AutoTokenizer.from_pretrained(name), arguments.chat)
        self.eos = _eos(name)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        ours = {
            "model": name,
            "worker_cls": WORKER,
            "enable_prefix_caching": False,
            "async_scheduling": False,
            "disable_hybrid_kv_cache_manager": True,
            "max_logprobs": max(arguments.next_tokens, 1),
        }
        given = json.loads(arguments.engine_args or "{}")
        if taken := sorted(ours.keys() & given.keys()):
            raise ValueError(f"`engine_args`: `collect` sets {', '.join(taken)} itself.")
        if changing := sorted(CHANGING & given.keys()):
            raise ValueError(
                f"`engine_args`: {', '.join(changing)} would change what `model` is, and heads are known by its "
                "fingerprint: pass the folder of the checkpoint that you mean as `model`."
            )
        defaults = {"dtype": arguments.dtype, "seed": 0, "disable_log_stats": True, **cpu_memory()}
        self.llm = LLM(**{**defaults, **given, **ours})
        model = self.llm.llm_engine.model_config
        self.longest, self.defaults = model.max_model_len, model.get_diff_sampling_param()
        self.facts = {
            "backbone_fingerprint": checkpoint_fingerprint(name),
            "hidden_size": model.get_hidden_size(),
            "feature_dtype": str(model.dtype).removeprefix("torch."),
            "kernel": f"decode, {self.llm.collective_rpc('attention')[0]} of vLLM",
            "backend": f"vllm {vllm.__version__}, torch {version('torch')}",
        }
        for first in range(0, len(prompts), arguments.batch_size):
            self._refuse_longer(self._token_ids(prompts[first : first + arguments.batch_size]))

    def tensors(self, batch: Batch) -> dict[str, Tensor]:
        steps, rows = self.arguments.max_new_tokens, len(batch.prompts) * batch.samples
        prompts = self._prompts(batch)
        outputs = self.llm.generate(prompts, [self._params(batch, row) for row in range(rows)], use_tqdm=False)
        recorded, *_ = self.llm.collective_rpc("take_features")  # every rank has them
        features = torch.stack(
            [torch.stack([recorded[row, step] for step in range(steps + 1)]) for row in range(rows)]
        )
        tokens = torch.tensor([output.outputs[0].token_ids for output in outputs])[:, :-1]
        columns = {"tokens": tokens.int()}
        if self.arguments.next_tokens:
            columns |= self._likely([output.outputs[0].logprobs[1:] for output in outputs])
        keep = until_end(tokens, self.eos)
        return shard_tensors(
            batch, keep, columns, Features({FINAL: features[:, 1:]}), Features({FINAL: features[:, 0]})
        )

    def _prompts(self, batch: Batch) -> list[dict[str, list[int]]]:
        """Token ids of every row's prompt."""
        prompts = self._token_ids(batch.prompts)
        return [{"prompt_token_ids": prompt} for prompt in prompts for _ in range(batch.samples)]

    def _token_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        inputs = self.formatter(prompts)
        pairs = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        return [ids[mask.bool()].tolist() for ids, mask in pairs]

    def _refuse_longer(self, prompts: Sequence[Sequence[int]]) -> None:
        room = self.longest - self.arguments.max_new_tokens - 1
        if longer := [prompt for prompt in prompts if len(prompt) > room]:
            raise ValueError(
                f"A prompt of {len(longer[0])} tokens leaves no room for {self.arguments.max_new_tokens} more and one "
                f"to be dropped in vLLM's `max_model_len` of {self.longest}: raise it in `engine_args`."
            )

    def _params(self, batch: Batch, row: int) -> SamplingParams:
        """The sampling parameters of one row."""
        drawn = self.arguments.sampling()
        if not drawn.pop("do_sample"):
            drawn = {"temperature": 0.0}
        steps = self.arguments.max_new_tokens + 1
        return SamplingParams(
            **{**self.defaults, **drawn, "max_tokens": steps, "min_tokens": 0},
            seed=seed_of(self.arguments.seed, batch.index) + row,
            ignore_eos=True,
            logprobs=self.arguments.next_tokens or None,
            extra_args={ROW: row},
        )

    def _likely(self, rows: list[list[dict[int, Any]]]) -> dict[str, Tensor]:
        """The most likely next tokens of every step, from vLLM's logprobs."""
        count = self.arguments.next_tokens
        best = [[sorted(step.items(), key=lambda each: -each[1].logprob)[:count] for step in row] for row in rows]
        logprobs = torch.tensor([[[found.logprob for _, found in step] for step in row] for row in best])
        tokens = torch.tensor([[[token for token, _ in step] for step in row] for row in best])
        return {"next_probabilities": logprobs.exp().half(), "next_tokens": tokens.int()}


def _eos(model: str) -> int | list[int] | None:
    """The tokens that end a text for `generate`."""
    try:
        config = GenerationConfig.from_pretrained(model)
    except OSError:
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(model))
    eos: int | list[int] | None = config.eos_token_id
    return eos
