"""Every private name of other libraries that rsoups uses has a row in a contract test, and further rows for the package.

`tests/training/test_contract.py` has those of training, adapters and decoding. The first two tests here read rsoups' source
and find what has no row: add one that says what breaks without the name.
"""

import argparse
import ast
import inspect
from collections import Counter

import gradio
import pytest
import torch
from places import ROOT
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, HfArgumentParser, LlamaConfig, PreTrainedModel, Trainer
from transformers.core_model_loading import WeightRenaming, revert_weight_conversion
from transformers.generation.utils import GenerationMixin
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils import hub
from trl import GRPOTrainer, SFTTrainer, TrlParser

from rsoups.explorer import app
from rsoups.training.averaging import EMACallback
from rsoups.training.callbacks import Interrupt, PPOProgress, ProgressFile
from rsoups.training.flags import FlagParser
from rsoups.training.ppo import PPOTrainer
from rsoups.training.resumable import EpochSampler, ResumableTrainer

SOURCES = {
    path: ast.parse(path.read_text("utf-8")) for room in ("rsoups", "recipes") for path in (ROOT / room).rglob("*.py")
}
CONTRACTS = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_contract*.py"))

# Private names that are Python's own, and documented: the fields of a named tuple.
PYTHONS = {"_asdict", "_replace"}
# Methods that their libraries document as meant to be overridden.
DOCUMENTED = {"__init__", "on_log", "on_save", "on_step_end", "on_train_begin", "on_train_end", "error", "format_help"}


def private_names_of_others():
    """Attributes, imports and texts that begin with one underscore and that no module of rsoups defines."""
    ours, used = set(), Counter()
    for tree in SOURCES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls"):
                ours.update([node.attr] if isinstance(node.ctx, ast.Store) else [])
            if isinstance(node, ast.Attribute):
                used[node.attr] += 1
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("rsoups"):
                used.update([alias.name for alias in node.names] + (node.module or "").split("."))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                # "_token", "_token_id" and the like are parts of names.
                used.update([node.value] if node.value.count("_") > 1 and node.value != "_token_id" else [])
    return {name for name in used if name.startswith("_") and not name.startswith("__")} - ours - PYTHONS


@pytest.mark.parametrize("name", sorted(private_names_of_others()))
def test_a_private_name_of_another_library_has_a_row(name):
    assert name in CONTRACTS, f"{name} is private: say in a contract test where it is from, and what breaks without it"


@pytest.mark.parametrize(
    "kind", [PPOTrainer, ResumableTrainer, EpochSampler, PPOProgress, ProgressFile, Interrupt, EMACallback, FlagParser],
    ids=lambda kind: kind.__name__,
)  # fmt: skip
def test_an_overridden_method_has_a_row(kind):
    others = [base for base in kind.__mro__[1:-1] if not base.__module__.startswith("rsoups")]
    overridden = {name for name in vars(kind) if any(name in vars(base) for base in others)}
    functions = {name for name in overridden if inspect.isfunction(vars(kind)[name])}
    for name in functions - DOCUMENTED:
        assert f'"{name}"' in CONTRACTS, f"{kind.__name__}.{name} overrides a method that no contract test names"


# Public methods that rsoups overrides or relies on: their parameters, and what breaks without them.
METHODS = {
    (Trainer, "train"): (
        ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
        "resume_from_checkpoint=True takes a half-written checkpoint, and Ctrl-C loses the step",
    ),
    (Trainer, "evaluate"): (
        ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
        "an evaluation changes the random numbers of the training",
    ),
    (SFTTrainer, "compute_loss"): (
        ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
        "recipes/sft.py projects the prompt's positions to the vocabulary on a CPU",
    ),
    (TrlParser, "parse_args_and_config"): (
        ["self", "args", "return_remaining_strings", "fail_with_unknown_args", "separate_remaining_strings"],
        "a word that belongs to no flag of a recipe is not refused",
    ),
    (revert_weight_conversion, ""): (["model", "state_dict"], "a merged model has names that no checkpoint has"),
    (TorchFunctionMode, "__torch_function__"): (
        ["self", "func", "types", "args", "kwargs"],
        "fast_sampling does not see the sampler's call",
    ),
}


@pytest.mark.parametrize(
    ("place", "contract"),
    METHODS.items(),
    ids=[f"{getattr(owner, '__name__', owner)}.{name}" for owner, name in METHODS],
)
def test_a_method_has_the_parameters_that_are_relied_on(place, contract):
    owner, name = place
    parameters, breaks = contract
    found = list(inspect.signature(getattr(owner, name) if name else owner).parameters)
    assert found[: len(parameters)] == parameters, f"{owner.__name__}.{name} has {found}: {breaks}"


def test_flags_are_added_by_one_method_and_shown_by_their_option_strings():
    """FlagParser overrides "add_argument". Without this the help of `rsoups train` shows all spellings, or none."""
    assert "parser.add_argument(*long_options, *aliases, **kwargs)" in inspect.getsource(
        HfArgumentParser._parse_dataclass_field
    )
    parser = argparse.ArgumentParser()
    action = parser.add_argument("--a_b", "--a-b")
    action.option_strings = ["--a-b"]
    assert parser.parse_args(["--a_b", "1"]).a_b == "1" and "--a_b" not in parser.format_help()


def test_an_evaluation_during_training_is_told_from_others():
    """Trainer.is_in_train. Without it every evaluation, or none, keeps the random numbers."""
    assert "self.is_in_train = True" in inspect.getsource(Trainer.train)
    assert "self.vllm_generation" in inspect.getsource(GRPOTrainer.__init__)  # hide_value_head takes it


def test_a_models_parameters_are_in_a_dictionary_by_name():
    """nn.Module._parameters. LiveSoup.merged exchanges them there, and puts the same tensors back."""
    layer = nn.Linear(2, 2)
    own = layer._parameters["weight"]
    layer._parameters |= {"weight": nn.Parameter(torch.zeros(2, 2), requires_grad=False)}
    assert layer.weight.sum() == 0 and layer._parameters["bias"] is layer.bias
    layer._parameters |= {"weight": own}
    assert layer.weight is own


def test_convolutions_have_one_class():
    """_ConvNd. Without it the merge of an adapter on convolutions is refused, or one on unknown layers is not."""
    assert all(issubclass(kind, _ConvNd) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not issubclass(
        nn.Linear, _ConvNd
    )


def test_a_model_with_an_adapter_of_transformers_own_says_so():
    """_hf_peft_config_loaded. Without it a soup is loaded on top of another adapter."""
    assert PeftAdapterMixin._hf_peft_config_loaded is False and issubclass(PreTrainedModel, PeftAdapterMixin)
    assert "self._hf_peft_config_loaded = True" in inspect.getsource(PeftAdapterMixin)


def test_a_config_has_room_for_its_commit_and_knows_its_name():
    """_commit_hash, which `from_safetensors` sets, is not saved; _name_or_path is left out of what is compared, published."""
    config = LlamaConfig(name_or_path="user/base")
    config._commit_hash = "abc"
    assert config._name_or_path == "user/base" and "_name_or_path" in config.to_dict()
    assert "abc" not in config.to_json_string(use_diff=False)


def test_a_missing_file_of_the_hub_can_be_no_error():
    """Without these two, a repository with an adapter only is not recognized as one."""
    source = inspect.getsource(hub.cached_files)
    assert "_raise_exceptions_for_missing_entries" in source and "_raise_exceptions_for_connection_errors" in source


def test_generate_takes_what_is_unset_from_the_models_own_config():
    """`respond` therefore exchanges model.generation_config. Without this a base's top_p would shape the sampling."""
    source = inspect.getsource(GenerationMixin._prepare_generation_config)
    assert "self.generation_config" in source
    assert GenerationConfig(do_sample=True, top_k=0, top_p=1.0).top_k == 0


def test_renamings_of_layers_have_one_class():
    """Without WeightRenaming the layers of a base are not found under the names of its files."""
    assert {"source_patterns", "target_patterns"} <= set(inspect.signature(WeightRenaming.__init__).parameters)


def test_gradio_takes_the_settings_that_keep_the_page_closed():
    """Without them the explorer serves files, sends usage figures, or does not stop."""
    launch = set(inspect.signature(gradio.Blocks.launch).parameters)
    assert app._launch_settings("127.0.0.1").keys() <= launch
    assert {"server_name", "server_port", "inbrowser"} & launch
    assert "analytics_enabled" in inspect.signature(gradio.Blocks.__init__).parameters
    assert "js_on_load" in inspect.signature(gradio.HTML.__init__).parameters
    assert "buttons" in inspect.signature(gradio.Slider.__init__).parameters
    assert {"title", "print_exception"} <= set(inspect.signature(gradio.Error.__init__).parameters)
