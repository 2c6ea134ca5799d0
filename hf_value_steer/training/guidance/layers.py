"""Which layer, how many bridges, how wide a value space: a probe sweep over the layers of a backbone."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_value_steer.training.guidance.states import ROWS
from hf_value_steer.training.probe import held_out_scores
from hf_value_steer.training.prompts import Formatter, join
from hf_value_steer.training.targets import Targets


DEPTHS = (0.3, 0.8)  # of the layers among which one is chosen: below, meaning is poor; above, little can be steered
TOLERANCE = 0.01  # of the AUROC: so much is given up for a lower layer, which leaves more layers to steer
WIDE = 2048  # backbones wider than this get the larger of the paper's sizes


@dataclass(frozen=True)
class GuidanceSuggestion:
    """What fits a backbone.

    Args:
        layer (`int`): decoder layer, counted from 0.
        num_bridges (`int`), value_width (`int`): those of the paper's backbones of about this width.
        auroc (`list` of `float`): of a linear probe on the output of every layer, on prompts it was not fitted to.
    """

    layer: int
    num_bridges: int
    value_width: int
    auroc: list[float]


@torch.no_grad()
def suggest_guidance_layer(
    model: PreTrainedModel, formatter: Formatter, targets: Targets, rows: Sequence[int], limit: int = 512
) -> GuidanceSuggestion:
    """Fit a linear probe to the outputs of every layer, and choose the lowest layer that is about as good as the best.

    Args:
        model, formatter: the backbone, and how prompts become its input.
        targets: what the tokens of a collection are labelled with.
        rows: of the collection; at most `limit` of them are read.

    Raises:
        ValueError: if the tokens that were read are all of one class.
    """
    from sklearn.metrics import roc_auc_score

    collection = targets.collection
    chosen = random.Random(0).sample(list(rows), min(limit, len(rows)))
    layers: list[list[Tensor]] = []
    labels, prompts = [], []
    for first in range(0, len(chosen), ROWS):
        part = chosen[first : first + ROWS]
        owners = [int(collection.rows.prompt[row]) for row in part]
        texts = [collection.prompts[owner] for owner in owners]
        inputs = join(formatter, texts, [collection.read("tokens", row) for row in part])
        length = int(inputs.pop("prompt_length"))
        real = inputs["attention_mask"][:, length:].bool()
        hidden = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states[1:]
        layers.append([layer[:, length:][real].float() for layer in hidden])
        labels += [targets.generated(row) > 0.5 for row in part]
        prompts.append(torch.tensor(owners)[:, None].expand_as(real)[real])
    label, fold = torch.cat(labels), torch.cat(prompts) % 2
    if any(label[half].all() or not label[half].any() for half in (fold == 0, fold == 1)):
        raise ValueError("The tokens that were read are all of one class: pass more rows, or other targets.")
    auroc = []
    for states in (torch.cat(parts) for parts in zip(*layers, strict=True)):
        scores = held_out_scores(states, label, fold)
        auroc.append(round(float(roc_auc_score(label, scores)), 4))
    count, wide = len(auroc), model.config.get_text_config(decoder=True).hidden_size > WIDE
    allowed = range(int(DEPTHS[0] * count), min(int(DEPTHS[1] * count), count - 2) + 1)
    best = max(auroc[layer] for layer in allowed)
    layer = next(layer for layer in allowed if auroc[layer] >= best - TOLERANCE)
    return GuidanceSuggestion(layer, 7 if wide else 5, 256 if wide else 128, auroc)
