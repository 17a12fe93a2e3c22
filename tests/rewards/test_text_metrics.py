"""Statistical rewards, against the libraries' corpus tools and by hand."""

import json
import math
import sys
from collections import Counter

import pytest
import sacrebleu
from pycocoevalcap.cider.cider import Cider
from rouge_score.rouge_scorer import RougeScorer

import rsoups
from rsoups import load_reward
from rsoups.rewards.text_metrics import words

SAID = [
    "a dog runs in the park.",
    "The boy, who swims, is happy",
    "a man rides a bike down the street near a man",
    "sea",
    "two dogs are running quickly",
    "",
]
REFERENCES = [
    ["A dog is running in a park.", "the dog runs through the park"],
    ["a boy swims in the lake", "A happy boy is swimming.", "the boy who swims is very happy"],
    ["a man is riding his bike down a street"],
    ["The sea is calm today.", "a boat on the sea"],
    ["two dogs run quickly on the grass"],
    ["nobody says nothing"],
]
PROMPTS = [f"prompt {i}" for i in range(len(SAID))]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"references": group}) + "\n" for group in REFERENCES))
    return str(path)


def loaded(name, corpus):
    return load_reward(name, **({"corpus": corpus} if name == "cider" else {}))


@pytest.mark.parametrize(("name", "order"), [("bleu-1", 1), ("bleu-4", 4)])
def test_bleu_is_sacrebleus_of_a_corpus_of_one_sentence(name, order):
    corpus_bleu = sacrebleu.BLEU(lowercase=True, max_ngram_order=order, effective_order=True).corpus_score
    expected = [
        corpus_bleu([text], [[ref] for ref in group]).score / 100 for text, group in zip(SAID, REFERENCES, strict=True)
    ]
    scores = load_reward(name)(PROMPTS, SAID, references=REFERENCES)
    assert scores == pytest.approx(expected, abs=1e-12)
    if order == 4:
        sentences = [sacrebleu.sentence_bleu(*pair, lowercase=True) for pair in zip(SAID, REFERENCES, strict=True)]
        assert scores == pytest.approx([found.score / 100 for found in sentences], abs=1e-12)


def test_bleu_1_by_hand():
    """Clipped counts over the response's length, with the brevity penalty."""
    reward = load_reward("bleu-1")
    assert reward(["p"], ["the the the the"], references=[["the cat is the one"]]) == pytest.approx(
        [2 / 4 * math.exp(-1 / 4)]
    )
    assert reward(["p"], ["A dog runs"], references=[["the dog runs home"]]) == pytest.approx(
        [2 / 3 * math.exp(-1 / 3)]
    )


def common(a, b):
    """Length of the longest common subsequence, as its definition says."""
    if not a or not b:
        return 0
    return 1 + common(a[1:], b[1:]) if a[0] == b[0] else max(common(a[1:], b), common(a, b[1:]))


def test_rouge_l_is_rouge_scores_and_the_longest_common_subsequence():
    scorer = RougeScorer(["rougeL"])
    found = {
        name: load_reward(f"rouge-l{name}")(PROMPTS, SAID, references=REFERENCES)
        for name in ("", "-precision", "-recall")
    }
    for i, (text, group) in enumerate(zip(SAID, REFERENCES, strict=True)):
        best = scorer.score_multi(group, text)["rougeL"]
        assert (found["-precision"][i], found["-recall"][i], found[""][i]) == tuple(best)
    said, wanted = "a man rides a bike", "a man is riding his bike"
    same = common(said.split(), wanted.split())
    assert same == 3
    for name, expected in (("-precision", same / 5), ("-recall", same / 6), ("", 2 * same / 11)):
        assert load_reward(f"rouge-l{name}")(["p"], [said], references=[[wanted]]) == pytest.approx([expected])


def test_meteor_by_hand():
    """Matches by stem, F of recall and precision at 9 to 1, a penalty for chunks (Lavie and Agarwal 2007)."""

    def expected(matches, chunks, said, wanted):
        precision, recall = matches / said, matches / wanted
        return 10 * precision * recall / (recall + 9 * precision) * (1 - 0.5 * (chunks / matches) ** 3)

    reward = load_reward("meteor")
    cases = [
        ("Dogs run!", ["the dog runs"], expected(2, 1, 2, 3)),
        ("the park, a dog", ["a dog in the park"], expected(4, 2, 4, 5)),
        ("a dog sleeps", ["cats eat fish", "a dog eats"], expected(2, 1, 3, 3)),
        ("big dog", ["large dog"], expected(1, 1, 2, 2)),  # a synonym is another word
        ("nothing", ["at all"], 0.0),
    ]
    for said, group, score in cases:
        assert reward(["p"], [said], references=[group]) == pytest.approx([score], abs=1e-12), said


def test_cider_is_pycocoevalcaps_of_the_corpus(corpus):
    truth = {i: [" ".join(words(text)) for text in group] for i, group in enumerate(REFERENCES)}
    _, expected = Cider().compute_score(truth, {i: [" ".join(words(text))] for i, text in enumerate(SAID)})
    reward = loaded("cider", corpus)
    scores = reward(PROMPTS, SAID, references=REFERENCES)
    assert scores == pytest.approx(expected.tolist(), abs=1e-12) and max(scores) > 1
    alone = [reward(["p"], [text], references=[group])[0] for text, group in zip(SAID, REFERENCES, strict=True)]
    assert alone == scores


def test_cider_by_hand_of_texts_that_the_corpus_does_not_hold(corpus):
    """tf-idf vectors of n-grams, n = 1 to 4; clipped cosine, length penalty, mean over n and references, times 10."""
    said, group = "a dog runs in the sea", ["a dog runs in a lake", "the dog is in the sea today"]

    def ngrams(text, n):
        tokens = words(text)
        return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))

    def weighed(text, n):
        documents = [{g for ref in refs for g in ngrams(ref, n)} for refs in REFERENCES]
        weight = {g: math.log(len(documents) / max(1, sum(g in d for d in documents))) for g in ngrams(text, n)}
        return {g: count * weight[g] for g, count in ngrams(text, n).items()}

    total = 0.0
    for reference in group:
        apart = len(words(said)) - len(words(reference))
        for n in (1, 2, 3, 4):
            a, b = weighed(said, n), weighed(reference, n)
            dot = sum(min(value, b.get(g, 0)) * b.get(g, 0) for g, value in a.items())
            norms = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
            total += dot / norms * math.exp(-(apart**2) / 72)
    assert loaded("cider", corpus)(["p"], [said], references=[group]) == pytest.approx([10 * total / 4 / 2], abs=1e-9)


STATISTICAL = ["bleu-1", "bleu-4", "rouge-l", "rouge-l-precision", "rouge-l-recall", "meteor", "cider"]


@pytest.mark.parametrize("name", STATISTICAL)
def test_a_batch_of_one_scores_as_a_batch_of_many_within_the_range(name, corpus):
    reward = loaded(name, corpus)
    scores = reward(PROMPTS, SAID, references=REFERENCES)
    assert scores == [
        reward([p], [said], references=[group])[0] for p, said, group in zip(PROMPTS, SAID, REFERENCES, strict=True)
    ]
    best = 10 if name == "cider" else 1
    assert all(0 <= score <= best for score in scores) and scores[-1] == 0 and len(set(scores)) > 4
    (perfect,) = reward(["p"], ["THE dog runs through the park"], references=[["the dog runs through the park"]])
    assert perfect == pytest.approx(best, abs=0.003) and perfect <= best + 1e-12  # METEOR: one chunk of six costs .0023
    assert reward(["p"], ["a dog"], references=["a dog"]) == reward(["p"], ["a dog"], references=[["a dog"]])


@pytest.mark.parametrize("name", STATISTICAL)
def test_without_references_there_is_no_score(name, corpus):
    reward = loaded(name, corpus)
    assert reward.needs == reward.columns == ("references",)
    with pytest.raises(rsoups.RewardError, match=rf"{name}.*needs the column\(s\) \['references'\]"):
        reward(["p"], ["r"])
    with pytest.raises(rsoups.RewardError, match="no references for prompt 'q'"):
        reward(["p", "q"], ["r", "r"], references=[["r"], []])


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("bleu-4", "sacrebleu.metrics"),
        ("rouge-l", "rouge_score.rouge_scorer"),
        ("meteor", "nltk.translate.meteor_score"),
        ("cider", "pycocoevalcap.cider.cider_scorer"),
        ("keywords", "nltk.stem.porter"),
        ("readability", "textstat"),
    ],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(name, library, corpus, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(rsoups.RewardError, match=rf"needs {library.split('.')[0]}: pip install 'rsoups\[metrics\]'"):
        loaded(name, corpus)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("bleu-4", {"order": 5}, "order is 5"),
        ("bleu-4", {"n": 4}, "unexpected keyword argument 'n'"),
        ("rouge-l", {"score": "f1"}, "score is 'f1'"),
        ("cider", {}, "missing a required argument: 'corpus'"),
        ("cider", {"corpus": "nowhere.jsonl"}, "cannot read the reference set 'nowhere.jsonl'"),
        ("coverage", {"order": 1}, "'coverage' is a model: only a function's card"),
        (len, {"order": 1}, "is no card"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(name, arguments, says):
    with pytest.raises(rsoups.RewardError, match=says):
        load_reward(name, **arguments)


def test_a_reference_set_without_the_column_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"sentences": ["a dog", "a cat"]}\n{"sentences": ["a dog runs"]}\n')
    with pytest.raises(rsoups.RewardError, match="no row of .* has texts in a column 'references'"):
        load_reward("cider", corpus=str(tmp_path / "rows.jsonl"))
    load_reward("cider", corpus=str(tmp_path / "rows.jsonl"), column="sentences")
