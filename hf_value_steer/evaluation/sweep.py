"""The working window of a multiplier: how far it moves a judge's rate before the text falls apart."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from accelerate import PartialState

from hf_value_steer.activation.steering_vectors import SteeringVectors
from hf_value_steer.arguments.evaluate import SweepArguments
from hf_value_steer.cards.document import TIMES, flat
from hf_value_steer.choices import VectorMode
from hf_value_steer.evaluation.charts import Chart, Point, Series, check_drawing, logarithmic, percents, reference
from hf_value_steer.evaluation.examples import masking
from hf_value_steer.evaluation.measures import Measures
from hf_value_steer.evaluation.pages import render
from hf_value_steer.evaluation.runs import Runner, Setting, Texts
from hf_value_steer.files.reading import read_record
from hf_value_steer.files.writing import write_atomically, write_json
from hf_value_steer.judges import load_judge
from hf_value_steer.training.collect import load_backbone
from hf_value_steer.training.prompts import Formatter, load_prompts


if TYPE_CHECKING:
    from matplotlib.axes import Axes


Example = tuple[str, str, str]  # a multiplier, a text, and what is wrong with the texts of that multiplier
_ABOUT = {  # of a document, and what a page calls it
    "model": "model",
    "attribute": "attribute",
    "vectors": "vectors",
    "prompts": "prompts",
    "generations": "texts for each multiplier",
    "max_new_tokens": "new tokens",
}
SHOWN = 3  # prompts whose texts are on the page
REPEATS = 0.5  # a text whose share of distinct pairs of tokens fell below this part of the base's repeats itself


def sweep(arguments: SweepArguments) -> dict[str, Any]:
    """Generate under every multiplier, measure, and write `sweep.json` and `sweep.html`.

    Perplexity is the unsteered model's, of the texts that the steered one wrote.

    Returns:
        The document: `runs`, the unsteered one first, and the `window`.
    """
    check_drawing()
    folder = Path(arguments.output)
    model, tokenizer = load_backbone(arguments.model, arguments.dtype, PartialState().device)
    vectors = SteeringVectors.from_pretrained(arguments.vectors)
    vectors.check_fit(model)
    prompts, formatter = load_prompts(arguments.prompts, limit=arguments.limit), Formatter(tokenizer, arguments.chat)
    runner = Runner(
        model,
        formatter,
        prompts,
        arguments.sampling(),
        **arguments.sizes(),
        folder=folder / "runs",
        conditions={"vectors": vectors.fingerprint()},
    )
    sweeper = Sweeper(runner, vectors, arguments.judges, arguments.mask)
    for mode, multiplier in _planned(folder, arguments):
        sweeper.run(multiplier, mode)
    about: dict[str, Any] = {"model": arguments.model, "attribute": vectors.attribute, "vectors": arguments.vectors}
    about |= {"prompts": len(prompts), "generations": len(prompts) * arguments.samples}
    document = {**sweeper.document(arguments.budget), **about, "max_new_tokens": arguments.max_new_tokens}
    write_json(folder / "sweep.json", document)
    write_atomically(folder / "sweep.html", sweep_page(document).encode())
    return document


def _planned(folder: Path, arguments: SweepArguments) -> list[tuple[VectorMode, float]]:
    """Modes and multipliers: those of now first, and those of a sweep that is there, whose runs are kept."""
    path, now = folder / "sweep.json", arguments.mode
    before = read_record(path, "runs")["runs"] if path.exists() else []
    found = {(run["method"], run["multiplier"]) for run in before if run["method"] in get_args(VectorMode)}
    found |= {(now, multiplier) for multiplier in arguments.multipliers}
    return sorted(((mode, m) for mode, m in found if m), key=lambda each: (each[0] != now, *each))


class Sweeper:
    """Runs of one backbone under its vectors, each measured against the unsteered run.

    Args:
        runner: of the backbone, on the prompts.
        vectors: of the backbone.
        judges: their names.
        mask (*optional*): what hides words of shown texts, as for `evaluate`.
    """

    def __init__(self, runner: Runner, vectors: SteeringVectors, judges: Sequence[str], mask: str | None = None):
        self.runner, self.vectors = runner, vectors
        loaded = {name: load_judge(name) for name in judges}
        for judge in loaded.values():
            judge.check(runner.prompts)
        base = Setting("base", "base")
        self.mask, self.texts = masking(mask, loaded), list[dict[str, Any]]()
        texts = runner.run(base)
        rows = [prompt for prompt in runner.prompts for _ in range(runner.samples)]
        self.measures = Measures(
            runner.model, runner.formatter, rows, loaded, judges[0], texts, polarity="undesirable"
        )
        self.runs = list[dict[str, Any]]()
        self._measure(0.0, base, texts)

    def run(self, multiplier: float, mode: VectorMode = "broadcast", setting: Setting | None = None) -> dict[str, Any]:
        """Generate and measure under vectors; with `setting`, under what it gives to `generate` instead."""
        if setting is None:
            setting = Setting(f"{mode} m={multiplier:g}", mode)
            with self.vectors.apply(self.runner.model, multiplier, mode):
                texts = self.runner.run(setting)
        else:
            texts = self.runner.run(setting)
        return self._measure(multiplier, setting, texts)

    def _measure(self, multiplier: float, setting: Setting, texts: Texts) -> dict[str, Any]:
        ids = texts.ids[: SHOWN * self.runner.samples : self.runner.samples]
        shown = self.runner.formatter.tokenizer.batch_decode(ids, skip_special_tokens=True)
        self.runs.append({"multiplier": multiplier, **self.measures.run(setting, texts)})
        self.texts.append({"method": setting.method, "multiplier": multiplier, "texts": list(map(self.mask, shown))})
        return self.runs[-1]

    def document(self, budget: float) -> dict[str, Any]:
        """All runs, and the window of the multipliers under which the text stays within the budget."""
        for run in self.runs:
            run["collapsed"] = collapsed(run, self.runs[0], budget)
        norms = self.vectors.norms
        return {
            "budget": budget,
            "runs": self.runs,
            "window": window(swept(self.runs)),
            "examples": {
                "prompts": [self.mask(prompt.text) for prompt in self.runner.prompts[:SHOWN]],
                "texts": self.texts,
            },
            "layers": list(self.vectors.layers),
            "norms": None if norms is None else [round(norm, 2) for norm in norms.tolist()],
        }


def swept(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The runs of the mode that was swept first, and the base, by multiplier."""
    mode = runs[1]["method"]
    return sorted((run for run in runs if run["method"] in ("base", mode)), key=lambda run: float(run["multiplier"]))


def collapsed(run: Mapping[str, Any], base: Mapping[str, Any], budget: float) -> str | None:
    """What is wrong with a run's texts, if they are too improbable, or repetitive, which makes them probable."""
    if run["perplexity_ratio"] > budget:
        return "over the budget of perplexity"
    repeats = (run["distinct_2"] or 0.0) < REPEATS * (base["distinct_2"] or 0.0)
    return "repeats itself" if repeats else None


def window(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Lowest and highest multiplier up to which, counted from 0, no run collapsed."""
    edges = []
    for sign in (-1, 1):
        side = sorted((run for run in runs if run["multiplier"] * sign > 0), key=lambda run: abs(run["multiplier"]))
        fine = itertools.takewhile(lambda run: not run["collapsed"], side)
        edges.append(max((run["multiplier"] for run in fine), key=abs, default=0.0))
    return edges


def sweep_page(document: Mapping[str, Any]) -> str:
    """Rates and perplexity over the multiplier, norms by layer, texts: one page of HTML and SVG without script."""
    runs = swept(document["runs"])
    low, high = document["window"]
    charts = [_rates(f"rate-{index}", name, runs) for index, name in enumerate(runs[0]["judges"])]
    charts.append(_perplexities(runs, document["budget"]))
    if document["norms"]:
        charts.append(norm_chart(document["layers"], document["norms"]))
    about = flat({said: document.get(name) for name, said in _ABOUT.items()})
    return render(
        "sweep.html",
        title=f"Working window: {low:g} to {high:g}",
        about=about,
        charts=charts,
        examples=_examples(document, runs),
    )


def _examples(document: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Example]]]:
    """Each prompt that is shown with its text under every multiplier, and what is wrong with the texts of that one."""
    held = document.get("examples") or {"prompts": [], "texts": []}
    texts = {(each["method"], each["multiplier"]): each["texts"] for each in held["texts"]}
    return [
        (
            prompt,
            [
                (f"{run['multiplier']:g}", texts[run["method"], run["multiplier"]][index], run["collapsed"] or "")
                for run in runs
            ],
        )
        for index, prompt in enumerate(held["prompts"])
    ]


def norm_chart(layers: Sequence[int], norms: Sequence[float]) -> Chart:
    """Why the strength follows the norm: how the residual grows with depth, and what is left of a flat strength.

    Args:
        layers, norms: the steered layers, and the mean norm of the residual behind each.
    """
    left = norms[0] / norms[-1]
    note = (
        f"The strength follows it. A flat one would have {100 * left:.0f} % of its relative influence at layer "
        f"{layers[0]} left at layer {layers[-1]}."
    )
    points = [Point(layer, norm, f"layer {layer}: {norm:.3g}") for layer, norm in zip(layers, norms, strict=True)]
    series = [Series("mean norm", points)]
    return Chart("norms", "Norm of the residual stream", note, "layer", "mean norm", series, _layers)


def _layers(axes: "Axes") -> None:
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", integer=True)


def _rates(name: str, judge: str, runs: Sequence[Mapping[str, Any]]) -> Chart:
    def finish(axes: "Axes") -> None:
        axes.set_ylim(bottom=0)
        _say_multipliers(axes, runs)
        percents(axes.yaxis)

    judged = [run["judges"][judge] for run in runs]
    points = _points(runs, [each["rate"] for each in judged], [each.get("rate_interval") for each in judged])
    series = [Series("rate", points)]
    return Chart(name, "Rate", f"Judge: {judge}", "multiplier m", "rate", series, finish)


def _perplexities(runs: Sequence[Mapping[str, Any]], budget: float) -> Chart:
    note = "Of the steered text under the unsteered model. Ringed: beyond the budget, or repetitive."
    spans = [run.get("perplexity_ratio_interval") for run in runs]
    points = _points(runs, [run["perplexity_ratio"] for run in runs], spans)
    series = [
        Series("perplexity", points),
        reference(f"budget {TIMES}{budget:g}", budget),
    ]

    def finish(axes: "Axes") -> None:
        _say_multipliers(axes, runs)
        logarithmic(axes, "y", f"{TIMES}{{x:g}}")

    title = "Perplexity, relative to base"
    return Chart("perplexity", title, note, "multiplier m", "perplexity", series, finish, keyed=True)


def _say_multipliers(axes: "Axes", runs: Sequence[Mapping[str, Any]]) -> None:
    """Let the x axis say which multipliers were tried, from 0 outwards as far as there is room for them."""
    tried, said = [run["multiplier"] for run in runs], list[float]()
    for each in sorted(tried, key=abs):
        if all(abs(each - other) >= (max(tried) - min(tried)) / 10 for other in said):
            said.append(each)
    axes.set_xticks(said, [f"{each:g}" for each in said])


def _points(
    runs: Sequence[Mapping[str, Any]], heights: Sequence[float], intervals: Sequence[Sequence[float] | None]
) -> list[Point]:
    multipliers = [float(run["multiplier"]) for run in runs]
    return [
        Point(x, y, f"m = {x:g}: {y:.3g}", y_interval=interval, ring=bool(run["collapsed"]))
        for x, y, interval, run in zip(multipliers, heights, intervals, runs, strict=True)
    ]
