"""The paper's experiment, line by line as README has it: real ids, classes, tokenizers and formats, tiny, on a loopback Hub.

Nothing is replaced but the numbers of steps and prompts, and the machine: `accelerate launch` starts two processes on the CPU.
"""

import hashlib
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from forked import warm_python
from hub_server import HubServer
from paper_hub import publish_assistant, publish_other_tasks
from places import ROOT
from ports import free_port

import rsoups
from rsoups.adapters.lineage import manifest_of, read_manifest

REWARDS = ("deberta-v3-large-v2", "deberta-v3-base", "deberta-v3-base-v2", "electra-large")
TOKEN = "hf_neverToBePrintedAnywhere"
# In place of `accelerate` on the PATH: the true one, on two CPU processes, with few steps.
ACCELERATE = """
import os, sys
from accelerate.commands.accelerate_cli import main

script = next(word for word in sys.argv if word.endswith(".py"))
few = {{"ppo_reward.py": ["--max_steps", "2", "--eval_prompts", "4", "--use_cpu", "true"], "sweep.py": ["--prompts", "3"]}}
more = few[os.path.basename(script)]
if "ppo_reward" in script and "{eight_bit}" not in sys.argv:
    more += ["--load_in_8bit", "false"]
sys.argv[2:2] = ["--num_processes", "2", "--main_process_port", "{port}"]
sys.argv += more
main()
"""
RSOUPS = "import sys, rsoups.cli.main; sys.exit(rsoups.cli.main.main())"
LOGITS = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base = AutoModelForCausalLM.from_pretrained("huggyllama/llama-7b", dtype=torch.float32)
ids = AutoTokenizer.from_pretrained("huggyllama/llama-7b")("### Instruction: How can you? ### Response:", return_tensors="pt")
plain = base(**ids).logits
loaded = [PeftModel.from_pretrained(base, sys.argv[1]).eval()(**ids).logits]
base = AutoModelForCausalLM.from_pretrained("huggyllama/llama-7b", dtype=torch.float32)
import rsoups
loaded.append(rsoups.Soup.from_pretrained(sys.argv[2]).load(base)(**ids).logits)
print(float((loaded[0] - loaded[1]).abs().max()), float((loaded[0] - plain).abs().max()))
"""


def commands():
    """The block of README that this test is about."""
    text = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"runs this block as it stands\. -->\n```bash\n(.*?)```", text, re.S)
    return block


def on_path(folder, name, code):
    path = folder / name
    path.write_text(f"#!{folder / 'python'}\n{code}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A loopback Hub, and a checkout to stand in."""
    root = tmp_path_factory.mktemp("paper")
    with HubServer() as hub:
        hub.token = TOKEN
        hub.folder = root / "checkout"
        hub.folder.mkdir()
        for name in ("recipes", "rewards", "rsoups", "accelerate_config.yaml", "README.md"):
            os.symlink(ROOT / name, hub.folder / name)
        hub_at = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(root / "home"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "*",
            "ACCELERATE_USE_CPU": "1",
        }
        (root / "bin").mkdir()
        (root / "bin" / "python").symlink_to(warm_python(**hub_at))
        on_path(root / "bin", "accelerate", ACCELERATE.format(port=free_port(), eight_bit="electra-large"))
        on_path(root / "bin", "rsoups", RSOUPS)
        hub.env = os.environ | hub_at
        hub.env |= {"PATH": f"{root / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
        hub.env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        (root / "made").mkdir()
        publish_assistant(hub, root / "made")
        hub.root = root
        yield hub
        hub.shutdown()


def run(world, script, *arguments):
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script, "bash", *arguments],
        cwd=world.folder, env=world.env, capture_output=True, text=True, check=False, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def told(world):
    return run(world, commands().replace("ME=your-name", "ME=someone", 1))


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def test_the_sizes_are_the_papers_and_told_at_the_start(told):
    sizes = "128 responses (64 on each of 2 processes), minibatches of 4 (2 on each process), gone through 4 times"
    assert told.count(sizes) == len(REWARDS)
    assert told.count("240 prompts, 1 rollouts, 2 optimizer steps") == len(REWARDS)
    assert len(re.findall(r"memory   about \d+\.\d GB in each process, worked out: base ", told)) == len(REWARDS)


@pytest.mark.parametrize("reward", REWARDS)
def test_each_run_tells_what_it_was_made_of(world, told, reward):
    manifest = read_manifest(world.folder / "runs" / "assistant" / reward / "lineage.json")
    hub = world.repositories
    assert manifest["base"]["model"] == "huggyllama/llama-7b"
    assert manifest["base"]["revision"] == hub["huggyllama/llama-7b"].refs["main"]
    assert manifest["config"].get("load_in_8bit", False) is (reward == "electra-large")
    (start,) = manifest["parents"]
    assert (start["source"], start["revision"]) == ("tloen/alpaca-lora-7b", hub["tloen/alpaca-lora-7b"].refs["main"])
    conversion = manifest["history"][start["sha256"]]
    assert conversion["kind"] == "conversion"
    assert conversion["parents"][0]["sha256"] == sha256(world.files("tloen/alpaca-lora-7b")["adapter_model.bin"])
    (card,) = manifest["rewards"]
    assert (card["name"], card["revision"]) == (reward, "refs/pr/3" if reward == REWARDS[0] else "refs/pr/1")
    data = manifest["data"]
    assert (data["dataset"], data["rows"]) == ("Anthropic/hh-rlhf", 240)
    assert re.fullmatch(r"### Instruction: [^?]+\? ### Response: \w.*", data["template"])


def test_the_pickle_is_converted_once_and_no_other_one_is_fetched(world, told):
    assert told.count("opening tloen/alpaca-lora-7b@") == 1
    assert len(list((world.root / "home" / "rsoups" / "converted").iterdir())) == 1
    pickles = [path for method, path in world.seen if path.endswith(".bin") and method == "GET"]
    assert pickles and all("tloen/alpaca-lora-7b" in path for path in pickles)


def test_the_sweep_has_the_singles_the_pairs_and_the_uniform_soup(world, told):
    folder = world.folder / "runs" / "assistant-sweep"
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    rows = {tuple(record["lambdas"].values()) for record in records if record["name"] == "soup"}
    assert len(rows) == 4 + 6 + 1 and (0.25,) * 4 in rows and (0.5, 0.0, 0.0, 0.5) in rows
    assert {record["name"] for record in records} == {"soup", "base", "alpaca"}
    assert len(records) == 3 * (11 + 2) and {tuple(sorted(record["rewards"])) for record in records} == {
        tuple(sorted(REWARDS))
    }
    assert all((folder / name).stat().st_size > 1000 for name in ("front.png", "report.html", "report.md"))
    assert "knee of the front" in told


def test_the_soup_on_the_hub_is_whole(world, told):
    files = world.files("someone/assistant-soup")
    pulled = world.folder / "pulled"
    assert all((pulled / name).read_bytes() == files[name] for name in ("adapter_model.safetensors", "soup.json"))
    manifest = manifest_of(pulled)
    assert [i["source"] for i in manifest["ingredients"]] == [f"someone/assistant-{reward}" for reward in REWARDS]
    assert [i["lambda"] for i in manifest["ingredients"]] == [0.25] * 4
    for ingredient in manifest["ingredients"]:
        weights = world.files(ingredient["source"])["adapter_model.safetensors"]
        assert ingredient["sha256"] == sha256(weights)
        assert ingredient["revision"] == world.repositories[ingredient["source"]].refs["main"]
        assert manifest["history"][ingredient["sha256"]]["kind"] == "ppo"
    tree = run(world, "rsoups log pulled")
    assert tree.count("PPO on ") == 4 and "original (tloen/alpaca-lora-7b@" in tree
    card = files["README.md"].decode()
    assert "base_model: huggyllama/llama-7b" in card and "rewarded-soups" in card


def test_nothing_of_this_disk_and_no_token_is_published(world, told):
    for name in (name for name in world.repositories if name.startswith("someone/")):
        for path, data in world.files(name).items():
            assert str(world.root).encode() not in data and TOKEN.encode() not in data, (name, path)


def test_peft_loads_the_soup_by_its_id_and_gives_the_same_logits(world, told):
    out = run(world, 'python -W ignore -c "$1" someone/assistant-soup pulled', LOGITS)
    apart, changed = map(float, out.split())
    assert apart < 1e-5 < 1e-2 < changed


OTHERS = (
    ("news", "gpt2-summarization"),
    ("news", "bart-faithful"),
    ("reddit", "gpt2-summarization"),
    ("stack", "electra-large"),
    ("review", "deberta-v3-base"),
)
RUN_OTHERS = """
import runpy, sys
recipe = runpy.run_path("recipes/ppo_reward.py")
for pair in sys.argv[1:]:
    task, reward = pair.split("/")
    flags = f"--config recipes/configs/llama7b-{task}.yaml --reward {reward} --output_dir runs/{pair} --convert_pickles"
    machine = "--use_cpu true --load_in_8bit false --bf16 false --dtype float32 --disable_tqdm true"
    recipe["main"](*recipe["parse"]([*flags.split(), "--max_steps", "2", "--eval_prompts", "4", *machine.split()]))
"""


@pytest.fixture(scope="module")
def other_tasks(world):
    publish_other_tasks(world, world.root / "made")
    return run(world, 'python -W ignore -c "$1" "${@:2}"', RUN_OTHERS, *("/".join(pair) for pair in OTHERS))


SUMMARIZE = r"### Instruction: Generate a one-sentence summary of this post. ### Input: \w[^(]+ ### Response: \w.*"


@pytest.mark.parametrize(
    ("task", "reward", "rows", "prompt"),
    [
        (*OTHERS[0], 150, SUMMARIZE),
        (*OTHERS[1], 150, SUMMARIZE),
        (*OTHERS[2], 153, SUMMARIZE),  # every tenth row has no post
        (*OTHERS[3], 140, r"### Instruction: \w.+ ### Response: \w.*"),  # two rows to each question
        (*OTHERS[4], 140, r"### Instruction: Generate a movie review. ### Response: \w.*"),
    ],
)
def test_the_other_tasks_read_their_data_and_train(world, other_tasks, task, reward, rows, prompt):
    manifest = read_manifest(world.folder / "runs" / task / reward / "lineage.json")
    assert manifest["data"]["rows"] == rows and re.fullmatch(prompt, manifest["data"]["template"])
    assert (manifest["config"]["steps"], manifest["rewards"][0]["name"]) == (2, reward)
    assert manifest["results"]["prompts"] == 4
    assert (manifest["rewards"][0].get("conversion") is not None) is (reward == "gpt2-summarization")
    rsoups.interpolate([world.folder / "runs" / task / reward], [1.0])
