"""Directions of an attribute: from contrastive texts, from labelled generations, from the gradient of a value head."""

from collections.abc import Callable, Container, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_value_steer.activation.residual import layer_range, read_residuals
from hf_value_steer.activation.steering_vectors import SteeringVectors
from hf_value_steer.backbone.features import FINAL, Features
from hf_value_steer.backbone.parts import fingerprint, num_layers, residual_width, underlying
from hf_value_steer.checks import check_choice, import_optional
from hf_value_steer.choices import DirectionMethod, Pooling
from hf_value_steer.errors import UnsupportedError
from hf_value_steer.generation.scorer import layers_read, require_fit
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.training.label import Labels
from hf_value_steer.training.prompts import Formatter
from hf_value_steer.training.shards import Collection


Side: TypeAlias = tuple[list[list[int]], list[int]]  # token ids of each text, and where in it reading begins


def vectors_from_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    method: DirectionMethod = "mean_difference",
    pooling: Pooling = "last",
    read_token_index: int = -1,
    chat: bool = False,
    layers: Sequence[int] | None = None,
    attribute: str | None = None,
    batch_size: int = 16,
) -> SteeringVectors:
    r"""Directions in which the residuals of texts with the attribute differ from those of texts without it.

    Args:
        model, tokenizer: the backbone.
        positive, negative (sequences of `str`): texts; the n-th of each belong together for `method="pca"`.
        method (`str`): `"mean_difference"` (CAA, arXiv 2312.06681); `"pca"`, the first principal component of the
            pairs' differences, centred on neither side (RepE, arXiv 2310.01405); `"logistic"`, the normal of a
            logistic probe (as in ITI, arXiv 2306.03341). All point from negative to positive.
        pooling (`str`): what stands for a text: the residual of its token at `read_token_index`, or with `"mean"` the
            mean over its tokens from there on, without the first, which is an attention sink in many models.
        read_token_index (`int`): the last token by default. With `pooling="mean"`, -1 is all tokens.
        chat (`bool`): put each text into the chat template, as what the user says; its last token is then the one
            behind which the answer begins.
        layers (sequence of `int`, *optional*): 40-90 % of the depth by default.
        attribute (`str`, *optional*): what the positive texts have.
        batch_size (`int`): texts in one forward pass.

    Raises:
        ValueError: for an empty side, sides of different lengths with `"pca"`, or a difference of zero.
    """
    model = underlying(model)
    _check(method, pooling, positive, negative)
    sides: list[Side] = []
    for texts in (positive, negative):
        rows = _encoded(tokenizer, texts, chat)
        sides.append((rows, [_first_read(len(row), pooling, read_token_index) for row in rows]))
    how = {"source": "pairs", "method": method, "pooling": pooling, "read_token_index": read_token_index}
    how |= {"chat": True} if chat else {}
    return _vectors(model, sides, _layers(model, layers), batch_size, attribute, how)


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], chat: bool) -> list[list[int]]:
    if not chat:
        return [tokenizer(text)["input_ids"] for text in texts]
    formatter = Formatter(tokenizer, chat)
    return [formatter([Prompt(text)])["input_ids"][0].tolist() for text in texts]


def vectors_from_collection(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    collection: Collection,
    judge: str,
    *,
    method: DirectionMethod = "mean_difference",
    pooling: Pooling = "mean",
    threshold: float = 0.5,
    prompts: Container[str] | None = None,
    layers: Sequence[int] | None = None,
    attribute: str | None = None,
    batch_size: int = 16,
) -> SteeringVectors:
    """Directions from generations that a judge scores above `threshold`, against the others of the same prompts.

    Args:
        model, tokenizer: the backbone of the collection.
        collection: labelled by `judge`, see [`~hf_value_steer.training.collect.collect`].
        judge (`str`): its name; a high score is the positive side.
        method, layers, attribute, batch_size: as in [`vectors_from_pairs`]; `"pca"` needs pairs, which there are none.
        pooling (`str`): the mean over a generation's tokens, or its last one.
        threshold (`float`): in (0, 1).
        prompts (container of `str`, *optional*): only generations of these prompts, so that others stay unseen.

    Raises:
        ValueError: if all generations are on one side, or the collection is of another backbone.
    """
    model = underlying(model)
    if fingerprint(model) != collection.manifest["backbone_fingerprint"]:
        raise ValueError(f"{collection.folder} was made with another backbone than this one ({model.name_or_path!r}).")
    if method == "pca":
        raise ValueError('`method`="pca" needs pairs of texts, and a collection has none: pass another.')
    formatter = Formatter(tokenizer, collection.manifest["arguments"]["chat"])
    rows, above = collection.rows, Labels(collection, judge).responses() > threshold
    known = {index for index, each in enumerate(collection.prompts) if prompts is None or each.text in prompts}
    mixed = {p for p in known if len(set(above[rows.prompt == p].tolist())) == 2}
    sides: list[Side] = [([], []), ([], [])]
    for row, (prompt, positive) in enumerate(zip(rows.prompt.tolist(), above.tolist(), strict=True)):
        tokens = collection.read("tokens", row).tolist()
        if prompt in mixed and tokens:
            text = formatter([collection.prompts[prompt]])["input_ids"][0].tolist()
            sides[not positive][0].append(text + tokens)
            sides[not positive][1].append(len(text) if pooling == "mean" else len(text) + len(tokens) - 1)
    _check(method, pooling, sides[0][0], sides[1][0])
    how = {"source": "collection", "judge": judge, "threshold": threshold, "method": method, "pooling": pooling}
    how["collection"] = collection.digest()
    return _vectors(model, sides, _layers(model, layers), batch_size, attribute, how)


def vectors_from_value_head(
    model: PreTrainedModel,
    head: ValueHead,
    sequences: Sequence[Sequence[int]],
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 4,
) -> SteeringVectors:
    """Directions in which the logit of a value head rises fastest, on average over the tokens of some texts.

    Args:
        model: the backbone.
        head: of this backbone; a positive multiplier raises its value, whatever its polarity.
        sequences: token ids of each text.
        layers, batch_size: as in [`vectors_from_pairs`]; none above all that the head reads.

    Raises:
        UnsupportedError: for a head over time.
        ValueError: for layers that the head does not depend on.
    """
    model = underlying(model)
    require_fit(head, model)
    if head.remembers:
        raise UnsupportedError(
            f"A head over time (`temporal`={head.config.temporal!r}) values a token with those before it, and has no "
            "direction of one token: pass a head without."
        )
    layers, reads = _layers(model, layers), layers_read(head, model)
    below = [layer for layer in reads if layer != FINAL]
    if FINAL not in reads and layers[-1] > max(below):
        raise ValueError(f"This head reads nothing above layer {max(below)}, but `layers` are {layers}: name others.")
    totals = {layer: torch.zeros(residual_width(model)) for layer in layers}
    with torch.enable_grad():
        for residuals, final, mask in read_residuals(model, sequences, sorted({*layers, *below}), batch_size):
            feature = Features([*residuals.items(), (FINAL, final)]).of(reads)
            logits = head.to(feature.device)(feature).logits[mask.bool().to(feature.device)].sum()
            gradients = torch.autograd.grad(logits, [residuals[layer] for layer in layers])
            for layer, gradient in zip(layers, gradients, strict=True):
                totals[layer] += gradient.float().sum(dim=(0, 1)).cpu()
    recorded = {"source": "value head", "head": head.fingerprint(), "texts": len(sequences)}
    return SteeringVectors.from_tensors(totals, **_backbone(model, head.config.attribute, recorded))


def _backbone(model: PreTrainedModel, attribute: str | None, provenance: dict[str, Any]) -> dict[str, Any]:
    return {
        "attribute": attribute,
        "backbone": model.name_or_path or None,
        "backbone_fingerprint": fingerprint(model),
        "num_layers": num_layers(model),
        "provenance": provenance,
    }


def _layers(model: PreTrainedModel, layers: Sequence[int] | None) -> list[int]:
    depth = num_layers(model)
    chosen = sorted(layer_range(depth) if layers is None else layers)
    if not chosen or chosen[0] < 0 or chosen[-1] >= depth:
        raise ValueError(f"`layers` have to be among 0 to {depth - 1}, got {chosen}.")
    return chosen


def _check(method: str, pooling: str, positive: Sequence[Any], negative: Sequence[Any]) -> None:
    check_choice(method, DirectionMethod, "method")
    check_choice(pooling, Pooling, "pooling")
    if not positive or not negative:
        raise ValueError(f"There are {len(positive)} positive and {len(negative)} negative texts: both are needed.")
    if method == "pca" and len(positive) != len(negative):
        raise ValueError(
            f'`method`="pca" needs pairs, got {len(positive)} positive and {len(negative)} negative texts.'
        )


def _first_read(length: int, pooling: Pooling, read_token_index: int) -> int:
    """Where reading begins in a text of `length` tokens."""
    if pooling == "mean" and read_token_index == -1:
        return min(1, length - 1)
    first = read_token_index + (length if read_token_index < 0 else 0)
    if not 0 <= first < length:
        raise ValueError(f"`read_token_index` is {read_token_index}, but a text has {length} tokens.")
    return first


@torch.no_grad()
def _pooled(
    model: PreTrainedModel, side: Side, pooling: Pooling, layers: Sequence[int], batch_size: int
) -> dict[int, Tensor]:
    """What stands for each text, by layer: `(texts, width)`, float32."""
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    (sequences, starts), first = side, 0
    for residuals, _, mask in read_residuals(model, sequences, layers, batch_size):
        begin = torch.tensor(starts[first : first + len(mask)], device=mask.device)[:, None]
        where = torch.arange(mask.shape[1], device=mask.device)
        read = (where == begin) if pooling == "last" else (where >= begin) & mask.bool()
        first += len(mask)
        for layer, hidden in residuals.items():
            weight = read.to(hidden.device).float()[:, :, None]
            parts[layer].append(((hidden.float() * weight).sum(dim=1) / weight.sum(dim=1)).cpu())
    return {layer: torch.cat(rows) for layer, rows in parts.items()}


def _vectors(
    model: PreTrainedModel,
    sides: Sequence[Side],
    layers: Sequence[int],
    batch_size: int,
    attribute: str | None,
    how: dict[str, Any],
) -> SteeringVectors:
    """From the texts of the second side to those of the first; `how` is recorded, and holds method and pooling."""
    find: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"pca": _principal, "logistic": _logistic}
    positive, negative = (_pooled(model, side, how["pooling"], layers, batch_size) for side in sides)
    difference = {layer: positive[layer].mean(dim=0) - negative[layer].mean(dim=0) for layer in layers}
    found = difference
    if how["method"] in find:
        found = {layer: find[how["method"]](positive[layer], negative[layer]) for layer in layers}
        found = {layer: vector * (vector @ difference[layer]).sign() for layer, vector in found.items()}
    counts = {"positive": len(sides[0][0]), "negative": len(sides[1][0])}
    return SteeringVectors.from_tensors(found, **_backbone(model, attribute, {**how, **counts}))


def _principal(positive: Tensor, negative: Tensor) -> Tensor:
    """First right singular vector of the pairs' differences, as long as their mean."""
    differences = positive - negative
    direction: Tensor = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    length: Tensor = differences.mean(dim=0).norm()
    return direction.mul(length)


def _logistic(positive: Tensor, negative: Tensor) -> Tensor:
    """Normal of a regularised logistic regression on standardised residuals, as long as the mean difference."""
    linear = import_optional("sklearn.linear_model", '`method`="logistic"')
    texts, labels = torch.cat([positive, negative]), [1] * len(positive) + [0] * len(negative)
    scale = texts.std() + torch.finfo(texts.dtype).tiny
    probe = linear.LogisticRegression(C=1.0, max_iter=1000, class_weight="balanced")
    probe.fit(((texts - texts.mean(dim=0)) / scale).numpy(), labels)
    normal: Tensor = torch.from_numpy(probe.coef_[0]).float()
    length: Tensor = (positive.mean(dim=0) - negative.mean(dim=0)).norm()
    return normal.mul(length / normal.norm())
