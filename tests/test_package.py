"""The shape of the package: public names, the one direction of imports, and the wheel."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import rsoups

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "rsoups").glob("*.py"))

# DESIGN: imports point one way. A module may import from rsoups only what stands in an earlier row.
ORDER = [
    {"_errors"},
    {"_cards", "_files", "_unpickle", "tensor_files"},
    {
        "actor_critic",
        "adapter_config",
        "callbacks",
        "checkpoints",
        "estimates",
        "first_step",
        "grids",
        "judge_client",
        "layer_names",
        "lineage",
        "low_rank",
    }
    | {"reward_inputs", "rl_math", "sampling", "tasks", "votes"},
    {"convert"},
    {"_resources"},
    {"bases"},
    {"base_files", "lora_modules"},
    {"adapters"},
    {"compatibility"},
    {"soup_config"},
    {"comparison", "decoding", "points", "records", "selection", "stacking", "text_metrics", "training_data"},
    {"notes"},
    {"front", "text_checks"},
    {"function_rewards"},
    {"base_weights"},
    {"attaching"},
    {"soup", "judge"},
    {"averaging", "conflicts", "full_weights", "inspection", "live", "merging", "sweep_folder"},
    {"generation", "ppo_config", "scoring", "streaming"},
    {"ppo", "probing", "vllm_server"},
    {"run_plan", "sweeps"},
    {"suites"},
    {"charts", "plots", "space", "tasting"},
    {"report"},
    {"model_card"},
    {"hub"},
    {"versions"},
    {"explorer_view"},
    {"explorer_page"},
    {"explorer"},
    {"cli_hub"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
# `Soup.push_to_hub` and `.merge` are methods as users expect them; their work is in modules imported when they are called.
ALLOWED = {("soup", "hub"), ("soup", "merging"), ("lineage", "convert")}


def imports_of(path: Path) -> set[str]:
    """Modules of rsoups that a file imports, at the top or inside a function; those under TYPE_CHECKING do not count."""
    found = set()

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("rsoups", "recipes", "rewards"):
            parts = (node.module or "").split(".")
            found.update([parts[1]] if len(parts) > 1 else [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            found.update(a.name for a in node.names if a.name.split(".")[0] in ("rsoups", "recipes", "rewards"))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_imports_point_one_way(path):
    if path.stem == "__init__":
        return
    assert path.stem in RANK, f"{path.name} has no place in ORDER: give it one"
    for imported in imports_of(path) - {"__version__"}:
        assert imported in RANK, f"{path.name} imports {imported}"
        assert RANK[imported] < RANK[path.stem] or (path.stem, imported) in ALLOWED, f"{path.stem} imports {imported}"


def test_the_public_names_are_those_of_all():
    assert sorted(rsoups.__all__) == rsoups.__all__ == [n for n in dir(rsoups) if n != "__version__"]
    for name in rsoups.__all__:
        assert getattr(rsoups, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        rsoups.nothing  # noqa: B018


def fresh_python(code: str, cwd: Path, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
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
    code = f"import sys, rsoups.cli\ntry: rsoups.cli.main(['--help'])\nexcept SystemExit: pass\nprint({heavy})"
    assert fresh_python(code, tmp_path).splitlines()[-1] == "[]"


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
        "rewards/naturalness.yaml",
        "recipes/ppo_reward.py",
        "recipes/configs/embedded.yaml",
        "assets/tiny-llama/model.safetensors",
        "assets/concepts/test.jsonl",
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
from rsoups._resources import resolve, shipped
AutoModelForCausalLM.from_pretrained(resolve("rsoups/tiny-llama"))
assert (shipped("recipes") / "demo.py").is_file()
print("works")
"""
    assert fresh_python(code, tmp_path, PYTHONPATH=str(site)).endswith("works")


def test_nothing_fetched_is_in_the_assets():
    """The embedded weights and our own prompts; none of the sentences that they were trained on."""
    files = {p.suffix for p in (ROOT / "rsoups" / "assets").rglob("*") if p.is_file()}
    assert files <= {".css", ".html", ".js", ".json", ".jsonl", ".md", ".safetensors"}
    size = sum(p.stat().st_size for p in (ROOT / "rsoups" / "assets").rglob("*"))
    assert size < 16 * 2**20
