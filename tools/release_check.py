"""Is this commit ready to be uploaded? Builds it, and uses what was built as a stranger would; uploads nothing.

`make release-check`, in a checkout in which `make demo` was run. What is not committed is not looked at.
"""

import re
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
DATA = (".cache", "model_cards")  # what the README's example reads
TINY_MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained("tiny")
"""


def run(*words: object, cwd: Path = ROOT) -> str:
    """What a command prints. One that fails ends the check, with the end of what it has printed."""
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(
            f"{done.stdout[-4000:]}{done.stderr[-4000:]}\nFailed with {done.returncode}: {' '.join(map(str, words))}"
        )
    return done.stdout


def tracked(*folders: str) -> set[str]:
    """The files of the commit, or of some of its folders."""
    return set(run("git", "ls-tree", "-r", "--name-only", "HEAD", *folders).splitlines())


def compare(what: str, found: set[str], expected: set[str]) -> None:
    """End the check unless an archive holds the files that it should, and no others."""
    stray, missing = sorted(found - expected), sorted(expected - found)
    if stray or missing:
        sys.exit(f"The {what} holds what it should not: {stray}, and lacks {missing}.")


def look_into(wheel: Path, sdist: Path) -> None:
    """The wheel is the package, with its templates, styles and `py.typed`; the sdist is the commit."""
    names = zipfile.ZipFile(wheel).namelist()
    compare("wheel", {name for name in names if ".dist-info/" not in name}, tracked("hf_value_steer"))
    with tarfile.open(sdist) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    compare("sdist", files, tracked() | {"PKG-INFO"})


def environment(folder: Path, constraints: str, *packages: object) -> Path:
    """A new environment with these packages: its `bin`."""
    run(sys.executable, "-m", "venv", folder)
    run(folder / "bin" / "pip", "install", "--quiet", "--constraint", ROOT / constraints, *packages)
    return folder / "bin"


def build(scratch: Path) -> tuple[Path, Path]:
    """Wheel and sdist of the commit, the first made from the second; `twine` has nothing to say about them."""
    tools = environment(scratch / "tools", "constraints-release.txt", "build", "twine", "hatchling")
    run("git", "archive", "--output", scratch / "commit.tar", "HEAD")
    with tarfile.open(scratch / "commit.tar") as archive:
        archive.extractall(scratch / "commit", filter="data")
    run(tools / "python", "-m", "build", "--no-isolation", "--outdir", scratch / "dist", scratch / "commit")
    (wheel,), (sdist,) = (scratch / "dist").glob("*.whl"), (scratch / "dist").glob("*.tar.gz")
    run(tools / "twine", "check", "--strict", wheel, sdist)
    return wheel, sdist


def use(wheel: Path, scratch: Path) -> None:
    """Install the wheel alone, and do what the README says, from a folder that is no checkout."""
    installed, folder = environment(scratch / "user", "constraints.txt", wheel), scratch / "elsewhere"
    folder.mkdir()
    for name in DATA:
        (folder / name).symlink_to(ROOT / name)
    where = run(installed / "python", "-c", "import hf_value_steer; print(hf_value_steer.__file__)", cwd=folder)
    said = run(installed / "hf-value-steer", "--version", cwd=folder)
    if "site-packages" not in where or wheel.name.split("-")[1] not in said:
        sys.exit(f"What was imported is {where}, and its version {said}: not what {wheel.name} holds.")
    run(installed / "python", "-c", TINY_MODEL, cwd=folder)
    run(installed / "hf-value-steer", "doctor", "tiny", cwd=folder)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    run(installed / "python", "-c", "".join(re.findall(r"(?ms)^```python\n(.*?)^```", readme)), cwd=folder)


def collect_tests(sdist: Path, scratch: Path) -> None:
    """The tests in the sdist find all that they name; they run in the environment of this checkout."""
    with tarfile.open(sdist) as archive:
        archive.extractall(scratch / "sdist", filter="data")
    (folder,) = (scratch / "sdist").iterdir()
    run(sys.executable, "-m", "pytest", "--collect-only", "--quiet", "--ignore", "tests/vllm", cwd=folder)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        scratch, start = Path(name), time.monotonic()

        def done(what: str) -> None:
            print(f"{time.monotonic() - start:5.0f} s  {what}", flush=True)

        wheel, sdist = build(scratch)
        done(f"built {wheel.name} and {sdist.name}; twine finds nothing")
        look_into(wheel, sdist)
        done("both hold what they should")
        use(wheel, scratch)
        done("installed alone: version, doctor, and what the README shows")
        collect_tests(sdist, scratch)
        done("the sdist's tests can be collected")


if __name__ == "__main__":
    main()
