"""One batch through TRL 1.12's PPOTrainer, everything between rollout and losses recorded. Run in .venv-oracle.

    .venv-oracle/bin/python tests/oracle/trl_ppo.py OUT.safetensors

The trainer is TRL's own, unchanged; its functions are wrapped to be seen, and the learning rate is 0 so that the second
PPO epoch sees the first one's policy with a perturbation of ours instead.
"""

import sys
import tempfile

import numpy as np
import torch
import trl
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

assert trl.__version__.startswith("1.12"), trl.__version__
SETTINGS = {"gamma": 0.97, "lam": 0.9, "kl_coef": 0.15, "cliprange": 0.2, "cliprange_value": 0.1, "vf_coef": 0.1}
seen = {}


def spy(name, store):
    real = getattr(ppo_trainer, name)

    def wrapped(*args, **kwargs):
        out = real(*args, **kwargs)
        store(args, out)
        return out

    setattr(ppo_trainer, name, wrapped)


def whitened(args, out):
    seen.update(raw_advantages=args[0].clone(), mask=args[1].clone(), advantages=out.clone())


calls = []


def log_softmaxed(args, out):
    calls.append(out.detach().clone())  # rollout: policy, reference; then one for each PPO epoch


def rewarded(args, out):
    full, scores, _ = out
    if "values" not in seen:
        seen["values"] = full[:, args[3] - 1 : -1].squeeze(-1).clone()  # of the value model, asked first
    else:
        seen["scores"] = scores.clone()


def generated(args, out):
    seen["query_responses"] = out[0].clone()
    seen["context"] = torch.tensor(args[1].shape[1])


def main(path):
    torch.manual_seed(0)
    words = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(21))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", padding_side="left"
    )
    config = LlamaConfig(
        vocab_size=24, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_labels=1,
    )  # fmt: skip
    policy, reference = LlamaForCausalLM(config), LlamaForCausalLM(config)
    value, reward = LlamaForSequenceClassification(config), LlamaForSequenceClassification(config)
    prompts = [f"w{i % 20} w{i % 7}" + " w3" * (i % 4) for i in range(16)]
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            output_dir=folder, per_device_train_batch_size=16, gradient_accumulation_steps=1, num_mini_batches=1,
            total_episodes=16, num_ppo_epochs=2, response_length=8, stop_token="eos", temperature=1.0,
            learning_rate=0.0, num_sample_generations=0, local_rollout_forward_batch_size=16, report_to="none",
            save_strategy="no", use_cpu=True, bf16=False, logging_steps=1, disable_tqdm=True, **SETTINGS,
        )  # fmt: skip
        trainer = PPOTrainer(
            args=args, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward,
            value_model=value, train_dataset=Dataset.from_dict({"input_ids": [tokenizer(p)["input_ids"] for p in prompts]}),
        )  # fmt: skip
        spy("masked_whiten", whitened)
        spy("selective_log_softmax", log_softmaxed)
        spy("get_reward", rewarded)
        spy("batch_generation", generated)
        losses = []
        backward = trainer.accelerator.backward

        def record(loss):
            losses.append(loss.detach().clone())
            backward(loss)
            with torch.no_grad():  # the second epoch's policy and critic differ from the rollout's
                generator = torch.Generator().manual_seed(1)
                for parameter in trainer.model.parameters():
                    parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))

        trainer.accelerator.backward = record
        permutation = np.random.permutation
        orders = []
        np.random.permutation = lambda n: orders.append(permutation(n)) or orders[-1]
        new_values = []
        trainer.model.value_model.score.register_forward_hook(lambda m, i, o: new_values.append(o.detach().clone()))
        trainer.train()
    logged = trainer.state.log_history[-1]
    context = int(seen["context"])
    seen.update(logps=calls[0], ref_logps=calls[1], losses=torch.stack(losses))
    rows = np.argsort(orders[-1])  # TRL shuffles the rows in each epoch
    seen["new_logps"], seen["new_values"] = calls[3][rows], new_values[-1][rows, context - 1 : -1].squeeze(-1)
    seen["policy_loss_mean"] = torch.tensor(logged["loss/policy_avg"], dtype=torch.float64)
    seen["value_loss_mean"] = torch.tensor(logged["loss/value_avg"], dtype=torch.float64)
    seen["kl"] = torch.tensor(logged["objective/kl"], dtype=torch.float64)
    save_file({key: value.contiguous() for key, value in seen.items()}, path)


if __name__ == "__main__":
    main(sys.argv[1])
