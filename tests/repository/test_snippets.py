"""Every Python snippet and every `nfm` command of README and docs runs as it stands, on a tiny run made once.

What a page leaves to its reader (names of files, a device, sizes) is filled in from the tables here. What cannot run
small is in `NOT_RUN`, with the reason; a new snippet or command must run, or be put there.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfm.stages.stores.export import add_field
from nfm.storage import PairStore
from tests.support.lab import Lab

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)

NOT_RUN = {
    "nfm compare -c configs/checkerboard.toml": "minutes; a smaller one runs in tests/e2e",
    "nfm compare -c configs/fashion14.toml": "hours; a smaller one runs in tests/e2e",
    "nfm compare -c F": "the tiny run compares nothing; tests/e2e has one that does",
    "nfm run pairs -c F --ray-address auto": "needs a Ray cluster; tests/clusters has one",
    "nfm run latents -c F": "needs a VAE; tests/e2e/test_latents.py makes one",
    "nfm submit pairs -c F --slurm --tasks 64": "submits jobs; tests/clusters has a Slurm",
    "nfm submit teacher -c F --slurm --nodes 8": "submits a job; tests/clusters has a Slurm",
    "nfm teacher import": "needs a published checkpoint; tests/e2e/test_import.py makes one",
    "nfm plan compare -c F ... --couplings A,B": "names that a reader fills in",
    "nfm submit data -c": "needs a Slurm and encoded images; tests/clusters has both",
    "nfm submit latents -c": "needs a Slurm and a VAE; tests/stages/data/test_tasks.py has the latter",
    "nfm submit pairs -c imagenet64.toml": "needs a Slurm; tests/pipeline/submit has the rest",
    "nfm run data -c F --set data.path=mnist.npz": "needs a file that is not ours; tests/stages/data has its like",
}
# What stands in a page, and what is put in its place here.
WORDS = {
    "-c F": "-c tiny.toml",
    "STAGE": "pairs",
    "...": "",
    "--images N": "--images 1000",
    "CxHxW": "1x8x8",
    "--classes K": "--classes 10",
    "IMAGES_PER_SECOND": "200",
    "FILE.npy": "values.npy",
    "embeddings.npy": "values.npy",
    "--of N": "--of 1",
    "--task I": "--task 0",
    "--generation 2": "--generation 1",
}
# A plan that times this machine, which a rate spares.
MEASURED = re.compile(r"^nfm plan (?!compare).*--image-shape (?!.*--rate)")
CODE = {
    "artifacts/pairs/3fa9c1d0b2e4": "STORE",
    'device="cuda"': 'device="cpu"',
    "epochs=None": "epochs=1",
    "epochs=10": "epochs=1",
    "range(10)": "range(1)",
    "num_workers=2": "num_workers=0",
    "rows=60_000": "rows=60",
    "batch_size=256": "batch_size=128",
    "batches(256": "batches(128",
    "dataset(256": "dataset(128",
}


def blocks(*kinds: str) -> Iterator[tuple[str, str]]:
    """(place, text) of the code blocks of these languages."""
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for found in BLOCK.finditer(text):
            if found[1] in kinds:
                yield f"{path.name}:{text[: found.start()].count(chr(10)) + 1}", found[2]


def commands() -> Iterator[tuple[str, str, str]]:
    """(place, command, what the page shows that it prints) of every `nfm` line, without the words beside it."""
    for place, block in blocks("", "sh", "bash", "console"):
        lines = block.replace("\\\n", " ").splitlines()
        for number, line in enumerate(lines):
            if line.removeprefix("$ ").startswith("nfm "):
                told = "\n".join(lines[number + 1 :]) if line.startswith("$ ") else ""
                yield f"{place}+{number}", re.split(r" {3,}|\s#\s", line.removeprefix("$ ").strip())[0], told


def reason(command: str) -> str | None:
    words = command.split()
    return next((why for start, why in NOT_RUN.items() if words[: len(start.split())] == start.split()), None)


COMMANDS = [pytest.param(*found, id=found[0]) for found in commands() if reason(found[1]) is None]


@pytest.fixture(scope="module")
def there(made: Lab, own: Lab) -> dict[str, Path]:
    """The artifacts of the tiny run by stage; a page's commands may add others beside them."""
    return {
        stage: own.artifacts / stage / made.only(stage).path.name for stage in ("data", "teacher", "pairs", "student")
    }


@pytest.fixture(scope="module")
def own(made: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A copy of the tiny run that the snippets of all pages change."""
    lab = Lab(tmp_path_factory.mktemp("pages") / "lab")
    shutil.copytree(made.folder, lab.folder)
    shutil.copytree(ROOT / "configs", lab.folder / "configs")
    np.save(lab.folder / "values.npy", np.zeros((256, 3), np.float32))
    lab.nfm("pairs", "worklist", "-c", "tiny.toml", "-o", "LIST", "--set", "pairs.seed=5")
    yield lab
    lab.close()


def filled(command: str, there: dict[str, Path], target: str) -> str:
    """The command with what the page leaves open."""
    for word, here in WORDS.items():
        command = command.replace(word, here)
    artifact = there["student" if " sample " in command else "teacher" if "--teacher" in command else "pairs"]
    command = command.replace("ARTIFACT", str(artifact))
    command = re.sub(r"\bSTORE\b", str(there["pairs"]), command).replace("-o LIST", f"-o {target}")
    command = command.replace("TARGET", target).replace("NAME", f"field_{target}")
    return command + (" --rate 1" if MEASURED.search(command) else "")


@pytest.mark.parametrize(("place", "command", "told"), COMMANDS)
def test_a_command_runs_as_the_page_has_it(
    own: Lab, there: dict[str, Path], place: str, command: str, told: str
) -> None:
    target = re.sub(r"\W", "_", place)
    line = filled(re.sub(r"[\[\]]", "", command), there, target)
    said = own.nfm(*shlex.split(line)[1:]).stdout
    # What a plan says is the same on every machine down to what the machine makes of it; its times are not.
    same = told if "--rate" in command else told.partition("\nFLOPs")[0]
    if "plan compare" in command:
        same = told.partition("\n")[0]
    assert same.strip() in said, f"{place} shows what is not printed:\n{said}"


def test_what_is_not_run_is_in_a_page_and_has_a_reason() -> None:
    lines = [command.split() for _, command, _ in commands()]
    for start, why in NOT_RUN.items():
        assert why
        assert any(words[: len(start.split())] == start.split() for words in lines), f"{start}: in no page any more"
    assert len(COMMANDS) > 20


@pytest.mark.parametrize(("place", "code"), [pytest.param(*found, id=found[0]) for found in blocks("python", "py")])
def test_a_python_snippet_runs_as_the_page_has_it(
    own: Lab, there: dict[str, Path], place: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.data import DataLoader

    monkeypatch.chdir(tmp_path)
    store = there["pairs"]
    if "fields=" in code:
        shutil.copytree(store, tmp_path / "copy")
        store = tmp_path / "copy"
        add_field(store, "embedding", own.folder / "values.npy")

    def mine(start: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        for slot in range(start, 60):
            values = np.random.default_rng(slot)
            yield values.integers(0, 256, (1, 28, 28), np.uint8), values.standard_normal((1, 28, 28)), slot % 10

    for word, here in CODE.items():
        code = code.replace(word, here)
    code = code.replace('"STORE"', repr(str(store)))
    left = {"t": 0.5, "mine": mine, "DataLoader": DataLoader, "store": PairStore.open(store)}
    names: dict[str, Any] = dict(left)
    exec(compile(code, place, "exec"), names)
    if "def noise(" in code:
        images = np.zeros((4, 1, 8, 8), np.float32)
        assert names["noise"](images, np.zeros(4, np.int64), np.random.default_rng(0)).shape == images.shape
    elif "batch" in code:
        assert "batch" in names, "its loop read nothing"
    elif "PairWriter" in code:
        assert len(PairStore.open("my-store")) == 60
    else:
        pytest.fail(f"{place}: say here what this snippet does")
