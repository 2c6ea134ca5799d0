"""The results picture of the README: how many texts are toxic, by three judges, under each method.

    python -m benchmarks.picture

Reads `benchmarks/results/smollm2-135m-toxicity-final.json` and writes `docs/results.png`; needs matplotlib, as in the
extra `bench`.
"""

import json

from matplotlib.figure import Figure

from benchmarks.markdown import JUDGES, RESULTS, ROOT


SHOWN = {
    "base": "without steering",
    "placebo": "placebo head",
    "bad words": "forbidden words",
    "best of 4": "best of 4",
}
SHOWN |= {"filter K=8": "value filter"}
COLOURS = ("#5b6475", "#b4bac5", "#b8336a", "#c2571a", "#1d5fd0")


def main() -> None:
    document = json.loads((RESULTS / "smollm2-135m-toxicity-final.json").read_text(encoding="utf-8"))
    runs = {run["name"]: run["judges"] for run in document["runs"]}
    figure = Figure((9, 3.2), dpi=150, layout="constrained")
    axes = figure.add_subplot(ylabel="toxic texts (%)")
    for index, (name, colour) in enumerate(zip(SHOWN, COLOURS, strict=True)):
        judged = [runs[name][judge] for judge in JUDGES]
        places = [place + 0.16 * (index - 2) for place in range(len(judged))]
        heights = [100 * each["rate"] for each in judged]
        reach = [[100 * abs(each["rate"] - each["rate_interval"][end]) for each in judged] for end in (0, 1)]
        axes.bar(
            places, heights, 0.14, yerr=reach, color=colour, label=SHOWN[name], error_kw={"ecolor": "#1c2230", "lw": 1}
        )
    axes.set_xticks(range(len(JUDGES)), [name.replace(" (", "\n(", 1) for name in JUDGES.values()])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.16), fontsize=9)
    figure.savefig(ROOT / "docs" / "results.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
