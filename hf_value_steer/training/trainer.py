"""Training a value head on collected features with `transformers.Trainer`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_value_steer.backbone.features import Layer
from hf_value_steer.choices import Loss
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.training.chance import at_chance, discrimination
from hf_value_steer.training.losses import coherence, token_loss
from hf_value_steer.training.targets import TargetRows, Targets


STATISTICS_TOKENS = 100_000  # enough to know mean and scale of every feature
BINS = 10  # of values, in which they are compared with labels
CHANCE_STEPS = 300  # for which a training may be at chance and go on


class TokenRows(TargetRows):
    """Features and targets of each token.

    Args:
        targets, rows: see [`TargetRows`].
        layers: whose states are the features.
        whole (`bool`): begin at the prompt's last token, which a head over time has seen, even where it has no target.
    """

    def __init__(self, targets: Targets, rows: Sequence[int], layers: Sequence[Layer], whole: bool):
        super().__init__(targets, rows)
        self.layers, self.whole = layers, whole

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        features, labels = self.targets.collection.features(row, self.layers), self.targets.of(row)
        return {"features": features if self.whole else features[len(features) - len(labels) :], "labels": labels}


def join_rows(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All tokens of some rows.

    Returns:
        `features` `(tokens, width)`; `lengths` `(rows,)`, how many of them each row has; `labels` `(n,)` or `(n, A)`
        of the last ones of each row, NaN where there is none; `labelled` `(tokens,)`, which these are; and `follows`
        `(n,)`, whether a label follows the one before it in its row.
    """
    counts = [(len(item["features"]), len(item["labels"])) for item in items]
    joined = {name: torch.cat([item[name] for item in items]) for name in ("features", "labels")}
    return {
        **joined,
        "lengths": torch.tensor([tokens for tokens, _ in counts]),
        "labelled": torch.cat([torch.arange(tokens) >= tokens - labels for tokens, labels in counts]),
        "follows": torch.cat([torch.arange(labels) > 0 for _, labels in counts]),
    }


class HeadInTraining(nn.Module):
    """A head behind standardised features, and its loss.

    Args:
        head: what is trained.
        mean, scale (`torch.FloatTensor` of shape `(width,)`): of the features.
        loss (`str`), positive_weight (`float`): see [`~hf_value_steer.training.losses.token_loss`].
        coherence_weight (`float`): weight of [`~hf_value_steer.training.losses.coherence`].
    """

    def __init__(
        self,
        head: ValueHead,
        mean: Tensor,
        scale: Tensor,
        loss: Loss,
        positive_weight: float,
        coherence_weight: float,
    ):
        super().__init__()
        self.mean: Tensor
        self.scale: Tensor
        self.head, self.loss = head, loss
        self.positive_weight, self.coherence_weight = positive_weight, coherence_weight
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(
        self, features: Tensor, lengths: Tensor, labels: Tensor, labelled: Tensor, follows: Tensor
    ) -> dict[str, Tensor]:
        """Loss `()`, the mean over labels that are there, and logits of the shape of `labels`; see [`join_rows`]."""
        logits = self.logits(features, lengths)[labelled].squeeze(-1)
        known = ~labels.isnan()
        loss = token_loss(logits[known], labels[known], self.loss, self.positive_weight).mean()
        if self.coherence_weight:
            loss = loss + self.coherence_weight * coherence(logits, follows)
        return {"loss": loss, "logits": logits}

    def logits(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Logits of each attribute, `(tokens, A)`, of features `(tokens, width)` of texts of `lengths` `(rows,)`."""
        standard = (features.float() - self.mean) / self.scale
        if not self.head.remembers:
            return self.head.attribute_logits(standard)
        counts = lengths.tolist()
        # Padding on the right: no token sees those behind it.
        rows = nn.utils.rnn.pad_sequence(list(torch.split(standard, counts)), batch_first=True)
        logits = self.head.attribute_logits(rows)
        return torch.cat([row[:count] for row, count in zip(logits, counts, strict=True)])

    def folded(self) -> ValueHead:
        """The head for features as they are: mean and scale folded into its first layer."""
        first: Any = self.head.net[0]
        with torch.no_grad():
            first.weight /= self.scale
            first.bias -= first.weight @ self.mean
        return self.head.cpu().eval()  # type: ignore[no-any-return]


def feature_moments(dataset: TokenRows, widths: Sequence[int]) -> tuple[Tensor, Tensor, list[float]]:
    """Of the features of the first rows mean and standard deviation, `(width,)` each, and each layer's mean norm.

    Args:
        dataset: the rows.
        widths: of the layers, side by side.
    """
    count, total, squares, norms = 0, torch.zeros(()), torch.zeros(()), torch.zeros(len(widths)).double()
    for index in range(len(dataset)):
        features = dataset[index]["features"].double()
        count, total = count + len(features), total + features.sum(0)
        squares = squares + features.square().sum(0)
        norms += torch.stack([layer.norm(dim=-1).sum() for layer in torch.split(features, list(widths), dim=-1)])
        if count >= STATISTICS_TOKENS:
            break
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=1e-12)
    return mean.float(), variance.sqrt().float(), [float(f"{norm:.6g}") for norm in norms / count]


@torch.no_grad()
def text_metrics(model: HeadInTraining, dataset: TokenRows, names: Sequence[str] = ()) -> dict[str, Any]:
    """How well the mean value of a text tells whether the judge scores all of it above one half.

    Not its highest value: that of a longer text is higher, and there is more in it for the judge to find, so that even
    random heads would be better than chance.

    Returns:
        [`~hf_value_steer.training.chance.Discrimination.metrics`], of several attributes under `<metric>_<name>`.
    """
    means = torch.stack([_mean_value(model, dataset[index]) for index in range(len(dataset))]).cpu().numpy()
    targets = dataset.targets
    prompts = targets.collection.rows.prompt[list(dataset.rows)].numpy()
    suffixes = [f"_{name}" for name in names] or [""]
    columns = zip(suffixes, means.T, targets.positive(dataset.rows).numpy().T, strict=True)
    found = {suffix: discrimination(values, positive, prompts).metrics() for suffix, values, positive in columns}
    return {f"{metric}{suffix}": each[metric] for suffix, each in found.items() for metric in each}


def _mean_value(model: HeadInTraining, item: dict[str, Tensor]) -> Tensor:
    """The mean value of the labelled tokens of a text, `(A,)`."""
    features, count = item["features"].to(model.mean.device), len(item["features"])
    return model.logits(features, torch.tensor([count]))[count - len(item["labels"]) :].sigmoid().mean(dim=0)


class StopAtChance(TrainerCallback):  # type: ignore[misc]
    """Ends a training in which an attribute was at chance in every epoch so far: the head would be refused.

    Args:
        patience: epochs for which it may be.
    """

    def __init__(self, patience: int):
        self.patience = patience

    def on_evaluate(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        evaluations = [
            {name.removeprefix("eval_"): value for name, value in entry.items()}
            for entry in state.log_history
            if "eval_loss" in entry
        ]
        if len(evaluations) >= self.patience and state.global_step >= CHANCE_STEPS:
            control.should_training_stop |= bool(set.intersection(*(set(at_chance(each)) for each in evaluations)))


class ValueHeadTrainer(Trainer):  # type: ignore[misc]
    """[`~transformers.Trainer`] of a [`HeadInTraining`] over [`TokenRows`]; batches are rows, losses are per token."""

    def __init__(self, *, model: HeadInTraining, eval_dataset: TokenRows, **kwargs: Any):
        names = [each["name"] for each in model.head.config.attributes or ()]

        def metrics(prediction: EvalPrediction) -> dict[str, Any]:
            return token_metrics(prediction, names) | text_metrics(model, eval_dataset, names)

        super().__init__(
            model=model, data_collator=join_rows, compute_metrics=metrics, eval_dataset=eval_dataset, **kwargs
        )
        # Trainer would divide the loss by the number of rows that it counts in the batch.
        self.model_accepts_loss_kwargs = False


@dataclass(frozen=True)
class Reliability:
    """How far values can be read as probabilities, bin by bin."""

    lower: list[float]
    count: list[int]
    mean_value: list[float]
    rate: list[float]

    @property
    def error(self) -> float:
        """Expected calibration error, in [0, 1]."""
        gaps = zip(self.count, self.mean_value, self.rate, strict=True)
        return sum(count * abs(value - rate) for count, value, rate in gaps) / max(sum(self.count), 1)


def reliability(values: Tensor, labels: Tensor) -> Reliability:
    """Bin values `(tokens,)` and compare their mean with that of the labels `(tokens,)`; empty bins are left out."""
    index = (values * BINS).long().clamp(0, BINS - 1)
    count = torch.bincount(index, minlength=BINS)
    full = count > 0
    sums = (torch.bincount(index, weights=each.double(), minlength=BINS) for each in (values, labels))
    mean_value, rate = (each[full] / count[full] for each in sums)
    lower = torch.arange(BINS)[full] / BINS
    return Reliability(lower.tolist(), count[full].tolist(), mean_value.tolist(), rate.tolist())


def token_metrics(prediction: EvalPrediction, names: Sequence[str] = ()) -> dict[str, float]:
    """`auroc` of tokens whose label is above one half, and `calibration_error`, the expected one.

    The AUROC is left out where all labels are on one side, and both are where logits are not finite.

    Args:
        prediction: logits and labels, `(tokens,)` or `(tokens, A)`; labels of NaN do not count.
        names: of several attributes. There is `auroc_<name>` and `calibration_error_<name>` of each then, and the
            others are means.
    """
    logits, labels = (torch.as_tensor(each) for each in (prediction.predictions, prediction.label_ids))
    if not names:
        return _metrics(logits, labels)
    single = [_metrics(*columns) for columns in zip(logits.unbind(-1), labels.unbind(-1), strict=True)]
    shared = [key for key in single[0] if all(key in each for each in single)]
    means = {key: sum(each[key] for each in single) / len(single) for key in shared}
    return means | {f"{key}_{name}": each[key] for name, each in zip(names, single, strict=True) for key in each}


def _metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    from sklearn.metrics import roc_auc_score

    if not logits.isfinite().all():
        return {}
    logits, labels = logits[~labels.isnan()], labels[~labels.isnan()]
    positive = labels > 0.5
    both = bool(positive.any()) and not bool(positive.all())
    auroc = {"auroc": float(roc_auc_score(positive, logits))} if both else {}
    return {**auroc, "calibration_error": reliability(logits.sigmoid(), labels).error}
