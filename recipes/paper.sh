#!/usr/bin/env bash
# The paper's LLaMA experiment for one task, whole: one PPO run for each reward, MORL between two, every λ, report, soup.
#
#   recipes/paper.sh assistant                       # or news, reddit, stack, review; from the root of a checkout
#   PROCESSES=1 recipes/paper.sh news                # one GPU of 24 GB
#   MORL=".2 .4 .6 .8" recipes/paper.sh review       # more MORL runs, each with this weight of the first reward
#   ME=your-name recipes/paper.sh assistant          # adapters and soup go to the Hub too
#
# Run it again after an interruption: what is finished is skipped, a run that was cut goes on from its newest checkpoint, a
# sweep after its records. More flags for every PPO run: PPO="--max_steps 1280".
#
# Costs are worked out (recipes/configs/README.md), not measured: for each PPO run and 100 rollouts of 128 prompts.
set -euo pipefail
cd "$(dirname "$0")/.."

TASK=${1:?a task: assistant, news, reddit, stack or review}
case $TASK in
assistant) REWARDS="deberta-v3-large-v2 deberta-v3-base deberta-v3-base-v2 electra-large" COST="1.9 hours, or 10 minutes" ;;
news) REWARDS="gpt2-summarization bart-faithful" COST="9.9 hours, or 37 minutes" ;;
reddit) REWARDS="gpt2-summarization bart-faithful" COST="8.2 hours, or 31 minutes" ;;
stack) REWARDS="deberta-v3-base electra-large" COST="4.9 hours, or 18 minutes" ;;
review) REWARDS="deberta-v3-base electra-large" COST="1.1 hours, or 10 minutes" ;;
*) echo "no task '$TASK': assistant, news, reddit, stack or review" >&2 && exit 2 ;;
esac
RUNS=runs/$TASK
LAUNCH="accelerate launch --config_file accelerate_config.yaml ${PROCESSES:+--num_processes $PROCESSES}"

step() { printf '\n== %s\n' "$*"; }

train() { # output folder, flags
  local out=$1
  shift
  step "PPO into $out: per 100 rollouts $COST (1 x 24 GB, or 4 x 80 GB; worked out)"
  if [ -f "$out/lineage.json" ]; then
    echo "finished before"
    return
  fi
  $LAUNCH recipes/ppo_reward.py --config "recipes/configs/llama7b-$TASK.yaml" --convert_pickles --resume \
    --output_dir "$out" "$@" ${PPO:-}
}

for reward in $REWARDS; do
  train "$RUNS/$reward" --reward "$reward" ${ME:+--push_to_hub true --hub_model_id "$ME/$TASK-$reward"}
done

others="alpaca=tloen/alpaca-lora-7b" # the start of every run
if [ "$TASK" != assistant ]; then
  for mu in ${MORL-.5}; do
    rest=$(python3 -c "print(round(1 - $mu, 4))")
    train "$RUNS-morl/$mu" --reward $REWARDS --reward_weights "$mu" "$rest"
    others="$others MORL-$mu=$RUNS-morl/$mu"
  done
fi

step "every reward at every λ: about 10 minutes on 1 x 24 GB, 2 on 4 x 80 GB (worked out)"
grid="--points 11"
# All rows of this task share one prompt, in training and in evaluation: many samples of it, and the report says so.
[ "$TASK" = review ] && grid="$grid --samples 200 --allow_trained_prompts true"
[ "$TASK" = assistant ] && grid="--grid edges --points 3"
adapters=$(for reward in $REWARDS; do echo "$reward=$RUNS/$reward"; done)
$LAUNCH recipes/sweep.py --model_name_or_path huggyllama/llama-7b --task "$TASK" --adapters $adapters --others $others \
  --reward $REWARDS $grid --output_dir "$RUNS-sweep" ${SWEEP:-}

step "a choice, and its soup: minutes, on a CPU"
rsoups select "$RUNS-sweep/records.jsonl" --knee
if [ ! -f "$RUNS-soup/soup.json" ]; then
  rsoups interpolate $(for reward in $REWARDS; do echo "$RUNS/$reward"; done) --out "$RUNS-soup"
fi
if [ -n "${ME:-}" ]; then
  rsoups push "$RUNS-soup" "$ME/$TASK-soup" --front "$RUNS-sweep/records.jsonl"
fi
step "look at $RUNS-sweep/report.html; $RUNS-soup holds equal shares: rsoups interpolate ... --lambdas for others"
