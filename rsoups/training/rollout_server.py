"""Rollouts from a running vLLM server, which is handed the adapter alone before each of them.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve my/base --enable-lora --max-lora-rank 16
    rsoups train --rollout_server http://127.0.0.1:8000 ...

Nothing is merged and no weights of the base travel, so the base may be quantized or in pieces on several processes. The server
runs on the machine of the main process: it reads the adapter from shared memory.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.distributed.tensor import DTensor
from trl.models.utils import disable_gradient_checkpointing

from rsoups.adapters.adapter import Adapter, adapter_of
from rsoups.adapters.served import write_served
from rsoups.adapters.settings import LoraSettings
from rsoups.common.errors import TrainingError
from rsoups.generation.vllm_client import VLLMClient, token_ids

_MEMORY = Path("/dev/shm")  # files here are never written to a disk
_CHECKED = 2  # responses of each rollout whose log-probabilities are compared
# Largest mean difference of log-probabilities, in nats per token: by rounding; by another quantization of the base, or dropout.
_ROUNDING, _QUANTIZED = 0.1, 0.5


class RolloutServer:
    """The server of a trainer's rollouts.

    Attributes:
        difference: Mean difference of log p between server and trainer in the last rollout, in nats per token.
    """

    def __init__(self, trainer: Any):
        """Reach the server.

        Raises:
            ServerError: The server cannot be reached, or it serves no base.
        """
        self._trainer = trainer
        self._client = VLLMClient(trainer.args.rollout_server)
        self._adapter: Path | None = None  # folder of the adapter that was handed over last
        self._state: dict[str, Tensor] = {}  # its tensors, on the main process
        self._count = 0
        self.difference = 0.0
        names = [""]
        if trainer.accelerator.is_main_process:
            where = _MEMORY if os.access(_MEMORY, os.W_OK) else None
            names = [tempfile.mkdtemp(prefix="rsoups-", dir=where)]
        self._folder = Path(broadcast_object_list(names)[0])
        self._closed = weakref.finalize(self, _close, self._client, self._folder, trainer.accelerator.is_main_process)

    def generate(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Tokens of a response to each prompt, by the policy as it is now, with the settings of local sampling.

        Raises:
            ServerError: The server refuses, or stays away.
            AdapterError: vLLM cannot load this kind of adapter.
            TrainingError: The server has another policy than the trainer.
        """
        args = self._trainer.args
        adapter = self._hand_over()
        sampling = {"temperature": args.temperature, "top_p": 1.0, "max_tokens": args.max_completion_length}
        sampling["stop_token_ids"] = list(self._trainer.eos_token_ids)
        # One seed for each response, of the state of random numbers that a checkpoint holds.
        seeds = torch.randint(2**31 - 1, (len(prompt_ids),)).tolist()
        requests = [{"prompt": ids, "seed": seed, **sampling} for ids, seed in zip(prompt_ids, seeds, strict=True)]

        responses = []
        for completion in self._client.complete(requests, adapter):
            ids = token_ids(completion)
            if not ids:
                raise TrainingError(
                    f"the server {self._client.url} tells no token ids: rollouts need vLLM 0.11 or later (return_token_ids)"
                )
            responses.append(ids)
        self._check(prompt_ids[:_CHECKED], responses[:_CHECKED], adapter)
        return responses

    def _hand_over(self) -> Path | None:
        """Write the active adapter, unless it is the one of before. Called by all processes at once.

        Returns:
            The folder of the adapter; None if it is switched off.
        """
        accelerator = self._trainer.accelerator
        policy = accelerator.unwrap_model(self._trainer.model)
        layer = next(module for module in policy.modules() if isinstance(module, BaseTunerLayer))
        if layer.disable_adapters:
            return None

        name = layer.active_adapters[0]
        state = self._gathered(policy, name)
        folders = [self._adapter]
        if accelerator.is_main_process and not _equal(state, self._state):
            self._count += 1
            folder = self._folder / f"{self._folder.name}-{self._count}"
            write_served(_adapter(policy, name, state), folder)
            if self._adapter is not None:
                shutil.rmtree(self._adapter, ignore_errors=True)
            self._state, folders = state, [folder]
        self._adapter = broadcast_object_list(folders)[0]
        return self._adapter

    def _gathered(self, policy: Any, name: str) -> dict[str, Tensor]:
        """An adapter's tensors by their names in the model, whole and on the CPU; empty but on the main process."""
        accelerator = self._trainer.accelerator
        part = re.compile(rf"\.{re.escape(name)}(\.|$)")
        parameters = {key: parameter for key, parameter in policy.named_parameters() if part.search(key)}
        state = {}
        with self._trainer._dist.gather_params(list(parameters.values())):
            for key, parameter in parameters.items():
                whole = parameter.detach()
                if isinstance(whole, DTensor):  # FSDP2: each process has its rows
                    whole = whole.full_tensor()
                if accelerator.is_main_process:
                    state[key] = whole.cpu().clone()
        return state

    def _check(self, prompts: list[list[int]], responses: list[list[int]], adapter: Path | None) -> None:
        """Compare log p of some responses' tokens, at temperature 1, by the server and by the trainer.

        A server of another base, without the adapter, or with the one before has other log-probabilities.
        """
        ours = torch.cat(self._own_logps(prompts, responses))
        self._trainer.accelerator.wait_for_everyone()  # the server reads one text at a time, when nobody generates
        differences = [0.0]
        if self._trainer.accelerator.is_main_process:
            read = self._client.read(list(zip(prompts, responses, strict=True)), adapter)
            differences = [float((torch.tensor(sum(read, [])) - ours).abs().nan_to_num(nan=1e3).mean())]
        self.difference = broadcast_object_list(differences)[0]

        quantized = getattr(
            self._trainer.accelerator.unwrap_model(self._trainer.model).config, "quantization_config", None
        )
        limit = _QUANTIZED if quantized or not self._trainer.args.disable_dropout else _ROUNDING
        mode = "train" if self._trainer.model.training else "eval"
        self._trainer._metrics[mode]["server_difference"].append(self.difference)
        if self.difference > limit:
            raise TrainingError(
                f"the server {self._client.url} ({self._client.base}) and the trainer differ by {self.difference:.3g} nats per "
                f"token in the log-probabilities of the same responses (limit {limit}): the server has another base or "
                "dtype, or it does not apply the whole adapter. PPO would train another policy than the one that writes"
            )

    @torch.no_grad()
    def _own_logps(self, prompts: list[list[int]], responses: list[list[int]]) -> list[Tensor]:
        """Log p of the tokens of responses at temperature 1, one (T,) for each, by the model as it is."""
        trainer = self._trainer
        logps = []
        with disable_gradient_checkpointing(trainer.model, trainer.args.activation_checkpointing_kwargs):
            for prompt, response in zip(prompts, responses, strict=True):
                ids = torch.tensor([[*prompt, *response]], device=trainer.accelerator.device)
                with trainer.accelerator.autocast():
                    logits = trainer.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
                before = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
                logps.append(before.gather(-1, ids[0, len(prompt) :, None])[:, 0].cpu())
        return logps


def _adapter(policy: Any, name: str, state: dict[str, Tensor]) -> Adapter:
    """The adapter of tensors with a model's names."""
    saved = get_peft_model_state_dict(policy, state, adapter_name=name, save_embedding_layers=False)
    return adapter_of("the policy's adapter", LoraSettings.of(policy.peft_config[name]), saved)


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def _close(client: VLLMClient, folder: Path, is_main: bool) -> None:
    """Let the server forget the adapter, and remove the files."""
    if is_main:
        client.close()
        shutil.rmtree(folder, ignore_errors=True)
