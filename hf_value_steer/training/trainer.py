"""Training a value head on collected features with `transformers.Trainer`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_value_steer.choices import Loss
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.training.chance import at_chance, discrimination
from hf_value_steer.training.losses import coherence, token_loss
from hf_value_steer.training.targets import TargetRows


STATISTICS_TOKENS = 100_000  # enough to know mean and scale of every feature
BINS = 10  # of values, in which they are compared with labels
CHANCE_STEPS = 300  # for which a training may be at chance and go on


class TokenRows(TargetRows):
    """Features and targets of each token."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        features, labels = self.targets.row(self.rows[index])
        return {"features": features, "labels": labels}


def join_rows(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All tokens of some rows: `features` `(tokens, width)`, `labels` `(tokens,)` or `(tokens, A)`, and `follows`.

    `follows` `(tokens,)` tells whether a token follows the one before it in its row.
    """
    follows = torch.cat([torch.arange(len(item["labels"])) > 0 for item in items])
    joined = {name: torch.cat([item[name] for item in items]) for name in ("features", "labels")}
    return {**joined, "follows": follows}


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

    def forward(self, features: Tensor, labels: Tensor, follows: Tensor) -> dict[str, Tensor]:
        """Loss `()`, the mean over tokens and attributes, and logits of the shape of `labels`."""
        logits = self.logits(features).squeeze(-1)
        loss = token_loss(logits, labels, self.loss, self.positive_weight).mean()
        if self.coherence_weight:
            loss = loss + self.coherence_weight * coherence(logits, follows)
        return {"loss": loss, "logits": logits}

    def logits(self, features: Tensor) -> Tensor:
        """Logits of each attribute, `(tokens, A)`, of features `(tokens, width)`."""
        return self.head.attribute_logits((features.float() - self.mean) / self.scale)

    def folded(self) -> ValueHead:
        """The head for features as they are: mean and scale folded into its first layer."""
        first: Any = self.head.net[0]
        with torch.no_grad():
            first.weight /= self.scale
            first.bias -= first.weight @ self.mean
        return self.head.cpu().eval()  # type: ignore[no-any-return]


def feature_moments(dataset: TokenRows) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the features, `(width,)` each, of the first rows."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for index in range(len(dataset)):
        features = dataset[index]["features"].double()
        count, total = count + len(features), total + features.sum(0)
        squares = squares + features.square().sum(0)
        if count >= STATISTICS_TOKENS:
            break
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=1e-12)
    return mean.float(), variance.sqrt().float()


@torch.no_grad()
def text_metrics(model: HeadInTraining, dataset: TokenRows, names: Sequence[str] = ()) -> dict[str, Any]:
    """How well the mean value of a text tells whether the judge scores all of it above one half.

    Not its highest value: that of a longer text is higher, and there is more in it for the judge to find, so that even
    random heads would be better than chance.

    Returns:
        [`~hf_value_steer.training.chance.Discrimination.metrics`], of several attributes under `<metric>_<name>`.
    """
    rows = (model.logits(dataset[index]["features"].to(model.mean.device)) for index in range(len(dataset)))
    means = torch.stack([logits.sigmoid().mean(dim=0) for logits in rows]).cpu().numpy()
    targets = dataset.targets
    prompts = targets.collection.rows.prompt[list(dataset.rows)].numpy()
    suffixes = [f"_{name}" for name in names] or [""]
    columns = zip(suffixes, means.T, targets.positive(dataset.rows).numpy().T, strict=True)
    found = {suffix: discrimination(values, positive, prompts).metrics() for suffix, values, positive in columns}
    return {f"{metric}{suffix}": each[metric] for suffix, each in found.items() for metric in each}


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
        prediction: logits and labels, `(tokens,)` or `(tokens, A)`.
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
    positive = labels > 0.5
    both = bool(positive.any()) and not bool(positive.all())
    auroc = {"auroc": float(roc_auc_score(positive, logits))} if both else {}
    return {**auroc, "calibration_error": reliability(logits.sigmoid(), labels).error}
