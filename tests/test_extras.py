"""What a command needs beyond the core is said before any work, with the command that installs it."""

import importlib.util
import runpy
import sys

import pytest
from front_records import records
from places import RECIPES

import rsoups


@pytest.fixture
def without(monkeypatch):
    """A package that is not installed, as far as anyone can tell."""

    def hide(name):
        find = importlib.util.find_spec
        monkeypatch.setattr("importlib.util.find_spec", lambda n, *more: None if n == name else find(n, *more))
        for module in ("rsoups.common.assets", "rsoups.reports.report"):
            __import__(module)
            monkeypatch.setattr(f"{module}.find_spec", lambda n, *more: None if n == name else find(n, *more))
        monkeypatch.setitem(sys.modules, name, None)

    return hide


@pytest.mark.parametrize("flag", ["--load_in_8bit", "--load_in_4bit"])
def test_a_quantized_run_without_bitsandbytes(without, tmp_path, monkeypatch, capsys, flag):
    without("bitsandbytes")
    monkeypatch.setattr("rsoups.load_reward", lambda *_, **__: pytest.fail("a reward was loaded first"))
    monkeypatch.setattr(sys, "argv", ["ppo_reward.py", flag, "true", "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(RECIPES / "ppo_reward.py"), run_name="__main__")
    assert "pip install 'rsoups[quantized]'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_quantized_live_soup_without_bitsandbytes(without, tmp_path):
    from tiny import tiny_adapter, tiny_llama

    tiny_llama().save_pretrained(tmp_path / "base")
    adapter = tiny_adapter(tmp_path / "a")
    without("bitsandbytes")
    with pytest.raises(rsoups.SettingsError, match=r"package bitsandbytes.*rsoups\[quantized\]"):
        rsoups.LiveSoup.from_pretrained(
            str(tmp_path / "base"), {"a": adapter}, quantization="4bit", allow_base_mismatch=True
        )


def test_a_report_without_matplotlib_has_no_picture_and_all_the_rest(without, tmp_path):
    without("matplotlib")
    found, _ = records(n=30)
    told = rsoups.write_report(rsoups.Front.from_records(found), found, tmp_path)
    assert any("pip install 'rsoups[report]'" in sentence for sentence in told)
    assert (tmp_path / "report.md").stat().st_size and (tmp_path / "report.html").stat().st_size
    assert not (tmp_path / "front.png").exists()
