"""The private methods of TRL and PEFT that PPOTrainer relies on: an upgrade that changes them fails here first."""

import inspect

import pytest
from peft.tuners.lora import LoraLayer
from transformers import Trainer
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import utils

METHODS = {
    "_generate": ["self", "prompts"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_prepare_inputs": ["self", "generation_batch"],
    "_get_dataloader": [
        "self",
        "dataset",
        "description",
        "batch_size",
        "sampler_fn",
        "is_training",
        "dataloader_key",
    ],
    "_compute_loss": ["self", "model", "inputs"],
    "_generate_single_turn": [
        "self",
        "prompt_ids",
        "images",
        "multimodal_fields",
        "num_generations",
        "has_tool_images",
    ],
    "_get_train_sampler": ["self", "dataset"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_get_output_dir": ["self", "trial"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
}


@pytest.mark.parametrize("name", METHODS)
def test_trls_online_loop_still_has(name):
    found = getattr(GRPOTrainer, name, None)
    assert found is not None, f"GRPOTrainer.{name} is gone: rsoups.ppo overrides or calls it; pin TRL or adapt ppo.py"
    parameters = list(inspect.signature(found).parameters)
    assert parameters == METHODS[name], f"GRPOTrainer.{name} changed to {parameters}: adapt rsoups/ppo.py"


def test_the_loop_asks_for_the_rows_of_each_pass():
    assert "is_training=True" in inspect.getsource(GRPOTrainer.get_train_dataloader)
    assert "inputs = self._prepare_inputs(inputs)" in inspect.getsource(Trainer.training_step)
    assert "self._step += 1" in inspect.getsource(GRPOTrainer.training_step)
    assert "self._compute_loss(" in inspect.getsource(GRPOTrainer.compute_loss)


def test_what_generate_returns_starts_with_ids_and_texts():
    returned = inspect.getsource(GRPOTrainer._generate).rsplit("return ", 1)[1]
    assert [part.strip() for part in returned.split(",")][:4] == [
        "prompt_ids",
        "completion_ids",
        "tool_mask",
        "completions",
    ]


def test_vllm_is_handed_the_weights_by_name():
    assert list(inspect.signature(VLLMGeneration._iter_named_params).parameters) == ["self"]
    assert "self._iter_named_params()" in inspect.getsource(VLLMGeneration.sync_weights)
    assert "self.vllm_generation = VLLMGeneration(" in inspect.getsource(GRPOTrainer.__init__)


def test_helpers_exist():
    assert list(inspect.signature(utils.use_adapter).parameters) == ["model", "adapter_name"]
    assert {"padding_value", "padding_side"} <= set(inspect.signature(utils.pad).parameters)
    assert list(inspect.signature(utils.shuffle_sequence_dict).parameters) == ["seq_dict"]
    assert list(inspect.signature(utils.split_tensor_dict).parameters) == ["tensor_dict", "num_chunks"]
    assert "init_lora_weights" in inspect.signature(LoraLayer.reset_lora_parameters).parameters
