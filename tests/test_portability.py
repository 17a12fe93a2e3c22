"""Windows, as far as can be told on Linux. (tests/test_package.py imports every module without those that Windows lacks.)"""

import subprocess
import sys

import pytest
import torch
from places import ROOT

import rsoups
from rsoups.adapters.convert import convert
from rsoups.cli.main import COMMANDS

POSIX = ("fcntl", "grp", "pwd", "resource", "termios")
HELPS = [[], *([function.__name__.replace("_", "-")] for group in COMMANDS.values() for function in group)]


def test_the_package_and_every_commands_help_need_no_module_that_windows_lacks():
    """They import neither torch nor its kind, which could not be tried so: on Linux those need some of these modules."""
    code = f"""
import sys
for name in {POSIX!r}:
    sys.modules[name] = None
import rsoups
from rsoups.cli.main import main
for words in {HELPS!r}:
    assert main([*words, "--help"]) == 0, words
assert main(["no-such-command"]) == 2
print("torch" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "False" and "Usage: rsoups interpolate" in run.stdout


def test_a_pickle_is_not_opened_without_limits(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "resource", None)
    with pytest.raises(rsoups.CheckpointError, match="only Linux and macOS can bound the memory"):
        convert(str(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
