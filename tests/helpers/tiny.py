"""Tiny models, tokenizers and adapters, made from configs; nothing is fetched."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def tiny_tokenizer(words):
    """One token for each word; id 0 pads, 1 begins, 2 ends, 3 is unknown."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=64,
    )


def tiny_llama(**overrides):
    """Two layers of width 32. Weights start larger than usual, so that responses depend on their prompts."""
    torch.manual_seed(0)
    config = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**(config | overrides))).eval()


def tiny_classifier(folder, kind, labels=1):
    """A sequence classifier over the words w0 ... w19, saved with its tokenizer; gpt2 has no pad token."""
    tokenizer = tiny_tokenizer([f"w{i}" for i in range(20)])
    shape = {"vocab_size": 24, "num_labels": labels, "initializer_range": 0.5}
    torch.manual_seed(1)
    if kind == "gpt2":
        tokenizer.pad_token = None
        model = GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, **shape))
        model.config.pad_token_id = None
    else:
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        shape |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        shape |= {"max_position_embeddings": 64, "pad_token_id": 0, "type_vocab_size": 2}
        if kind == "deberta":
            model = DebertaV2ForSequenceClassification(DebertaV2Config(**shape))
        else:
            model = ElectraForSequenceClassification(ElectraConfig(embedding_size=16, **shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_adapter(folder, base=None, *, seed=0, dtype=torch.float32, **lora):
    """A LoRA with random factors (a fresh one's B is zero), saved by PEFT."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base or tiny_llama(), LoraConfig(**(settings | lora)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.1
                whole = any(part in name for part in ("modules_to_save", "trainable_tokens", ".bias"))
                parameter.copy_(parameter + noise if whole else noise)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder, save_embedding_layers="embed_tokens" in settings["target_modules"])
    return folder


_GROUPED = {  # four heads share the keys and values of two
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def tiny_mixtral():
    """Two layers of three experts, whose weights are one parameter for all."""
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**_GROUPED, num_local_experts=3, experts_implementation="eager")).eval()


def tiny_qwen():
    """Two layers whose attention has biases."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**_GROUPED)).eval()


def merged_by_peft(base, folder):
    """The base's parameters with an adapter merged in, by PEFT, in float64.

    Args:
        base: Makes the base.
        folder: The adapter's.
    """
    merged = PeftModel.from_pretrained(base().double(), folder).merge_and_unload()
    return {name: tensor.double() for name, tensor in merged.state_dict().items()}


def assert_is_sum(soup_folder, base, folders, lambdas):
    """PEFT reads a saved soup as θ0 + Σ λi·(θi - θ0), each θi as PEFT itself merges it."""
    zero = {name: tensor.double() for name, tensor in base().state_dict().items()}
    ends = [merged_by_peft(base, folder) for folder in folders]
    found = merged_by_peft(base, soup_folder)
    moved = 0.0
    for name, start in zero.items():
        expected = start + sum(weight * (end[name] - start) for weight, end in zip(lambdas, ends, strict=True))
        assert torch.allclose(found[name], expected, rtol=1e-6, atol=1e-7), name
        moved = max(moved, float((expected - start).abs().max()))
    assert moved > 1e-2  # the adapters do something
