"""What the sections of a recipe say, all of it checked before the first step is done."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from hf_value_steer.arguments.base import old_names, renamed
from hf_value_steer.arguments.calibrate import CalibrateArguments
from hf_value_steer.arguments.collect import CollectArguments, LabelArguments
from hf_value_steer.arguments.evaluate import EvaluateArguments
from hf_value_steer.arguments.guidance import GuidanceTrainArguments
from hf_value_steer.arguments.hub import CardArguments, RecipePushArguments
from hf_value_steer.arguments.kinds import Folds, check_kind, shown
from hf_value_steer.arguments.train import SUGGESTED, TrainArguments, parse_attributes
from hf_value_steer.checks import refuse_unknown
from hf_value_steer.errors import FieldError
from hf_value_steer.evaluation.evaluate import check_sources, evaluation_prompts
from hf_value_steer.files.marked import Marked
from hf_value_steer.files.upload import check_hub_id
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.training.calibrate import check_column
from hf_value_steer.training.checkpoints import check_further
from hf_value_steer.training.prompts import load_prompts
from hf_value_steer.training.targets import check_target


SECTIONS = ("output", "collect", "label", "train", "calibrate", "evaluate", "card", "push", "guide")
# What later steps take from `collect` unless they say otherwise.
_SHARED = ("model", "chat", "prompt_column", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "dtype")
T = TypeVar("T")


class Steps:
    """The arguments of every step, all checked before the first is done."""

    def __init__(self, recipe: Marked):
        self.recipe = recipe
        self._check_sections()
        folder = Path(recipe.content["output"])
        head, collection = str(folder / "head"), {"collection": str(folder / "collection")}
        self.collect = self._arguments(CollectArguments, "collect", {"output": collection["collection"]})
        self.label = self._arguments(LabelArguments, "label", {})
        self.train: TrainArguments | None = None
        self.guide: GuidanceTrainArguments | None = None
        self.calibrate: CalibrateArguments | None = None
        self.evaluate: EvaluateArguments | None = None
        self.fresh: CollectArguments | None = None
        self.folds = 0
        learned: dict[str, Any] = {"judge": self.label.judges[0]}
        if "train" in recipe.content:
            self.train, learned = self._train({**collection, "output": head}, learned)
        if "guide" in recipe.content:
            filled = {"output": str(folder / "module"), "judge": self.label.judges[0]}
            self.guide = self._guide({**collection, **self._same("model", "dtype"), **filled})
        self.card, self.push = self._publishing()
        if "calibrate" in recipe.content:
            judged = {} if "judge" in self._own("calibrate") else learned
            self.fresh = self._fresh(str(folder / "calibration"))
            where = {"collection": self.fresh.output} if self.fresh else collection
            chosen = {**where, "value_head": head, **judged}
            self.calibrate = self._arguments(CalibrateArguments, "calibrate", chosen, "prompts")
        if "evaluate" in recipe.content:
            own = {"output": str(folder / "evaluation"), "value_head": head, "label_judge": _label_judge(learned)}
            self.folds, self.evaluate = self._evaluate({**self._same(*_SHARED), **own}, learned)

    def _fresh(self, output: str) -> CollectArguments | None:
        """What is collected for `calibrate`, if it has prompts of its own: one text for each."""
        if "prompts" not in self._own("calibrate"):
            return None
        with self.recipe.blaming("calibrate"):
            return replace(
                self.collect,
                prompts=self._own("calibrate")["prompts"],
                output=output,
                limit=None,
                samples=1,
                forced_samples=0,
                force_words=None,
                next_tokens=0,
            )

    def _check_sections(self) -> None:
        """Raise a `ValueError` for what is no recipe: sections, those that are needed among them, of fields."""
        content = self.recipe.content
        if not isinstance(content, Mapping):
            raise ValueError(
                f"{self.recipe.place()}: a recipe has to be a mapping of sections ({', '.join(SECTIONS)}), got "
                f"{shown(content)}."
            )
        with self.recipe.blaming():
            refuse_unknown(content, SECTIONS, "a recipe")
            if missing := [name for name in ("output", "collect", "label") if name not in content]:
                raise ValueError(f"it lacks {', '.join(missing)}.")
            of_a_head = {"calibrate", "evaluate", "card", "push"} & set(content)
            if "train" not in content and (of_a_head or "guide" not in content):
                raise ValueError("it lacks train.")
            output = content["output"]
            output = os.fspath(output) if isinstance(output, os.PathLike) else output
            check_kind("output", str, output, in_yaml=True)
            for name in SECTIONS[1:]:
                if not isinstance(content.get(name), Mapping | None):
                    raise FieldError(name, f"`{name}` has to be a mapping of its fields, got {shown(content[name])}.")

    def _own(self, section: str) -> dict[str, Any]:
        """What the recipe says in a section, which may be left empty."""
        return dict(self.recipe.content.get(section) or {})

    def _same(self, *names: str) -> dict[str, Any]:
        """What section `collect` says of these fields."""
        return {name: getattr(self.collect, name) for name in names if name in self._own("collect")}

    def _arguments(self, kind: type[T], section: str, filled: Mapping[str, Any], *besides: str) -> T:
        """What a section says, but for the keys `besides`, with what is filled in where it says nothing."""
        names = self._old_names(kind, section)
        with self.recipe.blaming(section, names=names):
            own, known = renamed(kind, self._own(section)), fields(kind)  # type: ignore[arg-type]
            refuse_unknown(own, [*besides, *(each.name for each in known)], f"section {section!r}")
            given = {name: choice for name, choice in {**filled, **own}.items() if name not in besides}
            needed = [each.name for each in known if each.default is each.default_factory is MISSING]
            if missing := [name for name in needed if name not in given]:
                raise ValueError(f"it lacks {', '.join(missing)}.")
            return kind(**given)

    def _old_names(self, kind: type[Any], section: str) -> dict[str, str]:
        """The fields that a section calls by names of before, of which a warning tells, and these names."""
        with self.recipe.blaming(section):
            found = old_names(kind, self._own(section))
        for name, was in found.items():
            place = self.recipe.place(section, was)
            warnings.warn(f"{place}: `{was}` is `{name}` now: say that.", FutureWarning, stacklevel=2)
        return found

    def _train(self, filled: Mapping[str, Any], learned: dict[str, Any]) -> tuple[TrainArguments, dict[str, Any]]:
        """The section `train`, and whose labels are learned: the first judge's, or for several attributes each one's.

        Raises:
            ValueError: if an attribute's judge gives no labels.
        """
        several = "attributes" in self._own("train")
        train = self._arguments(TrainArguments, "train", filled if several else {**filled, **learned})
        with self.recipe.blaming("train"):
            check_further(train.trainer)
            for attribute in parse_attributes(train.attributes):
                if attribute.judge not in self.label.judges:
                    raise ValueError(
                        f"`judges` of section 'label' lack {attribute.judge}, which {attribute.name!r} is from."
                    )
            check_target(train.settings().target, self.label.prefixes, self.collect.next_tokens)
            _check_kept(train.feature_layers, self.collect.feature_layers)
        return train, {"attributes": train.attributes} if several else learned

    def _guide(self, filled: Mapping[str, Any]) -> GuidanceTrainArguments:
        guide = self._arguments(GuidanceTrainArguments, "guide", filled)
        with self.recipe.blaming("guide"):
            check_further(guide.trainer)
            if not self.label.prefixes:
                raise ValueError("it needs `prefixes: true` in section 'label': stage `bridge` reads them.")
            check_target(guide.target, self.label.prefixes, self.collect.next_tokens)
        return guide

    def _evaluate(self, filled: Mapping[str, Any], learned: Mapping[str, Any]) -> tuple[int, EvaluateArguments]:
        """The folds and what else section `evaluate` says; with folds the prompts are those of `collect`."""
        own = self._own("evaluate")
        with self.recipe.blaming("evaluate"):
            folds = own.get("folds", 0)
            check_kind("folds", int if folds == 0 else Folds, folds, in_yaml=True)
            if folds:
                if self.calibrate is None or "prompts" in own:
                    raise FieldError(
                        "folds",
                        "`folds` evaluates on the prompts of `collect`: it needs `calibrate`, and no `prompts`.",
                    )
                filled = {**filled, "prompts": self.collect.prompts}
        evaluate = self._arguments(EvaluateArguments, "evaluate", filled, "folds")
        with self.recipe.blaming("evaluate"):
            _refuse_unmarked(learned, evaluate)
        return folds, evaluate

    def _publishing(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What sections `card` and `push` say."""
        self._arguments(CardArguments, "card", {})
        if "push" not in self.recipe.content:
            return self._own("card"), None
        self._arguments(RecipePushArguments, "push", {})
        with self.recipe.blaming("push"):
            check_hub_id(self.collect.backbone or self.collect.model, "The backbone of section 'collect'")
        return self._own("card"), self._own("push")

    def look_for_sources(self) -> None:
        """Look for everything that later steps will ask for; `collect` does so for its own."""
        column = self.calibrate.group_column if self.calibrate is not None else None
        prompts: list[Prompt] = []
        if self.evaluate is not None or self.fresh is not None or column is not None:
            with self.recipe.blaming("collect"):
                prompts = _prompts_of(self.collect)
        with self.recipe.blaming("calibrate"):
            calibrated = prompts if self.fresh is None else _prompts_of(self.fresh)
            if self.fresh is not None:
                _refuse_shared(calibrated, "collect", prompts)
            if column is not None:
                check_column(column, calibrated)
        if self.evaluate is not None:
            with self.recipe.blaming("evaluate"):
                asked = prompts if self.folds else evaluation_prompts(self.evaluate)
                check_sources(self.evaluate, asked)
                if not self.folds:
                    _refuse_shared(asked, "collect", prompts)
                    _refuse_shared(asked, "calibrate", calibrated)


def _refuse_shared(prompts: Sequence[Prompt], section: str, others: Sequence[Prompt]) -> None:
    """Raise a [`FieldError`] if prompts are used that another section has used for something else."""
    if both := {each.text for each in prompts} & {each.text for each in others}:
        raise FieldError("prompts", f"`prompts` hold {len(both)} of those of section {section!r}.")


def _prompts_of(given: CollectArguments) -> list[Prompt]:
    return load_prompts(given.prompts, given.prompt_column, given.prompt_split, given.limit)


def _check_kept(read: Sequence[Any] | None, kept: Sequence[Any]) -> None:
    """Raise a `ValueError` unless the layers that are read are some of those that are kept, as both are written."""
    if read == [SUGGESTED]:
        return
    if kept == ["all"]:
        if read is None:
            raise ValueError("it lacks feature_layers: section 'collect' keeps all, of which a head reads a few.")
        return
    if lacking := [layer for layer in read or [] if repr(layer) not in map(repr, kept)]:
        raise FieldError(
            "feature_layers",
            f"`feature_layers` names {lacking}, but section 'collect' keeps {list(kept)}: say them there, too, in the "
            "same words.",
        )


def _label_judge(learned: Mapping[str, Any]) -> str | None:
    """The judge that the report shows as the one that gave labels, and by which a text is safe."""
    if "attributes" not in learned:
        return learned["judge"]  # type: ignore[no-any-return]
    undesirable = (each.judge for each in parse_attributes(learned["attributes"]) if each.polarity == "undesirable")
    return next(undesirable, None)


def _refuse_unmarked(learned: Mapping[str, Any], evaluate: EvaluateArguments) -> None:
    """Raise a `ValueError` if a judge that gave labels would be reported as one that did not."""
    gave = {each.judge for each in parse_attributes(learned.get("attributes", ()))}
    if unmarked := sorted(gave & set(evaluate.judges) - {evaluate.label_judge}):
        raise ValueError(
            f"`judges` of section 'evaluate' hold {', '.join(unmarked)}, which gave labels. A report can say that of "
            f"one judge only, {evaluate.label_judge}: name judges that gave none."
        )
