"""PPO over bitsandbytes' 8-bit and 4-bit bases (QLoRA), and sweeps over them, on the CPU."""

import pytest
import torch
from ppo_runs import WORDS, history, pays_for_one_word, trainer
from sweep_runs import changed_llama, run
from tiny import tiny_adapter, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import rsoups

bitsandbytes = pytest.importorskip("bitsandbytes")
FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


@pytest.mark.filterwarnings("default")  # bitsandbytes tells which kernels it lacks here
@pytest.mark.parametrize(
    ("settings", "layer"),
    [(FOUR, "Linear4bit"), ({"load_in_8bit": True}, "Linear8bitLt")],
    ids=["4bit", "8bit"],
)
def test_an_adapter_is_trained_over_a_quantised_base(tmp_path, settings, layer):
    size = {"vocab_size": len(tiny_tokenizer(WORDS)), "hidden_size": 64, "intermediate_size": 128}
    tiny_llama(**size).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(**settings), dtype=torch.float32
    )
    assert type(base.model.layers[0].mlp.up_proj).__name__ == layer
    frozen = {key: value.clone() for key, value in base.state_dict().items()}
    run = trainer(tmp_path, pays_for_one_word, model=base, max_steps=120, kl_coef=0.01)
    run.train()
    rewards = history(run, "reward")
    assert sum(rewards[-6:]) / 6 > sum(rewards[:3]) / 3 + 0.2, "nothing was learnt"
    after = run.model.get_base_model().state_dict()
    for key, value in frozen.items():
        name = key if key in after else key.replace("_proj.", "_proj.base_layer.")
        assert torch.equal(after[name], value), f"{key} of the frozen base changed"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("settings", [FOUR, {"load_in_8bit": True}], ids=["4bit", "8bit"])
def test_a_sweep_over_a_quantised_base_goes_on_over_the_same_one(tmp_path, settings):
    path, size = tmp_path / "records.jsonl", {"hidden_size": 64, "intermediate_size": 128}
    two = {name: tiny_adapter(tmp_path / name, seed=seed, base=tiny_llama(**size)) for seed, name in enumerate("ab")}
    tiny_llama(**size).save_pretrained(tmp_path / "base")
    other = changed_llama(**size)
    with torch.no_grad():
        other.model.norm.weight.mul_(1.1)  # of 4-bit layers on a CPU no values are compared
    other.save_pretrained(tmp_path / "other")

    def load(name):
        quantized = BitsAndBytesConfig(**settings)
        return AutoModelForCausalLM.from_pretrained(tmp_path / name, quantization_config=quantized, dtype=torch.float32)

    same = load("base")
    for base, grid in ((same, [[1, 0]]), (same, [[0.5, 0.5]]), (load("base"), [[0, 1]])):
        run(two, path, base=base, lambdas=grid)
    for another in (load("other"), tiny_llama(**size)):
        with pytest.raises(rsoups.OutputError, match="the base's weights"):
            run(two, path, base=another, samples=2)
