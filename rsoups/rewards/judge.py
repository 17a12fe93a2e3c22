"""AI feedback: a language model that rates responses by a rubric, behind an OpenAI-compatible endpoint or in this process.

A card with a ``judge`` mapping (``rewards/judge-*.yaml``) names the model, the rubric and the scale; one card for each aspect
gives fine-grained rewards. A rating that does not come is an error, never a number.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field

from rsoups.bases.load import dtype_of, load_base, load_tokenizer
from rsoups.common.errors import RewardError, RsoupsError
from rsoups.data.prompts import question_of
from rsoups.rewards.cards import Card, Dtype, Text, card_class, of_fields
from rsoups.rewards.inputs import batches, padded
from rsoups.rewards.interface import LoadedReward
from rsoups.rewards.judge_client import Counts, ServerRatings, request_text

_RESERVED = {"messages", "model", "n", "response_format", "stream"}  # fields of a request that parameters may not set
_Filled = Annotated[Text, Field(pattern=r"\S")]
_Count = Annotated[int, Field(gt=0)]

logger = logging.getLogger(__name__)


@card_class
class JudgeSettings:
    """Who judges, by what. Each field is a key of a card's ``judge`` mapping.

    Attributes:
        model: The endpoint's name of its model; without an endpoint the Hub id or folder of a causal language model.
        rubric: Description of the aspect, and of what the ends of the scale mean.
        scale: Lowest and highest integer of the rating; higher is better.
        endpoint: Base URL of an OpenAI-compatible server, as in ``http://127.0.0.1:8000/v1``; None for a model in this process.
        key: Name of the environment variable with the server's key; the key itself is nowhere written.
        parameters: Further fields of each request, such as temperature or max_tokens.
        structured: Ask the server to constrain its answer to the JSON schema; False for servers that cannot.
        concurrency: Number of requests at a time.
        attempts: Number of requests for one rating, at most.
        timeout: Seconds for one request.
        price: Price of ``input`` and ``output`` tokens, per 1M, to count the cost.
        revision, dtype: Revision and precision of a model in this process; ``auto`` is float32.
    """

    model: _Filled
    rubric: _Filled
    scale: Annotated[Sequence[int], Field(min_length=2, max_length=2)] = (1, 5)
    endpoint: Any = None
    key: Any = None
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0, "max_tokens": 64})
    structured: bool = True
    concurrency: _Count = 8
    attempts: _Count = 5
    timeout: Annotated[float, Field(gt=0)] = 60.0
    price: Mapping[str, Annotated[float, Field(ge=0)]] | None = None
    revision: Text | None = None
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        if not self.scale[0] < self.scale[1]:
            raise ValueError(f"scale is {list(self.scale)}, must be two integers, [lowest, highest]")
        if reserved := sorted(_RESERVED & set(self.parameters)):
            raise ValueError(f"parameters may not set {reserved}, which rsoups sets")
        if self.price is not None and set(self.price) != {"input", "output"}:
            raise ValueError(f"price is {dict(self.price)}, must be input and output, per 1M tokens")

        # The endpoint and the key may hold a secret by mistake: no error shows them.
        if self.endpoint is None:
            if self.key is not None or self.price is not None:
                raise ValueError("key and price go with an endpoint")
            return
        url = urlsplit(str(self.endpoint))
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("endpoint must be an http(s) URL such as http://127.0.0.1:8000/v1")
        if url.username or url.password or url.query:
            raise ValueError("endpoint holds credentials or a query: name the variable of the key under `key`")
        if self.key is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", str(self.key)):
            raise ValueError(
                "key must be the name of an environment variable, such as OPENAI_API_KEY, not the key itself"
            )


@card_class
class JudgeCard(Card):
    """A judge as a reward. Each field is a key of the YAML file.

    The score is ``(rating - mean) / std``.

    Attributes:
        judge: Fields of `JudgeSettings`.
        license: License of the model's weights; empty where it was not looked up.
    """

    judge: Mapping[str, Any]
    license: Text = ""

    def __post_init__(self) -> None:
        _ = self.settings  # refuses wrong ones

    @cached_property
    def settings(self) -> JudgeSettings:
        """Fields of `judge`, checked."""
        return of_fields(JudgeSettings, self.judge, f"reward card {self.name!r}, judge")

    def summary(self) -> str:
        """Return the judge's model, its place and its scale, on one line."""
        low, high = self.settings.scale
        return f"{self.settings.model:50} {self.settings.endpoint or 'in this process':28} judged from {low} to {high}"


class Judge(LoadedReward):
    """A loaded judge.

    A server's ratings are integers of the scale, and each is kept on disk under a hash of all that it depends on. A model in
    this process gives the expected rating under its probabilities of the scale's integers; it is not cached, for its weights
    may change under its name.

    Args:
        card: Card of the reward.
        device: Device of a model in this process.
        trust_remote_code: Run Python code that comes with such a model.
        cache: Folder of the ratings; the environment's ``RSOUPS_CACHE``, or ``~/.cache/rsoups``, by default.

    Attributes:
        counts: Calls, cached ratings, retries, failures, tokens and cost so far; logged after each batch. TRL's `log_metric`
            gets calls, failures and cost.

    Raises:
        RewardError: The key's variable is not set, or a model cannot be loaded or splits the scale's numbers.
        SettingsError: A server's judge without the package openai.
    """

    def __init__(
        self, card: JudgeCard, device: str = "cpu", trust_remote_code: bool = False, cache: str | Path | None = None
    ):
        self.card, self.name = card, card.name
        self.is_model = card.settings.endpoint is None
        self._rater: ServerRatings | _Local
        if self.is_model:
            self._rater = _Local(card, device, trust_remote_code)
        else:
            folder = cache or os.environ.get("RSOUPS_CACHE") or Path("~/.cache/rsoups")
            self._rater = ServerRatings(card.name, card.settings, Path(folder).expanduser() / "judge")

    @property
    def counts(self) -> Counts:
        return self._rater.counts

    def _scores(self, prompts: list[Any], responses: list[str], columns: dict[str, Any]) -> list[float]:
        pairs = [(question_of(prompt), response) for prompt, response in zip(prompts, responses, strict=True)]
        different = list(dict.fromkeys(pairs))
        self.counts.cached += len(pairs) - len(different)
        try:
            ratings = dict(zip(different, self._rater(different), strict=True))
        finally:
            logger.info("%s, %d samples; in all: %s", self.name, len(pairs), self.counts)

        if log := columns.get("log_metric"):
            for name in ("calls", "failures", "cost"):
                log(f"{self.name}/{name}", float(getattr(self.counts, name)))
        return [self.card.scaled(ratings[pair]) for pair in pairs]


class _Local:
    """Ratings of a causal language model in this process: the expected rating under its probabilities of the scale."""

    def __init__(self, card: JudgeCard, device: str, trust_remote_code: bool):
        self._name, self._settings, self.counts = card.name, card.settings, Counts()
        model, dtype = card.settings.model, card.settings.dtype
        options: dict[str, Any] = {"revision": card.settings.revision, "trust_remote_code": trust_remote_code}
        try:
            self._tokenizer = load_tokenizer(model, **options)
            loaded = load_base(model, dtype=dtype_of(model, dtype, device, scores=True), **options)
        except RsoupsError as error:
            raise RewardError(f"reward {card.name!r}: {error}") from error
        self._model = loaded.eval().requires_grad_(False).to(device)
        self._encode("", "")  # refuses a scale whose numbers the tokenizer splits, before any work

    def _encode(self, question: str, response: str) -> tuple[list[int], list[int]]:
        """Return the ids up to the rating, and the id of each rating."""
        text, chat = request_text(self._settings, question, response), self._tokenizer.chat_template is not None
        if chat:
            messages = [{"role": "user", "content": text}]
            text = str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        else:
            text += "\n\n"

        low, high = self._settings.scale
        answers = [f'{text}{{"score": {number}' for number in range(low, high + 1)]
        ids = self._tokenizer(answers, add_special_tokens=not chat)["input_ids"]
        before = os.path.commonprefix(ids)
        if any(len(row) != len(before) + 1 for row in ids):
            raise RewardError(
                f"reward {self._name!r}: the tokenizer of {self._settings.model!r} splits numbers from {low} to {high}: "
                "choose a scale of single digits"
            )

        room = self._model.config.get_text_config().max_position_embeddings
        if len(before) > room:
            raise RewardError(
                f"reward {self._name!r}: {len(before)} tokens for a context of {room}; the sample: question {question!r}, "
                f"response {response!r}"
            )
        return before, [row[-1] for row in ids]

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        import torch

        inputs_of = [self._encode(*pair) for pair in pairs]
        encoded = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids, _ in inputs_of]
        low, high = self._settings.scale
        numbers = torch.arange(low, high + 1, dtype=torch.float64)
        ratings = [0.0] * len(pairs)
        with torch.inference_mode():
            for batch in batches(encoded, self._model.device):
                rows = [encoded[i] for i in batch]
                ends = [len(row["input_ids"]) - 1 for row in rows]
                places = sorted(set(ends))  # the only places whose logits are computed
                inputs = padded(rows, 0, self._model.device)
                logits = self._model(**inputs, logits_to_keep=torch.tensor(places, device=self._model.device)).logits
                for row, (i, end) in enumerate(zip(batch, ends, strict=True)):
                    chances = logits[row, places.index(end), inputs_of[i][1]].float().cpu().double().softmax(-1)
                    ratings[i] = float(chances @ numbers)

        self.counts.calls += len(pairs)
        self.counts.input_tokens += sum(len(ids) for ids, _ in inputs_of)
        return ratings
