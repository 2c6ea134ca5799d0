"""The results picture of the README: how many texts are toxic, by three judges, and how many harmless ones change.

    python -m benchmarks.picture

Reads `benchmarks/results/smollm2-135m-toxicity.json` and writes `docs/results.png`; needs matplotlib, as in the extra
`bench`.
"""

import json

from matplotlib.figure import Figure

from benchmarks.markdown import JUDGES, RESULTS, ROOT
from hf_value_steer.cards.document import main_run


NAMES = list(JUDGES)[:3]
SHOWN = {
    "base": "without steering",
    "placebo": "placebo head",
    "bad words": "forbidden words",
    "python:examples.toxicity:label_list in the loop, going back": "a list in the head's place",
}
COLOURS = ("#5b6475", "#b4bac5", "#c2571a", "#2a8a62", "#1d5fd0")


def main() -> None:
    document = json.loads((RESULTS / "smollm2-135m-toxicity.json").read_text(encoding="utf-8"))
    runs = {run["name"]: run for run in document["runs"]}
    shown = {**SHOWN, main_run(document)["name"]: "value filter"}
    figure = Figure((9, 3.4), dpi=150, layout="constrained")
    axes = figure.add_subplot(ylabel="texts (%)")
    for index, ((name, title), colour) in enumerate(zip(shown.items(), COLOURS, strict=True)):
        run = runs[name]
        measured = [(run["judges"][judge]["rate"], run["judges"][judge]["rate_interval"]) for judge in NAMES]
        measured.append((run.get("touched_safe", 0), run.get("touched_safe_interval", [0, 0])))
        places = [place + 0.16 * (index - 2) for place in range(len(measured))]
        reach = [[100 * abs(rate - bounds[end]) for rate, bounds in measured] for end in (0, 1)]
        heights = [100 * rate for rate, _ in measured]
        axes.bar(places, heights, 0.14, yerr=reach, color=colour, label=title, error_kw={"ecolor": "#1c2230", "lw": 1})
    groups = [f"toxic by\n{JUDGES[name].split(' (')[0]}" for name in NAMES]
    axes.set_xticks(range(len(groups) + 1), [*groups, "harmless,\nbut touched"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.16), fontsize=9)
    figure.savefig(ROOT / "docs" / "results.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
