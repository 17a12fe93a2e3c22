"""Each shipped card on a tiny random model of its real architecture and tokenizer class; ids and scores worked out by hand."""

import pytest
import torch
import yaml
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BartTokenizer,
    BertTokenizer,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2Tokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertTokenizer,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Tokenizer,
)

import rsoups
from rsoups.rewards.cards import RewardCard
from rsoups.rewards.load import cards, read_card

LETTERS = "abcdefgh"
BYTES = {"vocab_size": 40, "initializer_range": 0.5}
SMALL = BYTES | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def byte_level(start):
    """Vocabulary and merges for single letters with and without a space before them."""
    tokens = [
        *start,
        "Ġ",
        *LETTERS,
        *(f"Ġ{letter}" for letter in LETTERS),
        ":",
        "H",
        "u",
        "m",
        "n",
        "A",
        "s",
        "i",
        "t",
        "Ċ",
    ]
    tokens += ["ĠH"]
    return {token: i for i, token in enumerate(tokens)}, [("Ġ", letter) for letter in LETTERS] + [("Ġ", "H")]


def deberta(labels):
    vocab = [(t, 0.0) for t in ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")] + [
        (f"▁{letter}", -1.0) for letter in LETTERS
    ]
    shape = SMALL | {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "type_vocab_size": 0,
        "pad_token_id": 0,
    }
    model = DebertaV2ForSequenceClassification(DebertaV2Config(num_labels=labels, **shape))
    return DebertaV2Tokenizer(vocab=vocab), model


def wordpiece():
    return {t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS])}


def electra(labels):
    return BertTokenizer(vocab=wordpiece()), ElectraForSequenceClassification(ElectraConfig(num_labels=labels, **SMALL))


def distilbert(labels):
    shape = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "num_labels": labels}
    model = DistilBertForSequenceClassification(DistilBertConfig(**BYTES, **shape))
    return DistilBertTokenizer(vocab=wordpiece()), model


def gpt2(labels):
    vocab, merges = byte_level(["<|endoftext|>"])
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "num_labels": labels, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2ForSequenceClassification(GPT2Config(**BYTES, **shape))
    return GPT2Tokenizer(vocab=vocab, merges=merges), model  # without a pad token, as published


def bart(labels):
    vocab, merges = byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_labels": labels, "init_std": 0.5}
    shape |= {
        f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("attention_heads", 2), ("ffn_dim", 32))
    }
    tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    names = {0: "Hallucinated", 1: "Faithful"}
    config = BartConfig(vocab_size=40, id2label=names, label2id={v: k for k, v in names.items()}, **shape, **tokens)
    return BartTokenizer(vocab=vocab, merges=merges), BartForSequenceClassification(config)


# Card -> architecture, labels, ids of question "a b" and response "c", the score made of the logits, as its model card says.
# DeBERTa: [CLS] a b [SEP] c [SEP], letters from 5. ELECTRA: [CLS] is 2, [SEP] 3. GPT-2: "c" + " " + bos + " " + "a b", letters
# from 2, with a space from 10. BART: <s> c </s></s> a b </s>, letters from 6, with a space from 14.
FIRST = lambda logits: logits[0]  # noqa: E731
GOLDEN = {
    "deberta-v3-large-v2": (deberta, 1, [1, 5, 6, 2, 7, 2], FIRST),
    "deberta-v3-base": (deberta, 1, [1, 5, 6, 2, 7, 2], FIRST),
    "deberta-v3-base-v2": (deberta, 1, [1, 5, 6, 2, 7, 2], FIRST),
    "electra-large": (electra, 1, [2, 5, 6, 3, 7, 3], FIRST),
    "gpt2-summarization": (gpt2, 1, [4, 1, 0, 10, 11], FIRST),
    "bart-faithful": (bart, 2, [0, 8, 2, 2, 6, 15, 2], lambda logits: logits[1] - logits[0]),
    "harmless": (gpt2, 1, None, FIRST),
    "helpful": (gpt2, 1, None, FIRST),
    "humor": (distilbert, 2, [2, 7, 3], lambda logits: logits[1]),
}
QUESTION, RESPONSE = "a b", "c"
PROMPT = "### Instruction: Do it. ### Input: a b ### Response: "


def card_of(name, folder, tmp_path):
    fields = yaml.safe_load(cards()[name].read_text("utf-8")) | {"model": str(folder)}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.fixture
def made(request, tmp_path):
    """The card's reward on a tiny model, the model, and the tokenizer."""
    name = request.param
    torch.manual_seed(0)
    tokenizer, model = GOLDEN[name][0](GOLDEN[name][1])
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return name, rsoups.load_reward(card_of(name, tmp_path / "model", tmp_path)), model.eval(), tokenizer


def by_hand(name, tokenizer, question, response):
    """The ids that the model card's recipe gives, from the vocabulary alone."""
    vocab = tokenizer.get_vocab()
    letters = lambda text: [vocab[c if i == 0 else f"Ġ{c}"] for i, c in enumerate(text.split())]  # noqa: E731
    if name in ("harmless", "helpful"):  # "\n\nHuman: a b \n\nAssistant:" and the answer, one after the other
        pieces = ["Ċ", "Ċ", "H", "u", "m", "a", "n", ":", *(f"Ġ{c}" for c in question.split()), "Ġ", "Ċ", "Ċ"]
        return [vocab[p] for p in [*pieces, "A", "s", "s", "i", "s", "t", "a", "n", "t", ":"]] + letters(response)
    if name == "gpt2-summarization":
        return letters(response) + [vocab["Ġ"], 0] + [vocab[f"Ġ{c}"] for c in question.split()]
    if name == "bart-faithful":
        return [0, *letters(response), 2, 2, *letters(question), 2]
    plain = lambda text: [vocab.get(f"▁{c}", vocab.get(c)) for c in text.split()]  # noqa: E731
    first, last = vocab["[CLS]"], vocab["[SEP]"]
    return [first, *(plain(question) + [last] if name != "humor" else []), *plain(response), last]


def test_every_card_of_the_paper_is_here():
    shipped = {name: read_card(path) for name, path in cards().items()}
    models = {name for name, card in shipped.items() if isinstance(card, RewardCard) and card.input != "chat"}
    assert set(GOLDEN) | {"naturalness", "coverage", "rating"} == models


@pytest.mark.parametrize("made", GOLDEN, indirect=True)
def test_ids_and_scores_are_those_of_the_model_card(made):
    name, reward, model, tokenizer = made
    _, _, ids, score = GOLDEN[name]
    (encoded,) = reward.encode([PROMPT], [RESPONSE])
    assert encoded["input_ids"] == by_hand(name, tokenizer, QUESTION, RESPONSE)
    assert ids is None or encoded["input_ids"] == ids
    kinds = encoded.get("token_type_ids")
    assert kinds in (None, [0] * len(encoded["input_ids"])) or kinds == [0, 0, 0, 0, 1, 1]
    with torch.no_grad():
        inputs = {key: torch.tensor([value]) for key, value in encoded.items()}
        expected = float(score(model(**inputs).logits[0]))
    assert reward([PROMPT], [RESPONSE]) == pytest.approx([expected], abs=1e-5)


@pytest.mark.parametrize("made", GOLDEN, indirect=True)
def test_batches_score_as_each_sample_alone_and_both_texts_count(made):
    name, reward, model, tokenizer = made
    questions = ["a", "a b c d e f g", "h g", "c d e", "a b c d e f g h a b c d"]
    responses = ["b c", "d", "e f g h a b c", "a", "h h h"]
    expected = []
    for question, response in zip(questions, responses, strict=True):
        ids = torch.tensor([by_hand(name, tokenizer, question, response)])
        kinds = {}
        if name == "electra-large":
            end = question.count(" ") + 3
            kinds["token_type_ids"] = torch.tensor([[0] * end + [1] * (ids.shape[1] - end)])
        with torch.no_grad():
            expected.append(float(GOLDEN[name][3](model(input_ids=ids, **kinds).logits[0])))
    assert reward(questions, responses) == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == len(expected)
    one, other = reward(["a b", "c d"], ["e", "e"])
    assert (one == other) == (name == "humor"), "the question must count, but for humour"
    assert reward(["a b"], ["f"]) != reward(["a b"], ["g"])


@pytest.mark.parametrize("made", GOLDEN, indirect=True)
def test_long_inputs_keep_the_response(made):
    name, reward, _, tokenizer = made
    long = reward.card.max_length
    (encoded,) = reward.encode([" ".join("a b c d".split() * long)], ["e f g h"])
    assert len(encoded["input_ids"]) <= long
    if name != "humor":
        assert len(encoded["input_ids"]) == long
    assert "efgh" in tokenizer.decode(encoded["input_ids"]).replace(" ", "")
