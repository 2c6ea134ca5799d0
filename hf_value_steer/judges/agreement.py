"""How far judges agree."""

from collections.abc import Mapping
from itertools import permutations

import numpy as np
import numpy.typing as npt

from hf_value_steer.checks import import_optional


def agreement(
    scores: Mapping[str, npt.NDArray[np.floating]],
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Cohen's kappa and AUROC of every two judges. A label is `score > 0.5`.

    Args:
        scores (mapping of `str` to `np.ndarray` of shape `(n,)`): what each judge answered to the same responses.

    Returns:
        `{first: {second: {"kappa": ..., "auroc": ...}}}` for every ordered pair of judges. `"kappa"` compares their
        labels, and is `None` if one of them gave only one label. `"auroc"` is that of the first judge's score for
        the second judge's label, and is `None` if the second gave only one label.

    Raises:
        ValueError: if the judges did not answer to as many responses.
        ImportError: if scikit-learn is not installed.
    """
    if len({len(answers) for answers in scores.values()}) > 1:
        counts = ", ".join(f"{name}: {len(answers)}" for name, answers in scores.items())
        raise ValueError(f"`scores` have to be of one length, got {counts}.")
    metrics = import_optional("sklearn.metrics", "The agreement of judges")
    labels = {name: np.asarray(answers) > 0.5 for name, answers in scores.items()}
    both = {name: bool(answers.any() and not answers.all()) for name, answers in labels.items()}
    pairs: dict[str, dict[str, dict[str, float | None]]] = {name: {} for name in scores}
    for first, second in permutations(scores, 2):
        kappa = metrics.cohen_kappa_score(labels[first], labels[second]) if both[first] and both[second] else None
        auroc = metrics.roc_auc_score(labels[second], scores[first]) if both[second] else None
        pairs[first][second] = {
            "kappa": None if kappa is None else float(kappa),
            "auroc": None if auroc is None else float(auroc),
        }
    return pairs
