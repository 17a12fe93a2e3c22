"""Reward cards and rewards, against one-by-one scoring with transformers alone."""

import json
import logging
import math
from dataclasses import fields

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_classifier, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    XLNetConfig,
    XLNetForSequenceClassification,
)

import rsoups
from rsoups import RewardCard, load_reward
from rsoups.common.assets import shipped
from rsoups.data.prompts import question_of
from rsoups.rewards.classifier import Reward
from rsoups.rewards.functions import FunctionCard, FunctionReward
from rsoups.rewards.inputs import encode_texts
from rsoups.rewards.interface import check_columns, check_scores
from rsoups.rewards.judge import JudgeCard, JudgeSettings
from rsoups.rewards.load import cards, read_card
from rsoups.training.trl_rewards import PLACE, reward_function

PROMPTS = [f"### Instruction: w1 w2 ### Input: {' w3' * (i % 4 + 1)} ### Response: " for i in range(12)]
RESPONSES = [" ".join(f"w{(i * 7 + j) % 20}" for j in range(1 + i % 9)) for i in range(12)]


@pytest.fixture(params=["deberta", "electra", "gpt2"])
def model(request, tmp_path):
    return tiny_classifier(tmp_path / request.param, request.param, labels=2)


def write_card(tmp_path, **fields):
    path = tmp_path / "card.yaml"
    path.write_text("\n".join(f"{key}: {value}" for key, value in fields.items()))
    return path


def alone(folder, first, second):
    """The logits of one pair, without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    inputs = tokenizer(first, second, return_tensors="pt")
    if model.config.pad_token_id is None:  # GPT-2 looks for the last real token by its pad token
        model.config.pad_token_id = tokenizer.eos_token_id
    with torch.no_grad():
        return model(**inputs).logits[0].double()


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


def test_a_long_question_loses_its_end_and_never_the_response(tmp_path):
    folder = tiny_classifier(tmp_path / "m", "electra")
    reward = load_reward(write_card(tmp_path, name="r", model=folder, max_length=12))
    (encoded,) = reward.encode(["w1 " * 40], ["w2 w3 w4"])
    assert len(encoded["input_ids"]) == 12
    assert encoded["input_ids"][-4:-1] == [6, 7, 8]


@pytest.mark.parametrize("kind", ["pair", "reversed_pair", '"{question} {response}"', '"{response} {question}"'])
def test_the_side_of_a_long_question_that_is_lost_is_the_cards(tmp_path, kind):
    folder = tiny_classifier(tmp_path / "m", "electra")
    for cut, kept in (("end", ["w0", "w1"]), ("start", ["w8", "w9"])):
        reward = load_reward(write_card(tmp_path, name="r", model=folder, input=kind, max_length=8, cut=cut))
        (encoded,) = reward.encode([" ".join(f"w{i}" for i in range(10))], ["w17 w18 w19"])
        read = reward._tokenizer.decode(encoded["input_ids"]).replace("<s>", "").replace("</s>", "").split()
        assert len(encoded["input_ids"]) == 8 and [w for w in read if w in ("w17", "w18", "w19")] == [
            "w17",
            "w18",
            "w19",
        ]
        assert [w for w in read if len(w) == 2][:: -1 if cut == "start" else 1][:2] == kept[
            :: -1 if cut == "start" else 1
        ]
        assert reward._tokenizer.truncation_side == "right"


def test_a_model_is_loaded_in_the_cards_precision(tmp_path):
    folder = tiny_classifier(tmp_path / "m", "electra")
    exact = load_reward(write_card(tmp_path, name="r", model=folder))(PROMPTS, RESPONSES)
    half = load_reward(write_card(tmp_path, name="r", model=folder, dtype="bfloat16"))
    assert half._model.dtype == torch.bfloat16
    scores = half(PROMPTS, RESPONSES)
    assert scores != exact and scores == pytest.approx(exact, abs=0.1)


def test_one_text_made_by_a_template_is_what_the_model_reads(tmp_path):
    """gpt2_reward_summarization's recipe: the response, the bos token and the post, in one string."""
    folder = tiny_classifier(tmp_path / "m", "gpt2")
    card = write_card(tmp_path, name="r", model=folder, input='"{response} {bos} {question}"', max_length=9)
    reward = load_reward(card)
    prompt = "### Instruction: w9 ### Input: w1 {response} w2 ### Response: "  # a field's name in a text is text
    (encoded,) = reward.encode([prompt], ["w3 w4"])
    assert encoded["input_ids"] == [7, 8, 1, 5, 3, 6]
    long = "### Instruction: w9 ### Input: " + "w1 w2 " * 9 + "### Response: "
    (encoded,) = reward.encode([long], ["w3 w4"])
    assert encoded["input_ids"] == [7, 8, 1, 5, 6, 5, 6, 5, 6]
    expected = alone(folder, "w3 w4 <s> w1 w2 w1 w2 w1 w2", None)[0].item()
    assert reward([long], ["w3 w4"]) == pytest.approx([expected], abs=1e-5)
    assert reward([long, prompt], ["w3 w4", "w5"])[0] == pytest.approx(expected, abs=1e-5)


def test_questions_and_responses_are_prepared_as_the_card_says(tmp_path):
    folder = tiny_classifier(tmp_path / "m", "electra")
    chat = {"question": '"w0 {question} w19"', "response": "first_sentence"}
    (encoded,) = load_reward(write_card(tmp_path, name="r", model=folder, **chat)).encode(["w1"], ["w2. w3"])
    assert encoded["input_ids"] == [1, 4, 5, 23, 2, 3, 2]  # "w2." is no word of this tokenizer
    humor = {"input": '"{response}"'}
    (encoded,) = load_reward(write_card(tmp_path, name="r", model=folder, **humor)).encode(["w1"], ["w2 w3"])
    assert encoded["input_ids"] == [1, 6, 7, 2]


@pytest.mark.parametrize(
    ("kind", "short", "long"),
    [
        ("pair", [1, 5, 6, 2, 7, 2], [1, 2, *range(4, 11), 2]),
        ("reversed_pair", [1, 7, 2, 5, 6, 2], [1, *range(4, 12), 2]),
        ('"{question} {response}"', [1, 5, 6, 7, 2], [1, *range(4, 13)]),  # of one text the end token is lost too
    ],
)
def test_a_response_that_leaves_no_room_keeps_its_beginning(tmp_path, caplog, kind, short, long):
    folder = tiny_classifier(tmp_path / "m", "electra")
    reward = load_reward(write_card(tmp_path, name="r", model=folder, input=kind, max_length=10))
    asked, said = ["w1 w2", "w1 w2"], ["w3", " ".join(f"w{i}" for i in range(20))]
    assert [one["input_ids"] for one in reward.encode(asked[:1], said[:1])] == [short] and not caplog.text
    assert [one["input_ids"] for one in reward.encode(asked, said)] == [short, long]
    assert "fills all 10 tokens" in caplog.text


def test_a_response_that_fills_the_room_to_its_last_token_is_said_to(tmp_path, caplog):
    folder = tiny_classifier(tmp_path / "m", "electra")
    reward = load_reward(write_card(tmp_path, name="r", model=folder, max_length=8))
    for words, warned in ((4, False), (5, True)):  # 8 less three special tokens
        reward.encode(["w1 w2"], [" ".join(["w3"] * words)])
        assert ("its end is not seen" in caplog.text) == warned


def test_a_text_that_ends_with_end_of_text_is_scored_at_its_end(tmp_path, caplog):
    """GPT-2 has no pad token and looks for the last token that is not one: end-of-text must not stand in for it."""
    caplog.set_level(logging.INFO)
    folder = tiny_classifier(tmp_path / "m", "gpt2")
    reward = load_reward(write_card(tmp_path, name="r", model=folder, input='"{response} {sep} {eos}"'))
    assert "no pad token" in caplog.text and "no separator token" in caplog.text
    responses = ["w1", "w2 w3 w4 w5", "w1 w2", ""]
    tokenizer, model = (c.from_pretrained(folder) for c in (AutoTokenizer, AutoModelForSequenceClassification))
    assert tokenizer.pad_token is None and model.config.pad_token_id is None
    with torch.no_grad():
        rows = [torch.tensor([tokenizer(response)["input_ids"] + [2]]) for response in responses]
        expected = [model(row).logits[0, 0].item() for row in rows]  # alone and without a pad token: at the last one
    assert reward(["w9"] * 4, responses) == pytest.approx(expected, abs=1e-5)
    for response, score in zip(responses, expected, strict=True):
        assert reward.explain("w9", response)["logits"]["LABEL_0"] == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "electra", "deberta"])
@pytest.mark.parametrize("input", ["pair", "reversed_pair", '"{response}"'])
def test_an_empty_response_has_a_score(tmp_path, kind, input):
    folder = tiny_classifier(tmp_path / "m", kind)
    reward = load_reward(write_card(tmp_path, name="r", model=folder, input=input))
    empty, said = reward(["w1"] * 2, ["", "w2 w3"])
    assert math.isfinite(empty) and empty != said and reward(["w1"], [""]) == pytest.approx([empty], abs=1e-5)


def test_a_question_that_ends_in_a_character_of_several_tokens_is_cut(tmp_path):
    vocabulary = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    for cut in ("end", "start"):
        for question in ("ab\U0001f600", "\U0001f600ab", "\U0001f600\U0001f600"):
            for longest in range(1, 12):
                (one,) = encode_texts(fast, "{question}{response}", [question], ["c"], longest, cut)
                assert len(one["input_ids"]) <= longest and one["input_ids"][-1] == vocabulary["c"]


def test_code_that_comes_with_a_model_runs_on_leave_only(tmp_path, monkeypatch):
    """A folder whose config names Python code of its own, which leaves a mark when it runs."""
    folder = tiny_classifier(tmp_path / "m", "electra")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
    mark = tmp_path / "ran"
    (folder / "own.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import ElectraConfig, ElectraForSequenceClassification\n"
        "class OwnConfig(ElectraConfig):\n    model_type = 'own'\n"
        "class OwnModel(ElectraForSequenceClassification):\n    config_class = OwnConfig\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    card = write_card(tmp_path, name="r", model=folder)
    for source in (card, folder):
        with pytest.raises(rsoups.RewardError, match="brings Python code of its own.*trust_remote_code"):
            load_reward(source)
    assert not mark.exists()
    assert len(load_reward(card, trust_remote_code=True)(["w1"], ["w2"])) == 1 and mark.exists()
    selfish = write_card(tmp_path, name="r", model=folder, trust_remote_code="true")  # no card gives itself leave
    with pytest.raises(rsoups.RewardError, match=r"unknown field\(s\) \['trust_remote_code'\]"):
        load_reward(selfish)


def test_conversations_are_scored_by_their_last_question_and_answer():
    seen = []

    def score(prompts, responses):
        seen.extend((question_of(p), r) for p, r in zip(prompts, responses, strict=True))
        return [0.0] * len(responses)

    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
    ]
    answer = [{"role": "assistant", "content": " 2 "}]
    reward_function(score, str.strip)([messages], [answer], completion_ids=[[1]])
    assert seen == [("Two?", "2")]


def test_a_response_that_the_prompt_began_is_scored_whole():
    seen = []
    tokenizer = tiny_tokenizer([*(f"w{i}" for i in range(9)), "###", "Instruction:", "Response:"])

    def score(prompts, responses):
        seen.extend(responses)
        return [0.0] * len(responses)

    prompts = ["### Instruction: w1 ### Response: w2 w3", "### Instruction: w1 ### Response: "]
    ids = [tokenizer("w4 w5")["input_ids"] + [2], tokenizer("w6")["input_ids"]]
    reward_function(score, str.upper, tokenizer)(prompts, ["w4 w5", "w6"], completion_ids=ids)
    reward_function(score, str.upper)(prompts, ["w4 w5", "w6"])
    assert seen == ["W2 W3 W4 W5", "W6"] * 2


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


def test_a_pickled_reward_is_never_opened(tmp_path):
    folder = tiny_classifier(tmp_path / "m", "electra")

    class Bomb:
        def __reduce__(self):
            return ((tmp_path / "opened").touch, ())

    (folder / "model.safetensors").unlink()
    torch.save(Bomb(), folder / "pytorch_model.bin")
    with pytest.raises(rsoups.RewardError, match="rsoups convert"):
        load_reward(write_card(tmp_path, name="r", model=folder))
    assert not (tmp_path / "opened").exists()


BAD_CARDS = [
    *(
        (f"name: x\nmodel: y\nlogit: {text}", "field logit is (True|False): YAML reads yes")
        for text in ("yes", "no", "On", "false")
    ),
    ("name: x\nmodel: y\nminus: no", "minus is False: YAML reads yes"),
    ("name: no\nmodel: y", "name is False: YAML reads yes"),
    ("name: 7\nmodel: y", "field name is 7: it must be a text: put it in quotes"),
    ("name: x\nmodels: [a, yes]\naverage: scores", "field models.1 is True: YAML reads yes"),
    ("name: x\nmodel: y\nlogit: 1.0", "field logit is 1.0: it must be a text"),
    ("name: x\nfunction: length\nsign: yes", "field sign is True: input should be an integer"),
    (
        "name: x\nfunction: length\narguments: {target: yes}",
        "target is True, must be a number",
    ),
    ("name: x\nfunction: valid_json\narguments: {keys: [no]}", "must be a list of texts"),
    ("name: x\nmodel: y\ninput: '{response} {nothing}'", r"no field \['nothing'\]"),
    ("name: x\nmodel: y\nquestion: '{response}'", r"no field \['response'\]"),
    ("name: x\nmodel: y\nresponse: last", "response is 'last'"),
    ("[1, 2]", "mapping"),
    ("model: x", "field name is missing"),
    ("name: x", "names either its model, or models"),
    ("name: x\nmodel: y\nmodels: [a, b]\naverage: weights", "names either its model, or models"),
    ("name: x\nmodel: y\naverage: weights", "average and lambdas go with models"),
    ("name: x\nmodels: [a]\naverage: weights", r"field models is \['a'\]: value should have at least 2 items"),
    ("name: x\nmodels: a\naverage: weights", "field models is 'a': input should be a valid array"),
    ("name: x\nmodels: [a, b]", "average is None"),
    ("name: x\nmodels: [a, b]\naverage: scores\nrevision: main", "write each as id@revision"),
    ("name: x\nmodel: y\ncut: middle", "cut is 'middle'"),
    ("name: x\nmodel: y\ndtype: int8", "dtype is 'int8'"),
    ("name: x\nmodel: y\nmax_length: 0", "max_length is 0"),
    ("name: x\nmodel: y\ntemplate: z", r"unknown field\(s\) \['template'\]"),
    ("name: x\nmodel: y\ninput: triple", "input is 'triple'"),
    ("name: x\nmodel: y\nsign: 2", "sign is 2"),
    ("name: x\nmodel: y\nstd: 0", "std is 0"),
    ("name: x\nmodel: y\nmean: .nan", "mean is nan"),
    ("name: [", "not YAML"),
    ("name: x\nmodel: rsoups/nothing", "no embedded asset"),
    ("model: x", "field name is missing"),
    ("name: x\nmodel: y\nfunction: length", r"unknown field\(s\) \['model'\]"),
    ("name: x\nmodel: y\narguments: {target: 3}", r"unknown field\(s\) \['arguments'\]"),
    ("name: x\nfunction: length\narguments: 3", "field arguments is 3: input should be an object"),
    ("name: x\nfunction: length\narguments: {words: 3}", r"length: .*'target'"),
    ("name: x\nfunction: length\nsign: 0", "sign is 0"),
    ("name: x\nfunction: length\nstd: -1", "std is -1"),
    *(
        (
            f"name: x\nfunction: '{function}'",
            "must be one of .*'length'.*write no card: pass module:function",
        )
        for function in (
            "os:system",
            "rsoups.cli.main:main",
            "rsoups.rewards.text_metrics:library",  # imports what it is told to
            "rsoups.rewards.text_metrics:read_jsonl",
            "rsoups.rewards.text_checks:__builtins__",
            "text_checks:length",
            "re:compile",
            "rsoups.rewards.text_checks",
        )
    ),
]


@pytest.mark.parametrize(("text", "words"), BAD_CARDS)
def test_bad_cards_are_refused(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(rsoups.RsoupsError, match=words):
        load_reward(path)


def test_a_label_that_is_not_there_lists_those_that_are(model, tmp_path):
    with pytest.raises(rsoups.RewardError, match=r"no logit 'Faithful'.*LABEL_1"):
        load_reward(write_card(tmp_path, name="r", model=model, logit="Faithful"))


def test_an_unknown_reward_lists_the_shipped_ones():
    with pytest.raises(rsoups.RewardError, match="deberta-v3-large-v2"):
        load_reward("no-such-reward")


@pytest.mark.parametrize("name", sorted(cards()))
def test_shipped_cards_are_valid(name):
    card = read_card(cards()[name])
    assert card.name == name
    if isinstance(card, RewardCard):
        assert card.model.count("/") == 1


@pytest.mark.parametrize("kind", [RewardCard, FunctionCard, JudgeCard, JudgeSettings])
def test_the_schema_is_documented(kind):
    text = (shipped("rewards") / "README.md").read_text("utf-8")
    assert not [field.name for field in fields(kind) if f"`{field.name}`" not in text]


@pytest.mark.parametrize("scores", [[1.0], [1.0, 2.0, 3.0], [1.0, math.nan], [math.inf, 1.0]])
def test_scores_that_would_poison_a_run_are_refused(scores):
    with pytest.raises(rsoups.RewardError, match="reward 'r' returned"):
        check_scores("r", scores, ["p", "q"], ["a", "b"])


def test_functions_are_rewards(tmp_path, monkeypatch):
    def plain(prompts, responses):
        return [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]

    def trls(prompts, completions, references, **kwargs):
        assert kwargs == {"other": [2]}
        return [float(c in r) for c, r in zip(completions, references, strict=True)]

    assert load_reward(plain)(["ab"], ["c"], references=[["x"]]) == [3.0]
    assert load_reward(trls)(["p"], ["c"], references=[["c"]], other=[2]) == [1.0]
    (tmp_path / "my_rewards.py").write_text("def short(prompts, responses): return [-len(r) for r in responses]\nx = 1")
    monkeypatch.chdir(tmp_path)
    reward = load_reward("my_rewards:short")
    assert reward(["p"], ["four"]) == [-4.0] and reward.name == "short"
    for source, words in (
        ("my_rewards:tall", "no reward function"),
        ("my_rewards:x", "is int, not a function"),
        ("no_such:f", "no_such"),
    ):
        with pytest.raises(rsoups.RewardError, match=words):
            load_reward(source)
    with pytest.raises(rsoups.RewardError, match=r"'bad' returned 1 scores for 2 responses"):
        FunctionReward(lambda prompts, responses: [1.0], "bad")(["p"] * 2, ["r"] * 2)
    with pytest.raises(rsoups.RewardError, match="'nan' returned nan"):
        FunctionReward(lambda prompts, responses: [math.nan], "nan")(["p"], ["r"])


def test_a_functions_card_scales_as_a_models_does(tmp_path):
    fields = {
        "function": "length",
        "arguments": "{target: 4}",
        "mean": 0.25,
        "std": 0.5,
        "sign": -1,
    }
    reward = load_reward(write_card(tmp_path, name="short", **fields))
    assert reward(["p"] * 2, ["a b", "a b c d"]) == [(0.5 - 0.25) / 0.5, (0 - 0.25) / 0.5]
    assert reward.name == reward.__name__ == "short"
    assert load_reward(tmp_path / "card.yaml", target=2)(["p"], ["a b"]) == [-0.5]


def test_the_columns_of_a_function_are_those_that_it_names():
    def trls(prompts, completions, completion_ids, answer, trainer_state=None, hint=None, **columns):
        assert (answer, hint, columns) == (["a"], ["h"], {"other": [1]})
        return [1.0]

    reward = load_reward(trls)
    assert (reward.columns, reward.needs) == (("answer", "hint"), ("answer",))
    assert reward(["p"], ["r"], completion_ids=[[1]], answer=["a"], hint=["h"], other=[1]) == [1]
    with pytest.raises(rsoups.RewardError, match=r"'trls' needs the column\(s\) \['answer'\]"):
        reward(["p"], ["r"], completion_ids=[[1]])
    assert load_reward(lambda prompts, responses, answer: [0.0]).needs == ("answer",)
    assert load_reward(lambda texts, answers: [0.0]).columns == ()


def test_data_without_a_needed_column_is_refused_with_its_name():
    rewards = [load_reward("meteor"), load_reward("keywords"), load_reward(len_of_zero)]
    check_columns(rewards, {"prompt": ["p"] * 2, "references": [["r"]] * 2, "number": [0, 0]})
    for columns, words in (
        ({"prompt": ["p"]}, r"'meteor' needs a column 'references', the dataset gives \['prompt'\]"),
        (
            {"prompt": ["p"] * 3, "references": [["r"], [], None]},
            "'meteor' needs 'references' of every row: 2 of 3 have none",
        ),
        ({"prompt": ["p"], "references": [["r"]]}, "'len_of_zero' needs a column 'number'"),
    ):
        with pytest.raises(rsoups.RewardError, match=words):
            check_columns(rewards, columns)


def len_of_zero(prompts, completions, number):
    return number


def test_a_function_of_ones_own_gets_what_a_row_has_and_a_card_needs_a_value():
    rewards = [load_reward(len_of_zero)]
    check_columns(rewards, {"prompt": ["p"] * 3, "number": [None, "", {"x": 1}]})
    with pytest.raises(rsoups.RewardError, match="'len_of_zero' needs a column 'number'"):
        check_columns(rewards, {"prompt": ["p"] * 2, "number": [None, None]})


def test_rewards_get_columns_as_the_rows_have_them():
    """By place: a column of the dataset itself would have gone through Arrow, which makes all of one type."""
    seen = []

    def score(prompts, responses, spec, answer):
        seen.extend(zip(spec, answer, strict=True))
        return [0.0] * len(responses)

    columns = {"spec": [{"a": 1}, {"b": "2"}, None], "answer": [1, 0.5, "1"]}
    reward_function(score, str.strip, data=columns)(["p"] * 4, ["r"] * 4, **{PLACE: [2, 0, 1, 1], "other": [1] * 4})
    assert seen == [(None, "1"), ({"a": 1}, 1), ({"b": "2"}, 0.5), ({"b": "2"}, 0.5)]
    assert [type(answer) for _, answer in seen] == [str, int, float, float]


def test_a_reward_may_have_no_opinion():
    def some(prompts, responses):
        return [None, 2]

    assert load_reward(some)(["p"] * 2, ["a", "b"]) == [None, 2.0]
    with pytest.raises(rsoups.RewardError, match="returned nan for prompt 'p', response 'b'"):
        check_scores("r", [None, math.nan], ["p"] * 2, ["a", "b"])


def test_an_empty_question_is_refused_where_it_is_read(tmp_path):
    folder = tiny_classifier(tmp_path / "m", "electra")
    with pytest.raises(rsoups.DatasetError, match="asks nothing"):
        load_reward(write_card(tmp_path, name="r", model=folder))([" "], ["w1"])
    assert len(load_reward(write_card(tmp_path, name="r", model=folder, input='"{response}"'))([""], ["w1"])) == 1


def test_a_classifiers_folder_is_a_reward(tmp_path):
    folder = tiny_classifier(tmp_path / "judge", "electra")
    reward = load_reward(folder)
    assert reward.name == "judge"
    assert reward(["w1 w2"], ["w3"]) == pytest.approx([alone(folder, "w1 w2", "w3")[0].item()], abs=1e-5)


def test_trl_sees_a_named_function_of_cut_responses():
    seen = []

    def score(prompts, responses):
        seen.extend(responses)
        return [1.0] * len(responses)

    function = reward_function(score, str.strip)
    assert function(["p"], ["  x "], extra=[1]) == [1.0]
    assert seen == ["x"] and function.__name__ == "score"
