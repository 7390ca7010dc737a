"""The documents tell the truth: files, keys, flags and links exist, and every command line is run, here or elsewhere.

A line that is run nowhere stands in ``ELSEWHERE`` with the reason.
"""

import inspect
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from moe_mamba.config import Config
from moe_mamba.config_file import keys
from moe_mamba.train import run as training
from tests import ROOT
from tests.hf.checkpoints import make_run
from tests.test_walls import ALLOWED

PATHS = (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
PAGES = {path.name: path.read_text(encoding="utf-8") for path in PATHS}
ALL = "\n".join(PAGES.values())
CONFIG_KEYS = {name for name, _, _ in keys()}
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))
PROGRAMS = r"(?:pip|python|deepspeed|torchrun|pytest|moe-mamba|tools/gpu_check\.sh)"
# Command lines that are not run here -> the file that runs them, or the same command on small inputs; or why none does.
ELSEWHERE = {
    "pip install -e . && deepspeed launch/train.py": ".ci/run",
    "pip install -e '.[test]' && pytest": ".ci/run",
    "pip install -e . -c constraints.txt": "not run: it needs a network; tests/test_versions.py reads the file",
    "pip install -e .": ".ci/run",
    "pip install -e '.[evaluation]'": "not run: it needs a network",
    "pip install -e '.[benchmark]'": "not run: it needs a network",
    "pip install -e '.[cuda]'": "not run: it needs a network and a GPU",
    "pip install transformers": "not run: it needs a network",
    "pip install -e '.[test,huggingface]' && pytest -m long tests/hf -k ecosystem": (
        "tests/hf/test_ecosystem_trl_long.py"
    ),
    "pip wheel .": "tests/test_wheel.py",
    "python tools/compare_runs.py --before=../before --after=. --steps=50": "tests/test_compare_runs.py",
    "python tools/rehearse.py --config configs/scale/jamba_52b.yaml --gpus 1024 --rank 17 --train.micro_batch=1"
    " --train.global_batch=256": "tests/rehearsal/test_command.py",
    "python tools/rehearse.py --config configs/scale/jamba_52b.yaml --gpus 1024 --rank 17": (
        "tests/rehearsal/test_command.py"
    ),
    "pip check": "not run: it says something of one environment",
    "moe-mamba plan --config configs/paper/moe_mamba_25m.yaml": "tests/test_wheel.py",
    "moe-mamba --help": "tests/test_wheel.py",
    "deepspeed --module moe_mamba.commands.train": "tests/test_wheel.py",
    "deepspeed --module moe_mamba.commands.train --config configs/demo.yaml": "tests/test_wheel.py",
    "torchrun --nproc-per-node=2 -m moe_mamba.commands.train --config configs/demo.yaml": "tests/test_wheel.py",
    "pytest -m long tests/test_architectures.py": "tests/test_architectures.py",
    "pytest -m long tests/test_synthetic_tasks.py": "tests/test_synthetic_tasks.py",
    "pytest -m long tests/parallel/test_parity.py": "tests/parallel/test_parity.py",
    "pytest -m long tests/reproduce": "tests/reproduce/test_kills_long.py",
    "pytest -m long tests/reproduce/test_mini_long.py": "tests/reproduce/test_mini_long.py",
    "tools/gpu_check.sh": "tests/test_gpu_check.py",
    "sbatch --nodes 2 --gpus-per-node 8 launch/slurm.sbatch --config configs/paper/moe_mamba_100m.yaml": (
        "tests/launch/test_slurm.py"
    ),
    "sbatch --nodes 2 --gpus-per-node 8 --time 24:00:00 launch/slurm.sbatch --config configs/paper/moe_mamba_100m.yaml"
    " --run.folder=runs/site": "tests/launch/test_slurm.py",
    "kubectl apply -f launch/kubernetes/volumes.yaml && kubectl apply -f launch/kubernetes/job.yaml": (
        "tests/launch/test_kubernetes.py"
    ),
    "kubectl apply -f launch/kubernetes/volumes.yaml": "tests/launch/test_kubernetes.py",
    "kubectl apply -f launch/kubernetes/job.yaml": "tests/launch/test_kubernetes.py",
    'export PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=10 -o ServerAliveCountMax=3 -o ConnectTimeout=15'
    ' -o BatchMode=yes"': "not run: it is for a machine that is lost",
    "deepspeed launch/preflight.py --config configs/demo.yaml": "tests/preflight/test_preflight.py",
    "python launch/preflight.py --help": "tests/preflight/test_preflight.py",
    "deepspeed --hostfile launch/hostfile.example launch/preflight.py --config configs/paper/moe_mamba_100m.yaml": (
        "tests/preflight/test_preflight.py"
    ),
    "python tools/reproduce.py --table main --scale mini --seeds 1 --tokens 200000": (
        "tests/reproduce/test_mini_long.py"
    ),
    "python tools/reproduce.py --table main --dry": "tests/reproduce/test_reproduce.py",
    "python tools/reproduce.py --table main --gather": "tests/reproduce/test_reproduce.py",
    "python tools/reproduce.py --table main --gather --archive main.tar.xz": "tests/reproduce/test_reproduce.py",
    "python tools/reproduce.py --table main --version v2 --scale paper --dry": "tests/reproduce/test_experiment.py",
    "python tools/status.py runs/site": "tests/run/test_status.py",
    "python tools/experts.py runs/a runs/b --output specialisation": "tests/evaluation/test_experts.py",
    "python tools/benchmark.py --only=scan,step": "tests/test_benchmark.py",
    "python tools/benchmark.py --only=scan,step,prefill,decode,context --output=rows.json": "tests/test_benchmark.py",
    "python tools/benchmark.py --only=head": "tests/test_benchmark.py",
    "python tools/benchmark.py --only=moe": "tests/test_benchmark.py",
    "python tools/benchmark.py --only=startup_before,step_before,decode_before,head_before --before=../before": (
        "tests/test_benchmark.py"
    ),
    "python tools/benchmark.py --only=scaling": "tests/test_benchmark.py",
    "python tools/benchmark.py --only=plan": "tests/test_benchmark.py",
    "python tools/plan.py --config configs/scale/blackmamba_1.5b.yaml --worlds 8,64,256,1024 --cluster h100": (
        "tests/planning/test_plan_tool.py"
    ),
    "python tools/benchmark.py --only=designs --repeats=20": "tests/test_benchmark.py",
    "python tools/build_kernels.py --output=kernels": "tests/kernels/test_levels.py",
    "python tools/compile_kernels.py --capabilities=80,90": "tests/kernels/test_compiled.py",
    "python tools/compile_kernels.py --output=figures.json": "tests/kernels/test_compiled.py",
    "python tools/preprocess_c4.py --input 'c4/en/*.json.gz' --tokenizer gpt2 --output data/c4": (
        "tests/test_preprocess_c4.py"
    ),
    "python tools/preprocess_c4.py --input 'c4/en/c4-train.*.json.gz' --tokenizer gpt2 --output data/c4": (
        "tests/test_preprocess_c4.py"
    ),
    "python tools/preprocess_c4.py --input 'c4/en/c4-validation.*.json.gz' --tokenizer gpt2 --output "
    "data/c4_validation": "tests/test_preprocess_c4.py",
    "python tools/evaluate.py --checkpoint runs/demo --input held_out.txt": "tests/test_launch.py",
    "deepspeed tools/generate.py runs/demo --prompt='The ' --parallel.tensor=2 --parallel.expert=2": (
        "tests/parallel/test_inference_launch.py"
    ),
    "torchrun --nproc-per-node=2 tools/evaluate.py runs/demo --input=held_out.txt --parallel.tensor=2 "
    "--parallel.expert=2": "tests/parallel/test_inference_launch.py",
    "python tools/evaluate.py --checkpoint runs/demo --tasks=hellaswag,lambada_openai": (
        "tests/evaluation/test_evaluate_tool.py"
    ),
    "python tools/assemble_hf.py": "not run: it writes into the checkout; tests/hf/test_assembled.py checks its output",
    "python -c \"from transformers import pipeline; print(pipeline('text-generation', 'out/', trust_remote_code=True)"
    "('The '))\"": "tests/hf/class_under_version.py",
}

ELSEWHERE |= {
    line: "not run: it needs a GPU" if "cuda" in line else "tests/docker/test_image_long.py"
    for line in re.findall(r"(?m)^docker .*$", PAGES["docker.md"])
}
ELSEWHERE["docker compose --file docker/compose.yaml up"] = "tests/docker/test_docker_files.py"

# Files that docs/design.md speaks of and that are being written; to be empty.


class Script(NamedTuple):
    """Command lines that are run one after the other: a block, or a single line of the text."""

    page: str
    lines: tuple[str, ...]


def _scripts() -> list[Script]:
    found: dict[tuple[str, ...], str] = {}
    for name, text in PAGES.items():
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            lines = tuple(re.sub(r"\s+#.*", "", line) for line in block.splitlines() if line)
            found.setdefault(lines, name)
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for line in re.findall(rf"`({PROGRAMS}(?: [^`\n]+)?)`", prose):
            if line not in ("pytest", "pip", "python", "deepspeed", "torchrun", "moe-mamba"):
                found.setdefault((line,), name)
    return [Script(name, lines) for lines, name in found.items()]


SCRIPTS = _scripts()
RUN_HERE = [script for script in SCRIPTS if not ELSEWHERE.keys() >= set(script.lines)]


def test_what_is_run_elsewhere_is_shown_and_its_place_exists() -> None:
    shown = {line for script in SCRIPTS for line in script.lines}
    assert ELSEWHERE.keys() <= shown, "no document shows these any more"
    for place in ELSEWHERE.values():
        assert place.startswith("not run: ") or (ROOT / place).is_file(), place


@pytest.fixture(scope="module")
def prepared(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the documents' command lines speak of."""
    folder = tmp_path_factory.mktemp("prepared")
    for name in ("demo", "a", "b"):
        shutil.copytree(plain, folder / "runs" / name)
    make_run(folder / "runs" / "dense", {"pattern": "M-"})
    shutil.copytree(folder / "runs" / "dense" / "tokenizer", folder / "tokenizers" / "neox")
    make_run(folder / "mamba", {"pattern": "M"})
    _run("python tools/convert_to_hf.py --checkpoint mamba --output mamba-130m", folder)
    (folder / "prompts.txt").write_text("3 plus\n4 plus 4 is\n")
    return folder


@pytest.mark.parametrize("script", RUN_HERE, ids=[f"{script.page}: {script.lines[0]}" for script in RUN_HERE])
def test_a_command_line_runs(script: Script, prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(prepared, folder)
    for line in script.lines:
        if line not in ELSEWHERE:
            _run(line, folder)


def _run(line: str, folder: Path) -> None:
    """Run a tool in this process, as typed in `folder`; training stops where the loop would begin."""
    words = shlex.split(line)
    script = next(word for word in words if word.endswith(".py"))
    begun: list[Config] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(sys, "argv", words[words.index(script) :])
        patch.setattr(training, "train", lambda config, *_: begun.append(config))
        runpy.run_path(str(ROOT / script), run_name="__main__")
    if script == "launch/train.py" and "--help" not in words:
        assert len(begun) == 1


def test_every_key_that_is_named_exists() -> None:
    sections = "|".join(sorted({name.split(".")[0] for name in CONFIG_KEYS}))
    named = set(re.findall(rf"`(?:--)?((?:{sections})(?:\.[a-z_0-9]+)+)(?:=[^`]*)?`", ALL))
    named |= set(re.findall(rf"--((?:{sections})(?:\.[a-z_0-9]+)+)", ALL))
    named -= {name for name in named if name.endswith((".py", ".yaml", ".json"))}
    assert len(named) > 10
    assert named <= CONFIG_KEYS


def test_every_file_that_is_named_exists() -> None:
    named = re.findall(r"(?:configs|tools|launch|docs|tests)/[\w{},*/.-]+\.(?:yaml|py|md|png|json|sh)", ALL)
    rooms = "|".join(path.name for path in (ROOT / "moe_mamba").iterdir() if path.is_dir())
    named += [f"moe_mamba/{name}" for name in re.findall(rf"`((?:{rooms})/[\w/]+\.py)`", ALL)]
    assert len(named) > 50
    for name in set(named):
        for path in _expanded(name):
            assert list(ROOT.glob(path)), path


def _expanded(name: str) -> list[str]:
    """a/{b,c}.yaml -> a/b.yaml, a/c.yaml."""
    head, brace, rest = name.partition("{")
    if not brace:
        return [name]
    middle, _, tail = rest.partition("}")
    return [f"{head}{choice}{tail}" for choice in middle.split(",")]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    (folder,) = (path.parent for path in PATHS if path.name == page)
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        assert not path or (folder / path).exists(), target
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", PAGES[Path(path).name if path else page])
            assert anchor in {_anchor(heading) for heading in headings}, target


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_the_design_names_every_room_above_all_that_it_imports() -> None:
    section = PAGES["design.md"].partition("## The rooms")[2].partition("\n## ")[0]
    first_cells = re.findall(r"(?m)^\| (`[^|]*) \|", section)
    rooms = re.findall(r"`(\w+)(?:/|\.py)`", " ".join(first_cells))
    assert sorted(rooms) == sorted(ALLOWED)
    places = {room: rooms.index(room) for room in rooms}
    assert not [(room, other) for room, others in ALLOWED.items() for other in others if places[room] > places[other]]


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_is_shown_with_flags_that_exist(tool: str) -> None:
    commands = re.findall(rf"(?:tools/{re.escape(tool)}\.py|moe-mamba {re.escape(tool)}) ([^`\n]*)", ALL)
    assert commands, f"no document shows tools/{tool}.py"
    known = inspect.signature(runpy.run_path(str(ROOT / "tools" / f"{tool}.py"))["main"]).parameters
    for command in commands:
        flags = set(re.findall(r"--([a-z_]+)(?![a-z_.])", command))  # keys of the configuration are looked up elsewhere
        assert flags <= known.keys(), command


def test_the_readme_is_short() -> None:
    assert PAGES["README.md"].count("\n") <= 250
