"""Private parts of TRL, PEFT and transformers that rsoups relies on: an upgrade that changes them fails here first."""

import inspect

import pytest
from peft import set_peft_model_state_dict
from peft.config import PeftConfigMixin
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import transformers_weight_conversion as weight_conversion
from peft.utils.other import get_pattern_key
from transformers import LlamaForCausalLM, MixtralConfig, Trainer, conversion_mapping, core_model_loading
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
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
    assert found is not None, (
        f"GRPOTrainer.{name} is gone: rsoups.training.ppo overrides or calls it; pin TRL or adapt ppo.py"
    )
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


def test_names_of_layers_are_converted_as_we_rely_on():
    """rsoups/layer_names.py does by names what PEFT and transformers do when they load."""
    assert "convert_peft_adapter_state_dict_for_transformers(" in inspect.getsource(set_peft_model_state_dict)
    assert "convert_peft_config_for_transformers(" in inspect.getsource(BaseTuner.inject_adapter)
    signatures = {
        weight_conversion.convert_peft_adapter_state_dict_for_transformers: [
            "model",
            "peft_config",
            "adapter_state_dict",
        ],
        weight_conversion.convert_peft_config_for_transformers: ["peft_config", "model", "conversions"],
        conversion_mapping.get_checkpoint_conversion_mapping: ["model_type"],
        conversion_mapping.get_model_conversion_mapping: ["model"],
        core_model_loading.rename_source_key: [
            "source_key",
            "weight_renamings",
            "weight_converters",
            "base_model_prefix",
        ],
    }
    for function, names in signatures.items():
        assert list(inspect.signature(function).parameters)[: len(names)] == names, function.__name__
    llava = conversion_mapping.get_checkpoint_conversion_mapping("llava")
    renamed, _ = core_model_loading.rename_source_key("language_model.x", llava, [])
    assert renamed == "model.language_model.x"
    assert isinstance(LlamaForCausalLM.config_class.sub_configs, dict)


def test_configs_are_matched_as_we_rely_on():
    """rsoups/lora_modules.py and soup_config.py find a module's targets, rank and alpha as PEFT does."""
    assert list(inspect.signature(check_target_module_exists).parameters) == ["config", "key"]
    assert get_pattern_key(["b", "a"], "x.a") == "a" and get_pattern_key([".*", "a"], "x.a") == ".*"
    assert get_pattern_key([r"^x\.a"], "x.a") == r"^x\.a" and get_pattern_key([r"^x\.a"], "y.x.a") == "y.x.a"
    assert "sort_keys=True" in inspect.getsource(PeftConfigMixin.save_pretrained)
    source = inspect.getsource(LoraModel._create_and_replace)
    assert "get_pattern_key(lora_config.rank_pattern.keys(), current_key)" in source


def test_fused_experts_are_laid_out_as_we_rely_on():
    """rsoups stacks A expert by expert, and B direction by direction."""
    source = inspect.getsource(ParamWrapper.get_delta_factors)
    assert "weight_A.reshape(self.num_experts, -1, weight_A.shape[-1])" in source
    assert "weight_B.reshape(weight_B.shape[0], -1, self.num_experts)" in source
    parameters = [
        name for name, _ in MixtralExperts(MixtralConfig(hidden_size=8, intermediate_size=8)).named_parameters()
    ]
    assert parameters == ["gate_up_proj", "down_proj"]  # PEFT wraps them in this order


def test_helpers_exist():
    assert list(inspect.signature(utils.use_adapter).parameters) == ["model", "adapter_name"]
    assert {"padding_value", "padding_side"} <= set(inspect.signature(utils.pad).parameters)
    assert list(inspect.signature(utils.shuffle_sequence_dict).parameters) == ["seq_dict"]
    assert list(inspect.signature(utils.split_tensor_dict).parameters) == ["tensor_dict", "num_chunks"]
    assert "init_lora_weights" in inspect.signature(LoraLayer.reset_lora_parameters).parameters
