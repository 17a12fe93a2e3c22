"""Private and undocumented parts of TRL, PEFT, transformers, accelerate, gradio and torch that rsoups relies on.

An upgrade that changes one of them fails here first, and the message says what would break.
"""

import inspect

import gradio
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, get_int_from_env
from accelerate.utils.memory import should_reduce_batch_size
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.config import PeftConfigMixin
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import transformers_weight_conversion as weight_conversion
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import get_pattern_key
from ppo_runs import config, lora, trainer
from tiny import tiny_llama
from torch import nn
from transformers import (
    LlamaForCausalLM,
    MixtralConfig,
    ProgressCallback,
    Trainer,
    TrainerState,
    conversion_mapping,
    core_model_loading,
)
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerationMixin
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils.peft_utils import find_adapter_config_file
from trl import GRPOConfig, GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import utils

# Methods that PPOTrainer and ResumableTrainer override or call: their parameters, and what breaks without them.
METHODS = {
    "_generate": (["self", "prompts"], "a rollout has no responses"),
    "_generate_and_score_completions": (["self", "inputs"], "TRL's own scores and group advantages replace PPO's"),
    "_calculate_rewards": (
        ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "rewards are not called, or get other texts",
    ),
    "_prepare_inputs": (["self", "generation_batch"], "a rollout is used once, not in num_iterations epochs"),
    "_get_dataloader": (
        ["self", "dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key"],
        "a rollout has the wrong number of prompts where processes take turns",
    ),
    "_compute_loss": (["self", "model", "inputs"], "GRPO's loss trains, the critic does not"),
    "_generate_single_turn": (
        ["self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
        "local_rollout_forward_batch_size, min_completion_length and the first step's check have no effect",
    ),
    "_tokenize_prompts": (["self", "prompts"], "an end token stays at the end of a prompt"),
    "_get_train_sampler": (["self", "dataset"], "a resumed run sees other prompts than an uninterrupted one"),
    "_get_grad_norm": (["self", "model", "grad_norm"], "a gradient that is not finite makes every weight NaN"),
    "_get_output_dir": (["self", "trial"], "a killed run leaves half a checkpoint under a final name"),
    "_save_checkpoint": (["self", "model", "trial"], "critic, KL coefficient and rollout are missing from checkpoints"),
    "_load_from_checkpoint": (["self", "resume_from_checkpoint", "model"], "a resumed run starts a new critic"),
}


@pytest.mark.parametrize("name", METHODS)
def test_trls_online_loop_still_has(name):
    parameters, breaks = METHODS[name]
    method = getattr(GRPOTrainer, name, None)
    assert method is not None, f"GRPOTrainer.{name} is gone, so {breaks}: adapt rsoups/training, or pin TRL"
    assert list(inspect.signature(method).parameters) == parameters, f"GRPOTrainer.{name} changed, so {breaks}"


# Attributes of a GRPOTrainer that PPOTrainer reads or sets, their types, and what breaks without them.
ATTRIBUTES = {
    "_metrics": (dict, "metrics are not logged"),
    "_logs": (dict, "the table of responses is empty, and ppo_reward.py's summary shows no texts"),
    "_step": (int, "rollouts and their minibatches are counted wrongly, and a resumed run differs"),
    "_buffered_inputs": ((list, type(None)), "TRL does not take the minibatches from PPOTrainer"),
    "_tokenizer": (object, "prompts and responses are not padded"),
    "_pending_metrics": (dict, "what a reward logs with log_metric is lost"),
    "_pending_extra_logs": (dict, "what a reward logs with log_extra is lost"),
    "_dist": (object, "an adapter in pieces cannot be handed to a rollout server"),
    "_is_vlm": (bool, "a model that reads images gets the decoder, which passes none"),
    "_name": (str, "the run's card names GRPO"),
    "_tag_names": (list, "the run's card lacks its tags"),
    "eos_token_ids": ((list, set, tuple), "missing_eos_penalty falls on responses that ended"),
    "generation_config": (object, "the first step's check generates whole responses"),
    "num_generations": (int, "a rollout is counted in prompts wrongly"),
    "num_iterations": (int, "a rollout is not used in num_iterations epochs"),
    "reward_func_names": (list, "scores are logged under other names"),
    "reward_funcs": (list, "a model's NaN counts as no opinion"),
    "reward_weights": (torch.Tensor, "several rewards are not weighted"),
    "temperature": (float, "log-probabilities are not those of the sampler"),
    "use_vllm": (bool, "prompts are split for vLLM, and vLLM gets the critic"),
    "current_gradient_accumulation_steps": ((int, type(None)), "the loss has another scale in an epoch's last step"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One rollout and one optimizer step, with the batch that the loss got."""
    run = trainer(tmp_path_factory.mktemp("run"), max_steps=1)
    run.batches = []
    compute_loss = run._compute_loss
    run._compute_loss = lambda model, inputs: run.batches.append(inputs) or compute_loss(model, inputs)
    run.train()
    return run


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_trls_trainer_still_has(run, name):
    kind, breaks = ATTRIBUTES[name]
    assert hasattr(run, name), f"GRPOTrainer.{name} is gone, so {breaks}"
    assert isinstance(getattr(run, name), kind), f"GRPOTrainer.{name} is {getattr(run, name)!r}, so {breaks}"


def test_the_logs_are_the_ones_that_trl_prints():
    """Without them the table of responses is empty, or its columns have unlike lengths."""
    source = inspect.getsource(GRPOTrainer)
    for name in ("prompt", "completion", "rewards", "advantages", "extra"):
        assert f'self._logs["{name}"]' in source, name


def test_the_token_count_reaches_every_minibatch_whole(run):
    """`num_items_in_batch` has no dimension, so TRL neither shuffles nor splits it. Otherwise the loss has another scale."""
    tokens = torch.tensor(12.0)
    rollout = {"completion_mask": torch.ones(4, 3), "num_items_in_batch": tokens}
    for part in utils.split_tensor_dict(utils.shuffle_sequence_dict(rollout), 2):
        assert part["num_items_in_batch"] is tokens and len(part["completion_mask"]) == 2
    assert 'inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes' in inspect.getsource(
        GRPOTrainer
    )
    assert all(batch["num_items_in_batch"].ndim == 0 for batch in run.batches)


def test_the_loop_asks_for_the_rows_of_each_pass():
    """Without these calls PPOTrainer's overrides are dead code."""
    assert "is_training=True" in inspect.getsource(GRPOTrainer.get_train_dataloader)
    assert "inputs = self._prepare_inputs(inputs)" in inspect.getsource(Trainer.training_step)
    assert "self._step += 1" in inspect.getsource(GRPOTrainer.training_step)
    assert "self._compute_loss(" in inspect.getsource(GRPOTrainer.compute_loss)


def test_a_continued_adapter_has_a_frozen_copy_called_ref(tmp_path):
    """Without it the KL penalty of a continued adapter is to the base. TRL makes it only if beta is not 0."""
    run = trainer(tmp_path, model=get_peft_model(tiny_llama(vocab_size=24), lora()), kl_coef=0.0)
    assert set(run.model.peft_config) == {"default", "ref"} and run.beta != 0
    assert list(inspect.signature(utils.use_adapter).parameters) == ["model", "adapter_name"]


def test_one_response_per_prompt_passes_trls_checks_as_one_group(tmp_path):
    """The trick in PPOConfig.__post_init__: without it TRL refuses num_generations=1."""
    source = inspect.getsource(GRPOConfig.__post_init__)
    assert "self.generation_batch_size % self.num_generations != 0" in source
    assert "self.num_generations < 2" in source
    assert "self.num_generations_eval or self.num_generations" in source
    assert config(tmp_path, num_generations=1).num_generations == 1


def test_checkpoints_are_found_and_rotated_by_name(tmp_path):
    """Without it old checkpoints are never deleted, or the best one is."""
    assert PREFIX_CHECKPOINT_DIR == "checkpoint"
    assert list(inspect.signature(rotate_checkpoints).parameters)[:3] == [
        "output_dir", "save_total_limit", "best_model_checkpoint",
    ]  # fmt: skip
    assert hasattr(TrainerState(), "best_global_step") and "training_bar" in vars(ProgressCallback())
    source = inspect.getsource(Trainer._save_checkpoint)
    assert "self._get_output_dir(trial=trial)" in source, "a checkpoint would be written under its final name"


def test_the_sampler_of_prompts_is_seeded_anew_for_each_epoch():
    """EpochSampler is made of these attributes. Without them a resumed run sees other prompts."""
    sampler = utils.RepeatSampler([0, 1, 2, 3], 1, 2, 1, True, 7)
    assert list(inspect.signature(utils.RepeatSampler).parameters) == [
        "data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed",
    ]  # fmt: skip
    assert {"data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed"} <= vars(sampler).keys()
    assert isinstance(sampler.generator, torch.Generator)


def test_accelerate_gathers_and_counts_processes_as_we_rely_on(monkeypatch):
    """Otherwise metrics are of one process only, evaluations count padding rows, and rollouts are divided wrongly."""
    assert "use_gather_object" in inspect.signature(Accelerator.gather_for_metrics).parameters
    assert gather_object(["a", "b"]) == ["a", "b"]
    monkeypatch.setenv("PMI_SIZE", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert get_int_from_env(["WORLD_SIZE", "PMI_SIZE"], 1) == 3
    # A sweep halves its batch after an error of this kind, and lets any other pass.
    assert should_reduce_batch_size(torch.cuda.OutOfMemoryError("CUDA out of memory."))
    assert not should_reduce_batch_size(RuntimeError("shape"))


def test_generate_draws_tokens_by_multinomial():
    """`fast_sampling` answers this call. Without it sampling is slow, and the first step's check sees no draws."""
    assert "torch.multinomial(probs, num_samples=1)" in inspect.getsource(GenerationMixin._sample)


def test_a_cache_has_layers_with_keys_and_values_of_rows():
    """The decoder drops finished rows and shares prefixes through these. Without them its texts are wrong."""
    cache = DynamicCache()
    keys = torch.arange(24.0).view(2, 1, 3, 4)
    cache.update(keys, -keys, 0)
    (layer,) = cache.layers
    assert type(layer) is DynamicLayer and torch.equal(layer.keys, keys) and torch.equal(layer.values, -keys)
    cache.batch_select_indices(torch.tensor([1]))
    assert torch.equal(cache.layers[0].keys, keys[1:]) and cache.get_seq_length() == 3


def test_dropout_modules_have_one_class_and_a_probability():
    """`silence_noise` sets it to 0. Without it a rollout and its update see two policies."""
    for kind in (nn.Dropout, nn.Dropout2d, nn.AlphaDropout):
        assert isinstance(kind(0.3), nn.modules.dropout._DropoutNd) and kind(0.3).p == 0.3


def test_a_lora_layer_keeps_its_factors_by_adapter():
    """`reset_adapter` and `Soup.load` write them. Without them runs of one soup have unlike starts."""
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert layers and all(
        isinstance(layer, BaseTunerLayer) and layer.active_adapters == ["default"] for layer in layers
    )
    for layer in layers:
        factors = layer.lora_embedding_A if "default" in layer.lora_embedding_A else layer.lora_A
        assert "default" in factors and layer.scaling["default"] == 4.0
    assert "init_lora_weights" in inspect.signature(LoraLayer.reset_lora_parameters).parameters
    assert EMBEDDING_LAYER_NAMES == ["embed_tokens", "lm_head"]
    assert list(inspect.signature(TrainableTokensLayer.get_merged_weights).parameters) == ["self", "active_adapters"]


def test_transformers_finds_adapters_and_ties_as_we_rely_on():
    """Without them an adapter is not recognized as a reward, and a merged model holds its head twice or not at all."""
    assert "token" in inspect.signature(find_adapter_config_file).parameters
    assert list(inspect.signature(remove_tied_weights_from_state_dict).parameters)[:2] == ["state_dict", "model"]
    assert {"put", "end"} <= set(dir(BaseStreamer))


def test_gradio_tells_what_a_page_of_ours_sends():
    """The explorer's page sends events by name and is updated in part. Without these it does not react."""
    assert "_data" in inspect.getsource(gradio.EventData)
    assert {"show_api", "allowed_paths"} & set(inspect.signature(gradio.Blocks.launch).parameters)
    assert callable(gradio.skip) and callable(gradio.update)


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
    """Without them a rollout is not padded, and evaluating it recomputes activations."""
    assert {"padding_value", "padding_side"} <= set(inspect.signature(utils.pad).parameters)
    assert list(inspect.signature(utils.shuffle_sequence_dict).parameters) == ["seq_dict"]
    assert list(inspect.signature(utils.split_tensor_dict).parameters) == ["tensor_dict", "num_chunks"]
    assert list(inspect.signature(disable_gradient_checkpointing).parameters) == [
        "model",
        "gradient_checkpointing_kwargs",
    ]
