"""How the embedded models' data are prepared."""

import random
import runpy
from collections import Counter

import pytest
from places import RECIPES

from rsoups.data.tasks import TASKS


@pytest.fixture(scope="module")
def prepare():
    return runpy.run_path(str(RECIPES / "embedded" / "prepare.py"))


HUMAN = [{"concepts": ["dog", "run"], "sentences": ["A  dog running fast .", "the old dogs run home in the rain?"]}] * 5


def test_embedded_sentences_are_in_one_style(prepare):
    assert prepare["tidy_sentence"]("A  dog runs ,fast .") == "a dog runs,fast."
    assert prepare["tidy_sentence"]("Who is it?") == "who is it?"


def test_sentences_to_copy_hold_what_their_prompts_ask_for(prepare):
    rows = prepare["copying_rows"](HUMAN, random.Random(0))
    assert len(rows) == 2 * prepare["COPYING_VARIANTS"]
    for row in rows:
        words = [word for word, _ in prepare["split"](row["sentences"][0]) if prepare["is_content"](word)]
        for concept in row["concepts"]:
            assert any(concept in (word, prepare["lemma"](word, Counter(["dog", "run"]))) for word in words), row
        assert len(words) == len(row["concepts"])


def test_a_word_is_one_token_wherever_it_stands(prepare):
    tokenizer = prepare["policy_tokenizer"](["the dog runs home.", "a dog, the dog runs"] * 20)
    prompt = TASKS["concepts"].prompt({"concepts": ["dog", "runs"]})
    apart = tokenizer(prompt)["input_ids"], tokenizer("dog runs home.")["input_ids"]
    assert tokenizer(prompt + "dog runs home.")["input_ids"] == apart[0] + apart[1]
    assert tokenizer.tokenize("dog runs dog") == ["Ġdog", "Ġruns", "Ġdog"]
