"""Base models of several families, made from configs."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

IDS = torch.tensor([[1, 5, 9, 30, 7], [1, 2, 40, 41, 42]])


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16)).eval()
