"""Reward cards and rewards: prompts and responses in, one float each out.

A card (``rewards/*.yaml``) says which model scores, what its input is made of, and which logit is the score. The
question is always in the input: `question_of` finds it in the prompt (the paper's released code lost it for two tasks).
"""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rsoups._errors import RewardError, RsoupsError
from rsoups._resources import resolve, shipped
from rsoups.tasks import first_sentence, question_of, response_start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INPUTS = ("pair", "reversed_pair")
_FIELD = re.compile(r"\{(\w+)\}")  # in templates
_FIELDS = {"question", "response", "bos", "eos", "sep"}
_RESPONSES: dict[str, Callable[[str], str]] = {"whole": str, "first_sentence": first_sentence}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NO_ROOM = "a response fills all %d tokens that a reward model reads: its end is not seen"
_BATCH_TOKENS = 8_192  # per scoring batch, padding included

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardCard:
    """What a reward is. Each field is a key of the YAML file.

    Attributes:
        name: Names the reward in records, logs and plots.
        model: Hub id, folder, or ``rsoups/...`` for an embedded one: a sequence classifier.
        revision: Hub revision, None for the newest.
        input: ``pair``: tokenizer(question, response); ``reversed_pair``: tokenizer(response, question); or one text, a
            template with ``{response}`` and, where the model reads them, ``{question}``, ``{bos}``, ``{eos}``, ``{sep}``.
        question: Template of the question before it goes in, such as a chat's turn.
        response: ``whole``, or ``first_sentence`` of it.
        logit: Index or label of the logit that is the score.
        minus: Index or label of a logit to subtract from it, None for none.
        sign: 1, or -1 where a higher logit is worse.
        mean, std: The score is ``(sign * logit - mean) / std``: from a named calibration, so that rewards can be mixed.
        calibration: What mean and std were measured on.
        max_length: Tokens; a longer input loses the end of its question, never of its response.
        source: Where the input recipe comes from.
        licence: Of the model's weights.
    """

    name: str
    model: str
    revision: str | None = None
    input: str = "pair"
    question: str = "{question}"
    response: str = "whole"
    logit: int | str = 0
    minus: int | str | None = None
    sign: int = 1
    mean: float = 0.0
    std: float = 1.0
    calibration: str | None = None
    max_length: int = 512
    source: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        if self.input not in _INPUTS and "{response}" not in self.input:
            raise RewardError(
                f"reward card {self.name!r}: input is {self.input!r}, must be one of {list(_INPUTS)} or a template with "
                "{response}"
            )
        if unknown := {*_FIELD.findall(self.input)} - _FIELDS or {*_FIELD.findall(self.question)} - {"question"}:
            raise RewardError(f"reward card {self.name!r}: no field {sorted(unknown)} for templates; {sorted(_FIELDS)}")
        if self.response not in _RESPONSES:
            raise RewardError(f"reward card {self.name!r}: response is {self.response!r}, not of {sorted(_RESPONSES)}")
        if self.sign not in (1, -1):
            raise RewardError(f"reward card {self.name!r}: sign is {self.sign!r}, must be 1 or -1")
        for field in ("mean", "std"):
            value = getattr(self, field)
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise RewardError(f"reward card {self.name!r}: {field} is {value!r}, must be a finite number")
        if self.std <= 0:
            raise RewardError(f"reward card {self.name!r}: std is {self.std!r}, must be above 0")

    @classmethod
    def read(cls, path: str | Path) -> RewardCard:
        """Read and check a card.

        Raises:
            RewardError: Not a YAML mapping, an unknown or missing key, or a value that is out of range.
        """
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise RewardError(f"{path}: not YAML ({error})") from None
        if not isinstance(data, dict):
            raise RewardError(f"{path}: a reward card is a mapping of fields, not {type(data).__name__}")
        known = {field.name for field in fields(cls)}
        if unknown := set(data) - known:
            raise RewardError(f"{path}: unknown field(s) {sorted(unknown)}; a card has {sorted(known)}")
        if missing := {"name", "model"} - set(data):
            raise RewardError(f"{path}: missing field(s) {sorted(missing)}")
        return cls(**data)


def cards() -> dict[str, Path]:
    """Names and files of the cards that ship with rsoups."""
    return {path.stem: path for path in sorted(shipped("rewards").glob("*.yaml"))}


class Reward:
    """A loaded reward model: ``reward(prompts, responses) -> list[float]``.

    Runs without gradients, in the model's own precision, sorted by length into batches of equal padding; scores do not
    depend on the batching.
    """

    def __init__(self, card: RewardCard, device: str = "cpu"):
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.card = card
        self.name = self.__name__ = card.name  # TRL logs a reward under its __name__
        source = resolve(card.model)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(source, revision=card.revision)
            # The embedded weights are stored in half precision to be small, and computed with in float32.
            dtype = torch.float32 if source != card.model else "auto"
            model = AutoModelForSequenceClassification.from_pretrained(
                source, revision=card.revision, dtype=dtype, use_safetensors=True
            )
        except OSError as error:
            raise RewardError(
                f"reward {card.name!r}: cannot load {card.model!r} (only safetensors are read, never a pickle): {error}"
            ) from error
        self._pad(model)
        self._columns = [self._column(model.config, label) for label in (card.logit, card.minus) if label is not None]
        self._model = model.eval().requires_grad_(False).to(device)

    def _pad(self, model: Any) -> None:
        """A pad token for tokenizers without one (GPT-2), known to the model, which looks for the last real token."""
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.unk_token
        model.config.pad_token_id = self._tokenizer.pad_token_id

    def _column(self, config: Any, label: int | str) -> int:
        names = {int(i): str(name) for i, name in config.id2label.items()}
        found = [i for i, name in names.items() if label in (i, name)]
        if not found:
            raise RewardError(f"reward {self.name!r}: no logit {label!r} in {self.card.model!r}, which has {names}")
        return found[0]

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> list[dict[str, list[int]]]:
        """The model's input for each sample, unpadded."""
        card = self.card
        questions = [_filled(card.question, question=question_of(prompt)) for prompt in prompts]
        said = [_RESPONSES[card.response](response) for response in responses]
        if card.input in _INPUTS:
            return encode_pairs(
                self._tokenizer, questions, said, card.max_length, reverse=card.input == "reversed_pair"
            )
        return encode_texts(self._tokenizer, card.input, questions, said, card.max_length)

    def explain(self, prompt: str, response: str) -> dict[str, Any]:
        """What the model reads of one sample, and what it says: ``text``, ``ids``, ``logits`` by label, ``score``."""
        import torch

        (encoded,) = self.encode([prompt], [response])
        with torch.inference_mode():
            inputs = {key: torch.tensor([value], device=self._model.device) for key, value in encoded.items()}
            logits = self._model(**inputs).logits[0].float().tolist()
        names = self._model.config.id2label
        return {
            "text": self._tokenizer.decode(encoded["input_ids"]),
            "ids": encoded["input_ids"],
            "logits": {str(names[i]): value for i, value in enumerate(logits)},
            "score": self([prompt], [response])[0],
        }

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
        """Score each response to its prompt.

        Args:
            prompts: Policy prompts (the question is taken out of the prompt format) or bare questions.
            responses: As many responses.
            columns: Of a dataset; a model does not look at them.

        Raises:
            RewardError: Unequal numbers, or a score that is not finite (the sample is shown).
        """
        import torch

        if len(prompts) != len(responses):
            raise RewardError(f"reward {self.name!r}: {len(prompts)} prompts but {len(responses)} responses")
        encoded = self.encode(prompts, responses)
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]["input_ids"]), reverse=True)
        scores = [0.0] * len(encoded)
        with torch.inference_mode():
            while order:
                size = max(1, _BATCH_TOKENS // len(encoded[order[0]]["input_ids"]))
                batch, order = order[:size], order[size:]
                padded = self._tokenizer.pad([encoded[i] for i in batch], return_tensors="pt", padding_side="right")
                logits = self._model(**padded.to(self._model.device)).logits.float()
                raw = logits[:, self._columns[0]]
                if len(self._columns) == 2:
                    raw = raw - logits[:, self._columns[1]]
                values = (self.card.sign * raw - self.card.mean) / self.card.std
                for i, value in zip(batch, values.tolist(), strict=True):
                    scores[i] = value
        check_scores(self.name, scores, prompts, responses)
        return scores


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    responses: Sequence[str],
    max_length: int,
    reverse: bool = False,
) -> list[dict[str, list[int]]]:
    """Tokenize (question, response) pairs as a sequence classifier reads them; `reverse` puts the response first.

    Where a pair is longer than `max_length` tokens, the question loses its end, and where all of it is not enough, the
    response does.
    """

    def encode(question: str, response: str, lost: str) -> dict[str, list[int]]:
        pair = (response, question) if reverse else (question, response)
        side = "only_second" if reverse == (lost == "question") else "only_first"
        return dict(tokenizer(*pair, truncation=side, max_length=max_length))

    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    sizes = [len(ids) for ids in tokenizer(list(responses), add_special_tokens=False)["input_ids"]]
    encoded = []
    for question, response, size in zip(questions, responses, sizes, strict=True):
        if size < room:
            encoded.append(encode(question, response, "question"))
        else:
            logger.warning(_NO_ROOM, max_length)
            encoded.append(encode("", response, "response"))
    return encoded


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    questions: Sequence[str],
    responses: Sequence[str],
    max_length: int,
) -> list[dict[str, list[int]]]:
    """Tokenize texts made by a template; where one is longer than `max_length` tokens, its question loses its end."""
    special = {name: getattr(tokenizer, f"{name}_token") or "" for name in ("bos", "eos", "sep")}

    def encode(question: str, response: str) -> dict[str, list[int]]:
        return dict(tokenizer(_filled(template, question=question, response=response, **special)))

    encoded = []
    for question, response in zip(questions, responses, strict=True):
        one = encode(question, response)
        while (over := len(one["input_ids"]) - max_length) > 0 and question:
            ends = [
                end
                for _, end in tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)[
                    "offset_mapping"
                ]
            ]
            question = question[: ends[-over - 1]] if over < len(ends) else ""
            one = encode(question, response)
        if over > 0:
            logger.warning(_NO_ROOM, max_length)
            one = {key: ids[:max_length] for key, ids in one.items()}
        encoded.append(one)
    return encoded


def _filled(template: str, **values: str) -> str:
    return _FIELD.sub(lambda match: values[match[1]], template)


def check_scores(name: str, scores: Sequence[float], prompts: Sequence[Any], responses: Sequence[str]) -> None:
    """Refuse scores that would poison a run.

    Raises:
        RewardError: Not one score per sample, or a score that is NaN or infinite; names the reward and the sample.
    """
    if len(scores) != len(responses):
        raise RewardError(f"reward {name!r} returned {len(scores)} scores for {len(responses)} responses")
    for score, prompt, response in zip(scores, prompts, responses, strict=True):
        if not math.isfinite(score):
            raise RewardError(f"reward {name!r} returned {score} for prompt {prompt!r}, response {response!r}")


class FunctionReward:
    """A function as a reward: ``reward(prompts, responses, **columns) -> list[float]``.

    Takes ``f(prompts, responses)`` and TRL's ``f(prompts, completions, **columns)`` alike; a function gets those of the
    dataset's columns that it names, or all where it takes any.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None):
        self.name: str = name or str(getattr(function, "__name__", type(function).__name__))
        self.__name__ = self.name
        self._function = function
        parameters = inspect.signature(function).parameters
        self._any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._known = set(parameters)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
        """Score each response to its prompt.

        Raises:
            RewardError: Not one finite score for each response (the sample is shown).
        """
        passed = {key: value for key, value in columns.items() if self._any or key in self._known}
        if "completions" in self._known:
            scores = self._function(prompts=list(prompts), completions=list(responses), **passed)
        else:
            scores = self._function(list(prompts), list(responses), **passed)
        scores = [float(score) for score in scores]
        check_scores(self.name, scores, prompts, responses)
        return scores


def load_reward(source: str | Path | Callable[..., Any], device: str = "cpu") -> Reward | FunctionReward:
    """Load a reward.

    Args:
        source: A shipped card's name (``"naturalness"``, ``"deberta-v3-large-v2"``, ...), the path of a YAML card, a sequence
            classifier's Hub id or folder (read as ``tokenizer(question, response)``, score logits[0]), ``"module:function"``
            (also of a file beside you), or a function.
        device: Where a model runs.

    Raises:
        RewardError: No such reward (the shipped ones are listed), or an invalid one.
    """
    if callable(source):
        return FunctionReward(source)
    text, known = str(source), cards()
    path = known.get(text, Path(text))
    if path.is_file():
        return Reward(RewardCard.read(path), device)
    if path.is_dir() or _HUB_ID.fullmatch(text):
        logger.info("%s is no card: scored as tokenizer(question, response), logits[0]", text)
        return Reward(RewardCard(name=path.name, model=text), device)
    module, separator, name = text.partition(":")
    if separator:
        return FunctionReward(_imported(module, name), name)
    raise RewardError(
        f"no reward {text!r}; shipped cards: {sorted(known)}, or give a YAML card, a classifier's Hub id or module:function"
    )


def _imported(module: str, name: str) -> Callable[..., Any]:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RewardError(f"no reward function {module}:{name}: {error}") from None
    if not callable(found):
        raise RewardError(f"{module}:{name} is {type(found).__name__}, not a function")
    return found


def reward_function(
    reward: Callable[..., Any], cut: Callable[[str], str], tokenizer: PreTrainedTokenizerBase | None = None
) -> Callable[..., list[float]]:
    """A reward in TRL's signature, ``f(prompts, completions, **columns)``, that sees what `cut` leaves of a response.

    Where the prompt holds the response's first words, it sees them too; with the policy's `tokenizer`, joined as the tokens
    say (a word that goes on has no space before it).
    """

    scored = reward if isinstance(reward, (Reward, FunctionReward)) else FunctionReward(reward)

    def whole(prompt: Any, completion: Any, ids: list[int] | None) -> str:
        if isinstance(completion, list):  # messages: a conversation's answer
            return str(completion[-1]["content"])
        if not (start := response_start(prompt)):
            return completion
        if tokenizer is None or ids is None:
            return f"{start} {completion}"
        started = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        before, after = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in (started, [*started, *ids]))
        return start + after[len(before) :]

    def function(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        ids = columns.get("completion_ids") or [None] * len(prompts)
        rows = zip(prompts, completions, ids, strict=True)
        return scored(prompts, [cut(whole(*row)) for row in rows], **columns)

    function.__name__ = scored.name
    return function


def named_failures(reward: Any) -> Any:
    """A reward function of TRL's signature whose failures are `RewardError`s that name it and where it failed.

    Anything else that TRL takes (a model, its name, an async function) comes back as it is.
    """
    from torch import nn

    if isinstance(reward, (str, nn.Module)) or inspect.iscoroutinefunction(reward):
        return reward
    name = getattr(reward, "__name__", type(reward).__name__)

    def function(prompts: list, completions: list, **columns: Any) -> list[float]:
        try:
            scores = list(reward(prompts=prompts, completions=completions, **columns))
        except RsoupsError:
            raise
        except Exception as error:
            raise RewardError(
                f"reward {name!r} raised {type(error).__name__}: {error}; the batch begins with prompt {prompts[0]!r}, "
                f"response {completions[0]!r}"
            ) from error
        if len(scores) != len(completions):
            raise RewardError(
                f"reward {name!r} returned {len(scores)} scores for {len(completions)} responses; the batch begins with "
                f"prompt {prompts[0]!r}, response {completions[0]!r}"
            )
        return scores

    function.__name__ = name
    return function
