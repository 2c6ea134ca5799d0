"""Writing vectors into the weights: a checkpoint that is steered wherever it is loaded."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_value_steer.activation.apply import is_steered, steered
from hf_value_steer.activation.exports import Export, plan_export
from hf_value_steer.activation.residual import pad_right
from hf_value_steer.activation.vectors import Directions
from hf_value_steer.backbone.parts import fingerprint, layers_path, residual_width
from hf_value_steer.files.writing import write_json
from hf_value_steer.hosts.transformers import attention_of


_MODULE = "modeling_steered"
# How far baked logits may be from hooked ones, relative to what steering changes, and to the logits themselves.
_TOLERANCE = {torch.float32: (1e-3, 1e-6), torch.bfloat16: (0.3, 2e-2), torch.float16: (0.1, 3e-3)}

_TEMPLATE = '''"""{model} with a vector added behind some of its layers. Made by hf-value-steer."""

from functools import partial

import torch
from torch import nn
from transformers import {config}, {model}


class SteeredConfig({config}):
    model_type = "steered_{type}"


class SteeredForCausalLM({model}):
    config_class = SteeredConfig

    def __init__(self, config):
        super().__init__(config)
        self.activation_offsets = nn.Parameter(torch.zeros(len(config.steered_layers), config.steered_width))
        layers = self.get_submodule(config.steered_path)
        for row, layer in enumerate(config.steered_layers):
            layers[layer].register_forward_hook(partial(self._add, row))
        self.post_init()

    def _add(self, row, layer, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden + self.activation_offsets[row].to(hidden.device, hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
'''


def bake(
    model: PreTrainedModel,
    vectors: Directions,
    multiplier: float,
    output_dir: str | os.PathLike[str],
    *,
    sequences: Sequence[Sequence[int]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    allow_backbone_mismatch: bool = False,
    max_shard_size: str = "5GB",
) -> dict[str, Any]:
    """Write a checkpoint of `model` that adds the vectors at every position, by itself.

    It is loaded by plain `AutoModelForCausalLM.from_pretrained` unless the report's `kind` is `"custom code"`, which
    needs `trust_remote_code=True`. It is read back and compared with the steered model before this returns, and
    appears complete or not at all; `steering/report.json` beside it holds the report.

    Args:
        model: the backbone, not quantised; it stays as it is.
        vectors: of this model.
        multiplier (`float`): how much of them.
        output_dir: folder, which must not be there yet.
        sequences (*optional*): token ids of the texts on which the two are compared; random tokens by default.
        tokenizer (*optional*): saved beside it.
        allow_backbone_mismatch (`bool`): as in [`~hf_value_steer.activation.apply.steered`].
        max_shard_size (`str`): as in `save_pretrained`.

    Returns:
        The report: `kind`, `offset_rounding` (largest relative error of an offset in the model's dtype),
        `max_logit_difference`, `max_logit_change` (by steering), `relative_difference`, `same_greedy_tokens`, ..., and
        under `original` which model it was: `name_or_path`, `revision` (of the Hub, if known), `fingerprint`.

    Raises:
        ValueError: for vectors that do not fit, a quantised, offloaded or steered model, a folder that is there, and
            if the checkpoint does not compute what the steered model does. Nothing is written then.
    """
    target = Path(output_dir)
    vectors.check_fit(model, allow_backbone_mismatch)
    _refuse(model, target)
    sequences = sequences or _random_sequences(model)
    with torch.no_grad(), steered(model, vectors, multiplier, allow_backbone_mismatch=True):
        expected = _logits(model, sequences)
    offsets = multiplier * vectors.strengths[:, None] * vectors.directions
    export = plan_export(model)
    state, rounding = _with_offsets(model, export, vectors.layers, offsets)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch) / target.name
        _save(model, export, vectors.layers, state, folder, max_shard_size)
        report = {
            "kind": export.kind,
            "multiplier": multiplier,
            "layers": list(vectors.layers),
            "attribute": vectors.attribute,
            "offset_rounding": rounding,
            "dtype": str(model.dtype).removeprefix("torch."),
            "original": _identity(model),
            **_compare(model, folder, export, sequences, expected),
        }
        write_json(folder / "steering" / "report.json", report)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        os.rename(folder, target)
    return report


def _refuse(model: PreTrainedModel, target: Path) -> None:
    if target.exists():
        raise ValueError(f"`output_dir` {target} is there already: choose another.")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("A quantised model cannot be baked: offsets go into float weights. Bake it, then quantise.")
    if is_steered(model):
        raise ValueError("This model is steered by vectors now: leave that `with` block before baking.")
    if model.dtype not in _TOLERANCE:
        raise ValueError(f"A model in {model.dtype} cannot be baked: load it in float32, bfloat16 or float16.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("Weights of this model are offloaded: load it on the CPU to bake it.")
    if getattr(transformers, type(model).__name__, None) is not type(model):
        raise ValueError(f"{type(model).__name__} is no class of transformers itself: it cannot be baked.")


def _identity(model: PreTrainedModel) -> dict[str, str | None]:
    """Which model was baked: enough to load it again, and to see whether it is the same one."""
    return {
        "name_or_path": model.name_or_path or None,
        "revision": getattr(model.config, "_commit_hash", None),
        "fingerprint": fingerprint(model),
    }


def _random_sequences(model: PreTrainedModel) -> list[list[int]]:
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in (8, 16, 24)]


@torch.no_grad()
def _logits(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Logits of every token, `(tokens, vocabulary)`, float32."""
    rows = []
    for sequence in sequences:
        ids, mask = pad_right([sequence], model.device)
        rows.append(model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0].float().cpu())
    return torch.cat(rows)


def _with_offsets(
    model: PreTrainedModel, export: Export, layers: Sequence[int], offsets: Tensor
) -> tuple[dict[str, Tensor], float]:
    """The checkpoint's tensors, and the largest relative rounding error among its offsets."""
    state, path = dict(export.state), layers_path(model)
    if export.kind == "custom code":
        state["activation_offsets"] = offsets.to(model.dtype)
        return state, _rounding(state["activation_offsets"].float(), offsets)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(export.config).state_dict()
    for name in shapes.keys() - state.keys():
        state[name] = torch.zeros(shapes[name].shape, dtype=model.dtype)
    worst = 0.0
    for layer, offset in zip(layers, offsets, strict=True):
        name = f"{path}.{layer}.{export.spot}.bias"
        before = state[name].detach().float().cpu()
        state[name] = (before + offset / export.scale).to(model.dtype)
        worst = max(worst, _rounding((state[name].float() - before) * export.scale, offset))
    return state, worst


def _rounding(rounded: Tensor, exact: Tensor) -> float:
    return float(((rounded - exact).norm(dim=-1) / exact.norm(dim=-1)).nan_to_num().max())


def _save(
    model: PreTrainedModel,
    export: Export,
    layers: Sequence[int],
    state: Mapping[str, Tensor],
    folder: Path,
    max_shard_size: str,
) -> None:
    if export.kind == "custom code":
        kind, config = _with_code(model, layers, folder)
    else:
        config = export.config
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(config))
    baked = _assembled(kind, config, state)
    baked.generation_config = model.generation_config
    baked.save_pretrained(folder, max_shard_size=max_shard_size)


def _with_code(model: PreTrainedModel, layers: Sequence[int], folder: Path) -> tuple[Any, Any]:
    """Class and configuration of a checkpoint that brings its own code, which is written into `folder`."""
    name, kind = type(model).__name__, type(model.config).model_type  # the class's: an instance has what its file says
    folder.mkdir()
    code = _TEMPLATE.format(model=name, config=type(model.config).__name__, type=kind)
    (folder / f"{_MODULE}.py").write_text(code, encoding="utf-8")
    steered_class = get_class_from_dynamic_module(f"{_MODULE}.SteeredForCausalLM", str(folder))
    # A model type of its own: without `trust_remote_code` loading fails, instead of giving an unsteered model.
    changed = {
        "model_type": f"steered_{kind}",
        "auto_map": {
            "AutoConfig": f"{_MODULE}.SteeredConfig",
            "AutoModelForCausalLM": f"{_MODULE}.SteeredForCausalLM",
        },
        "steered_layers": list(layers),
        "steered_path": layers_path(model),
        "steered_width": residual_width(model),
    }
    return steered_class, steered_class.config_class.from_dict({**model.config.to_dict(), **changed})


def _assembled(kind: Any, config: Any, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model of these tensors, without a copy of them, fit to be saved."""
    with torch.device("meta"):
        model: PreTrainedModel = kind(config)
    model.load_state_dict({name: tensor.detach() for name, tensor in state.items()}, assign=True)
    model.tie_weights()
    return model


def _compare(
    model: PreTrainedModel, folder: Path, export: Export, sequences: Sequence[Sequence[int]], expected: Tensor
) -> dict[str, Any]:
    """The checkpoint as it is loaded against the steered model, on the same texts.

    Raises:
        ValueError: if they differ by more than rounding.
    """
    trust = export.kind == "custom code"
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=model.dtype, trust_remote_code=trust, attn_implementation=attention_of(model.config)
    )
    found = _logits(loaded.to(model.device).eval(), sequences)
    plain = _logits(model, sequences)
    relative, rounding = _TOLERANCE[model.dtype]
    error, change = (found - expected).norm(), (expected - plain).norm()
    if not error <= relative * change + rounding * expected.norm():
        raise ValueError(
            f"A checkpoint of {type(model).__name__} with these offsets in its weights does not compute what the "
            f"steered model does (logits differ by {float(error):.3g}, steering changes them by {float(change):.3g}). "
            "Nothing was written."
        )
    return {
        "texts": len(sequences),
        "tokens": len(expected),
        "max_logit_difference": float((found - expected).abs().max()),
        "max_logit_change": float((expected - plain).abs().max()),
        "relative_difference": float(error / change) if change else None,
        "same_greedy_tokens": float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
    }
