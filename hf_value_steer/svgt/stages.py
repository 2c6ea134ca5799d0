"""The three stages of training (arXiv 2605.11712) as `transformers.Trainer`s."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EvalPrediction, Trainer

from hf_value_steer.svgt.data import ResponseBatch, join_states
from hf_value_steer.svgt.module import ValueGuidanceModule
from hf_value_steer.svgt.parallel import Guided, GuidedText


class ValueStage(nn.Module):
    """The module under binary cross-entropy: on texts alone, or on texts with their prompts.

    Args:
        module: what is trained.
        conditional (`bool`): whether the prompt takes part.
    """

    def __init__(self, module: ValueGuidanceModule, conditional: bool):
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
    """`auroc`, `accuracy` and `f1` of tokens that count, whose label is above one half or not."""
    from sklearn.metrics import f1_score, roc_auc_score

    logits, labels = (torch.as_tensor(each) for each in (prediction.predictions, prediction.label_ids))
    counted = ~labels.isnan() & (labels >= 0)  # `Trainer` pads with -100
    positive, said = labels[counted] > 0.5, logits[counted] > 0
    both = bool(positive.any()) and not bool(positive.all())
    return {
        "auroc": float(roc_auc_score(positive, logits[counted])) if both else float("nan"),
        "accuracy": float((positive == said).float().mean()),
        "f1": float(f1_score(positive, said, zero_division=0.0)),
    }


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Of the third stage, as in the paper's code; `avoid` is ours, and 0 there.

    Args:
        ce: cross-entropy of safe natural responses.
        safe: `softplus(s) + alpha * relu(s)` of response tokens, read one layer above l*.
        manifold: how far the norm of bridges is from that of the states they were made from, beyond `tau`.
        avoid: `-log(1 - p)` of the next tokens that the judge dislikes, where there are any.
    """

    ce: float = 0.5
    safe: float = 2.0
    manifold: float = 0.1
    avoid: float = 0.0
    alpha: float = 2.0
    tau: float = 0.2


class BridgeStage(nn.Module):
    """The generator behind a frozen backbone and a frozen discriminator.

    Args:
        text: how a text is guided. Its backbone is no part of this module, and not in its checkpoints.
        weights: of the losses.
    """

    def __init__(self, text: GuidedText, weights: LossWeights):
        super().__init__()
        self.module, self.text, self.weights = text.module, [text], weights
        self.module.requires_grad_(False)
        self.module.generator.requires_grad_(True)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        prompt_length: Tensor,
        natural: Tensor,
        avoided: Tensor | None = None,
    ) -> dict[str, Any]:
        """Loss `()`, and the parts that it is made of, `(4,)`."""
        length = int(prompt_length)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        guided = self.text[0](inputs, length)
        real, log_p = attention_mask[:, length:].bool(), guided.logits.float().log_softmax(-1)
        drawn = log_p.gather(-1, input_ids[:, length:, None]).squeeze(-1)
        parts = {
            "ce": -_mean(drawn, real & natural.bool()),
            "safe": _mean(self._unsafe(guided), real),
            "manifold": manifold_loss(guided.bridges, guided.states, self.text[0].interval, self.weights.tau),
            "avoid": log_p.new_zeros(()) if avoided is None else avoidance(log_p, avoided),
        }
        loss = sum(getattr(self.weights, name) * part for name, part in parts.items())
        return {"loss": loss, "logits": torch.stack(list(parts.values())).detach()[None]}

    def _unsafe(self, guided: Guided) -> Tensor:
        """The dense safety loss of each token, `(rows, tokens)`."""
        text = self.text[0]
        logits = self.module.discriminator(self.module.encode(guided.later, guided.prompt, text.prompt_mask))
        unsafe: Tensor = F.softplus(logits) + self.weights.alpha * logits.relu()
        return unsafe


def _mean(numbers: Tensor, counted: Tensor) -> Tensor:
    mean: Tensor = (numbers * counted).sum() / counted.sum().clamp(min=1)
    return mean


def manifold_loss(bridges: Tensor, states: Tensor, interval: int, tau: float) -> Tensor:
    """`max(| |B| / |h| - 1 | - tau, 0)`, `()`.

    Args:
        bridges (`torch.FloatTensor` of shape `(rows, refreshes, K, width)`).
        states (`torch.FloatTensor` of shape `(rows, tokens, width)`), interval (`int`): what they were made from.
    """
    makers = states[:, :: interval or states.shape[1]]
    ratio = bridges.norm(dim=-1) / makers.norm(dim=-1)[..., None]
    beyond: Tensor = (ratio - 1).abs() - tau
    return F.relu(beyond).mean()


def avoidance(log_p: Tensor, avoided: Tensor) -> Tensor:
    """`-log(1 - p)`, `()`, over steps where something is to be avoided; `p` is the probability of all of that.

    Args:
        log_p (`torch.FloatTensor` of shape `(rows, tokens, vocab)`).
        avoided (`torch.LongTensor` of shape `(rows, tokens, n)`): token ids, -1 where there is none.
    """
    there = avoided >= 0
    p = (log_p.gather(-1, avoided.clamp(min=0)).exp() * there).sum(dim=-1).clamp(max=1 - 1e-4)
    return _mean(-torch.log1p(-p), there.any(dim=-1))


class BridgeStageTrainer(Trainer):  # type: ignore[misc]
    """Stage three."""

    def __init__(self, *, model: BridgeStage, collate: ResponseBatch, **kwargs: Any):
        super().__init__(model=model, data_collator=collate, compute_metrics=_parts, **kwargs)
        self.model_accepts_loss_kwargs = False


def _parts(prediction: EvalPrediction) -> dict[str, float]:
    means = torch.as_tensor(prediction.predictions).mean(dim=0)
    return dict(zip(("ce", "safe", "manifold", "avoid"), means.tolist(), strict=True))
