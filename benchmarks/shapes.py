"""Models, tokenizers and memory that the benchmarks share: real shapes with random weights, nothing fetched.

Scripts import this file by its bare name, since their folder is on their path. It imports nothing of rsoups, so that TRL 1.12's
environment, which has no rsoups, can use it.
"""

import gc
import os
import resource
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).parent.parent
EMBEDDED = ROOT / "rsoups/assets/tiny-llama"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMAS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 12_000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 1_024,
    },
    "smollm2": {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1_536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8_192, "tie_word_embeddings": True,
    },
    "llama7b": {},  # LlamaConfig's defaults
}  # fmt: skip
SHAPES = ("embedded", *_LLAMAS)


def base_model(
    shape: str, layers: int | None = None, dtype: torch.dtype | None = None, folder: str | Path | None = None
) -> Any:
    """Return a base in evaluation mode, on the GPU if there is one: the embedded policy, or random weights of another shape.

    Args:
        shape: One of `SHAPES`.
        layers: Number of layers, if not the shape's own.
        dtype: Type of the weights; bfloat16 for LLaMA-7b and float32 for the others if None.
        folder: Folder of a model of that shape, instead of random weights.
    """
    dtype = dtype or (torch.bfloat16 if shape == "llama7b" else torch.float32)
    if folder or shape == "embedded":
        base: Any = AutoModelForCausalLM.from_pretrained(folder or EMBEDDED, dtype=dtype)
        return base.to(DEVICE).eval()

    settings: dict[str, Any] = {**_SPECIAL, **_LLAMAS[shape]}
    config = LlamaConfig(**settings)
    config.num_hidden_layers = layers or config.num_hidden_layers
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def deberta_v3_large(layers: int = 24, tiny: bool = False, pad: int = 0) -> Any:
    """Return a reward model of DeBERTa-v3-large's shape with random weights, in float32 on the CPU.

    Args:
        layers: Number of layers; the real one has 24.
        tiny: A small model of the same kind, for a rehearsal.
        pad: Id of the padding token.
    """
    torch.manual_seed(0)
    config: Any = DebertaV2Config  # its hints lack what its checkpoints have
    config = config(
        vocab_size=128_100, hidden_size=32 if tiny else 1_024, num_hidden_layers=2 if tiny else layers,
        num_attention_heads=2 if tiny else 16, intermediate_size=64 if tiny else 4_096, relative_attention=True,
        position_buckets=256, norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"],
        position_biased_input=False, max_relative_positions=-1, type_vocab_size=0, num_labels=1, pad_token_id=pad,
    )  # fmt: skip
    return DebertaV2ForSequenceClassification(config).eval()


def words_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the words w0, w1, ...: a text of n words has n tokens."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = [*special, *(f"w{i}" for i in range(vocabulary - len(special)))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip


def memory() -> tuple[int, int]:
    """Return bytes now and at the peak so far: allocated on a GPU, resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> None:
    """Let a GPU's peak begin anew, with no tensor left of objects that are gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def quantized(base: Any, bits: int) -> Any:
    """Return a base of the same weights in 8 or 4 bit (NF4), by bitsandbytes."""
    settings: dict[str, Any] = {f"load_in_{bits}bit": True}
    if bits == 4:
        settings |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    return type(base).from_pretrained(
        None, config=base.config, state_dict=base.state_dict(), quantization_config=BitsAndBytesConfig(**settings),
        dtype=torch.bfloat16, device_map={"": DEVICE},
    )  # fmt: skip
