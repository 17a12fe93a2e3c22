"""Reward models that read a chat: the model's own template over the conversation and the response, special tokens once."""

from dataclasses import dataclass, replace

import pytest
import torch
from classifier_cards import write_card
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_classifier, tiny_llama
from tokenizers import processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from rsoups import Reward, RewardError, load_reward
from rsoups.rewards.load import cards, read_card

# Templates of the shape of four families, over the words of the tiny tokenizer. w10 to w19 stand for their own marks.
FAMILIES = {
    # Qwen3: an empty thought before the last answer; no token that begins a text.
    "qwen": "{% for m in messages %}w10 {{ m.role }} {% if loop.last %}w12 w13 {% endif %}{{ m.content }} w11 {% endfor %}",
    # Llama 3: begins a text once; every turn has a header.
    "llama": "{{ bos_token }} {% for m in messages %}w14 {{ m.role }} w15 {{ m.content }} w16 {% endfor %}",
    # Gemma: the assistant is called model; no system turn.
    "gemma": "{{ bos_token }} "
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}w17 {{ 'model' if m.role == 'assistant' else m.role }} {{ m.content }} w18 {% endfor %}",
    # Mistral: the system message is written before the first question; answers end with the token that ends a text.
    "mistral": "{{ bos_token }} {% set start = messages[0].content + ' ' if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}w19 {{ start if loop.index0 < 2 }}{{ m.content }} w19 "
    "{% elif m.role == 'assistant' %}{{ m.content }} {{ eos_token }} {% endif %}{% endfor %}",
}
SYSTEM, QUESTION, ANSWER = ({"role": "system", "content": "w1"}, {"role": "user", "content": "w2 w3"}, "w4 w5")
# What the family's reward model reads of system message, question and answer. Roles are unknown words to the tokenizer.
GOLDEN = {
    ("qwen", True): "w10 <unk> w1 w11 w10 <unk> w2 w3 w11 w10 <unk> w12 w13 w4 w5 w11",
    ("qwen", False): "w10 <unk> w2 w3 w11 w10 <unk> w12 w13 w4 w5 w11",
    ("llama", True): "<s> w14 <unk> w15 w1 w16 w14 <unk> w15 w2 w3 w16 w14 <unk> w15 w4 w5 w16",
    ("llama", False): "<s> w14 <unk> w15 w2 w3 w16 w14 <unk> w15 w4 w5 w16",
    ("gemma", False): "<s> w17 <unk> w2 w3 w18 w17 <unk> w4 w5 w18",
    ("mistral", True): "<s> w19 w1 w2 w3 w19 w4 w5 </s>",
    ("mistral", False): "<s> w19 w2 w3 w19 w4 w5 </s>",
}


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    """A decoder that scores, and its tokenizer, which begins every text with <s> when it is called by itself."""
    return request.param, decoder(tmp_path / "model", FAMILIES[request.param])


def decoder(folder, template, labels=1):
    tiny_classifier(folder, "gpt2")  # for its tokenizer
    torch.manual_seed(0)
    config = tiny_llama(vocab_size=24).config
    config.num_labels, config.pad_token_id = labels, 0
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def read(reward, prompt, response=ANSWER):
    (row,) = reward.encode([prompt], [response])
    return reward._tokenizer.decode(row["input_ids"])


def test_each_family_reads_its_template_with_special_tokens_once(family, tmp_path):
    name, folder = family
    reward = load_reward(write_card(tmp_path, name="r", model=folder, input="chat"))
    assert read(reward, [QUESTION]) == GOLDEN[name, False]
    assert read(reward, "### Instruction: w2 w3 ### Response: ") == GOLDEN[name, False]
    if (name, True) in GOLDEN:
        assert read(reward, [SYSTEM, QUESTION]) == GOLDEN[name, True]
    else:
        with pytest.raises(RewardError, match=r"System role not supported.*system: drop"):
            reward([[SYSTEM, QUESTION]], [ANSWER])

    without = load_reward(write_card(tmp_path, name="r", model=folder, input="chat", system="drop"))
    assert read(without, [SYSTEM, QUESTION]) == GOLDEN[name, False]


def test_the_chat_cards_that_ship_are_of_these_families(tmp_path):
    """With a model of its family in place of the published one, each card reads what is above."""
    families = {"qwen3": "qwen", "llama": "llama", "gemma": "gemma", "mistral": "mistral"}
    shipped = {name: read_card(path) for name, path in cards().items()}
    chats = {name: card for name, card in shipped.items() if getattr(card, "input", "") == "chat"}
    assert len(chats) == 14

    for name, card in chats.items():
        (family,) = {kind for text, kind in families.items() if text in str(card.model).lower()}
        folder = decoder(tmp_path / family, FAMILIES[family])
        reward = Reward(replace(card, model=str(folder), head="logits", logit=0, dtype="float32"))
        with_system = (family, True) in GOLDEN and card.system == "keep"
        assert read(reward, [SYSTEM, QUESTION]) == GOLDEN[family, with_system], name


def test_the_score_is_the_models_own_on_those_ids(family, tmp_path):
    name, folder = family
    reward = load_reward(write_card(tmp_path, name="r", model=folder, input="chat"))
    prompts = [[QUESTION], [QUESTION, {"role": "assistant", "content": "w6"}, {"role": "user", "content": "w7 w8"}]]
    scores = reward(prompts, [ANSWER, "w9"])

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt, response, score in zip(prompts, [ANSWER, "w9"], scores, strict=True):
        text = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": response}], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            assert score == pytest.approx(model(ids).logits[0, 0].item(), abs=1e-5), name


def test_a_long_conversation_loses_its_oldest_turns_then_its_question_and_last_the_response(tmp_path):
    folder = decoder(tmp_path / "model", FAMILIES["llama"])
    turns = [SYSTEM]
    for place in range(3):
        turns += [{"role": "user", "content": f"w{place} " * 3}, {"role": "assistant", "content": "w9"}]
    turns = [*turns[:-1], {"role": "assistant", "content": "w9"}, {"role": "user", "content": "w5 w6 w7 w8"}]

    def shortened(max_length, cut="end", response=ANSWER):
        card = write_card(tmp_path, name="r", model=folder, input="chat", max_length=max_length, cut=cut)
        (row,) = load_reward(card).encode([turns], [response])
        assert len(row["input_ids"]) <= max_length
        text = AutoTokenizer.from_pretrained(folder).decode(row["input_ids"])
        return text.replace("w14 <unk> w15 ", "").replace("<s> ", "").replace(" w16", "|")

    assert shortened(60) == "w1| w0 w0 w0| w9| w1 w1 w1| w9| w2 w2 w2| w9| w5 w6 w7 w8| w4 w5|"
    assert shortened(30) == "w1| w5 w6 w7 w8| w4 w5|"
    assert shortened(18) == "w1| w5 w6| w4 w5|"
    assert shortened(18, cut="start") == "w1| w7 w8| w4 w5|"


def test_a_response_that_fills_the_input_keeps_the_tokens_that_end_it(tmp_path, caplog):
    folder = decoder(tmp_path / "model", FAMILIES["llama"])
    reward = load_reward(write_card(tmp_path, name="r", model=folder, input="chat", max_length=12))
    text = read(reward, [QUESTION], "w4 w5 w6 w7 w8 w9")
    assert text.startswith("<s> w14 <unk> w15 w16 w14 <unk> w15 w4 w5 w6") and text.endswith(" w16")
    assert "its end is not seen" in caplog.text


def test_a_conversation_that_does_not_wait_for_an_answer_is_refused(tmp_path):
    reward = load_reward(write_card(tmp_path, name="r", model=decoder(tmp_path / "m", FAMILIES["llama"]), input="chat"))
    with pytest.raises(RewardError, match="ends with a message of system"):
        reward([[QUESTION, SYSTEM]], [ANSWER])
    with pytest.raises(Exception, match="nothing to answer"):
        reward([[QUESTION, {"role": "assistant", "content": "w1"}]], [ANSWER])


def test_a_model_without_a_template_is_refused_when_it_is_loaded(tmp_path):
    folder = tiny_classifier(tmp_path / "m", "electra")
    with pytest.raises(RewardError, match=r"chat template.*input: pair"):
        load_reward(write_card(tmp_path, name="r", model=folder, input="chat"))


# --- an adapter on a base, and heads of several outputs -----------------------------------------------------------------


def test_a_card_names_a_base_and_its_adapter(tmp_path):
    base = tiny_classifier(tmp_path / "base", "electra")
    model = AutoModelForSequenceClassification.from_pretrained(base)
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["classifier"])
    adapted = get_peft_model(model, lora)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")  # without a tokenizer: the base's reads

    reward = load_reward(write_card(tmp_path, name="r", model=base, adapter=tmp_path / "adapter"))
    by_peft = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), tmp_path / "adapter")
    inputs = AutoTokenizer.from_pretrained(base)("w1", "w2 w3", return_tensors="pt")
    with torch.no_grad():
        assert reward(["w1"], ["w2 w3"]) == pytest.approx([by_peft(**inputs).logits.item()], abs=1e-5)

    other = tiny_classifier(tmp_path / "other", "deberta")
    with pytest.raises(RewardError, match="was trained on the base"):
        load_reward(write_card(tmp_path, name="r", model=other, adapter=tmp_path / "adapter"))


class TwoHeads(LlamaForSequenceClassification):
    """Its objectives are not in `logits`, as ArmoRM's are not."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        return Objectives(logits=out.logits[:, :1], rewards=out.logits * 2)


@dataclass
class Objectives(SequenceClassifierOutputWithPast):
    rewards: torch.Tensor | None = None


def test_a_card_names_one_of_several_outputs(tmp_path, monkeypatch):
    folder = decoder(tmp_path / "m", FAMILIES["llama"], labels=3)
    plain = load_reward(write_card(tmp_path, name="r", model=folder, input="chat", logit=2))([[QUESTION]], [ANSWER])
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", TwoHeads.from_pretrained)

    reward = load_reward(write_card(tmp_path, name="r", model=folder, input="chat", head="rewards", logit=2))
    assert reward([[QUESTION]], [ANSWER]) == pytest.approx([2 * plain[0]], abs=1e-5)
    for wrong in ({"head": "rewards", "logit": 3}, {"head": "gates"}):
        with pytest.raises(RewardError, match="no output"):
            load_reward(write_card(tmp_path, name="r", model=folder, input="chat", **wrong))
