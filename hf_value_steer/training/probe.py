"""A linear probe: how much a linear map of states knows of a label, on states that it was not fitted to."""

import torch
from torch import Tensor


RIDGE = 0.1  # for each token, against the unit variance of the states


def held_out_scores(states: Tensor, label: Tensor, fold: Tensor) -> Tensor:
    """Scores of each token, `(tokens,)`, by a ridge regression of the label that was fitted to the other folds.

    Args:
        states (`torch.FloatTensor` of shape `(tokens, width)`): standardised here.
        label (`torch.BoolTensor` of shape `(tokens,)`): what is to be known.
        fold (`torch.LongTensor` of shape `(tokens,)`): which part a token is in, from 0; tokens of one prompt in one.
    """
    standard = (states - states.mean(0)) / states.std(0).clamp(min=1e-6)
    inputs, wanted = torch.cat([standard, torch.ones_like(standard[:, :1])], dim=1), label.to(standard)
    parts = [fold == each for each in range(int(fold.max()) + 1)]
    grams = [inputs[part].T @ inputs[part] for part in parts]
    moments = [inputs[part].T @ wanted[part] for part in parts]
    scores = torch.empty_like(wanted)
    for part, gram, moment in zip(parts, grams, moments, strict=True):
        ridge = RIDGE * int((~part).sum()) * torch.eye(len(gram)).to(gram)
        scores[part] = inputs[part] @ torch.linalg.solve(sum(grams) - gram + ridge, sum(moments) - moment)
    return scores
