"""Before the first step: what is sampled, scored and trained is one policy, or the run is refused with the culprit's name."""

import re

import pytest
import torch
from ppo_runs import PROMPTS, WORDS, config, history, lora, pays_for_one_word, trainer
from tiny import tiny_llama, tiny_tokenizer
from tokenizers import processors
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from rsoups import PPOTrainer, SettingsError, TrainingError
from rsoups.generation.decoding import encode
from rsoups.training.actor_critic import ValueHead, add_actor_critic_forward
from rsoups.training.policy import reset_adapter

SIZE = len(tiny_tokenizer(WORDS))
SMALL = {"vocab_size": SIZE, "hidden_size": 16, "num_attention_heads": 2, "pad_token_id": 0, "eos_token_id": 2}


def gpt2():
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": SIZE}
    return GPT2LMHeadModel(GPT2Config(**shape, attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3, eos_token_id=2))


def opt():
    """Dropout as a function, on activations and attention, and whole layers dropped."""
    shape = {"ffn_dim": 32, "num_hidden_layers": 2, "max_position_embeddings": 64, "word_embed_proj_dim": 16}
    return OPTForCausalLM(OPTConfig(**SMALL, **shape, dropout=0.3, attention_dropout=0.3, layerdrop=0.5))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize(
    "base", [lambda: tiny_llama(vocab_size=SIZE, attention_dropout=0.3), gpt2, opt], ids=["llama", "gpt2", "opt"]
)
def test_no_dropout_means_none(tmp_path, base):
    """A fresh adapter changes nothing, and the first minibatch is the rollout: KL and clip fraction are 0."""
    run = trainer(tmp_path, model=base(), max_steps=1, learning_rate=1e-6)
    run.train()
    assert history(run, "kl")[0] == pytest.approx(0, abs=1e-5) and history(run, "clip_fraction")[0] == 0


class Noisy(nn.Module):
    """Noise of which no name tells."""

    def forward(self, states):
        return states + torch.randn_like(states) if self.training else states


def test_noise_that_no_name_tells_is_refused_by_the_modules_name(tmp_path):
    base = tiny_llama(vocab_size=SIZE)
    base.model.layers[1].mlp.down_proj = nn.Sequential(base.model.layers[1].mlp.down_proj, Noisy())
    run = trainer(tmp_path, model=base)
    with pytest.raises(TrainingError, match=r"layers\.1\.mlp\.down_proj\.1 \(Noisy\): switch its dropout"):
        run.train()
    assert run.state.global_step == 0


LEAKS = {
    "top_k": 2,
    "top_p": 0.3,
    "temperature": 0.1,
    "repetition_penalty": 5.0,
    "min_p": 0.5,
    "typical_p": 0.2,
    "epsilon_cutoff": 0.2,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 6,
    "suppress_tokens": [7, 8, 9],
    "bad_words_ids": [[7]],
    "num_beams": 3,
    "max_new_tokens": 1,
    "forced_eos_token_id": 2,
    "length_penalty": 3.0,
    "guidance_scale": 3.0,
    "exponential_decay_length_penalty": (1, 5.0),
}


def first_tokens(run):
    torch.manual_seed(0)
    return run._generate_single_turn([[5, 9]] * 500, None, {}, 1)[0]


@pytest.mark.parametrize("name", LEAKS)
def test_nothing_is_inherited_from_the_bases_generation_config(tmp_path, name, capsys):
    plain = trainer(tmp_path, max_steps=1)
    base = tiny_llama(vocab_size=SIZE)
    setattr(base.generation_config, name, LEAKS[name])
    run = trainer(tmp_path, model=base, max_steps=1)
    assert first_tokens(run) == first_tokens(plain)
    run.train()
    assert f"not inherited from the base's generation_config: {name}=" in capsys.readouterr().out


def test_all_is_well_in_one_line_and_changes_nothing(tmp_path, capsys):
    run = trainer(tmp_path, max_steps=4)
    run.train()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("checked")]
    assert "log p of sampler and update agree (to " in line and "KL to the reference is 0; no dropout" in line
    unchecked = trainer(tmp_path, max_steps=4)
    unchecked._checked = True
    unchecked.train()
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, unchecked.model.get_parameter(name)), name


def test_a_sampler_of_another_policy_is_refused(tmp_path):
    run = trainer(tmp_path)
    run.generation_config.top_k = 2
    with pytest.raises(TrainingError, match=r"differ by [\d.]+ nats per token between generation and PPO's own"):
        run.train()


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 2},
        {"top_p": 0.5},
        {"min_p": 0.1},
        {"repetition_penalty": 3.0},
        {"generation_kwargs": {"num_beams": 2}},
    ],
    ids=str,
)
def test_settings_that_the_log_probabilities_do_not_have_are_refused(tmp_path, settings):
    name = next(iter(settings.get("generation_kwargs", settings)))
    with pytest.raises(SettingsError, match=f"{name}: PPO samples from the whole softmax"):
        config(tmp_path, **settings)


def capped(kind):
    shape = {**SMALL, "intermediate_size": 32, "num_hidden_layers": 3}
    if kind == "gemma2":
        told = {"num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}
        return Gemma2ForCausalLM(Gemma2Config(**shape, **told, attn_implementation="eager"))
    if kind == "recurrent gemma":
        more = {"lru_width": 16, "attention_window_size": 64, "logits_soft_cap": 3.0}
        return RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**shape, **more))

    class Scaled(type(tiny_llama())):
        """A scale of which the config tells nothing."""

        def forward(self, *arguments, **options):
            out = super().forward(*arguments, **options)
            out.logits = out.logits * 0.3
            return out

    torch.manual_seed(0)
    return Scaled(tiny_llama(vocab_size=SIZE).config)


@pytest.mark.parametrize("kind", ["gemma2", "recurrent gemma", "a scale"])
def test_a_head_that_changes_its_logits_is_the_models_own(kind):
    torch.manual_seed(0)
    model = capped(kind).eval()
    model.get_output_embeddings().weight.data.mul_(30)
    ids = torch.randint(4, SIZE, (2, 9))
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = (model(**asked).logits[:, -5:-1] / 0.7).log_softmax(-1).gather(-1, ids[:, -4:, None])[..., 0]
    model.value_head = ValueHead(16 if kind != "a scale" else 32)
    add_actor_critic_forward(model, temperature=0.7)
    logps, values = model(**asked, response_length=4)
    assert torch.allclose(logps, expected, atol=1e-5) and values.shape == logps.shape
    logps.sum().backward()


def test_prompts_begin_once_and_do_not_end(tmp_path, caplog):
    tokenizer = tiny_tokenizer(WORDS)
    template = {"single": "<s> <s> $A </s>", "pair": "<s> $A </s> $B </s>", "special_tokens": [("<s>", 1), ("</s>", 2)]}
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(**template)
    assert tokenizer("w1 w2")["input_ids"] == [1, 1, 5, 6, 2]
    assert encode(tokenizer, "w1 w2") == [1, 5, 6]
    assert "adds a second <s> and the </s> behind each prompt: left out" in caplog.text
    run = PPOTrainer(
        tiny_llama(vocab_size=SIZE), pays_for_one_word, config(tmp_path), train_dataset=PROMPTS,
        processing_class=tokenizer, peft_config=lora(),
    )  # fmt: skip
    assert run._tokenize_prompts(["w1 w2", "w3"])[0] == [[1, 5, 6], [1, 7]]


# --- random numbers, minibatches, evaluation ----------------------------------------------------------------------------


def test_a_fresh_adapter_takes_no_random_numbers_from_the_run(tmp_path, monkeypatch):
    seeded = []
    monkeypatch.setattr("torch.cuda.manual_seed_all", seeded.append)
    run = trainer(tmp_path, seed=123, adapter_init_seed=5)
    before = torch.get_rng_state()
    reset_adapter(run.model, 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert 5 not in seeded, "the GPUs' generators were left at adapter_init_seed"


def test_each_epoch_draws_its_minibatches_anew(tmp_path):
    sizes = {"generation_batch_size": 16, "mini_batch_size": 4, "num_iterations": 3, "max_steps": 12}
    bare = dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation"))
    run = trainer(tmp_path, **bare, **sizes)
    seen, real = [], run._compute_loss

    def compute(model, inputs):
        seen.append(frozenset(map(tuple, torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1).tolist())))
        return real(model, inputs)

    run._compute_loss = compute
    run.train()
    epochs = [seen[at : at + 4] for at in (0, 4, 8)]
    assert all(frozenset.union(*epoch) == frozenset.union(*epochs[0]) for epoch in epochs)
    assert len({frozenset(epoch) for epoch in epochs}) == 3


def test_an_evaluation_in_between_changes_nothing(tmp_path):
    found = []
    for every in (None, 2):
        more = {"eval_strategy": "steps", "eval_steps": every} if every else {}
        run = trainer(tmp_path / str(every), evaluate=bool(every), max_steps=8, kl_target=0.05, kl_horizon=200, **more)
        run.train()
        found.append((run.kl_controller.coef, dict(run.model.named_parameters())))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())


def test_what_rewards_log_reaches_the_log(tmp_path):
    def judged(prompts, completions, log_metric=None, log_extra=None, **columns):
        log_metric("judge/calls", 7.0)
        log_extra("why", ["because"] * len(completions))
        return [float(len(text)) for text in completions]

    run = trainer(tmp_path, reward=judged, max_steps=4)
    run.train()
    assert history(run, "judge/calls") == [7.0] and not run._pending_metrics
    assert set(run._logs["extra"]["why"]) == {"because"}


def test_rewards_of_one_name_and_weights_of_nothing_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="several rewards are called 'pays_for_one_word'"):
        trainer(tmp_path, reward=[pays_for_one_word, pays_for_one_word])
    for weights, reason in (
        ([0.0], "one at least must not be 0"),
        ([float("nan")], "finite"),
        ([1, 2], "of the 1 rewards"),
    ):
        with pytest.raises(SettingsError, match=rf"reward_weights are {re.escape(str(weights))}: .*{reason}"):
            trainer(tmp_path, reward_weights=weights)


@pytest.mark.parametrize("penalty", [None, 1.0])
def test_only_responses_that_never_end_pay_the_penalty(tmp_path, penalty):
    """Of responses cut by their own drawn limit, those are spared that would have ended before the longest one."""
    run = trainer(
        tmp_path, reward=lambda prompts, completions, **columns: [0.0] * len(prompts), missing_eos_penalty=penalty,
        min_completion_length=1, max_completion_length=6, max_steps=1,
    )  # fmt: skip
    whole, real = [], PPOTrainer.__mro__[1]._generate_single_turn

    def seen(self, *arguments, **options):
        whole.extend(real(self, *arguments, **options)[0])
        return whole[-32:], None

    run._checked = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PPOTrainer.__mro__[1], "_generate_single_turn", seen)
        patch.setattr("rsoups.training.ppo.decoder_generates", lambda trainer: False)
        run.train()
    endless = sum(ids[-1] != 2 for ids in whole) / len(whole)
    assert 0 < endless < 1
    assert history(run, "reward")[0] == pytest.approx(-endless if penalty else 0)
