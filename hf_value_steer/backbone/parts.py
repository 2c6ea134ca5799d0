"""The one place that knows how to read a backbone: the feature, its width, and which backbone it is."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import GenerationMixin, PreTrainedModel

from hf_value_steer.backbone.weights import sample, until_weights_change
from hf_value_steer.errors import MismatchError, UnsupportedError


def output_embedding(model: PreTrainedModel) -> nn.Module:
    """The module (`lm_head`) whose input is the feature: final layer, after the final norm, per token."""
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Module):
        raise ValueError(f"{type(model).__name__} has no output embeddings: value steering needs a causal LM.")
    return module


def feature_width(model: PreTrainedModel) -> int:
    """Width of the feature. It differs from `hidden_size` in models that project before the output embedding."""
    return int(output_embedding(model).in_features)  # type: ignore[arg-type]


def residual_width(model: PreTrainedModel) -> int:
    """Width of the residual stream; the feature's may differ."""
    return int(model.config.get_text_config(decoder=True).hidden_size)


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many tokens the model has scores for."""
    return int(output_embedding(model).out_features)  # type: ignore[arg-type]


@until_weights_change
def fingerprint(model: PreTrainedModel) -> str:
    """Identity of a backbone's weights: a digest of a few entries of every parameter, and of the parameters' names.

    The same checkpoint gives the same answer in float32, bfloat16 and (for checkpoints stored in bfloat16) float16.
    A fine-tuned, merged or quantised backbone gives another one: its features are others, too. Of a model with PEFT
    adapters the active ones count; with all of them switched off it is the backbone that it was without them.

    Raises:
        ValueError: if weights are offloaded, or sharded over several processes, and so cannot be read here.
    """
    return fingerprint_of([*_acting_parameters(model), *_scalings(model)])


def _acting_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that a forward reads, by the names that they have without adapters that are switched off."""
    adapters = getattr(model, "peft_config", {})
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "adapter_layer_names")}
    for name, parameter in model.named_parameters():
        parts, acts = name.split("."), True
        for depth in range(1, len(parts)) if adapted else ():
            module = adapted.get(".".join(name.split(".")[:depth]))
            if module is None:
                continue
            if parts[depth] in ("base_layer", "original_module", "token_adapter"):
                parts[depth] = "" if module.disable_adapters else parts[depth]
            elif parts[depth + 1] in adapters:
                acts &= not module.disable_adapters and parts[depth + 1] in module.active_adapters
        if acts:
            yield ".".join(filter(None, parts)), parameter


def _scalings(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """How much each active adapter counts, by layer."""
    for name, module in model.named_modules():
        if isinstance(scaling := getattr(module, "scaling", None), dict) and not module.disable_adapters:
            for adapter in module.active_adapters:
                yield f"{name}.scaling.{adapter}", torch.tensor(float(scaling.get(adapter, 1.0)))


def fingerprint_of(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """[`fingerprint`] of parameters by name, wherever they come from."""
    digest = hashlib.sha256()
    for name, parameter in parameters:
        if parameter.is_meta or isinstance(parameter.data, DTensor):
            raise ValueError(
                f"The weights {name} are offloaded or sharded, so this backbone cannot be identified: pass "
                "`allow_backbone_mismatch=True` if you know that the head fits."
            )
        entries = sample(parameter)
        canonical = entries.to(torch.bfloat16).to(torch.float16) if entries.is_floating_point() else entries
        digest.update(f"{name}:{tuple(parameter.shape)}".encode())
        digest.update(canonical.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class OfBackbone(Protocol):
    """What says which backbone it was made for: `None` where it does not know."""

    @property
    def backbone(self) -> str | None: ...

    @property
    def backbone_fingerprint(self) -> str | None: ...


def refuse_other_backbone(name: str, made_for: OfBackbone, model: PreTrainedModel) -> None:
    """Raise a `MismatchError` if what argument `name` holds was trained on other weights than those of `model`.

    It is let through if it names no `backbone_fingerprint`.
    """
    expected = made_for.backbone_fingerprint
    if expected and (found := fingerprint(model)) != expected:
        adapted = ", with PEFT adapters" if getattr(model, "peft_config", None) else ""
        raise MismatchError(
            f"`{name}` was trained on backbone {made_for.backbone!r} with fingerprint {expected}, but "
            f"this model ({model.name_or_path!r}{adapted}) has {found}: it would mean nothing here. Load the matching "
            "one or backbone, or pass `allow_backbone_mismatch=True` if you know that they fit."
        )


def underlying(model: nn.Module) -> PreTrainedModel:
    """The model of `transformers` that is called in the end, inside what is wrapped around it (PEFT, `torch.compile`).

    A model of `transformers` is returned as it is.

    Raises:
        TypeError: if there is none inside that can generate.
        UnsupportedError: if it is run as several copies, or in parts.
    """
    if isinstance(model, nn.DataParallel | FullyShardedDataParallel):
        raise UnsupportedError(
            f"A model inside {type(model).__name__} cannot be steered: it runs as copies, or in parts, that nobody "
            "watches. Pass the model inside, `model.module`, on one device."
        )
    for inside in model.modules():
        if isinstance(inside, PreTrainedModel) and isinstance(inside, GenerationMixin):
            return inside
    raise TypeError(f"`model` has to be a transformers model that can generate, got {type(model).__name__}.")


def layers_path(model: PreTrainedModel) -> str:
    """Dotted name of the `nn.ModuleList` that holds the decoder layers.

    Raises:
        ValueError: if the model has no such list, or more than one.
    """
    depth = num_layers(model)
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = [name for name in lists if len(model.get_submodule(name)) == depth]
    outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outermost) != 1:
        raise ValueError(
            f"{type(model).__name__} cannot be steered in its layers: it should have one list of {depth} decoder "
            f"layers, found {len(outermost)} ({', '.join(outermost)})."
        )
    return str(outermost[0])


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers; layer `l` is counted from 0, and its *residual* is what it hands on."""
    layers: nn.ModuleList = model.get_submodule(layers_path(model))
    return layers


def layer_stack(model: PreTrainedModel) -> nn.Module:
    """The module that runs the decoder layers one after another and returns what the rest of the model starts from."""
    try:
        stack: nn.Module = model.get_submodule(layers_path(model).rpartition(".")[0])
    except ValueError:  # its layers stand in no list of their own
        stack = model.base_model
    return stack


def num_layers(model: PreTrainedModel) -> int:
    """Number of decoder layers. Some configs count those of an encoder as `num_hidden_layers`."""
    config = model.config.get_text_config(decoder=True)
    return int(getattr(config, "decoder_layers", None) or config.num_hidden_layers)
