"""What the documents tell people to type works, and the files they name exist."""

import re
import shlex
import sys

import pytest

from helpers import REPO, load_script, train_args

DOCUMENTS = ("README.md", "MIXED_PRECISION.md", "EVALUATION.md", "LANDSCAPE.md", "datasets/README.md")


def commands(document):
    """(script, arguments) of every indented or fenced command that runs a Python file of ours."""
    text = (REPO / document).read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^    (?:python|torchrun) .*?\b((?:EqM|datasets)/\w+\.py|EqM\.measure\.\w+) *(.*)$", text, re.M)
    return [(script, shlex.split(rest.split("  #")[0])) for script, rest in found]


def name_of(script):
    """EqM/train.py -> train, EqM.measure.benchmark -> benchmark."""
    return script.removesuffix(".py").replace("/", ".").split(".")[-1]


MIXED = [
    pair for pair in commands("MIXED_PRECISION.md") if pair[0] != "EqM.measure.compare_precisions"
]  # that has its own
SMALL = "--model EqM-T/4 --image-size 32 --batch-size 1 --rounds 1 --steps 1 --video --clip-len 4"  # for the benchmark


def test_the_documents_hold_commands():
    assert len(MIXED) >= 8 and len(commands("README.md")) >= 5


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.mark.parametrize(("script", "argv"), MIXED, ids=lambda part: part if isinstance(part, str) else " ".join(part))
def test_every_command_of_mixed_precision_runs(run_script, small_peak, image_folder, trained, tmp_path, script, argv):
    """As it stands, with a tiny model and few steps added."""
    if not list(trained.glob("*/checkpoints/*.pt")):
        assert run_script("train", *train_args(image_folder, trained, "--use-bf16")).code == 0
    places = {"DATA": image_folder, "CHECKPOINT": next(trained.glob("*/checkpoints/*.pt"))}
    argv = [str(places.get(word, word)) for word in argv]
    tiny = {
        "EqM/train.py": train_args(image_folder, tmp_path, "--max-steps", 3, "--epochs", 9)[2:],
        "EqM/sample_gd.py": ["--folder", tmp_path / "s", "--num-fid-samples", 2, "--num-sampling-steps", 3],
        "EqM.measure.precision_error": ["--out", tmp_path / "errors.md", "--batch-size", 2, "--num-sampling-steps", 3],
        "EqM.measure.benchmark": [*SMALL.split(), "--out", tmp_path / "out"],
        "EqM.measure.estimate": ["--model", "EqM-T/4", "--global-batch-size", 2],
    }[script]
    result = run_script(name_of(script), *argv, *tiny, "--device", "cpu")
    assert result.code == 0, result.err


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_other_command_has_flags_that_exist(document, monkeypatch, tmp_path):
    for script, argv in commands(document):
        if script.startswith("EqM") and "..." not in argv:
            module = load_script(name_of(script))
            monkeypatch.setattr(sys, "argv", [script, *argv])
            module.parse_args()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_a_document_names_is_there(document):
    text = (REPO / document).read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:EqM|datasets|tests)/\w+\.(?:py|md|png)\b", text))
    assert named
    for name in named:
        assert (REPO / name).exists() or (REPO / document).parent.joinpath(name).exists(), name


@pytest.mark.parametrize("document", [*DOCUMENTS, "results/README.md", "results/measured/precisions/report.md"])
def test_every_link_leads_to_a_file_and_a_heading(document):
    page = REPO / document
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert link.startswith("http") or target.exists(), link
        if heading and not link.startswith("http"):
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            assert heading in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings], link


def test_the_readmes_file_tree_names_every_module():
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    tree = readme[readme.index("## Where things are") :]
    missing = [path.name for path in (REPO / "EqM").rglob("*.py") if path.name not in (tree + "__init__.py")]
    assert not missing
