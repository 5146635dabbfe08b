"""The house: who may import whom, and commands that find their own package from anywhere."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from EqM.run import errors
from helpers import REPO

FLOORS = {  # each imports from lower floors alone, and within its own
    "EqM.run": 0,
    "EqM.models": 0, "EqM.transport": 0, "EqM.updates": 1, "EqM.guidance": 1, "EqM.samplers": 2,
    "EqM.engine": 1, "EqM.data": 1,
    "EqM.architecture": 2, "EqM.transplant": 2, "EqM.composition": 2,
    "EqM.pipeline": 3,
    "EqM.cli": 4, "EqM.recipe": 4, "EqM.trace": 4, "EqM.metrics": 4,
    "EqM.watch": 5, "EqM.training_flags": 5,
    "EqM.train": 6, "EqM.sample_gd": 6, "EqM.extract_latents": 6, "EqM.evaluate": 6, "EqM.score": 6,
    "EqM.export": 6, "EqM.gather": 6,
    "EqM.measure": 7,
}  # fmt: skip
COMMANDS = ("train", "sample_gd", "extract_latents", "evaluate", "score", "export", "gather")


def imports_of_ours():
    """{module: modules of ours that it imports}, read from the source."""
    paths = [path for path in (REPO / "EqM").rglob("*.py") if path.name != "__init__.py"]
    modules = {".".join(path.relative_to(REPO).with_suffix("").parts): path for path in paths}
    found = {}
    for name, path in modules.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("EqM"):
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                imported |= {each if each in modules else node.module for each in inside}
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names if alias.name.startswith("EqM")}
        found[name] = imported - {name}
    return found


def floor(module):
    name = next(name for name in FLOORS if module == name or module.startswith(name + "."))
    return FLOORS[name], name


def test_nothing_imports_upwards_and_wings_do_not_mix():
    for module, imported in imports_of_ours().items():
        for other in imported:
            (ours, room), (theirs, their_room) = floor(module), floor(other)
            assert theirs < ours or room == their_room, f"{module} imports {other}"


def test_there_is_no_circle():
    left = imports_of_ours()
    while left:
        free = {name for name, imported in left.items() if not imported & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {name: imported for name, imported in left.items() if name not in free}


def test_the_method_knows_no_precision_device_file_rank_or_flag():
    for name in ("models", "transport", "updates", "samplers", "guidance"):
        text = (REPO / "EqM" / f"{name}.py").read_text(encoding="utf-8")
        for word in ("autocast", "bfloat16", ".half(", ".cuda(", "argparse", "distributed", "open(", "Path("):
            assert word not in text, f"{name}.py says {word}"


def test_an_argument_becomes_its_flag_in_one_place():
    assert errors.flag_of("num_sampling_steps") == "--num-sampling-steps"
    spelt = re.compile(r"""replace\(['"]_['"], ?['"]-['"]\)""")
    paths = (REPO / "EqM").rglob("*.py")
    assert [path.name for path in paths if spelt.search(path.read_text(encoding="utf-8"))] == ["errors.py"]


@pytest.fixture(scope="module")
def two_copies(tmp_path_factory):
    """(a copy of the package that lies on the path as if installed, another copy to call by its path)."""
    root = tmp_path_factory.mktemp("copies")
    for copy in ("installed", "beside"):
        for path in (REPO / "EqM").rglob("*.py"):
            target = root / copy / path.relative_to(REPO)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        for command in COMMANDS:  # tell where the rest of the package comes from, and end
            script = root / copy / "EqM" / f"{command}.py"
            text = script.read_text(encoding="utf-8")
            head = text[: text.index("\n", text.index("sys.path = [")) + 1]
            script.write_text(head + "import EqM.run.errors\nprint(EqM.run.errors.__file__)\n", encoding="utf-8")
    return root / "installed", root / "beside"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("safe", [{}, {"PYTHONSAFEPATH": "1"}])
@pytest.mark.parametrize("by", ["absolute path", "relative path", "name in its folder"])
def test_a_script_takes_the_package_beside_it_whatever_is_installed(two_copies, tmp_path, command, safe, by):
    installed, beside = two_copies
    script = beside / "EqM" / f"{command}.py"
    folder, name = {
        "absolute path": (tmp_path, script),
        "relative path": (beside.parent, script.relative_to(beside.parent)),
        "name in its folder": (script.parent, script.name),
    }[by]
    environment = {**os.environ, "PYTHONPATH": str(installed), **safe}
    result = subprocess.run([sys.executable, name], cwd=folder, env=environment, capture_output=True, text=True)
    assert Path(result.stdout.strip()) == beside / "EqM/run/errors.py", result.stderr


def test_a_script_leaves_no_folder_of_ours_on_the_path_to_shadow_other_packages(two_copies, tmp_path):
    _, beside = two_copies
    script = beside / "EqM" / "train.py"
    script.write_text(script.read_text(encoding="utf-8") + "print(sys.path)\n", encoding="utf-8")
    result = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert str(beside) in result.stdout and f"'{beside / 'EqM'}'" not in result.stdout


@pytest.mark.parametrize("how", [["-m", "EqM.train"], ["EqM/train.py"], ["-m", "EqM.measure.benchmark"]])
def test_commands_run_as_modules_too(how):
    environment = {**os.environ, "PYTHONPATH": ""}
    result = subprocess.run([sys.executable, *how, "--help"], cwd=REPO, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "--compile" in result.stdout, result.stderr
