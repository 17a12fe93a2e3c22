"""How torch's idle threads wait: asleep, unless the user chose another way or loaded torch first."""

import ast
import os
import subprocess
import sys

import pytest
from places import ROOT

WAY = "OMP_WAIT_POLICY"
CHOICES = {WAY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
RECIPES = sorted((ROOT / "recipes").rglob("*.py"))
LIGHT = {"numpy", "yaml"}  # packages that do not load torch


def python(code, **environment):
    """Output of Python in an environment in which nobody has chosen a way to wait."""
    kept = {name: value for name, value in os.environ.items() if name not in CHOICES}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, env=kept | environment, capture_output=True, text=True)


def way_after(code, **environment):
    return python(f"import os, sys\n{code}\nprint(os.environ.get('{WAY}'))", **environment).stdout.split()[-1]


def test_idle_threads_sleep_and_child_processes_inherit_it():
    assert way_after("import rsoups") == "PASSIVE"
    child = "import subprocess, rsoups; subprocess.run([sys.executable, '-c', 'import os; print(os.environ[\"{}\"])'])"
    lines = python(f"import os, sys\n{child.format(WAY)}").stdout.split()
    assert lines == ["PASSIVE"]


def test_the_openmp_runtime_reads_it():
    """libgomp itself says how its threads wait, and how many it has."""
    code = "import rsoups, torch; print(torch.get_num_threads())"
    shown = python(code, OMP_DISPLAY_ENV="TRUE", OMP_NUM_THREADS="2")
    if "OMP_WAIT_POLICY" not in shown.stderr:
        pytest.skip("the OpenMP runtime of this torch does not show its settings")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in shown.stderr
    assert shown.stdout.split() == ["2"]


@pytest.mark.parametrize(
    "choice", [{WAY: "ACTIVE"}, {WAY: "active"}, {WAY: ""}, {"GOMP_SPINCOUNT": "infinity"}, {"KMP_BLOCKTIME": "200"}]
)
def test_what_the_user_set_stays(choice):
    code = "before = dict(os.environ)\nimport rsoups\nassert os.environ == before"
    assert python(f"import os\n{code}", **choice).returncode == 0


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_number_of_threads_stays_and_is_no_way_to_wait(name):
    assert way_after(f"import rsoups\nassert os.environ['{name}'] == '3'", **{name: "3"}) == "PASSIVE"


def test_nothing_is_set_once_torch_is_loaded():
    """It would have no effect on this process; its child processes should not differ from it."""
    assert way_after("import types; sys.modules['torch'] = types.ModuleType('torch')\nimport rsoups") == "None"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_recipe_imports_rsoups_before_torch(path):
    """torch reads the setting when it is loaded, and many packages load it."""
    names = []
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            names += [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(str(node.module).split(".")[0])
    packages = [name for name in names if name not in sys.stdlib_module_names | LIGHT]
    assert "rsoups" not in packages or packages[0] == "rsoups"
