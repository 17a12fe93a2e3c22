"""Commands that read and write small files start fast: they import neither PEFT nor the models of transformers."""

import json
import os
import subprocess
import sys

import pytest
from front_records import records
from tiny import tiny_adapter, tiny_llama

HEAVY = "peft", "bitsandbytes", "trl", "accelerate", "datasets", "scipy", "matplotlib", "transformers.modeling_utils"


def imports_of(*commands: list[str]) -> set[str]:
    """Heavy modules that a fresh Python has imported after some commands, all of which succeed."""
    code = (
        f"import json, sys\nfrom rsoups.cli.main import main\n"
        f"codes = [main(command) for command in {commands!r}]\n"
        f"print(json.dumps([codes, [name for name in {HEAVY!r} if name in sys.modules]]), file=sys.stderr)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    codes, heavy = json.loads(run.stderr.splitlines()[-1])
    assert codes == [0] * len(commands), run.stderr
    return set(heavy)


def with_base(folder, **fields):
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    return str(folder)


@pytest.mark.parametrize("base", ["unknown", "on the Hub", "a folder", "a class"])
def test_interpolate_inspect_and_log_are_light(tmp_path, base):
    fields = {"base_model_name_or_path": {"unknown": None, "on the Hub": "some/base"}.get(base, str(tmp_path / "base"))}
    if base == "a folder":
        tiny_llama().save_pretrained(tmp_path / "base")
    if base == "a class":  # as PEFT writes it where there is no task type
        llama = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
        fields |= {"auto_mapping": llama, "task_type": None}
    two = [with_base(tiny_adapter(tmp_path / name, seed=seed, r=4 - seed), **fields) for seed, name in enumerate("ab")]
    commands = [["interpolate", *two, "--lambdas", "0.3", "0.7", "--out", str(tmp_path / f"soup{i}")] for i in range(2)]
    commands[1] += ["--method", "svd", "--rank", "2"]
    assert imports_of(*commands, ["inspect", *two], ["log", str(tmp_path / "soup0")]) == set()


def test_select_is_light(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in records(20)[0]))
    assert imports_of(["select", str(path), "--maximize", "a"]) == set()
