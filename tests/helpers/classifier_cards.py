"""Cards of tiny classifiers, texts for them, and their logits one by one."""

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

PROMPTS = [f"### Instruction: w1 w2 ### Input: {' w3' * (i % 4 + 1)} ### Response: " for i in range(12)]
RESPONSES = [" ".join(f"w{(i * 7 + j) % 20}" for j in range(1 + i % 9)) for i in range(12)]


def write_card(tmp_path, **fields):
    path = tmp_path / "card.yaml"
    path.write_text("\n".join(f"{key}: {value}" for key, value in fields.items()))
    return path


def alone(folder, first, second):
    """The logits of one pair, without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    inputs = tokenizer(first, second, return_tensors="pt")
    if model.config.pad_token_id is None:  # GPT-2 looks for the last real token by its pad token
        model.config.pad_token_id = tokenizer.eos_token_id
    with torch.no_grad():
        return model(**inputs).logits[0].double()
