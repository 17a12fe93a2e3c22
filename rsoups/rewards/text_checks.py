"""Rewards that read the response alone, or with its question: length, form, keywords, readability.

Each function makes a reward, ``reward(prompts, completions) -> list[float]``, from the ``arguments`` of a card
(``function: length``). A RewardError refuses an argument that is out of range.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from threading import Lock
from typing import NoReturn

from rsoups.common.errors import RewardError
from rsoups.data.prompts import question_of
from rsoups.rewards.text_metrics import library, words

__all__ = ["grammar", "keyword_coverage", "length", "matches", "readability", "valid_json"]  # what a card may name

CheckReward = Callable[[Sequence[str], Sequence[str]], list[float]]


def length(target: int) -> CheckReward:
    """Distance of the response from a number of words: ``-|words - target| / target``; 0 at best, -1 if it is empty."""
    if type(target) is not int or target < 1:
        raise RewardError(f"length: target is {target!r}, must be a number of words, 1 or more")
    return _of_response("length", lambda response: 0.0 - abs(len(response.split()) - target) / target)


def grammar() -> CheckReward:
    """Faults of grammar, spelling and style in 10 words of the response, with a minus sign: 0 at best, -1 at worst or if empty.

    The faults are Harper's, for American English.
    """
    harper = library("harper", extra="grammar")
    linter, one_at_a_time = harper.Linter(), Lock()  # a linter refuses a second thread

    def score(response: str) -> float:
        count = len(response.split())
        if not count:
            return -1.0
        with one_at_a_time:
            faults = linter.lint(response, language="plaintext")
        return 0.0 - min(1.0, 10 * len(faults) / max(count, 10))

    return _of_response("grammar", score)


def matches(pattern: str) -> CheckReward:
    """1 if the whole response matches a regular expression (Python's; ``.`` matches line ends too), else 0."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except (re.error, TypeError) as error:
        raise RewardError(f"matches: pattern {pattern!r} is no regular expression: {error}") from None
    return _of_response("matches", lambda response: float(compiled.fullmatch(response.strip()) is not None))


def valid_json(keys: Sequence[str] = ()) -> CheckReward:
    """1 if the response is JSON (RFC 8259: no NaN) and, with `keys`, an object that has them; else 0."""
    if isinstance(keys, str) or not all(isinstance(key, str) for key in keys):
        raise RewardError(
            f"valid_json: keys is {keys!r}, must be a list of texts, in quotes where YAML reads them otherwise"
        )

    def score(response: str) -> float:
        try:
            value = json.loads(response, parse_constant=_no_number)
        except (ValueError, RecursionError):
            return 0.0
        return float(not keys or (isinstance(value, dict) and set(keys) <= set(value)))

    return _of_response("valid_json", score)


def keyword_coverage() -> Callable[..., list[float]]:
    """Share of the keywords that the response has, in any inflection (equal Porter stems), 0 to 1.

    The keywords are the dataset's column ``keywords`` (words or phrases, as a list or between commas), or the question's
    parts between its commas ("dog, run, ice cream").
    """
    stem = library("nltk.stem.porter").PorterStemmer().stem

    def stems(text: str) -> str:
        return " ".join(["", *map(stem, words(text)), ""])

    def reward(
        prompts: Sequence[str], completions: Sequence[str], keywords: Sequence[Sequence[str]] | None = None
    ) -> list[float]:
        scores = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            keys = question_of(prompt) if keywords is None else keywords[i]
            parts = keys.split(",") if isinstance(keys, str) else keys
            wanted = [stemmed for stemmed in map(stems, parts) if stemmed.strip()]
            if not wanted:
                raise RewardError(f"keyword_coverage: the prompt {prompt!r} has no keywords")
            stemmed_response = stems(completion)
            scores.append(sum(keyword in stemmed_response for keyword in wanted) / len(wanted))
        return scores

    reward.__name__ = "keyword_coverage"
    return reward


def readability(grade: float) -> CheckReward:
    """Distance of the response from a school grade: ``-|index - grade|``, 0 at best.

    The index is textstat's Automated Readability Index, 4.71 characters a word + 0.5 words a sentence - 21.43: about the US
    school grade that can read the text; an empty text has index 0. (textstat's indices of syllables fetch a dictionary.)
    """
    if isinstance(grade, bool) or not isinstance(grade, (int, float)):
        raise RewardError(f"readability: grade is {grade!r}, must be a number")
    index = library("textstat").automated_readability_index
    return _of_response("readability", lambda response: 0.0 - abs(index(response) - grade))


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _of_response(name: str, score: Callable[[str], float]) -> CheckReward:
    def reward(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        return [score(completion) for completion in completions]

    reward.__name__ = name
    return reward
