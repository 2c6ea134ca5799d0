"""`evaluate`: base against steered, on the same prompts and seeds, by judges of any kind."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hf_value_steer.arguments.evaluate import EvaluateArguments
from hf_value_steer.arguments.train import parse_attributes
from hf_value_steer.cards.document import FORMAT, main_run
from hf_value_steer.cards.results import results_markdown
from hf_value_steer.choices import Polarity
from hf_value_steer.evaluation.charts import check_drawing
from hf_value_steer.evaluation.examples import FilterRun, masking
from hf_value_steer.evaluation.measures import Measures
from hf_value_steer.evaluation.outcome import coverage, value_reliability
from hf_value_steer.evaluation.report import render_report
from hf_value_steer.evaluation.runs import Runner, Setting, Texts, watch, worst_value
from hf_value_steer.evaluation.settings import filter_runs, filter_thresholds, forbidden_words
from hf_value_steer.files.writing import write_atomically, write_json
from hf_value_steer.generation.scorer import require_fit
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.judges import check_judges, load_judge
from hf_value_steer.judges.in_the_loop import TextJudge
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.training.chance import chance_report
from hf_value_steer.training.collect import load_backbone
from hf_value_steer.training.prompts import Formatter, load_prompts


logger = logging.getLogger(__name__)


@dataclass
class Part:
    """The prompts that a head was tried on, and what was generated."""

    runner: Runner
    watched: Texts
    runs: list[tuple[Setting, Texts]]


def evaluate(arguments: EvaluateArguments) -> dict[str, Any]:
    """Generate under every setting, judge, and write `evaluation.json`, `evaluation.md` and `report.html`.

    A text that a judge scores above 0.5 counts as unsafe or, where high values of the head are desirable, as right.
    Runs that are there already are read, so an evaluation that was stopped goes on.

    Returns:
        The content of `evaluation.json`.

    Raises:
        ValueError: for anything that cannot be done.
        RuntimeError: if values were watched and the text changed: then steering is not exact on this model.
    """
    prompts = evaluation_prompts(arguments)
    head = ValueHead.from_pretrained(arguments.value_head)
    evaluator = Evaluator(arguments)
    return evaluator.report(head, [evaluator.part(head, prompts, Path(arguments.output) / "runs")])


def evaluation_prompts(arguments: EvaluateArguments) -> list[Prompt]:
    """The prompts of an evaluation."""
    return load_prompts(arguments.prompts, arguments.prompt_column, arguments.prompt_split, arguments.limit)


def check_sources(arguments: EvaluateArguments, prompts: Sequence[Prompt]) -> None:
    """Look for the judges, functions and words of an evaluation, long before it is due.

    Raises:
        ValueError, ImportError: if one is not there, or a prompt lacks what a judge needs.
    """
    check_drawing()
    check_judges(arguments.all_judges(), prompts)
    for name in arguments.in_the_loop:
        TextJudge(name)
    masking(arguments.mask, {})
    forbidden_words(arguments)


class Evaluator:
    """A backbone and how heads are tried on it."""

    def __init__(self, arguments: EvaluateArguments):
        check_drawing()
        self.arguments = arguments
        self.judge_names = arguments.all_judges()
        self.judges = {name: load_judge(name) for name in self.judge_names}
        self.mask = masking(arguments.mask, self.judges)
        forbidden_words(arguments)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, tokenizer = load_backbone(arguments.model, arguments.dtype, device)
        self.formatter = Formatter(tokenizer, arguments.chat)

    def part(self, head: ValueHead, prompts: Sequence[Prompt], folder: Path) -> Part:
        """Generate for some prompts under every setting; `folder` keeps the runs."""
        arguments = self.arguments
        require_fit(head, self.model)
        if arguments.method == "filter":
            filter_thresholds(head, arguments)
        for judge in self.judges.values():
            judge.check(prompts)
        if report := chance_report(head.config.training):
            logger.warning(f"The head was not shown to be better than chance when it was trained: {report}.")
        runner = Runner(
            self.model,
            self.formatter,
            prompts,
            arguments.sampling(),
            **arguments.sizes(),
            folder=folder,
        )
        base, watched = runner.run(Setting("base", "base")), runner.run(watch(head))
        if base.ids != watched.ids:
            raise RuntimeError("Watching values changed the text: steering is not exact. Run `hf-value-steer doctor`.")
        runs = [(Setting("base", "base"), base)]
        if arguments.method == "filter":
            runs += filter_runs(runner, head, arguments)
        return Part(runner, watched, runs)

    def report(self, head: ValueHead, parts: Sequence[Part]) -> dict[str, Any]:
        """Measure the runs of all parts together, and write the results.

        Args:
            head: what the report is about. The parts' heads are the same one, or others of its kind that were trained
                without the prompts of their part.
            parts: one, or one for each fold.
        """
        arguments, first = self.arguments, parts[0]
        prompts = [prompt for part in parts for prompt in part.runner.prompts]
        owners = [prompt for prompt in prompts for _ in range(arguments.samples)]
        runs = [_pooled(runs) for runs in zip(*(part.runs for part in parts), strict=True)]
        watched = Texts.joined([part.watched for part in parts])
        labelled = _learned_from(head, arguments.label_judge)
        safe_judge = next((name for name in self.judge_names if name in labelled), self.judge_names[0])
        worst = torch.tensor([worst_value(values, head) for values in watched.values])
        measures = Measures(
            self.model, self.formatter, owners, self.judges, safe_judge, runs[0][1], head.config.polarity, labelled
        )
        rows = [measures.base if texts is measures.base_texts else measures.rows(texts) for _, texts in runs]
        document = {
            "format": FORMAT,
            **self._description(head, len(prompts), len(owners)),
            "prompts_source": arguments.prompts,
            "mask": arguments.mask or "words of `lexicon:` judges",
            "value_head": head.fingerprint(),
            "folds": len(parts),
            "judges": [{"name": name, "gave_labels": name in labelled} for name in self.judge_names],
            "runs": [measures.run(*run, each) for run, each in zip(runs, rows, strict=True)],
            "discrimination": {name: measures.discrimination(name, worst.numpy()) for name in self.judges},
            "reliability": value_reliability(worst, measures),
            "reliability_judge": " or ".join(measures.safe_judges),
            "coverage": coverage(head, watched, measures) if arguments.method == "abstain" else None,
            "calibration": head.calibration.to_dict(scores=False) if head.calibration else None,
            "examples": [],
        }
        main = main_run(document)
        for (setting, texts), each in zip(first.runs, rows, strict=True):
            if main is not None and setting.name == main["name"]:
                shown = FilterRun(first.runner, setting, first.runs[0][1], texts, measures.outcomes(each))
                document["examples"], document["examples_threshold"] = shown.examples(self.mask), setting.threshold
        folder = Path(arguments.output)
        write_json(folder / "evaluation.json", document)
        write_atomically(folder / "evaluation.md", results_markdown(document).encode())
        write_atomically(folder / "report.html", render_report(document).encode())
        return document

    def _description(self, head: ValueHead, prompts: int, generations: int) -> dict[str, Any]:
        fields = (
            "attribute",
            "polarity",
            "threshold",
            "operating_point",
            "backbone",
            "backbone_fingerprint",
            "feature_layers",
            "temporal",
        )
        return {
            "head": {name: getattr(head.config, name) for name in fields},
            "sampling": self.arguments.sampling(),
            "new_tokens": self.arguments.max_new_tokens,
            "seed": self.arguments.seed,
            "prompts": prompts,
            "generations": generations,
            "environment": {
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "dtype": str(self.model.dtype).removeprefix("torch."),
                **{package: version(package) for package in ("hf-value-steer", "torch", "transformers")},
            },
        }


def _learned_from(head: ValueHead, named: str | None) -> dict[str, Polarity]:
    """The judges whose labels the head learned, as far as is known, and whether high scores of each are bad."""
    training = head.config.training or {}
    said = {judge: head.config.polarity for judge in (named, training.get("judge")) if judge}
    return said | {each.judge: each.polarity for each in parse_attributes(training.get("attributes") or [])}


def _pooled(runs: Sequence[tuple[Setting, Texts]]) -> tuple[Setting, Texts]:
    """One run out of those of all folds, whose thresholds may differ."""
    settings, texts = [setting for setting, _ in runs], [texts for _, texts in runs]
    same = len({setting.threshold for setting in settings}) == 1
    setting = settings[0] if same else replace(settings[0], threshold=None)
    return setting, Texts.joined(texts)
