"""The package as a user installs it: the wheel and the dependencies that it declares, in an environment of its own.

Slow (minutes, and the package index): `make test-install` runs it.
"""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
from places import ROOT

pytestmark = pytest.mark.install

# The lowest versions that pyproject.toml declares. torch is left at the tested build: others come with gigabytes of CUDA.
LOWEST = [
    "accelerate==1.12.0",
    "cyclopts==4.0.0",
    "datasets==5.1.0",
    "filelock==4.2.11",
    "huggingface_hub==2.4.0",
    "jinja2==3.1.0",
    "moocore==0.3.0",
    "numpy==2.0.0",
    "peft==0.21.0",
    "protobuf==4.21.1",
    "pydantic==2.9.0",
    "pyyaml==6.0.1",
    "rich==13.6.0",
    "safetensors==0.8.0",
    "sentencepiece==0.2.0",
    "tenacity==9.0.0",
    "tqdm==4.66.3",
    "transformers==5.18.0",
    "trl==1.16.0",
]
NEWEST = ["transformers==5.24.0"]
EXTRAS = ("matplotlib", "gradio", "httpx", "sklearn", "openai", "bitsandbytes", "sacrebleu")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    return next(out.glob("*.whl"))


@pytest.fixture(params=["declared", "lowest", "newest"])
def python(request, wheel, tmp_path):
    """The interpreter of a fresh environment that holds the wheel and what it needs, and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / "bin" / "python"
    versions = {"declared": [], "lowest": LOWEST, "newest": NEWEST}[request.param]
    packages = [str(wheel), f"torch=={version('torch')}", *versions]
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def test_the_core_alone_imports_interpolates_trains_sweeps_and_reports(python, tmp_path):
    def run(*arguments):
        command = [str(python), "-W", "ignore", "-m", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
        return done.stdout

    missing = f"import importlib.util as u; print([m for m in {EXTRAS} if u.find_spec(m)])"
    assert subprocess.check_output([str(python), "-c", missing], text=True).strip() == "[]"

    for reward in ("naturalness", "coverage"):
        run("rsoups.cli", "train", "--reward", reward, "--max_steps", "4", "--output_dir", reward)
    run("rsoups.cli", "interpolate", "naturalness", "coverage", "--lambdas", "0.3", "0.7", "--out", "soup")
    assert json.loads((tmp_path / "soup" / "soup.json").read_text())["method"] == "exact"

    sweep = ["--adapters", "naturalness", "coverage", "--reward", "naturalness", "coverage", "--prompts", "8"]
    run("rsoups.cli", "sweep", *sweep, "--output_dir", "swept")
    assert len((tmp_path / "swept" / "records.jsonl").read_text().splitlines()) >= 8 * 11
    report = (tmp_path / "swept" / "report.md").read_text()
    assert "naturalness" in report and "| base |" in report
    assert "λ" in run("rsoups.cli", "select", "swept/records.jsonl", "--knee")
