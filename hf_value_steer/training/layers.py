"""Which layers should a head read? A linear probe of each that a collection keeps, and what a look-ahead costs."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_value_steer.arguments.train import SplitArguments
from hf_value_steer.backbone.features import FINAL, Layer
from hf_value_steer.checks import check_choice
from hf_value_steer.choices import Target, Temporal
from hf_value_steer.files.markup import table
from hf_value_steer.heads.over_time import empty_memory, over_time
from hf_value_steer.progress import progress
from hf_value_steer.training.bootstrap import Bootstrap, interval
from hf_value_steer.training.probe import held_out_scores
from hf_value_steer.training.prompts import share
from hf_value_steer.training.shards import Collection
from hf_value_steer.training.splits import split_rows
from hf_value_steer.training.targets import Targets


MEMORIES: tuple[Temporal, ...] = ("none", "mean")


@dataclass(frozen=True)
class LayerProbe:
    """What a linear probe of a layer knows of tokens of prompts that it was not fitted to.

    Args:
        layer: decoder layer, counted from 0, or `"final"`.
        temporal (`str`): whether it sees a token's state, `"none"`, or the mean of all since the prompt's last token,
            `"mean"`.
        auroc (`float`): of its scores, for the target above one half.
        lower, upper (`float`): 95 % interval of that, a bootstrap over prompts.
        price (`float`): share of the depth, in (0, 1], that a look-ahead runs through for a head on this layer.
    """

    layer: Layer
    temporal: Temporal
    auroc: float
    lower: float
    upper: float
    price: float


@dataclass(frozen=True)
class LayerSuggestion:
    """The probes of all layers; printed, a table.

    Args:
        probes (`list` of [`LayerProbe`]): the cheapest first of those that may be as good as the best one, whose
            intervals reach its AUROC; then the others, the cheapest first.
        tokens, positive (`int`): the tokens that were scored, and those above one half among them.
    """

    probes: list[LayerProbe]
    tokens: int
    positive: int

    @property
    def best(self) -> LayerProbe:
        """The probe to go by: none that is cheaper may be as good as the best one."""
        return self.probes[0]

    @property
    def reaching(self) -> int:
        """How many of them, the first ones, may be as good as the best."""
        best = max(probe.auroc for probe in self.probes)
        return sum(probe.upper >= best for probe in self.probes)

    def __str__(self) -> str:
        rows = [
            [
                str(each.layer),
                each.temporal,
                f"{each.auroc:.3f}",
                f"{each.lower:.3f} to {each.upper:.3f}",
                f"{each.price:.0%}",
            ]
            for each in self.probes
        ]
        said = f"{self.positive} of {self.tokens} tokens are positive."
        said += f" The first {self.reaching} rows may be as good as the best."
        return f"{table(['layer', 'temporal', 'AUROC', '95 % interval', 'depth of a look-ahead'], rows)}\n\n{said}"


@torch.no_grad()
def suggest_feature_layers(
    collection: Collection,
    judge: str,
    rows: Sequence[int] | None = None,
    *,
    target: Target = "response",
    folds: int = 5,
    limit: int = 500,
) -> LayerSuggestion:
    """Probe each layer that a collection keeps, with and without a memory, on prompts that a probe was not fitted to.

    Args:
        collection: labelled by `judge`, with the states of several layers: collect with `feature_layers=["all"]`.
        judge (`str`): whose labels are to be known.
        rows (sequence of `int`, *optional*): the rows to look at; those that `train` sees by default, so that the
            choice of a layer breaks no promise of `calibrate`.
        target (`str`): what tokens are labelled with, see [`~hf_value_steer.training.targets.Targets`].
        folds (`int`): parts into which the prompts are cut; each is scored by a probe of the others. At least 2.
        limit (`int`): the most rows that are read, drawn at random.

    Raises:
        ValueError: if the tokens that were read are all of one class, or all of one prompt.
    """
    _check(folds, limit, target)
    if rows is None:
        split = split_rows(collection, SplitArguments())
        rows = [*split["train"], *split["validation"]]
    if not rows:
        raise ValueError("`rows` has to name at least one row of the collection.")
    rows = sorted(random.Random(0).sample(list(rows), min(limit, len(rows))))
    targets = Targets(collection, [judge], target)
    labels = [targets.of(row) for row in rows]
    known = torch.cat(labels).isnan().logical_not()
    label, counts = torch.cat(labels)[known] > 0.5, torch.tensor([len(each) for each in labels])
    owner = _owners(collection, rows).repeat_interleave(counts)[known]
    if label.all() or not label.any() or owner.max() == 0:
        raise ValueError(
            f"The {len(label)} tokens that were read are all of one class, or of one prompt: pass more `rows`, or "
            "another `target`."
        )
    bootstrap, probes = Bootstrap(owner.numpy()), []
    for layer in progress(collection.layers, "layers", "layer"):
        texts = [collection.features(row, [layer]).float() for row in rows]
        for temporal in MEMORIES:
            seen = [_seen(text, temporal) for text in texts]
            states = torch.cat([text[len(text) - len(of) :] for text, of in zip(seen, labels, strict=True)])[known]
            scores = held_out_scores(states, label, owner % folds).numpy()
            auroc, draws = bootstrap.auroc(scores, label.numpy())
            lower, upper = interval(draws) or [0.0, 1.0]
            probes.append(LayerProbe(layer, temporal, round(auroc, 4), lower, upper, _price(layer, collection)))
    best = max(probe.auroc for probe in probes)
    ordered = sorted(probes, key=lambda probe: (probe.upper < best, probe.price, -probe.auroc))
    return LayerSuggestion(ordered, len(label), int(label.sum()))


def _check(folds: int, limit: int, target: str) -> None:
    for name, given, least in (("folds", folds, 2), ("limit", limit, 1)):
        if given < least:
            raise ValueError(f"`{name}` has to be at least {least}, got {given}.")
    check_choice(target, Target, "target")


def _owners(collection: Collection, rows: Sequence[int]) -> Tensor:
    """A number for the prompt of each row, `(rows,)`; the same for prompts of the same text."""
    shares = [share(collection.prompts[prompt].text) for prompt in collection.rows.prompt[list(rows)].tolist()]
    return torch.from_numpy(np.unique(shares, return_inverse=True)[1])


def _seen(text: Tensor, temporal: Temporal) -> Tensor:
    """What a linear head reads at each token of a text, `(tokens, width)`: a mean of a map is the map of the mean."""
    if temporal == "none":
        return text
    return over_time(text, empty_memory(1, text.shape[1], text.device)[0], temporal, None)[0]


def _price(layer: Layer, collection: Collection) -> float:
    return 1.0 if layer == FINAL else (layer + 1) / int(collection.manifest["num_layers"])
