"""A recipe: collect, train, calibrate, evaluate and push, or train a guidance module, all from one YAML file."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from hf_value_steer.arguments.calibrate import CalibrateArguments
from hf_value_steer.arguments.collect import CollectArguments, LabelArguments
from hf_value_steer.arguments.evaluate import EvaluateArguments
from hf_value_steer.arguments.guidance import GuidanceTrainArguments
from hf_value_steer.arguments.train import TrainArguments, parse_attributes
from hf_value_steer.evaluation.crossfit import evaluate_crossfitted
from hf_value_steer.evaluation.evaluate import check_sources, evaluate, evaluation_prompts
from hf_value_steer.files.upload import check_hub_id
from hf_value_steer.files.writing import read_utf8, write_atomically
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.hub import push_head, renew_card
from hf_value_steer.training.calibrate import calibrate, check_column
from hf_value_steer.training.collect import collect
from hf_value_steer.training.guidance.train import train_guidance
from hf_value_steer.training.prompts import Prompt, load_prompts
from hf_value_steer.training.targets import check_target
from hf_value_steer.training.train import train
from hf_value_steer.vllm.start import vllm_engine


SECTIONS = ("output", "collect", "label", "train", "calibrate", "evaluate", "card", "push", "guide")
# What later steps take from `collect` unless they say otherwise.
_SHARED = ("model", "chat", "prompt_column", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "dtype")
T = TypeVar("T")


def run_recipe(recipe: str | os.PathLike[str] | Mapping[str, Any]) -> Path:
    """Do what a recipe says. A run that was stopped goes on; what is done already is not done again.

    ```yaml
    output: runs/my-attribute        # collection/, head/, evaluation/ and module/ appear in it
    collect: {model: org/backbone, prompts: prompts.txt, samples: 4}
    label: {judges: ["lexicon:words.txt"]}
    train: {attribute: my-attribute}
    calibrate: {alpha: 0.1}
    evaluate: {prompts: unseen.txt, judges: ["classifier:org/judge"]}
    # or, where prompts are few: {folds: 4, judges: [...]}, see [`evaluate_crossfitted`]
    guide: {attribute: my-attribute} # a guidance module, beside a head or, without `train`, instead of one
    ```

    A head of several attributes learns from a judge of `label` for each, not from the first one:

    ```yaml
    label: {judges: ["lexicon:rude.txt", "python:mine:polite"]}
    train: {attributes: ["rude=lexicon:rude.txt", "polite=python:mine:polite@desirable"]}
    ```

    Sections hold the fields of [`CollectArguments`], [`LabelArguments`], [`TrainArguments`], [`CalibrateArguments`],
    [`EvaluateArguments`] and [`GuidanceTrainArguments`]; folders are filled in, the first judge of `label` gives the
    labels, and the backbone and how it samples are those of `collect` unless another section says otherwise.
    `calibrate`, `evaluate`, `card` (`limits`, `license`, `datasets`) and `push` (arguments of
    [`~hf_value_steer.hub.push_head`]) belong to a head, and may be left out.

    Args:
        recipe: file, or its content.

    Returns:
        The folder of what was trained: of the head, if there is one.

    Raises:
        ValueError: for an unknown section or field, and for a judge, a function, a file or a column that is not there,
            before anything is generated; for a head that learned nothing, see
            [`~hf_value_steer.training.train.train`].
    """
    content = recipe if isinstance(recipe, Mapping) else yaml.safe_load(read_utf8(Path(recipe)))
    steps = _Steps(content)
    steps.look_for_sources()
    collect(steps.collect, steps.label, vllm_engine)
    trained = []
    if steps.train is not None:
        trained.append(_make_head(steps, steps.train))
    if steps.guide is not None:
        train_guidance(steps.guide)
        trained.append(Path(steps.guide.output))
    return trained[0]


def _make_head(steps: "_Steps", arguments: TrainArguments) -> Path:
    train(arguments)
    if steps.calibrate is not None:
        calibrate(steps.calibrate)
    if steps.evaluate is not None and steps.calibrate is not None and steps.folds:
        evaluate_crossfitted(steps.evaluate, arguments, steps.calibrate, steps.folds)
    elif steps.evaluate is not None:
        evaluate(steps.evaluate)
    head, results = Path(arguments.output), Path(steps.evaluate.output) if steps.evaluate else None
    _renew_card(head, results, steps.card)
    if steps.push is not None:
        push_head(head, **steps.push, evaluation=results)
    return head


def _renew_card(head: Path, results: Path | None, said: Mapping[str, Any]) -> None:
    """The card of the finished head, with what was measured of it, and what the recipe says."""
    card = head / "README.md"
    document = json.loads((results / "evaluation.json").read_text(encoding="utf-8")) if results else None
    text = renew_card(ValueHead.from_pretrained(head), card.read_text(encoding="utf-8"), document, **said)
    write_atomically(card, text.encode())


class _Steps:
    """The arguments of every step, all checked before the first is done."""

    def __init__(self, content: Mapping[str, Any]):
        _check_sections(content)
        folder, labels = Path(content["output"]), content["label"]
        head, collection = str(folder / "head"), {"collection": str(folder / "collection")}
        learned = _learned(labels.get("judges") or [], content.get("train") or {})
        given = {"output": collection["collection"], **content["collect"]}
        self.collect = _arguments(CollectArguments, "collect", given)
        self.label = _arguments(LabelArguments, "label", labels)
        self.train = self.calibrate = self.evaluate = self.guide = None
        if "train" in content:
            chosen = {**collection, "output": head, **learned, **content["train"]}
            self.train = _arguments(TrainArguments, "train", chosen)
            check_target(self.train.preset().target, self.label.prefixes, self.collect.next_tokens)
        if "guide" in content:
            same = {name: given[name] for name in ("model", "dtype") if name in given}
            own = {"output": str(folder / "module"), "judge": (labels.get("judges") or [None])[0]}
            self.guide = self._guide({**collection, **same, **own, **content["guide"]})
        self.folds, self.card, self.push = 0, content.get("card") or {}, content.get("push")
        self._check_publishing()
        if "calibrate" in content:
            own = content["calibrate"] or {}
            chosen = {**collection, "value_head": head, **({} if "judge" in own else learned), **own}
            self.calibrate = _arguments(CalibrateArguments, "calibrate", chosen)
        if "evaluate" in content:
            shared = {name: given[name] for name in _SHARED if name in given}
            own = {"output": str(folder / "evaluation"), "value_head": head, "label_judge": _label_judge(learned)}
            chosen = {**shared, **own, **content["evaluate"]}
            _refuse_unmarked(learned, chosen)
            self.folds = chosen.pop("folds", 0)
            self.evaluate = self._evaluate(chosen)

    def _guide(self, chosen: Mapping[str, Any]) -> GuidanceTrainArguments:
        if not self.label.prefixes:
            raise ValueError("Section 'guide' needs `prefixes: true` in section 'label': stage `bridge` reads them.")
        guide = _arguments(GuidanceTrainArguments, "guide", chosen)
        check_target(guide.target, self.label.prefixes, self.collect.next_tokens)
        return guide

    def _evaluate(self, chosen: Mapping[str, Any]) -> EvaluateArguments:
        if not self.folds:
            return _arguments(EvaluateArguments, "evaluate", chosen)
        if self.calibrate is None or "prompts" in chosen:
            raise ValueError("`folds` evaluates on the prompts of `collect`: it needs `calibrate`, and no `prompts`.")
        return _arguments(EvaluateArguments, "evaluate", {**chosen, "prompts": self.collect.prompts})

    def _check_publishing(self) -> None:
        if unknown := sorted(set(self.card) - {"limits", "license", "datasets"}):
            raise ValueError(f"Section 'card' of the recipe has no {', '.join(unknown)}.")
        if self.push is not None and "repo_id" not in self.push:
            raise ValueError("Section 'push' of the recipe needs `repo_id`.")
        if self.push is not None:
            check_hub_id(self.collect.backbone or self.collect.model, "The backbone of section 'collect'")

    def look_for_sources(self) -> None:
        """Look for everything that later steps will ask for; `collect` does so for its own."""
        if self.calibrate is not None and self.calibrate.group_column is not None:
            check_column(self.calibrate.group_column, self._prompts())
        if self.evaluate is not None:
            check_sources(self.evaluate, self._prompts() if self.folds else evaluation_prompts(self.evaluate))

    def _prompts(self) -> list[Prompt]:
        given = self.collect
        return load_prompts(given.prompts, given.prompt_column, given.prompt_split, given.limit)


def _check_sections(content: Mapping[str, Any]) -> None:
    """Raise a `ValueError` for a section that is not known, and for one that is missing."""
    if unknown := sorted(set(content) - set(SECTIONS)):
        raise ValueError(f"A recipe has no section {', '.join(unknown)}; it has {', '.join(SECTIONS)}.")
    if missing := [name for name in ("output", "collect", "label") if name not in content]:
        raise ValueError(f"The recipe lacks {', '.join(missing)}.")
    of_a_head = {"calibrate", "evaluate", "card", "push"} & set(content)
    if "train" not in content and (of_a_head or "guide" not in content):
        raise ValueError("The recipe lacks train.")


def _learned(judges: Sequence[str], train: Mapping[str, Any]) -> dict[str, Any]:
    """Whose labels are learned: those of the first judge, or for several attributes those of each one's own.

    Raises:
        ValueError: if an attribute's judge gives no labels.
    """
    if "attributes" not in train:
        return {"judge": judges[0] if judges else None}
    for attribute in parse_attributes(train["attributes"]):
        if attribute.judge not in judges:
            raise ValueError(f"`judges` of section 'label' lack {attribute.judge}, which {attribute.name!r} is from.")
    return {"attributes": train["attributes"]}


def _label_judge(learned: Mapping[str, Any]) -> str | None:
    """The judge that the report shows as the one that gave labels, and by which a text is safe."""
    if "attributes" not in learned:
        return learned["judge"]  # type: ignore[no-any-return]
    undesirable = (each.judge for each in parse_attributes(learned["attributes"]) if each.polarity == "undesirable")
    return next(undesirable, None)


def _refuse_unmarked(learned: Mapping[str, Any], evaluate: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if a judge that gave labels would be reported as one that did not."""
    gave = {each.judge for each in parse_attributes(learned.get("attributes", ()))}
    if unmarked := sorted(gave & set(evaluate.get("judges", ())) - {evaluate["label_judge"]}):
        raise ValueError(
            f"`judges` of section 'evaluate' hold {', '.join(unmarked)}, which gave labels. A report can say that of "
            f"one judge only, {evaluate['label_judge']}: name judges that gave none."
        )


def _arguments(kind: type[T], section: str, given: Mapping[str, Any]) -> T:
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"Section {section!r} of the recipe: {error}.") from error
