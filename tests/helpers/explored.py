"""The two rewards of the explorer's tests."""

NAMES = ["letters", "words"]


def letters(prompts, responses):
    return [len(set(r)) / 10 for r in responses]


def words(prompts, responses):
    return [len(r.split()) / 10 for r in responses]
