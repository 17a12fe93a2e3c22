"""recipes/paper.sh: which runs it starts, and what it leaves out the second time."""

import os
import shutil
import subprocess

import pytest
from front_records import record
from places import RECIPES

from rsoups.fronts.front import Front
from rsoups.hub.evaluation import Evaluation

SCRIPT = RECIPES / "paper.sh"
# Instead of the launcher: a line for each call, and what tells that a run is finished. FAIL: a word at which it is "killed".
LAUNCHER = """#!/usr/bin/env bash
echo "$(basename $0) $*" >> calls
if [ -n "${FAIL:-}" ] && [[ "$*" == *"$FAIL"* ]]; then exit 137; fi
while [ $# -gt 0 ]; do
  if [ "$1" = --output_dir ]; then mkdir -p "$2" && touch "$2/lineage.json"; fi
  if [ "$1" = --out ]; then mkdir -p "$2" && touch "$2/soup.json"; fi
  shift
done
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "recipes").mkdir()
    shutil.copy(SCRIPT, tmp_path / "recipes")
    for name in ("accelerate", "rsoups"):
        (tmp_path / name).write_text(LAUNCHER)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def run(place, task, expect=0, **variables):
    (place / "calls").unlink(missing_ok=True)
    env = os.environ | {"PATH": f"{place}:{os.environ['PATH']}"} | variables
    done = subprocess.run([place / "recipes" / "paper.sh", task], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == expect, done.stderr
    calls = (place / "calls").read_text().splitlines() if (place / "calls").exists() else []
    return done, calls


def test_two_rewards_and_morl_between_them(place):
    done, calls = run(place, "news", PROCESSES="1", MORL=".25 .5")
    launch = "accelerate launch --config_file accelerate_config.yaml --num_processes 1 recipes/"
    start = f"{launch}ppo_reward.py --config recipes/configs/llama7b-news.yaml --convert_pickles --resume"
    start += " --output_dir runs/news"
    both = "--reward gpt2-summarization bart-faithful"
    assert calls == [
        f"{start}/gpt2-summarization --reward gpt2-summarization",
        f"{start}/bart-faithful --reward bart-faithful",
        f"{start}-morl/.25 {both} --reward_weights .25 0.75",
        f"{start}-morl/.5 {both} --reward_weights .5 0.5",
        f"{launch}sweep.py --model_name_or_path huggyllama/llama-7b --task news --adapters "
        "gpt2-summarization=runs/news/gpt2-summarization bart-faithful=runs/news/bart-faithful --others "
        f"alpaca=tloen/alpaca-lora-7b MORL-.25=runs/news-morl/.25 MORL-.5=runs/news-morl/.5 {both} --points 11 "
        "--output_dir runs/news-sweep",
        "rsoups select runs/news-sweep/records.jsonl --knee",
        "rsoups interpolate runs/news/gpt2-summarization runs/news/bart-faithful --out runs/news-soup",
    ]
    assert done.stdout.count("per 100 rollouts 9.9 hours, or 37 minutes (1 x 24 GB, or 4 x 80 GB; worked out)") == 4


def test_four_rewards_go_to_the_hub(place):
    _, calls = run(place, "assistant", ME="me")
    assert sum("ppo_reward.py" in call for call in calls) == 4 and not any("--reward_weights" in call for call in calls)
    assert calls[3].endswith("--reward electra-large --push_to_hub true --hub_model_id me/assistant-electra-large")
    assert "--grid edges --points 3" in calls[4]
    assert calls[-1] == "rsoups push runs/assistant-soup me/assistant-soup --front runs/assistant-sweep/records.jsonl"


def test_what_is_finished_is_skipped_after_an_interruption(place):
    _, calls = run(place, "stack", expect=137, FAIL="--reward electra-large")
    assert len(calls) == 2
    done, calls = run(place, "stack")
    assert "--output_dir runs/stack/electra-large" in calls[0] and "--resume" in calls[0]
    assert done.stdout.count("finished before") == 1
    _, calls = run(place, "stack")
    assert [call.split()[0] for call in calls] == ["accelerate", "rsoups"] and "sweep.py" in calls[0]


def test_another_task_is_refused(place):
    done, calls = run(place, "chess", expect=2)
    assert not calls and "no task 'chess'" in done.stderr


def test_a_card_of_a_front_with_one_prompt_has_values_without_intervals():
    """All rows of the review task share one prompt."""
    rows = []
    for sample in range(3):
        for x in (0.0, 1.0):
            rows.append(record("soup", {"A": x, "B": 1 - x}, "one prompt", a=x + sample, b=1 - x) | {"sample": sample})
    front = Front.from_records(rows)
    results = Evaluation(front, [front.soups[0]], {"samples": 3}).results()
    assert [result.metric_name for result in results] == ["a, mean reward", "b, mean reward"]
    assert results[0].metric_args == {"n": 1, "samples": 3}
