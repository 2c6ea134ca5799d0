"""The three stages of training (arXiv 2605.11712) as `transformers.Trainer`s."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EvalPrediction, Trainer

from hf_value_steer.arguments.guidance import LossWeights
from hf_value_steer.guidance.module import GuidanceModule
from hf_value_steer.training.guidance.data import ResponseBatch, join_states
from hf_value_steer.training.guidance.moments import GuidedMoments


class ValueStage(nn.Module):
    """The module under binary cross-entropy: on texts alone, or on texts with their prompts.

    Args:
        module: what is trained.
        conditional (`bool`): whether the prompt takes part.
    """

    def __init__(self, module: GuidanceModule, conditional: bool):
        super().__init__()
        self.module, self.conditional = module, conditional

    def forward(
        self, states: Tensor, prompt_states: Tensor, prompt_mask: Tensor, labels: Tensor
    ) -> dict[str, Tensor | None]:
        """Loss `()` and logits `(rows, tokens)`."""
        prompt = prompt_states if self.conditional else None
        out = self.module(states, prompt, prompt_mask, labels)
        return {"loss": out.loss, "logits": out.logits}


class ValueStageTrainer(Trainer):  # type: ignore[misc]
    """Stages one and two. Stage two learns the conditional path fast, and what stage one made slowly.

    Args:
        slow (`float`, *optional*): learning rate of all that is not the conditional path.
    """

    def __init__(self, *, model: ValueStage, slow: float | None = None, **kwargs: Any):
        self.slow = slow
        super().__init__(model=model, data_collator=join_states, compute_metrics=discrimination, **kwargs)
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.slow is None:
            return super().create_optimizer(*args, **kwargs)
        path = self.model.module.conditional
        new = [] if path is None else list(path.parameters())
        known = {id(parameter) for parameter in new}
        old = [each for each in self.model.parameters() if each.requires_grad and id(each) not in known]
        groups = [{"params": new, "lr": self.args.learning_rate}, {"params": old, "lr": self.slow}]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=self.args.weight_decay)
        return self.optimizer


def discrimination(prediction: EvalPrediction) -> dict[str, float]:
    """`auroc`, `accuracy` and `f1` of tokens that count, whose label is above one half or not.

    `captured`: which share of the sum of all labels the tenth of the tokens with the highest values has. It is left
    out where all labels are 0, and `auroc` where all are on one side.
    """
    from sklearn.metrics import f1_score, roc_auc_score

    logits, labels = (torch.as_tensor(each) for each in (prediction.predictions, prediction.label_ids))
    counted = ~labels.isnan() & (labels >= 0)  # `Trainer` pads with -100
    positive, said = labels[counted] > 0.5, logits[counted] > 0
    top = labels[counted][logits[counted].argsort(descending=True)[: int(counted.sum()) // 10]]
    found = {
        "accuracy": float((positive == said).float().mean()),
        "f1": float(f1_score(positive, said, zero_division=0.0)),
    }
    if positive.any() and not positive.all():
        found["auroc"] = float(roc_auc_score(positive, logits[counted]))
    if labels[counted].any():
        found["captured"] = float(top.sum() / labels[counted].sum())
    return found


ALPHA, TAU = 2.0, 0.2
PARTS = ("ce", "safe", "manifold", "avoid", "keep")


class BridgeStage(nn.Module):
    """The generator behind a frozen backbone and a frozen discriminator.

    Args:
        moments: what is guided. Its backbone is no part of this module, and not in its checkpoints.
        weights: of the losses.
        disliked (`torch.BoolTensor` of shape `(vocab,)`): tokens that the judge dislikes as a rule.
    """

    def __init__(self, moments: GuidedMoments, weights: LossWeights, disliked: Tensor):
        super().__init__()
        self.module, self.moments, self.weights, self.disliked = moments.module, [moments], weights, disliked
        self.module.requires_grad_(False)
        self.module.generator.requires_grad_(True)

    def train(self, mode: bool = True) -> "BridgeStage":
        """What values the tokens is frozen, and without dropout."""
        super().train(mode)
        self.module.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        prompt_length: Tensor,
        natural: Tensor,
        known: Tensor,
        rises: Tensor,
    ) -> dict[str, Any]:
        """Loss `()`, and the parts that it is made of, `(1, 5)`."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        guided = self.moments[0](inputs, int(prompt_length))
        moment = guided.rows, guided.steps
        drawn = input_ids[:, int(prompt_length) :][moment]
        log_p, log_q = (each.float().log_softmax(-1) for each in (guided.logits, guided.base))
        disliked = self._disliked(known[moment], rises[moment])
        unsafe = self.module.discriminator(guided.later)
        parts = {
            "ce": -_mean(log_p.gather(-1, drawn[:, None]).squeeze(-1), natural[moment].bool()),
            "safe": (F.softplus(unsafe) + ALPHA * unsafe.relu()).mean(),
            "manifold": manifold_loss(guided.bridges, guided.states, TAU),
            "avoid": avoidance(log_p, disliked).mean(),
            "keep": divergence(log_p, log_q, disliked).mean(),
        }
        loss = sum(getattr(self.weights, name) * parts[name] for name in PARTS)
        return {"loss": loss, "logits": torch.stack([parts[name] for name in PARTS]).detach()[None]}

    def _disliked(self, known: Tensor, rises: Tensor) -> Tensor:
        """Which tokens must not come next, `(moments, vocab)`: those the judge read there, and others as a rule."""
        disliked = self.disliked.to(known.device).repeat(len(known), 1)
        for column in range(known.shape[1]):
            there = known[:, column] >= 0
            disliked[there, known[there, column]] = rises[there, column]
        return disliked


def _mean(numbers: Tensor, counted: Tensor) -> Tensor:
    mean: Tensor = (numbers * counted).sum() / counted.sum().clamp(min=1)
    return mean


def manifold_loss(bridges: Tensor, states: Tensor, tau: float) -> Tensor:
    """`max(| |B| / |h| - 1 | - tau, 0)`, `()`.

    Args:
        bridges (`torch.FloatTensor` of shape `(moments, K, width)`).
        states (`torch.FloatTensor` of shape `(moments, width)`): what they were made from.
    """
    ratio = bridges.norm(dim=-1) / states.norm(dim=-1, keepdim=True)
    beyond: Tensor = (ratio - 1).abs() - tau
    return F.relu(beyond).mean()


def avoidance(log_p: Tensor, disliked: Tensor) -> Tensor:
    """`-log(1 - p)`, `(moments,)`, with the probability `p` of all that is disliked; both `(moments, vocab)`."""
    p = (log_p.exp() * disliked).sum(dim=-1).clamp(max=1 - 1e-4)
    return -torch.log1p(-p)


def divergence(log_p: Tensor, log_q: Tensor, disliked: Tensor) -> Tensor:
    """`KL(q || p)`, `(moments,)`, of both without what is disliked; all `(moments, vocab)`."""
    p, q = (each.masked_fill(disliked, -1e4).log_softmax(-1) for each in (log_p, log_q))
    return F.kl_div(p, q, reduction="none", log_target=True).sum(dim=-1)


class BridgeStageTrainer(Trainer):  # type: ignore[misc]
    """Stage three."""

    def __init__(self, *, model: BridgeStage, collate: ResponseBatch, **kwargs: Any):
        # Gate, biases and norm learn ten times as fast as matrices: they have further to go.
        rate = kwargs["args"].learning_rate
        trained = [each for each in model.parameters() if each.requires_grad]
        groups = [
            {"params": [each for each in trained if each.ndim > 1], "lr": rate},
            {"params": [each for each in trained if each.ndim <= 1], "lr": 10 * rate},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=kwargs["args"].weight_decay)
        parts = {"data_collator": collate, "compute_metrics": _parts, "optimizers": (optimizer, None)}
        super().__init__(model=model, **parts, **kwargs)
        self.model_accepts_loss_kwargs = False


def _parts(prediction: EvalPrediction) -> dict[str, float]:
    means = torch.as_tensor(prediction.predictions).mean(dim=0)
    return dict(zip(PARTS, means.tolist(), strict=True))
