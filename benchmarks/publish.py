"""Put what a recipe made where the repository keeps it: `python -m benchmarks.publish runs/NAME`.

The head with its card goes to `model_cards/`, the evaluation and its report, without texts, to `benchmarks/results/`
and `docs/`. `benchmarks.outcomes` makes examples for the report.
"""

import argparse
import json
import shutil
from pathlib import Path

from hf_value_steer.evaluation.report import render_report
from hf_value_steer.files.writing import write_json


ROOT = Path(__file__).resolve().parents[1]
HEAD = ("README.md", "config.json", "model.safetensors", "calibration.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the recipe's run")
    parser.add_argument("name", help="of the head below model_cards/, for instance smollm2-135m-toxicity-final")
    arguments = parser.parse_args()
    card = ROOT / "model_cards" / arguments.name
    card.mkdir(parents=True, exist_ok=True)
    for file in HEAD:
        shutil.copyfile(arguments.run / "head" / file, card / file)
    document = json.loads((arguments.run / "evaluation" / "evaluation.json").read_text("utf-8"))
    document["examples"] = []
    write_json(ROOT / "benchmarks" / "results" / f"{arguments.name}.json", document)
    (ROOT / "docs" / f"{arguments.name}.html").write_text(render_report(document), encoding="utf-8")


if __name__ == "__main__":
    main()
