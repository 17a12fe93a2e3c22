"""Reward cards and rewards: prompts and responses in, one float each out.

A card (``rewards/*.yaml``) says which model scores, what its input is made of, and which logit is the score. The
question is always in the input: `question_of` finds it in the prompt (the paper's released code lost it for two tasks).
"""

from __future__ import annotations

import inspect
import logging
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from rsoups._cards import DTYPES, check_calibration, check_fields, made, read_card_file
from rsoups._errors import RewardError, RsoupsError
from rsoups._resources import from_safetensors, resolve, shipped, why_not
from rsoups.function_rewards import FunctionCard, FunctionReward, check_scores, imported
from rsoups.judge import Judge, JudgeCard
from rsoups.reward_inputs import FIELD, FIELDS, batches, encode_pairs, encode_texts, filled, padded
from rsoups.tasks import first_sentence, messages_of, question_of, response_start

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_INPUTS = ("pair", "reversed_pair")
_AVERAGES = ("weights", "scores")
_RESPONSES: dict[str, Callable[[str], str]] = {"whole": str, "first_sentence": first_sentence}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PLACE = "_place"  # column of a dataset: where a row's other columns are, in what `reward_function` is given
_ROUNDING = 1e-3  # of float32 logits, in a batch and alone

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardCard:
    """What a reward is. Each field is a key of the YAML file.

    Attributes:
        name: Names the reward in records, logs and plots.
        model: Hub id, folder, or ``rsoups/...`` for an embedded one: a sequence classifier, or a LoRA adapter of one.
        models: Instead of one model several to be averaged, each as ``model`` or ``id@revision``.
        average: What is averaged: their ``weights`` (WARM, Ramé et al. 2024: models of one architecture and tokenizer, one
            forward for a score) or their ``scores`` (an ensemble: any models, one forward of each).
        lambdas: Weights of the average, one for each of ``models``, summing to 1; uniform ones where left out.
        revision: Of ``model`` on the Hub, None for the newest.
        input: ``pair``: tokenizer(question, response); ``reversed_pair``: tokenizer(response, question); or one text, a
            template with ``{response}`` and, where the model reads them, ``{question}``, ``{bos}``, ``{eos}``, ``{sep}``.
        question: Template of the question before it goes in, such as a chat's turn.
        response: ``whole``, or ``first_sentence`` of it.
        logit: Index or label of the logit that is the score.
        minus: Index or label of a logit to subtract from it, None for none.
        sign: 1, or -1 where a higher logit is worse.
        mean, std: The score is ``(sign * logit - mean) / std``: from a named calibration, so that rewards can be mixed.
        calibration: What mean and std were measured on.
        max_length: Tokens; a longer input loses a side of its question, and only then the end of its response.
        cut: Which side of a long question is lost: ``end``, or ``start`` (of a conversation, say).
        dtype: To compute in: ``float32``, which ``auto`` is too, ``bfloat16`` or ``float16``, whose scores move a little with
            the batch (by how much is logged when the model is loaded).
        source: Where the input recipe comes from.
        licence: Of the model's weights; empty where it was not looked up.
    """

    name: str
    model: str | None = None
    models: Sequence[str] | None = None
    average: str | None = None
    lambdas: Sequence[float] | None = None
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
    cut: str = "end"
    dtype: str = "auto"
    source: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        check_fields(self, f"reward card {self.name!r}")
        self._check_models()
        if self.input not in _INPUTS and "{response}" not in self.input:
            self._refuse(f"input is {self.input!r}, must be one of {list(_INPUTS)} or a template with {{response}}")
        if unknown := {*FIELD.findall(self.input)} - FIELDS or {*FIELD.findall(self.question)} - {"question"}:
            self._refuse(f"no field {sorted(unknown)} for templates; {sorted(FIELDS)}")
        allowed = {"response": (*_RESPONSES,), "sign": (1, -1), "cut": ("end", "start"), "dtype": DTYPES}
        for field, values in allowed.items():
            if (value := getattr(self, field)) not in values:
                self._refuse(f"{field} is {value!r}, must be one of {list(values)}")
        if type(self.max_length) is not int or self.max_length < 1:
            self._refuse(f"max_length is {self.max_length!r}, must be a number of tokens")
        check_calibration(self.name, self.mean, self.std)

    def _check_models(self) -> None:
        if (self.model is None) == (self.models is None):
            self._refuse("names either its model, or models with an average")
        if self.models is None:
            if self.average is not None or self.lambdas is not None:
                self._refuse("average and lambdas go with models, not with one model")
            return
        if isinstance(self.models, str) or len(self.models) < 2:
            self._refuse(f"models is {self.models!r}, must be a list of two or more")
        if self.average not in _AVERAGES:
            self._refuse(f"average is {self.average!r}, must be one of {list(_AVERAGES)}")
        if self.revision is not None:
            self._refuse("revision goes with one model; with models, write each as id@revision")

    def _refuse(self, reason: str) -> NoReturn:
        raise RewardError(f"reward card {self.name!r}: {reason}")

    @classmethod
    def read(cls, path: str | Path) -> RewardCard:
        """Read and check a card.

        Raises:
            RewardError: Not a YAML mapping, an unknown or missing key, or a value that is out of range.
        """
        return made(cls, read_card_file(path), str(path))

    def summary(self) -> str:
        """Who scores, what it reads, and which logit counts, on one line."""
        who = self.model or f"average of {self.average}: {', '.join(self.models or ())}"
        minus = f" - logit {self.minus}" if self.minus is not None else ""
        return f"{who:50} {self.input:28} {'-' if self.sign < 0 else ''}logit {self.logit}{minus}"

    def said(self, response: str) -> str:
        """The part of a response that is scored."""
        return _RESPONSES[self.response](response)

    def scaled(self, raw: Any) -> Any:
        """The score of a raw value (a number, or a tensor of them): sign, then mean and std."""
        return (self.sign * raw - self.mean) / self.std


def cards() -> dict[str, Path]:
    """Names and files of the cards that ship with rsoups."""
    return {path.stem: path for path in sorted(shipped("rewards").glob("*.yaml"))}


def is_adapter(source: str, revision: str) -> bool:
    """Whether a folder or Hub repository holds an adapter, and no whole model."""
    from transformers.utils import cached_file
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(source, revision=revision) is None:
        return False
    quiet: dict[str, Any] = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    return cached_file(source, "config.json", revision=revision, **quiet) is None


class LoadedReward(Protocol):
    """What `load_reward` returns, whatever its kind: prompts and responses in, one float each out (None: no opinion).

    Attributes:
        name: Of records, logs and plots.
        columns: Those of a dataset that it looks at beside prompts and responses, passed by name.
    """

    name: str
    columns: tuple[str, ...]

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[Any]: ...


class Reward:
    """A loaded reward model: ``reward(prompts, responses) -> list[float]``.

    Runs without gradients, in the card's precision, sorted by length into batches of equal padding. In float32 scores do not
    depend on the batching. Models whose weights a card averages are averaged once, in float64, by way of a temporary folder.

    Args:
        card: What the reward is.
        device: Where the model runs.
        trust_remote_code: Run Python code that comes with the model, of a kind that transformers does not know.

    Raises:
        RewardError: A model that cannot be loaded, that asks for code of its own without leave, that has no trained head, that
            lacks the card's logits, or that cannot be averaged with the others.
    """

    columns: tuple[str, ...] = ()  # of a dataset: a model looks at prompt and response only

    def __init__(self, card: RewardCard, device: str = "cpu", trust_remote_code: bool = False):
        if card.average == "scores":
            raise RewardError(f"reward card {card.name!r} averages scores of several models: use load_reward")
        self.card = card
        self.name = self.__name__ = card.name  # TRL logs a reward under its __name__
        if card.model is not None:
            model = self._load(resolve(card.model), trust_remote_code)
        else:
            with tempfile.TemporaryDirectory(prefix="rsoups-") as folder:
                model = self._load(self._averaged(folder), trust_remote_code)
        self._columns = [self._column(model.config, label) for label in (card.logit, card.minus) if label is not None]
        self._model = model.eval().requires_grad_(False).to(device)
        self._pad_id = self._padding()
        self._even = False
        self._even = self._moves_with_padding()

    @property
    def _dtype(self) -> Any:
        """The torch dtype to compute in."""
        import torch

        return torch.float32 if self.card.dtype == "auto" else getattr(torch, self.card.dtype)

    def _averaged(self, folder: str) -> str:
        from rsoups.full_weights import interpolate_checkpoints

        out = Path(folder) / "average"
        try:
            interpolate_checkpoints(
                [*(self.card.models or ())], self.card.lambdas, out, dtype=self._dtype, progress=False
            )
        except RsoupsError as error:
            raise RewardError(f"reward card {self.name!r}: its models' weights do not average: {error}") from error
        return str(out)

    def _load(self, source: str, trust_remote_code: bool) -> Any:
        from transformers import AutoTokenizer

        # Of "main", said aloud, transformers also looks for the conversion bot's safetensors where it holds a pickle only.
        revision = self.card.revision or "main"
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(source, **options)
            if is_adapter(source, revision):
                return self._with_adapter(source, options)
            model, missing = self._classifier(source, options)
        except RsoupsError as error:
            raise RewardError(f"reward {self.name!r}: {error}") from error
        except (OSError, ValueError, RuntimeError) as error:
            what = f"reward {self.name!r}: cannot load {self.card.model or self.card.models!r}"
            if "trust_remote_code" in str(error):
                raise RewardError(
                    f"{what}: it brings Python code of its own; read it, and allow it with trust_remote_code (in Python: =True)"
                ) from None
            raise RewardError(f"{what}: {why_not(source, self.card.revision) or error}") from error
        self._check_trained(missing)
        return model

    def _classifier(self, source: str, options: dict[str, Any]) -> tuple[Any, set[str]]:
        """A sequence classifier, and the names of those of its parameters that its files do not hold."""
        from transformers import AutoModelForSequenceClassification

        load = AutoModelForSequenceClassification.from_pretrained
        model, found = from_safetensors(load, source, dtype=self._dtype, output_loading_info=True, **options)
        return model, set(found["missing_keys"])

    def _with_adapter(self, source: str, options: dict[str, Any]) -> Any:
        """The base that an adapter names, with the adapter written into it."""
        from rsoups.adapters import PREFIX
        from rsoups.soup import Soup, interpolate

        place = source if Path(source).is_dir() or not self.card.revision else f"{source}@{self.card.revision}"
        soup = interpolate({self.name: place}, [1.0])
        assert isinstance(soup, Soup)
        base = soup.config.base_model_name_or_path
        if not base:
            raise RewardError(f"{source!r} is an adapter that does not name its base")
        whole = {
            name.removeprefix(PREFIX): tensor.shape for name, tensor in soup.state_dict.items() if "lora_" not in name
        }
        heads = [shape[0] for shape in whole.values() if len(shape) == 2]
        options = options | {"revision": soup.config.revision or "main"} | ({"num_labels": min(heads)} if heads else {})

        model, missing = self._classifier(resolve(base), options)
        self._check_trained(missing - set(whole))
        text_config = model.config.get_text_config()
        if text_config.pad_token_id is None:  # TRL trains with the tokenizer's, and no adapter tells of it
            text_config.pad_token_id = self._tokenizer.pad_token_id
        return soup.load(model).merge_and_unload()

    def _check_trained(self, missing: set[str]) -> None:
        """Refuse a model with parameters that are in no file: they would be drawn at random."""
        if missing:
            raise RewardError(
                f"reward {self.name!r}: {self.card.model or self.card.models!r} holds no trained {sorted(missing)[0]}, so its "
                "scores would be random: name a trained sequence classifier"
            )

    def _padding(self) -> int | None:
        """The id that pads, None for one that is in no row of a batch.

        It must be the model's, not the tokenizer's: a decoder reads its score at the last token that is not this one, whoever
        put it there. Only so a batch scores as each row alone.
        """
        tokenizer, config = self._tokenizer, self._model.config.get_text_config()
        if tokenizer.sep_token is None and (
            "{sep}" in self.card.input or not tokenizer.num_special_tokens_to_add(True)
        ):
            logger.info("reward %s: its tokenizer has no separator token, none is put in", self.name)
        pad = config.pad_token_id
        if pad is None or not 0 <= pad < self._model.get_input_embeddings().num_embeddings:
            logger.info("reward %s: its model has no pad token, a token that no input holds stands in", self.name)
            return None
        return int(pad)

    def _moves_with_padding(self) -> bool:
        """Whether this model may see no padding; says by how much its precision makes scores move with their batch."""
        import torch

        rows = self.encode(["a", "a"], ["", " ".join(["a"] * min(self.card.max_length // 8, 32))])
        with torch.inference_mode():
            try:
                alone = torch.cat([self._logits([row]) for row in rows]).double()
            except Exception as error:
                raise RewardError(
                    f"reward {self.name!r}: {self.card.model or self.card.models!r} cannot read a text: "
                    f"{str(error).partition(chr(10))[0]}"
                ) from error
            try:
                apart = float((self._logits(rows).double() - alone).abs().max())
            except Exception:  # BART, say, where its pad token is its end token too
                apart = float("inf")
        exact = self._dtype == torch.float32
        if apart == float("inf") or (exact and apart > _ROUNDING * max(1.0, float(alone.abs().max()))):
            logger.info("reward %s: padding changes its scores, batches are of equal lengths", self.name)
            return True
        if not exact:
            logger.warning(
                "reward %s: in %s its logits move with their batch, by %.2g in a test; dtype: float32 in its card is exact",
                self.name, self.card.dtype, apart,
            )  # fmt: skip
        return False

    def _column(self, config: Any, label: int | str) -> int:
        names = {int(i): str(name) for i, name in config.id2label.items()}
        found = [i for i, name in names.items() if label == (i if isinstance(label, int) else name)]
        if len(found) != 1:
            models = self.card.model or self.card.models
            how_many = "no" if not found else f"{len(found)} times the"
            raise RewardError(f"reward {self.name!r}: {how_many} logit {label!r} in {models!r}, which has {names}")
        return found[0]

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> list[dict[str, list[int]]]:
        """The model's input for each sample, unpadded."""
        card = self.card
        reads = card.input in _INPUTS or "{question}" in card.input
        questions = [filled(card.question, question=question_of(prompt)) if reads else "" for prompt in prompts]
        said = [card.said(response) for response in responses]
        if card.input in _INPUTS:
            reverse = card.input == "reversed_pair"
            return encode_pairs(self._tokenizer, questions, said, card.max_length, reverse, card.cut)
        return encode_texts(self._tokenizer, card.input, questions, said, card.max_length, card.cut)

    def explain(self, prompt: str, response: str) -> dict[str, Any]:
        """What the model reads of one sample, and what it says: ``text``, ``ids``, ``logits`` by label, ``score``."""
        import torch

        (encoded,) = self.encode([prompt], [response])
        with torch.inference_mode():
            logits = self._logits([encoded])[0].tolist()
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
            columns: Of a dataset; not looked at.

        Raises:
            RewardError: Unequal numbers, or a score that is not finite (the sample is shown).
        """
        import torch

        if len(prompts) != len(responses):
            raise RewardError(f"reward {self.name!r}: {len(prompts)} prompts but {len(responses)} responses")
        encoded = self.encode(prompts, responses)
        scores = [0.0] * len(encoded)
        with torch.inference_mode():
            for batch in batches(encoded, self._model.device, self._even):
                logits = self._logits([encoded[i] for i in batch])
                raw = logits[:, self._columns[0]]
                if len(self._columns) == 2:
                    raw = raw - logits[:, self._columns[1]]
                for i, value in zip(batch, self.card.scaled(raw).tolist(), strict=True):
                    scores[i] = value
        check_scores(self.name, scores, prompts, responses)
        return scores

    def _logits(self, rows: list[dict[str, list[int]]]) -> Tensor:
        """(B, labels), float32.

        Where the model has no pad token of its own, one that is in no row stands in: of a decoder's row the last token then
        counts, whatever it is.
        """
        pad = self._pad_id
        if pad is None:
            used = {token for row in rows for token in row["input_ids"]}
            pad = next(token for token in range(len(used) + 1) if token not in used)
            self._model.config.pad_token_id = self._model.config.get_text_config().pad_token_id = pad
        return self._model(**padded(rows, pad, self._model.device)).logits.float()


class AveragedScores:
    """Several loaded reward models, of any kinds: the score is the weighted mean of theirs."""

    columns: tuple[str, ...] = ()

    def __init__(self, card: RewardCard, device: str = "cpu", trust_remote_code: bool = False):
        from rsoups.soup import weights_of

        self.card = card
        self.name = self.__name__ = card.name
        sources = [source.partition("@") for source in card.models or ()]
        try:
            (self.lambdas,) = weights_of(card.lambdas, len(sources), False, False)
        except RsoupsError as error:
            raise RewardError(f"reward card {self.name!r}: {error}") from error
        one = replace(card, models=None, average=None, lambdas=None, model="")
        self.members = [
            Reward(replace(one, model=model, revision=revision or None), device, trust_remote_code)
            for model, _, revision in sources
        ]

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
        """Score each response to its prompt; errors as of `Reward`."""
        rows = zip(*(member(prompts, responses) for member in self.members), strict=True)
        return [math.fsum(weight * score for weight, score in zip(self.lambdas, row, strict=True)) for row in rows]


def read_card(path: str | Path) -> RewardCard | FunctionCard | JudgeCard:
    """Read and check a card of any kind.

    Raises:
        RewardError: Not a YAML mapping, an unknown or missing key, or a value that is out of range.
    """
    data = read_card_file(path)
    kind: Any = JudgeCard if "judge" in data else FunctionCard if "function" in data else RewardCard
    return made(kind, data, str(path))


def _of_card(
    card: RewardCard | FunctionCard | JudgeCard, device: str, trust_remote_code: bool, arguments: dict[str, Any]
) -> LoadedReward:
    if isinstance(card, FunctionCard):
        return FunctionReward.of(replace(card, arguments={**card.arguments, **arguments}))
    if arguments:
        raise RewardError(
            f"reward {card.name!r} is a model: only a function's card takes arguments, {sorted(arguments)}"
        )
    if isinstance(card, JudgeCard):
        return Judge(card, device, trust_remote_code)
    kind = AveragedScores if card.average == "scores" else Reward
    return kind(card, device, trust_remote_code)


def load_reward(
    source: str | Path | Callable[..., Any],
    device: str = "cpu",
    *,
    trust_remote_code: bool = False,
    **arguments: Any,
) -> LoadedReward:
    """Load a reward.

    Args:
        source: A shipped card's name (``"naturalness"``, ``"rouge-l"``, ...), the path of a YAML card, a sequence classifier's
            Hub id or folder (read as ``tokenizer(question, response)``, score logits[0]), ``"module:function"`` (also of a
            file beside you), or a function.
        device: Where a model runs.
        trust_remote_code: Run Python code that comes with a model, of a kind that transformers does not know.
        arguments: Of the function that a card names, over the card's own.

    Raises:
        RewardError: No such reward (the shipped ones are listed), or an invalid one.
    """
    text, known = str(source), cards()
    path = known.get(text, Path(text))
    if not callable(source) and path.is_file():
        return _of_card(read_card(path), device, trust_remote_code, arguments)
    if arguments:
        raise RewardError(f"{text} is no card: only a function that a card names takes arguments, {sorted(arguments)}")
    if callable(source):
        return FunctionReward(source)
    if path.is_dir() or _HUB_ID.fullmatch(text):
        logger.info("%s is no card: scored as tokenizer(question, response), logits[0]", text)
        return Reward(RewardCard(name=path.name, model=text), device, trust_remote_code)
    module, separator, name = text.partition(":")
    if separator:
        return FunctionReward(imported(module, name), name)
    raise RewardError(
        f"no reward {text!r}; shipped cards: {sorted(known)}, or give a YAML card, a classifier's Hub id or module:function"
    )


def rewards_by_name(loaded: Mapping[str, LoadedReward]) -> dict[str, LoadedReward]:
    """Rewards by their names, none of them lost.

    Args:
        loaded: Rewards by what they were loaded from.

    Raises:
        RewardError: Two have one name.
    """
    sources: dict[str, str] = {}
    for source, reward in loaded.items():
        if reward.name in sources:
            raise RewardError(
                f"two rewards have the name {reward.name!r}, {sources[reward.name]} and {source}: "
                "give each its own, in its card or as the function's name"
            )
        sources[reward.name] = source
    return {name: loaded[source] for name, source in sources.items()}


def models_of(source: str) -> list[tuple[str, str | None]]:
    """Models and revisions that a reward will load, as far as its card or its name tells; errors as of `load_reward`."""
    path = cards().get(source, Path(source))
    if path.is_file():
        card = read_card(path)
        if not isinstance(card, RewardCard):
            return []
        if card.model is not None:
            return [(card.model, card.revision)]
        return [(model, revision or None) for model, _, revision in (name.partition("@") for name in card.models or ())]
    return [(source, None)] if path.is_dir() or _HUB_ID.fullmatch(source) else []


def reward_function(
    reward: Callable[..., Any],
    cut: Callable[[str], str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Mapping[str, Sequence[Any]] | None = None,
) -> Callable[..., list[float | None]]:
    """A reward in TRL's signature, ``f(prompts, completions, **columns)``, that sees what `cut` leaves of a response.

    Where the prompt holds the response's first words, it sees them too; with the policy's `tokenizer`, joined as the tokens
    say (a word that goes on has no space before it).

    Args:
        reward: A loaded reward, or a function.
        cut: Response -> the part of it that counts.
        tokenizer: The policy's.
        data: Columns whose values the reward gets as they are, at the places that the dataset's column `PLACE` tells. (As
            columns of the dataset Arrow would change them: all rows of one type, all dicts with the same keys.)
    """
    scored = FunctionReward(reward)

    def whole(prompt: Any, completion: Any, ids: list[int] | None) -> str:
        if isinstance(completion, list):  # messages: a conversation's answer
            return messages_of(completion)[-1]["content"]
        if not (start := response_start(prompt)):
            return str(completion)
        if tokenizer is None or ids is None:
            return f"{start} {completion}"
        started = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        before, after = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in (started, [*started, *ids]))
        return start + after[len(before) :]

    def function(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        ids = columns.get("completion_ids") or [None] * len(prompts)
        rows = zip(prompts, completions, ids, strict=True)
        places = columns.pop(PLACE, [])
        columns |= {name: [values[place] for place in places] for name, values in (data or {}).items()}
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
        check_scores(name, scores, prompts, completions)
        return scores

    function.__name__ = name
    return function
