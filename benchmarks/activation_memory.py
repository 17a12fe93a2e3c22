"""Activation memory of a 7B update: bytes per token and layer, the figures of recipes/configs/README.md.

    python benchmarks/activation_memory.py                                  # a few minutes on a CPU, 4 GB of memory

Runs the trainer's own forward under bf16 autocast on one and on two layers of LLaMA-7b's shape, with random weights and a LoRA
of rank 16 on q/k/v/o_proj. Every storage that autograd saves counts once; parameters do not count. The difference between the
two is one layer. Bases are in bf16, 8 and 4 bit, with and without activation checkpointing.
"""

import json
import platform
from pathlib import Path

import shapes
import torch
from peft import LoraConfig, get_peft_model

from rsoups.training.actor_critic import add_actor_critic_forward

ROWS, LENGTH, RESPONSE = 2, 72, 32
KINDS = {"bf16": None, "8bit": 8, "4bit": 4}  # bits of quantized weights


def policy(layers, kind):
    base = shapes.base_model("llama7b", layers)
    base = shapes.quantized(base, KINDS[kind]) if KINDS[kind] else base
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))


def saved_bytes(layers, kind, checkpointing):
    """Bytes that autograd saves in one forward."""
    model = policy(layers, kind)
    causal_lm = model.get_base_model()
    causal_lm.value_head = torch.nn.Linear(causal_lm.config.hidden_size, 1, device=shapes.DEVICE)
    add_actor_critic_forward(causal_lm, 1.0)
    if checkpointing:
        causal_lm.activation_checkpointing_enable()
        causal_lm.enable_input_require_grads()
    model.train()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved, tensors = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        tensors.append(tensor)  # kept alive, so that no address is used twice
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(3, 100, (ROWS, LENGTH), device=shapes.DEVICE)
    half = torch.autocast(shapes.DEVICE, torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), half:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), response_length=RESPONSE)
    return sum(saved.values())


def main():
    figures = {}
    for kind in KINDS:
        for checkpointing in (False, True):
            one, two = (saved_bytes(layers, kind, checkpointing) for layers in (1, 2))
            name = f"{kind}{', activation checkpointing' if checkpointing else ''}"
            figures[name] = {"bytes_per_token_and_layer": (two - one) / (ROWS * LENGTH)}
            print(name, figures[name], flush=True)
    result = {"shape": "llama-7b", "torch": torch.__version__, "machine": platform.machine(), "found": figures}
    out = Path(__file__).parent / "results" / "activation_memory.json"
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
