"""Put a trained model into the package: half-precision safetensors, tokenizer, nothing else.

python recipes/embedded/publish.py runs/embedded/coverage rsoups/assets/coverage
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("asset", type=Path)
    args = parser.parse_args()
    causal = "CausalLM" in AutoConfig.from_pretrained(args.model).architectures[0]
    kind = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    model = kind.from_pretrained(args.model, dtype=torch.float32).half()
    model.save_pretrained(args.asset)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.asset)
    # The tokenizer's file without its indentation: a third of the size.
    file = args.asset / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")), ensure_ascii=False, separators=(",", ":")), "utf-8")
    for path in sorted(args.asset.iterdir()):
        print(f"{path.stat().st_size:>10,} {path}")


if __name__ == "__main__":
    main()
