"""The shape of the package: public names, the one direction of imports, and the wheel."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from forked import warm_python
from places import ROOT

import rsoups

SOURCES = sorted((ROOT / "rsoups").rglob("*.py"))
SCRIPTS = sorted(path for folder in ("recipes", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# DESIGN: imports point one way. A room imports only from itself and from rooms in earlier rows.
ROOMS = [
    "common",
    "adapters",
    "bases",
    "data",
    "fronts",
    "reports",
    "generation",
    "hub",
    "soups",
    "versions",
    "rewards",
    "explorer",
    "sweeps",
    "training",
    "cli",
]


def imports_of(path: Path) -> set[str]:
    """Modules of rsoups that a file imports, at the top or inside a function; those under TYPE_CHECKING do not count."""
    found = set()

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rsoups":
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(name if (ROOT / f"{name.replace('.', '/')}.py").is_file() else node.module for name in below)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.split(".")[0] == "rsoups")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found - {"rsoups"}


def test_every_module_is_in_a_room():
    folders = {path.relative_to(ROOT / "rsoups").parts[0] for path in SOURCES}
    assert folders == {*ROOMS, "__init__.py"}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_from_earlier_rooms_only(room):
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    for path in sorted((ROOT / "rsoups" / room).rglob("*.py")):
        for imported in imports_of(path):
            assert imported.split(".")[1] in allowed, f"{path.relative_to(ROOT)} imports {imported}"


@pytest.mark.parametrize("room", ROOMS)
def test_no_circle_within_a_room(room):
    files = {f"rsoups.{room}.{path.stem}": path for path in (ROOT / "rsoups" / room).glob("*.py")}
    left = {name: imports_of(path) & files.keys() for name, path in files.items()}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"these import each other: {left}"


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_have_400_lines_at_most(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_have_60_lines_at_most_without_their_docstrings(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
            assert node.end_lineno - node.lineno + 1 - docstring <= 60, node.name


def test_no_recipe_or_benchmark_imports_a_private_name():
    for path in SCRIPTS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rsoups"):
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
                assert not [name for name in names if name.startswith("_")], f"{path.name}: {names}"


def test_the_public_names_are_those_of_all():
    assert sorted(rsoups.__all__) == rsoups.__all__ == [n for n in dir(rsoups) if n != "__version__"]
    for name in rsoups.__all__:
        assert getattr(rsoups, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        rsoups.nothing  # noqa: B018


def fresh_python(code: str, cwd: Path, python: str = sys.executable, **env: str) -> str:
    result = subprocess.run(
        [python, "-c", code],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_rsoups_or_asking_for_help_imports_no_torch(tmp_path):
    heavy = "[m for m in ('torch', 'transformers', 'numpy', 'peft', 'matplotlib') if m in sys.modules]"
    assert fresh_python(f"import sys, rsoups; print({heavy})", tmp_path) == "[]"
    code = (
        f"import sys, rsoups.cli.main\ntry: rsoups.cli.main.main(['--help'])\nexcept SystemExit: pass\nprint({heavy})"
    )
    assert fresh_python(code, tmp_path).splitlines()[-1] == "[]"


def test_nothing_but_the_child_that_opens_pickles_needs_unix(tmp_path):
    """As far as imports tell, Windows and macOS can import every module and show the help."""
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES if path.stem != "__init__"]
    names = sorted({*names} - {"rsoups.common.unpickle", "rsoups.cli.__main__"})
    code = f"""
import sys
import accelerate, datasets, gradio, moocore, openai, peft, torch, transformers, trl  # what they import is their own affair
from trl import GRPOTrainer
from importlib import import_module
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
for name in {names}:
    import_module(name)
from rsoups.cli.main import main
main(["--help"])
"""
    assert "interpolate" in fresh_python(code, tmp_path, warm_python())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


def test_the_wheel_holds_one_package_with_its_cards_recipes_and_assets(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"rsoups", f"rsoups-{rsoups.__version__}.dist-info"}
    for needed in (
        "assets/cards/naturalness.yaml",
        "recipes/ppo_reward.py",
        "recipes/configs/embedded.yaml",
        "recipes/accelerate/zero2.yaml",
        "recipes/__init__.py",
        "assets/tiny-llama/model.safetensors",
        "assets/concepts/test.jsonl",
        "assets/card.md.j2",
        "assets/explorer.css",
        "assets/explorer.js",
    ):
        assert f"rsoups/{needed}" in names
    assert not [name for name in names if name.endswith((".pyc", ".bin", ".pt"))]


def test_the_wheel_works_outside_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    code = """
import rsoups
from pathlib import Path
assert Path(rsoups.__file__).is_relative_to(Path.cwd() / "site"), rsoups.__file__
prompt = "### Instruction: Write one sentence that uses these words. ### Input: dog, run ### Response: "
scores = rsoups.load_reward("coverage")([prompt, prompt], ["A dog runs in the park.", "The sea is calm."])
assert scores[0] > scores[1], scores
from transformers import AutoModelForCausalLM
from rsoups.common.assets import resolve, shipped
AutoModelForCausalLM.from_pretrained(resolve("rsoups/tiny-llama"))
assert (shipped("recipes") / "demo.py").is_file()
from importlib import import_module
for path in sorted(shipped("recipes").glob("*.py")):
    import_module(f"rsoups.recipes.{path.stem}")  # as `python -m` does
from rsoups.recipes.ppo_reward import parse
script, training, model = parse(["--config", "llama7b-news", "--use_cpu", "true"])
assert model.model_name_or_path == "huggyllama/llama-7b" and training.mini_batch_size == 4
print("works")
"""
    assert fresh_python(code, tmp_path, warm_python(), PYTHONPATH=str(site)).endswith("works")


def test_nothing_fetched_is_in_the_assets():
    """The embedded weights and our own prompts; none of the sentences that they were trained on."""
    files = {p.suffix for p in (ROOT / "rsoups" / "assets").rglob("*") if p.is_file()}
    assert files <= {".css", ".html", ".j2", ".js", ".json", ".jsonl", ".md", ".safetensors"}
    size = sum(p.stat().st_size for p in (ROOT / "rsoups" / "assets").rglob("*"))
    assert size < 16 * 2**20
