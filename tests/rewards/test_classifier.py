"""Reward models, against one-by-one scoring with transformers alone."""

import json

import pytest
import torch
from classifier_cards import PROMPTS, RESPONSES, alone, write_card
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_classifier, tiny_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

import rsoups
from rsoups import RewardCard, load_reward
from rsoups.data.prompts import question_of
from rsoups.rewards.classifier import Reward


@pytest.fixture(params=["deberta", "electra", "gpt2"])
def model(request, tmp_path):
    return tiny_classifier(tmp_path / request.param, request.param, labels=2)


def test_batches_score_as_each_sample_alone(model, tmp_path):
    reward = load_reward(write_card(tmp_path, name="r", model=model, logit=0))
    questions = [" ".join(["w3"] * (i % 4 + 1)) for i in range(12)]
    expected = [alone(model, q, r)[0].item() for q, r in zip(questions, RESPONSES, strict=True)]
    scores = reward(PROMPTS, RESPONSES)
    assert scores == pytest.approx(expected, abs=1e-5)
    assert max(scores) - min(scores) > 0.01
    assert reward(PROMPTS[:1], RESPONSES[:1]) == pytest.approx(expected[:1], abs=1e-5)


def test_every_field_of_a_card_counts(model, tmp_path):
    one = alone(model, RESPONSES[5], "w3 w3")
    prompt = [PROMPTS[1]]
    reversed_pair = {"name": "r", "model": model, "input": "reversed_pair"}
    assert load_reward(write_card(tmp_path, **reversed_pair))(prompt, [RESPONSES[5]]) == pytest.approx(
        [one[0].item()], abs=1e-5
    )
    full = reversed_pair | {"logit": 1, "minus": 0, "sign": -1, "mean": 0.5, "std": 2}
    expected = (-(one[1] - one[0]).item() - 0.5) / 2
    assert load_reward(write_card(tmp_path, **full))(prompt, [RESPONSES[5]]) == pytest.approx([expected], abs=1e-5)
    by_label = full | {"logit": "LABEL_1", "minus": "LABEL_0"}
    assert load_reward(write_card(tmp_path, **by_label))(prompt, [RESPONSES[5]]) == pytest.approx([expected], abs=1e-5)


def test_a_model_is_loaded_in_the_cards_precision(tmp_path):
    folder = tiny_classifier(tmp_path / "m", "electra")
    exact = load_reward(write_card(tmp_path, name="r", model=folder))(PROMPTS, RESPONSES)
    half = load_reward(write_card(tmp_path, name="r", model=folder, dtype="bfloat16"))
    assert half._model.dtype == torch.bfloat16
    scores = half(PROMPTS, RESPONSES)
    assert scores != exact and scores == pytest.approx(exact, abs=0.1)


ONE_LABEL: dict = {"num_labels": 1}  # transformers' hints lack the settings that all configs share
DECODERS = {
    "gpt2": (GPT2ForSequenceClassification, GPT2Config(vocab_size=24, n_embd=16, n_layer=1, n_head=2, **ONE_LABEL)),
    "llama": (
        LlamaForSequenceClassification,
        LlamaConfig(
            vocab_size=24,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            **ONE_LABEL,
        ),
    ),
}


def decoder(folder, kind="llama", pad=None, tokenizer_pad="</s>", dtype=torch.float32):
    """A decoder with a head, over the words w0 ... w19, whose config and tokenizer may pad differently."""
    model, config = DECODERS[kind]
    config.pad_token_id = pad
    torch.manual_seed(0)
    made = model(config)
    for parameter in made.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    made.to(dtype).save_pretrained(folder)
    tokenizer = tiny_tokenizer([f"w{i}" for i in range(20)])
    tokenizer.pad_token = tokenizer_pad
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("pad", [None, 0, 2, -1, 7])
@pytest.mark.parametrize("tokenizer_pad", [None, "</s>", "<pad>"])
def test_a_decoder_scores_the_ids_that_are_shown_as_it_does_alone(tmp_path, kind, pad, tokenizer_pad):
    """For every pad token of its config and its tokenizer, the end token at the end of a text included."""
    folder = decoder(tmp_path / "m", kind, pad, tokenizer_pad)
    reward = load_reward(write_card(tmp_path, name="r", model=folder, input='"{question} {response} {eos}"'))
    asked, said = ["w1", "w2 w3", "w4", "w3"], ["w5 w6 w7", "w3", "w3 w3 w3", "w1 w1 w1 w1 w1 w1"]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    shown = [reward.explain(*pair) for pair in zip(asked, said, strict=True)]
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([one["ids"]])).logits.item() for one in shown]
    assert all(one["ids"][-1] == 2 for one in shown) and max(expected) - min(expected) > 0.01
    assert reward(asked, said) == pytest.approx(expected, abs=1e-5)
    assert [one["score"] for one in shown] == pytest.approx(expected, abs=1e-5)


def test_a_model_that_padding_changes_gets_none(tmp_path):
    """XLNet reads its summary at the last place, padding or not."""
    torch.manual_seed(0)
    config = XLNetConfig(
        vocab_size=24, d_model=16, n_layer=1, n_head=2, d_inner=16, num_labels=1, initializer_range=0.5
    )
    XLNetForSequenceClassification(config).save_pretrained(tmp_path / "m")
    tiny_tokenizer([f"w{i}" for i in range(20)]).save_pretrained(tmp_path / "m")
    reward, model = load_reward(tmp_path / "m"), AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    shown = [reward.explain(p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([one["ids"]])).logits.item() for one in shown]
    assert reward(PROMPTS, RESPONSES) == pytest.approx(expected, abs=1e-5)


def test_half_precision_is_asked_for_and_says_how_much_scores_move(tmp_path, caplog):
    folder = decoder(tmp_path / "m", dtype=torch.bfloat16)
    exact = load_reward(write_card(tmp_path, name="r", model=folder))
    assert exact._model.dtype == torch.float32 and not caplog.text
    one_by_one = [exact([p], [r])[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert exact(PROMPTS, RESPONSES) == pytest.approx(one_by_one, abs=1e-6)
    half = load_reward(write_card(tmp_path, name="r", model=folder, dtype="bfloat16"))
    assert half._model.dtype == torch.bfloat16
    assert "in bfloat16 its logits move with their batch, by" in caplog.text


@pytest.mark.parametrize(("label", "score"), [("'yes'", 0), ("'no'", 1), ("1", 1), ("'1'", 2)])
def test_labels_are_texts_and_places_numbers(tmp_path, label, score):
    folder = tiny_classifier(tmp_path / "m", "electra", labels=3)
    config = json.loads((folder / "config.json").read_text())
    names = {"0": "yes", "1": "no", "2": "1"}
    (folder / "config.json").write_text(
        json.dumps(config | {"id2label": names, "label2id": {v: int(k) for k, v in names.items()}})
    )
    found = load_reward(write_card(tmp_path, name="r", model=folder, logit=label)).explain("w1", "w2")
    assert found["score"] == pytest.approx([*found["logits"].values()][score])


def test_a_label_that_two_logits_have_is_refused(tmp_path):
    folder = tiny_classifier(tmp_path / "m", "electra", labels=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"id2label": {"0": "good", "1": "good"}, "label2id": {"good": 0}})
    )
    with pytest.raises(rsoups.RewardError, match="2 times the logit 'good'"):
        load_reward(write_card(tmp_path, name="r", model=folder, logit="good"))


@pytest.mark.parametrize("kind", ["llama", "deberta"])
def test_an_adapter_of_a_classifier_is_a_reward(tmp_path, kind):
    """As PEFT loads and merges it, its head included; without one the base's own counts."""
    base = decoder(tmp_path / "base") if kind == "llama" else tiny_classifier(tmp_path / "base", "deberta")
    targets = ["q_proj", "v_proj"] if kind == "llama" else ["query_proj"]
    lora = LoraConfig(r=2, lora_alpha=8, target_modules=targets, task_type="SEQ_CLS")
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), lora)
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        parameter.data = torch.randn(parameter.shape) * 0.3
    model.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(tmp_path / "adapter")

    reward = load_reward(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base), tmp_path / "adapter"
    ).double()
    with torch.no_grad():
        expected = [
            loaded(**tokenizer(question_of(p), r, return_tensors="pt")).logits.item()
            for p, r in zip(PROMPTS, RESPONSES, strict=True)
        ]
    assert reward(PROMPTS, RESPONSES) == pytest.approx(expected, abs=1e-5) and max(expected) - min(expected) > 0.01
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(rsoups.RewardError, match="adapter_model"):
        load_reward(tmp_path / "adapter")


def test_a_model_without_a_trained_head_is_refused():
    with pytest.raises(rsoups.RewardError, match="holds no trained score.weight, so its scores would be random"):
        Reward(RewardCard(name="r", model="rsoups/tiny-llama"))


def test_a_label_that_is_not_there_lists_those_that_are(model, tmp_path):
    with pytest.raises(rsoups.RewardError, match=r"no logit 'Faithful'.*LABEL_1"):
        load_reward(write_card(tmp_path, name="r", model=model, logit="Faithful"))


def test_a_classifiers_folder_is_a_reward(tmp_path):
    folder = tiny_classifier(tmp_path / "judge", "electra")
    reward = load_reward(folder)
    assert reward.name == "judge"
    assert reward(["w1 w2"], ["w3"]) == pytest.approx([alone(folder, "w1 w2", "w3")[0].item()], abs=1e-5)
