"""The command line as a whole: help and example of every command, one spelling, errors of one line, and no weight."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import pytest

import hf_value_steer
from hf_value_steer.arguments.calibrate import CalibrateArguments
from hf_value_steer.arguments.evaluate import EvaluateArguments
from hf_value_steer.arguments.hub import PushArguments
from hf_value_steer.cli import main, running
from hf_value_steer.cli.commands import COMMANDS, GROUPS, Command
from hf_value_steer.cli.options import as_options, parser_of, read
from tools.command_line import PAGE, page


ROOT = Path(hf_value_steer.__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def kinds(name):
    return [resolve_name(kind) for kind in COMMANDS[name].arguments]


def parser(name):
    return parser_of(f"hf-value-steer {name}", COMMANDS[name].summary, COMMANDS[name].example, kinds(name))


def parsed(line):
    """What a line asks for: the command's name, its arguments, and words that are none of its options."""
    program, *words = shlex.split(line)
    assert program == "hf-value-steer"
    name = next(name for name in (words[0], " ".join(words[:2])) if name in COMMANDS)
    return name, *read(parser(name), kinds(name), words[len(name.split()) :], COMMANDS[name].passes_on)


def told():
    """The command lines that documents show, on one line each."""
    for path in DOCS:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for language, block in re.findall(r"^```([^\n]*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            if language != "text":  # which is what was printed
                yield from (line.split("  #")[0] for line in block.splitlines() if line.startswith("hf-value-steer "))


def printed(capsys, words, status=0):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == status
    return capsys.readouterr()


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_can_be_typed(name):
    found, arguments, others = parsed(COMMANDS[name].example)
    assert found == name and len(arguments) == len(COMMANDS[name].arguments)
    assert not others or COMMANDS[name].passes_on


def test_lines_in_documents_can_be_typed():
    lines = sorted(set(told()))
    assert len(lines) > 10
    for line in lines:
        name, _, others = parsed(line)
        assert not others or COMMANDS[name].passes_on, line


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_written_for_people(name, capsys):
    out = printed(capsys, [*name.split(), "--help"]).out
    assert COMMANDS[name].example in out and ("required:" in out or name == "doctor")
    assert not re.search(r"--\w+_|Args:|Raises:|\[`|```|==SUPPRESS==", out)
    options = [action for action in parser(name)._actions if action.dest != "help"]
    assert options and all(action.help and len(action.help) > 5 for action in options)


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in GROUPS)])
def test_the_list_of_commands_says_what_each_is_for(words, capsys):
    out = printed(capsys, words).out
    shown = [name for name in COMMANDS if len(words) == 1 or name.startswith(words[0])]
    assert all(f"  {name} " in out and COMMANDS[name].summary in out for name in shown)
    assert len(re.findall(r"^  \w[\w ]*?  +", out, re.MULTILINE)) == len(shown)


def test_a_program_without_a_command_shows_the_list(capsys):
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_the_version(capsys):
    assert re.fullmatch(r"hf-value-steer \d+\.\d+\.\d+\S*\n", printed(capsys, ["--version"]).out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["colect"], "there is no command 'colect'; did you mean 'collect'?"),
        (["colect", "--model", "m"], "there is no command 'colect'; did you mean 'collect'?"),
        (["vectors", "bakee"], "there is no command 'vectors bakee'; did you mean 'vectors bake'?"),
        (["quite", "other"], "there is no command 'quite'."),
        (["--color", "generate", "x"], "options of 'generate' stand behind it."),
        (["train", "--collection", "c", "--output", "o", "--judgee", "j"], "--judgee j; did you mean --judge?"),
        (["train", "--output", "o", "--judge", "j"], "the following arguments are required: --collection"),
        (["train", "--collection", "c", "--output", "o"], "--judge says whose labels are learned, or --attributes do"),
        (["train", "--collection", "c", "--output", "o", "--judge", "j", "--epochs", "x"], "invalid int value: 'x'"),
        (["train", "--collection", "c", "--output", "o", "--judge", "j", "--loss", "x"], "invalid choice: 'x'"),
        (["doctor"], "Pass a model, or --vllm."),
        (["push", "folder"], "the following arguments are required: REPO_ID"),
    ],
)
def test_a_wrong_line_is_answered_in_one(words, message, capsys):
    said = printed(capsys, words, 2)
    first, second = said.err.splitlines()
    assert message in first and first.startswith("hf-value-steer") and not said.out
    assert re.fullmatch(r"See `hf-value-steer[\w ]* --help`\.", second)


def test_old_spellings_are_understood(capsys):
    line = "hf-value-steer calibrate --collection c --judge j --value_head h --alpha=0.2"
    assert parsed(line)[1] == [CalibrateArguments(collection="c", judge="j", value_head="h", alpha=0.2)]
    for words, new in ((["svgt", "train"], "guidance train"), (["vectors", "calibrate"], "vectors scale")):
        said = printed(capsys, [*words, "--help"])
        assert f"usage: hf-value-steer {new} " in said.out and "now." in said.err


def test_values_are_left_as_they_are():
    line = "hf-value-steer push a_b org/c_d --limits='--not_an option' --datasets x_y --no-private"
    _, (arguments,), _ = parsed(line)
    assert arguments == PushArguments(
        folder="a_b", repo_id="org/c_d", limits="--not_an option", datasets=["x_y"], private=False
    )
    assert parsed("hf-value-steer run -- --a_b.yaml")[1][0].recipe == "--a_b.yaml"
    name, (arguments,), others = parsed("hf-value-steer serve m --value-head h --max_model_len 64 --port 1")
    assert name == "serve" and arguments.value_head == "h" and others == ["--max_model_len", "64", "--port", "1"]


def test_switches_numbers_and_lists():
    needed = "--model m --value-head h --prompts p --output o"
    _, (arguments,), _ = parsed(
        f"hf-value-steer evaluate {needed} --judges a b --no-placebo --thresholds 0.5 1e-3 --top-k 5 --method abstain"
    )
    assert isinstance(arguments, EvaluateArguments)
    assert (arguments.judges, arguments.placebo, arguments.thresholds) == (["a", "b"], False, [0.5, 1e-3])
    assert (arguments.top_k, arguments.method, arguments.do_sample) == (5, "abstain", True)
    given = "--model m --vectors v --prompts p"
    _, (arguments,), _ = parsed(f"hf-value-steer vectors apply {given} --multipliers -0.5 -1e-2 2")
    assert arguments.multipliers == [-0.5, -0.01, 2.0]


def test_errors_name_options_and_not_fields():
    message = "Pass `accept_limits=True`, or `limits`; `other` and `repo_id` stay."
    assert as_options(message, [PushArguments]) == "Pass --accept-limits, or --limits; `other` and REPO_ID stay."


def test_what_goes_wrong_is_one_line_and_a_status(monkeypatch, capsys):
    monkeypatch.setattr(running, "_quieten", lambda: None)
    command = Command("is tested", ("hf_value_steer.arguments.hub:RunArguments",), f"{__name__}:failing", "")
    for error, status, said in (
        (ValueError("`recipe` is wrong."), 2, "hf-value-steer x: `recipe` is wrong.\n"),
        (KeyboardInterrupt(), 130, "\nhf-value-steer x: stopped.\n"),
        (None, 0, ""),
    ):
        monkeypatch.setattr(sys.modules[__name__], "failing", raising(error), raising=False)
        assert running.run("hf-value-steer x", command, ["file"]) == status
        assert capsys.readouterr().err == said


def raising(error):
    def function(_):
        if error is not None:
            raise error

    return function


def script(code):
    """The output of some code in a process of its own."""
    finished = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_help_and_wrong_arguments_import_nothing_heavy():
    lines = [["--help"], ["--version"], ["nothing"], *([*name.split(), "--help"] for name in COMMANDS)]
    lines += [[*name.split(), "--wrong"] for name in COMMANDS]
    code = f"""
import contextlib, io, sys
from hf_value_steer.cli import main
for words in {lines!r}:
    out = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        main(words)
print(sorted(name for name in ("torch", "transformers", "numpy", "rich", "yaml", "jinja2") if name in sys.modules))
"""
    assert script(code) == "[]\n"


def test_output_that_nobody_reads_is_no_error(tmp_path):
    command = [sys.executable, "-m", "hf_value_steer.cli", "export", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        process.stdout.close()
        assert "Error" not in process.stderr.read() and process.wait() == 1


@pytest.mark.parametrize(
    "imports",
    [
        "import hf_value_steer, transformers",
        "import transformers, hf_value_steer",
        "from hf_value_steer.errors import SteeringError; from transformers.generation import GenerationMixin",
        "from hf_value_steer.hosts.transformers import attention_of",
        "from hf_value_steer import ValueHead",
        "import hf_value_steer, importlib.util; importlib.util.find_spec('transformers'); import transformers",
    ],
)
def test_auto_classes_know_our_artefacts_whatever_is_imported_first(imports):
    code = f"""
import warnings; warnings.simplefilter("ignore")
{imports}
import transformers
config = transformers.AutoConfig.for_model("hvs_value_head", hidden_size=8)
print(type(transformers.AutoModel.from_config(config)).__name__)
print(transformers.CONFIG_MAPPING["hvs_value_guidance"].__name__)
"""
    assert script(code).split() == ["ValueHead", "GuidanceModuleConfig"]


def test_what_type_checkers_see_is_what_there_is():
    tree = ast.parse(Path(hf_value_steer.__file__).read_text(encoding="utf-8"))
    [checked] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.asname: node.module for node in checked.body for alias in node.names}
    assert seen == {name: f"hf_value_steer.{home}" for name, home in hf_value_steer._HOME.items()}
    assert set(hf_value_steer.__all__) <= set(dir(hf_value_steer))


def test_the_page_of_commands_says_what_help_says():
    assert PAGE.read_text("utf-8") == page(), "run `make tables`"
