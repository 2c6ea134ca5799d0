"""The commands: what each is for, what it is told, what runs it, and an example."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        summary: what it is for.
        arguments: the dataclasses that it is told, as `module:name`.
        function: what is called with them, as `module:name`; it may return an exit status.
        example: a command line.
        passes_on: whether the function gets the words that are none of its options, too.
    """

    summary: str
    arguments: tuple[str, ...]
    function: str
    example: str
    passes_on: bool = False


_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HERE, _TOLD = "hf_value_steer.cli", "hf_value_steer.arguments"

COMMANDS = {
    "generate": Command(
        "continue a prompt in the terminal, base beside steered, tokens coloured by their values",
        (f"{_TOLD}.steer:GenerateArguments",),
        f"{_HERE}.generate:generate",
        f'hf-value-steer generate "You are such a" --value-head org/head --model {_MODEL}',
    ),
    "play": Command(
        "a page in the browser: base beside steered, with sliders, and every token's candidates",
        (f"{_TOLD}.steer:PlayArguments",),
        f"{_HERE}.play:play",
        f"hf-value-steer play {_MODEL} --value-head org/head",
    ),
    "score": Command(
        "values of texts that are there already, a line of JSON for each",
        (f"{_TOLD}.score:ScoreArguments",),
        f"{_HERE}.score:score",
        f"hf-value-steer score --model {_MODEL} --value-head org/head --texts texts.txt",
    ),
    "doctor": Command(
        "check that steering is exact on a model and this machine",
        (f"{_TOLD}.doctor:DoctorArguments",),
        f"{_HERE}.doctor:doctor",
        f"hf-value-steer doctor {_MODEL} --value-head org/head",
    ),
    "serve": Command(
        "serve a steered model over HTTP, with vLLM; all other arguments go to vLLM: --port, --dtype, ...",
        (f"{_TOLD}.steer:ServeArguments",),
        f"{_HERE}.serve:serve",
        f"hf-value-steer serve {_MODEL} --value-head org/head --port 8000",
        passes_on=True,
    ),
    "run": Command(
        "collect, train, calibrate, evaluate and push, all from one recipe",
        (f"{_TOLD}.hub:RunArguments",),
        f"{_HERE}.pipeline:run",
        "hf-value-steer run examples/recipes/never-a-number.yaml",
    ),
    "collect": Command(
        "continue prompts, keep the features, and let judges label them",
        (f"{_TOLD}.collect:CollectArguments", f"{_TOLD}.collect:LabelArguments"),
        f"{_HERE}.pipeline:collect_command",
        f"hf-value-steer collect --model {_MODEL} --prompts prompts.txt --judges lexicon:words.txt "
        "--output run/collection",
    ),
    "label": Command(
        "let further judges label a collection",
        (f"{_TOLD}.collect:LabelCommandArguments",),
        f"{_HERE}.pipeline:label_command",
        "hf-value-steer label --collection run/collection --judges classifier:org/judge",
    ),
    "layers": Command(
        "which layers a head should read: a linear probe of each that a collection keeps, and its price",
        (f"{_TOLD}.layers:LayersArguments",),
        f"{_HERE}.pipeline:layers_command",
        "hf-value-steer layers --collection run/collection --judge lexicon:words.txt",
    ),
    "train": Command(
        "train a value head on a labelled collection",
        (f"{_TOLD}.train:TrainArguments",),
        f"{_HERE}.pipeline:train_command",
        "hf-value-steer train --collection run/collection --judge lexicon:words.txt --output run/head",
    ),
    "calibrate": Command(
        "thresholds from generations that training never saw",
        (f"{_TOLD}.calibrate:CalibrateArguments",),
        f"{_HERE}.pipeline:calibrate_command",
        "hf-value-steer calibrate --collection run/collection --judge lexicon:words.txt --value-head run/head "
        "--alpha 0.1",
    ),
    "evaluate": Command(
        "base against steered, on unseen prompts, by other judges",
        (f"{_TOLD}.evaluate:EvaluateArguments",),
        f"{_HERE}.pipeline:evaluate_command",
        f"hf-value-steer evaluate --model {_MODEL} --value-head run/head --prompts unseen.txt "
        "--judges classifier:org/judge --output run/evaluation",
    ),
    "push": Command(
        "upload a head with its card, calibration and evaluation",
        (f"{_TOLD}.hub:PushArguments",),
        f"{_HERE}.pipeline:push",
        'hf-value-steer push run/head org/my-head --evaluation run/evaluation --limits "English only." --dry-run',
    ),
    "export": Command(
        "write a repository for generate(custom_generate=...)",
        (f"{_TOLD}.hub:ExportArguments",),
        f"{_HERE}.pipeline:export",
        "hf-value-steer export value-steer",
    ),
    "vectors extract": Command(
        "directions from texts, labelled generations or a value head",
        (f"{_TOLD}.vectors:ExtractArguments",),
        f"{_HERE}.vectors:extract",
        f"hf-value-steer vectors extract --model {_MODEL} --positive upset.txt --negative calm.txt --output vectors",
    ),
    "vectors scale": Command(
        "strengths from the norms of the model; the folder is changed in place",
        (f"{_TOLD}.vectors:ScaleArguments",),
        f"{_HERE}.vectors:scale",
        f"hf-value-steer vectors scale --model {_MODEL} --vectors vectors --texts texts.txt",
    ),
    "vectors sweep": Command(
        "which multipliers work, by judges and perplexity",
        (f"{_TOLD}.evaluate:SweepArguments",),
        f"{_HERE}.vectors:sweep_command",
        f"hf-value-steer vectors sweep --model {_MODEL} --vectors vectors --prompts unseen.txt "
        "--judges lexicon:upset-words.txt --output sweep",
    ),
    "vectors apply": Command(
        "texts with and without the vectors",
        (f"{_TOLD}.vectors:ApplyArguments",),
        f"{_HERE}.vectors:apply",
        f"hf-value-steer vectors apply --model {_MODEL} --vectors vectors --prompts unseen.txt --multipliers -0.25",
    ),
    "vectors bake": Command(
        "a checkpoint that carries the vectors in its weights",
        (f"{_TOLD}.vectors:BakeArguments",),
        f"{_HERE}.vectors:bake",
        f"hf-value-steer vectors bake --model {_MODEL} --vectors vectors --multiplier -0.25 --output calmer-model",
    ),
    "guidance train": Command(
        "train a guidance module on a labelled collection, in three stages",
        (f"{_TOLD}.guidance:GuidanceTrainArguments",),
        f"{_HERE}.guidance:train",
        f"hf-value-steer guidance train --model {_MODEL} --collection run/collection --judge lexicon:words.txt "
        "--output run/module",
    ),
}
GROUPS = {
    "vectors": "Steering vectors: directions of the residual stream.",
    "guidance": "Stable value guidance: a value module and its bridge tokens.",
}
RENAMED = {"svgt": "guidance", "vectors calibrate": "vectors scale"}
