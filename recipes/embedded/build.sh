#!/usr/bin/env bash
# Builds the embedded models (rsoups/assets) from CommonGen's sentences and ratings. About two hours on two CPU cores.
#   recipes/embedded/build.sh PATH/TO/commongen [runs/embedded]
# The folder holds train.jsonl.gz and dev.jsonl.gz (rows {"concepts", "sentences"}) and ratings_{train,dev}.jsonl.gz
# (rows {"candidate", "reference", "scores"}); the data does not ship with rsoups. Wants pip install -e .[metrics].
set -euo pipefail
data=$1 out=${2:-runs/embedded}
cd "$(dirname "$0")/../.."
export HF_HUB_OFFLINE=1 PYTHONPATH=.
embedded=recipes/embedded

python $embedded/prompts.py rsoups/assets/concepts --exclude "$data"
python $embedded/prepare.py "$data" "$out"
python recipes/sft.py --config recipes/configs/embedded-sft-copying.yaml
python recipes/sft.py --config recipes/configs/embedded-sft.yaml
python $embedded/publish.py "$out/sft" rsoups/assets/tiny-llama

python $embedded/rewards.py init "$data" "$out"
mkdir -p "$out/own"
python $embedded/rewards.py coverage "$data" "$out/own" --limit 0
python recipes/reward_model.py --config recipes/configs/embedded-coverage.yaml
for reward in coverage naturalness rating; do # coverage continues from its first round, rating from naturalness
  python $embedded/rewards.py $reward "$data" "$out"
  config=recipes/configs/embedded-$reward
  [ $reward = coverage ] && config+=-sampled
  python recipes/reward_model.py --config $config.yaml
  python $embedded/publish.py "$out/$reward" rsoups/assets/$reward
done

python $embedded/evaluate.py policy "$data" rsoups/tiny-llama --out "$out/policy.json"
python $embedded/evaluate.py people "$data" --out "$out/people.json"
python $embedded/evaluate.py calibrate naturalness coverage rating --policy rsoups/tiny-llama # -> rewards/*.yaml
