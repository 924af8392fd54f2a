"""The scripts of a submission: which job waits for which, which task does what, and that bash can read them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nfm.pipeline.submit.ray import allocation, job_command
from nfm.pipeline.submit.slurm import Script, Submission, array_jobs, directive, user_options
from nfm.pipeline.submit.training import training_job
from nfm.stages.base import StageError

if TYPE_CHECKING:
    from tests.conftest import Lab

ODD = '/data/a lab\'s 100% "odd" $HOME; place'
EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "clusters"


def submission(root: str = ODD, **changes: object) -> Submission:
    values: dict[str, object] = {
        "folder": Path(root) / "artifacts/submissions/0123abcd-001",
        "work": Path(root),
        "artifacts": f"{root}/artifacts",
        "nfm": (f"{root}/venv/bin/python", "-m", "nfm.pipeline.cli"),
        "config": Path(root) / "artifacts/submissions/0123abcd-001/config.toml",
        "sets": ("pairs.draws=4", "data.source=it's $(odd)"),
        "threads": 2,
    }
    return Submission(**{**values, **changes})  # type: ignore[arg-type]


def scripts(tasks: int, limit: int, **changes: object) -> dict[str, Script]:
    return {script.name: script for script in array_jobs(submission(**changes), tasks, limit)}


def options(script: Script) -> list[str]:
    return re.findall(r"^#SBATCH (.*)$", script.text, re.MULTILINE)


def last_command(script: Script) -> list[str]:
    line = script.text.rstrip().splitlines()[-1]
    return shlex.split(line)


@pytest.mark.parametrize(("tasks", "limit"), [(1, 1), (8, 1000), (1000, 1000), (1001, 1000), (7, 3), (2500, 1001)])
def test_arrays_and_offsets_run_every_task_exactly_once(tasks: int, limit: int) -> None:
    seen = []
    for name, script in scripts(tasks, limit).items():
        if name.startswith("array"):
            first, last = re.search(r"#SBATCH --array=(\d+)-(\d+)\n", script.text).groups()  # type: ignore[union-attr]
            assert int(first) == 0
            assert int(last) < limit
            offset = int(re.search(r"task=\$\(\(SLURM_ARRAY_TASK_ID \+ (\d+)\)\)", script.text)[1])  # type: ignore[index]
            seen += [offset + index for index in range(int(last) + 1)]
            assert last_command(script)[-4:] == ["--task", "$task", "--of", str(tasks)]
    assert seen == list(range(tasks))


def test_arrays_wait_for_the_list_and_the_seal_for_all_of_them() -> None:
    made, folder = scripts(5, 2), submission().folder
    ids = {"prepare": "10", "array-0": "11", "array-1": "12", "array-2": "13"}
    assert made["prepare"].sbatch(folder, {}) == ["sbatch", "--parsable", str(folder / "prepare.sbatch")]
    for name in ("array-0", "array-1", "array-2"):
        assert made[name].sbatch(folder, ids)[2] == "--dependency=afterok:10"
    assert made["seal"].sbatch(folder, ids)[2] == "--dependency=afterok:10,afterany:11:12:13"
    assert all("--kill-on-invalid-dep=yes" in options(script) for script in made.values())


def test_what_begins_a_submission_waits_for_the_jobs_before_it() -> None:
    first = submission(after=("7", "8"))
    begin = {
        "prepare": array_jobs(first, 2, 2)[0],
        "ray": allocation(first, 2),
        "teacher": training_job(first, "teacher", 1, 1),
    }
    for name, script in begin.items():
        command = script.sbatch(first.folder, {})
        assert command == ["sbatch", "--parsable", "--dependency=afterok:7:8", str(first.folder / f"{name}.sbatch")]
        assert "--kill-on-invalid-dep=yes" in options(script)


def test_nfm_takes_the_place_of_the_shell_so_that_signals_reach_it() -> None:
    made = scripts(2, 2)
    for script in made.values():
        assert last_command(script)[:4] == ["exec", f"{ODD}/venv/bin/python", "-m", "nfm.pipeline.cli"]
    assert "--signal=B:USR1@120" in options(made["array-0"])
    assert {"--requeue", "--open-mode=append", "--cpus-per-task=2"} <= set(options(made["array-0"]))
    assert "export OMP_NUM_THREADS=2\n" in made["array-0"].text


def test_workers_of_a_rays_own_job_are_no_nicer_than_the_job() -> None:
    begins = allocation(submission(), 2).text.partition(" start --head")[0]
    assert "export RAY_worker_niceness=0 " in begins, "Ray adds 15: workers wait for ever where others use the cores"


def test_bash_reads_every_script_and_the_odd_names_arrive_whole(tmp_path: Path) -> None:
    root = f"{tmp_path}{ODD}"
    Path(root).mkdir(parents=True)
    here = submission(root, nfm=("printf", "%s\\n"), before=("module() { :; }", "module load cuda"))
    made = [*array_jobs(here, 3, 2), allocation(here, 2)]
    for script in made:
        checked = subprocess.run(["bash", "-n"], input=script.text, capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, ""), script.name
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "0"}
    said = {
        script.name: subprocess.run(["bash"], input=script.text, capture_output=True, text=True, env=environment).stdout
        for script in made[:-1]
    }
    sets = ["--set", "pairs.draws=4", "--set", "data.source=it's $(odd)"]
    config = ["-c", str(here.config)]
    assert said["prepare"].splitlines() == ["worklist", "pairs", "-o", str(here.worklist), *config, *sets]
    task = ["--task", "2", "--of", "3"]  # the first of the second array
    assert said["array-1"].splitlines() == ["work", str(here.worklist), *task]
    assert said["seal"].splitlines() == ["run", "pairs", *config, *sets, "--set", "pairs.executor=slurm"]


@pytest.mark.parametrize("stage", ["data", "latents"])
def test_the_last_job_of_data_and_latents_ends_the_stage(stage: str) -> None:
    made = {script.name: script for script in array_jobs(submission(), 3, 2, stage=stage)}
    assert list(made) == ["prepare", "array-0", "array-1", "finish"]
    assert last_command(made["prepare"])[4:6] == ["worklist", stage]
    assert last_command(made["finish"])[4:6] == ["run", stage]
    assert last_command(made["finish"])[-2:] == ["--set", f"{stage}.executor=slurm"]
    assert made["finish"].waits == {"afterok": ["prepare"], "afterany": ["array-0", "array-1"]}


def test_options_of_sbatch_are_passed_on_after_ours_and_quoted_where_they_must_be() -> None:
    made = scripts(2, 2, compute=("--gres=gpu:1", "--comment=a b", "-p long"), sealing=("--mem=8G",))
    assert options(made["array-0"])[-3:] == ["--gres=gpu:1", '--comment="a b"', "-p long"]
    assert options(made["prepare"])[-3:] == options(made["array-0"])[-3:]
    assert options(made["seal"])[-1] == "--mem=8G"
    assert directive('--comment=say "a\\b"') == '--comment="say \\"a\\\\b\\""'
    assert f'--output="{ODD}/artifacts'.replace("%", "%%").replace('"odd"', '\\"odd\\"') in made["seal"].text


@pytest.mark.parametrize(
    "option", ["--array=0-9", "-a 0-9", "-a0-9", "--arr=0-9", "--dependency=afterok:1", "--wrap=true", "--output=x"]
)
def test_options_that_the_scripts_decide_are_refused_with_what_to_use_instead(option: str) -> None:
    with pytest.raises(StageError, match="use"):
        user_options([option])


def test_a_line_that_is_no_option_is_refused() -> None:
    with pytest.raises(StageError, match="one option of sbatch"):
        user_options(["gres=gpu:1"])
    with pytest.raises(StageError, match="one option of sbatch"):
        user_options(["--comment=a\nrm -rf /"])


def test_a_ray_job_runs_the_same_command_where_the_user_stands() -> None:
    command = job_command(submission(), "http://head:8265", "nfm-0123abcd-001")
    assert command[:5] == ["ray", "job", "submit", "--address", "http://head:8265"]
    line = command[-1]
    assert command[-3:-1] == ["bash", "-c"]
    words = shlex.split(line)
    assert words[:3] == ["cd", "--", ODD]
    assert words[words.index("exec") + 1 :][:5] == [f"{ODD}/venv/bin/python", "-m", "nfm.pipeline.cli", "run", "pairs"]
    assert words[-2:] == ["--set", "pairs.executor=ray"]


def test_a_cluster_inside_an_allocation_is_ended_without_touching_others() -> None:
    text = allocation(submission(), 4).text
    commands = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    assert not any("ray stop" in line or "pkill" in line or "killall" in line for line in commands)
    assert "#SBATCH --nodes=4\n" in text
    assert 'pairs.ray_address="$address"' in text


def test_the_examples_are_what_the_command_prints() -> None:
    made = {script.name: script for script in example_scripts()}
    for file, name in {
        "slurm-array": "array-0",
        "slurm-prepare": "prepare",
        "slurm-seal": "seal",
        "slurm-ray": "ray",
    }.items():
        assert (EXAMPLES / f"{file}.sbatch").read_text() == made[name].text, file


def example_scripts() -> list[Script]:
    here = submission(
        "/shared/project",
        sets=(),
        threads=8,
        before=("module load cuda",),
        compute=("--partition=gpu", "--gres=gpu:1", "--time=04:00:00"),
        sealing=("--time=01:00:00",),
    )
    return [*array_jobs(here, 64, 1000), allocation(here, 4)]


def test_without_go_everything_is_printed_and_nothing_written(empty: Lab) -> None:
    said = empty.nfm("submit", "pairs", "-c", "tiny.toml", "--slurm", "--tasks", 5, "--max-array", 2).stdout
    for name in ("prepare", "array-0", "array-1", "array-2", "seal"):
        assert f"/{name}.sbatch" in said
    assert "--dependency=afterok:PREPARE,afterany:ARRAY-0:ARRAY-1:ARRAY-2" in said
    assert {path.name for path in empty.folder.iterdir()} == {"tiny.toml"}


def test_what_is_wrong_is_said_before_anything_is_written(empty: Lab) -> None:
    bare = {"PATH": "/nonexistent"}
    said = empty.nfm("submit", "pairs", "-c", "tiny.toml", "--slurm", "--go", exits=1, **bare).stderr
    assert "sbatch: not found" in said
    assert "no such file" in empty.nfm("submit", "pairs", "-c", "none.toml", "--slurm", exits=2).stderr
    assert "--slurm, --ray" in empty.nfm("submit", "pairs", "-c", "tiny.toml", exits=2).stderr
    assert {path.name for path in empty.folder.iterdir()} == {"tiny.toml"}


def test_a_training_is_one_job_whose_tasks_know_each_other(empty: Lab) -> None:
    sizes = ("--slurm", "--nodes", 2, "--per-node", 4)
    arguments = ("submit", "student", "-c", "tiny.toml", *sizes, "--set", "student.seed=3")
    told = empty.nfm(*arguments, "--sbatch=--gpus-per-node=4", "--before", "module load cuda").stdout
    for line in ("#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4", "#SBATCH --gpus-per-node=4", "module load cuda"):
        assert line in told.splitlines()
    assert told.index("MASTER_ADDR=") < told.index("exec srun --kill-on-bad-exit=1")
    assert "run student -c" in told
    assert "--set student.seed=3" in told
    assert not (empty.folder / "artifacts").exists()


def test_a_batch_that_the_processes_cannot_share_is_refused(empty: Lab) -> None:
    told = "config section [teacher]: batch_size 64 is shared by 3 processes: make it a multiple of 3"
    assert told in empty.nfm("submit", "teacher", "-c", "tiny.toml", "--slurm", "--nodes", 3, exits=2).stderr
    assert told in empty.run("teacher", "teacher.workers=3", exits=2).stderr
    # Slurm sets the number of processes; that of Ray says nothing there.
    empty.nfm("submit", "teacher", "-c", "tiny.toml", "--slurm", "--nodes", 2, "--set", "teacher.workers=3")


@pytest.mark.parametrize("stage", ["teacher", "pairs"])
def test_what_a_run_would_refuse_is_not_submitted(empty: Lab, stage: str) -> None:
    wrong = ("--set", "teacher.channels=12")
    said = empty.nfm("submit", stage, "-c", "tiny.toml", "--slurm", *wrong, exits=2).stderr
    assert "channels = 12 is not a multiple of head_size = 32" in said
    assert {path.name for path in empty.folder.iterdir()} == {"tiny.toml"}


@pytest.mark.parametrize(("given", "scratch"), [({}, "/node/nfm-scratch-"), ({"NFM_SCRATCH": "/mine"}, "/mine\n")])
def test_jobs_whose_artifacts_are_in_a_bucket_compute_in_a_folder_of_their_node(
    given: dict[str, str], scratch: str
) -> None:
    there = submission("/tmp", artifacts="s3://bucket/run", nfm=("printenv", "NFM_SCRATCH"), before=("printenv() {",
                       '  echo "$NFM_ARTIFACTS"; command printenv "$1"', "}"))  # fmt: skip
    assert there.worklist == "s3://bucket/run/submissions/0123abcd-001/worklist.json"
    (prepare, *_) = array_jobs(there, 1, 1)
    text = prepare.text.replace("exec printenv", "printenv")
    environment = {"PATH": os.environ["PATH"], "SLURM_TMPDIR": "/node", **given}
    told = subprocess.run(["bash"], input=text, capture_output=True, text=True, env=environment)
    assert told.stdout.startswith(f"s3://bucket/run\n{scratch}"), told.stderr
