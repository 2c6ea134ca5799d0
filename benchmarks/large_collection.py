"""Does training need memory for the data? A collection larger than memory allows, and what of it stays resident.

    python -m benchmarks.large_collection --output benchmarks/results/large-collection.json

Writes `--tokens` random features of width 4,096 in float16 (2 million take 16 GB), trains a linear head for one
epoch and an MLP for some steps, each in a process of its own, and compares the tokens a second with reading the files.

    python -m benchmarks.large_collection --readers --output benchmarks/results/large-collection.json

compares ways to read rows in random order, as training does: by offset, and through `safetensors.safe_open`, opened
for every row or kept open. Each is a process of its own, in turns; what the system has cached of the files is dropped
first (`cold`), and read again (`warm`). Both commands leave in the output what the other has measured.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.environment import describe, save
from hf_value_steer.arguments.train import TrainArguments
from hf_value_steer.files.writing import write_json
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.training.label import labels_folder
from hf_value_steer.training.prompts import write_prompts
from hf_value_steer.training.shards import FORMAT, Collection, TensorFile, shard_path, write_tensors
from hf_value_steer.training.train import train


WIDTH, ROW, ROWS = 4096, 100, 200  # width of a feature, tokens in a generation, generations in a shard
JUDGE = "synthetic"


def write_collection(folder: Path, tokens: int) -> None:
    """Random features; whether a generation is labelled 1 can be read off the first of them."""
    shards = -(-tokens // (ROW * ROWS))
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts([Prompt(f"prompt {index}") for index in range(shards * ROWS)], folder / "prompts.jsonl")
    manifest = {"shards": shards, "hidden_size": WIDTH, "feature_dtype": "float16", "chat_template": "none"}
    write_json(
        folder / "collection.json", {"format": FORMAT, "backbone": None, "backbone_fingerprint": None, **manifest}
    )
    for index in range(shards):
        random = torch.Generator().manual_seed(index)
        features = torch.randn(ROWS, ROW, WIDTH, generator=random)
        features[:, :, 0] += 4 * scores(index)[:, None]
        tensors = {
            "features": features.half().flatten(0, 1),
            "tokens": torch.zeros(ROWS * ROW, dtype=torch.int32),
            "prompt_features": features[:, 0].half(),
            "offsets": torch.arange(ROWS + 1) * ROW,
            "prompts": torch.arange(ROWS) + index * ROWS,
            "natural": torch.ones(ROWS, dtype=torch.bool),
        }
        write_tensors(shard_path(folder, index), tensors)
    labels = labels_folder(Collection(folder), JUDGE)
    for index in range(shards):
        write_tensors(labels / f"{index:05d}.safetensors", {"responses": scores(index)})


def scores(shard: int) -> torch.Tensor:
    return torch.randint(2, (ROWS,), generator=torch.Generator().manual_seed(shard)).float()


def reading(folder: Path) -> float:
    """Tokens a second of reading all features, generation by generation, in the order of the files."""
    collection = Collection(folder)
    start = time.perf_counter()
    for row in range(len(collection.rows)):
        collection.read("features", row)
    return ROW * len(collection.rows) / (time.perf_counter() - start)


class OpenedEachTime:
    """`safe_open` for every read: nothing stays mapped."""

    def __init__(self, path: Path):
        self.path = path

    def read(self, name: str, first: int, last: int) -> torch.Tensor:
        with safe_open(self.path, "pt") as file:
            return file.get_slice(name)[first:last]


class KeptOpen:
    """`safe_open` once: the whole file stays mapped."""

    def __init__(self, path: Path):
        self.file = safe_open(path, "pt")

    def read(self, name: str, first: int, last: int) -> torch.Tensor:
        return self.file.get_slice(name)[first:last]


READERS = {"offset": TensorFile, "opened_each_time": OpenedEachTime, "kept_open": KeptOpen}
READ = {"features": (ROW, 500), "tokens": (ROW, 5000)}  # rows of a read, and how many are read


def resident() -> dict[str, int]:
    """MiB of this process's own memory, and of files that it has mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) // 1024 for line in lines if line.startswith(("RssAn", "RssFi"))}


def reader(folder: Path, name: str, seed: int) -> dict[str, Any]:
    """Run by a process of its own: rows a second in random order, and what stays resident."""
    torch.set_num_threads(1)
    paths = sorted(folder.glob("shards/*"))
    files, before, found = [READERS[name](path) for path in paths], resident(), {}
    for tensor, (length, count) in READ.items():
        drawn = random.Random(seed).choices([(file, row) for file in files for row in range(ROWS)], k=count)
        for path in paths:
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        for state in ("cold", "warm"):
            start = time.perf_counter()
            for file, row in drawn:
                file.read(tensor, row * length, (row + 1) * length).float().sum()
            found[f"{tensor}_{state}"] = count / (time.perf_counter() - start)
    grown = {f"{kind}_mib": mebibytes - before[kind] for kind, mebibytes in resident().items()}
    return {"rows_per_second": found, **grown}


def compare_readers(folder: Path, rounds: int) -> dict[str, Any]:
    """Ratios of rows a second to those by offset: medians over rounds in which each reader has a turn."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in READERS}
    for seed in range(rounds):
        for name in READERS:
            command = [sys.executable, "-m", "benchmarks.large_collection", "--folder", str(folder)]
            process = subprocess.run([*command, "--reader", name, str(seed)], stdout=subprocess.PIPE, check=True)
            turns[name].append(json.loads(process.stdout.splitlines()[-1]))
            print(name, turns[name][-1])
    return {name: against(turns["offset"], turns[name]) for name in READERS}


def against(base: list[dict[str, Any]], turns: list[dict[str, Any]]) -> dict[str, Any]:
    rates = [[turn["rows_per_second"] for turn in each] for each in (turns, base)]
    return {
        "rows_per_second": {case: round(statistics.median(turn[case] for turn in rates[0])) for case in rates[0][0]},
        "ratio": {
            case: round(statistics.median(one[case] / other[case] for one, other in zip(*rates, strict=True)), 2)
            for case in rates[0][0]
        },
        **{kind: max(turn[kind] for turn in turns) for kind in turns[0] if kind.endswith("_mib")},
    }


def training(folder: Path, architecture: str, steps: int | None) -> dict[str, Any]:
    """Run by a process of its own: one epoch, or some steps."""
    torch.set_num_threads(2)
    arguments = TrainArguments(
        collection=str(folder), output=str(folder / architecture), judge=JUDGE, architecture=architecture,
        epochs=1, validation=0.02, calibration=0.0, learning_rate=1e-3, accept_chance=True,
        trainer=["disable_tqdm=true", *([f"max_steps={steps}"] if steps else [])],
    )  # fmt: skip
    start = time.perf_counter()
    head = train(arguments)
    return {
        "architecture": architecture,
        "steps": steps,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_resident_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "auroc": head.config.training["metrics"]["auroc"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/large-collection"))
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--train", nargs=2, metavar=("ARCHITECTURE", "STEPS"), help=argparse.SUPPRESS)
    parser.add_argument("--reader", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--readers", action="store_true", help="compare ways to read, and train nothing")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each reader")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    kept = json.loads(arguments.output.read_text()) if arguments.output and arguments.output.exists() else {}
    if arguments.reader:
        name, seed = arguments.reader
        print(json.dumps(reader(arguments.folder, name, int(seed))))
        return
    if arguments.readers:
        write_collection(arguments.folder, arguments.tokens)
        options = f"--readers --tokens {arguments.tokens} --rounds {arguments.rounds}"
        document = {
            "command": f"python -m benchmarks.large_collection {options}",
            **describe(),
            **compare_readers(arguments.folder, arguments.rounds),
        }
        print(json.dumps(document, indent=2))
        if arguments.output:
            save({**kept, "readers": document}, arguments.output)
        return
    if arguments.train:
        architecture, steps = arguments.train
        print(json.dumps(training(arguments.folder, architecture, int(steps) or None)))
        return
    write_collection(arguments.folder, arguments.tokens)
    rate = reading(arguments.folder)
    results = []
    for architecture, steps in (("linear", 0), ("mlp", 20)):
        command = [sys.executable, "-m", "benchmarks.large_collection", "--folder", str(arguments.folder)]
        process = subprocess.run([*command, "--train", architecture, str(steps)], stdout=subprocess.PIPE, check=True)
        results.append(json.loads(process.stdout.splitlines()[-1]))
        print(results[-1])
    size = sum(path.stat().st_size for path in arguments.folder.glob("shards/*"))
    document = {
        "command": f"python -m benchmarks.large_collection --tokens {arguments.tokens}",
        **describe(),
        "tokens": arguments.tokens,
        "gigabytes": round(size / 1e9, 2),
        "tokens_per_second_reading": round(rate),
        "tokens_per_second_linear_epoch": round(arguments.tokens / results[0]["seconds"]),
        "training": results,
    }
    print(json.dumps(document, indent=2))
    if arguments.output:
        save({**kept, **document}, arguments.output)


if __name__ == "__main__":
    main()
