"""Reward models: sequence classifiers, and averages of them.

A card (``rewards/*.yaml``) says which model scores, what its input is made of, and which logit is the score. The question is
always in the input: `question_of` finds it in the prompt (the paper's released code lost it for two tasks).
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsoups.bases.load import dtype_of, from_safetensors, why_not
from rsoups.common.assets import resolve
from rsoups.common.errors import RewardError, RsoupsError
from rsoups.data.prompts import messages_of, question_of
from rsoups.rewards.cards import INPUTS, RewardCard
from rsoups.rewards.inputs import batches, encode_chats, encode_pairs, encode_texts, filled, padded
from rsoups.rewards.interface import LoadedReward

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDING = 1e-3  # relative difference of float32 logits between a batch and single rows

logger = logging.getLogger(__name__)


class Reward(LoadedReward):
    """A loaded reward model.

    Runs without gradients, in the card's precision, in batches of samples of like length. In float32 scores do not depend on
    the batch. Weights that a card averages are averaged once, in float64, by way of a temporary folder.

    Args:
        card: Card of the reward.
        device: Device of the model.
        trust_remote_code: Run Python code that comes with the model, of a kind that transformers does not know.

    Raises:
        RewardError: A model that cannot be loaded, that requires code of its own, that has no trained head, that lacks the
            card's logits, or that cannot be averaged with the others.
    """

    is_model = True

    def __init__(self, card: RewardCard, device: str = "cpu", trust_remote_code: bool = False):
        from rsoups.rewards.relative_positions import project_positions_once

        if card.average == "scores":
            raise RewardError(f"reward card {card.name!r} averages scores of several models: use load_reward")
        self.card, self.name = card, card.name
        self._model_name = card.model or card.models  # for errors
        self._dtype = dtype_of(card.model, card.dtype, device, scores=True)
        if card.model is not None:
            model = self._load(resolve(card.model), trust_remote_code)
        else:
            with tempfile.TemporaryDirectory(prefix="rsoups-") as folder:
                model = self._load(self._averaged(folder), trust_remote_code)

        labels = [label for label in (card.logit, card.minus) if label is not None]
        self._logit_places = [self._place_of(model.config, label) for label in labels]
        self._model = model.eval().requires_grad_(False).to(device)
        project_positions_once(self._model)
        self._pad_id = self._padding()
        self._even = False  # the test itself pads
        self._even = self._moves_with_padding()

    def _averaged(self, folder: str) -> str:
        """Average the weights of the card's models into a folder, and return it."""
        from rsoups.soups.whole_models import interpolate_checkpoints

        out = Path(folder) / "average"
        models = [*(self.card.models or ())]
        try:
            interpolate_checkpoints(models, self.card.lambdas, out, dtype=self._dtype, progress=False)
        except RsoupsError as error:
            raise RewardError(f"reward card {self.name!r}: its models' weights do not average: {error}") from error
        return str(out)

    def _load(self, source: str, trust_remote_code: bool) -> Any:
        from transformers import AutoTokenizer

        # With an explicit "main", transformers also looks for the safetensors that the Hub's bot converted from a pickle.
        revision = self.card.revision or "main"
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(source, **options)
            if self.card.adapter is not None:
                return self._with_adapter(resolve(self.card.adapter), options, base=str(self.card.model))
            if is_adapter(source, revision):
                return self._with_adapter(source, options)
            model, missing = self._classifier(source, options)
        except RsoupsError as error:
            raise RewardError(f"reward {self.name!r}: {error}") from error
        except (OSError, ValueError, RuntimeError) as error:
            what = f"reward {self.name!r}: cannot load {self._model_name!r}"
            if "trust_remote_code" in str(error):
                raise RewardError(
                    f"{what}: it brings Python code of its own. Review it, then pass --trust_remote_code (in Python: "
                    "trust_remote_code=True)"
                ) from None
            raise RewardError(f"{what}: {why_not(source, self.card.revision) or error}") from error
        self._check_trained(missing)
        return model

    def _classifier(self, source: str, options: dict[str, Any]) -> tuple[Any, set[str]]:
        """Load a sequence classifier; return it with the names of its parameters that no file holds."""
        from transformers import AutoModelForSequenceClassification

        load = AutoModelForSequenceClassification.from_pretrained
        model, report = from_safetensors(load, source, dtype=self._dtype, output_loading_info=True, **options)
        return model, set(report["missing_keys"])

    def _with_adapter(self, source: str, options: dict[str, Any], base: str | None = None) -> Any:
        """Load a base, by default the one that the adapter names, and merge the adapter into it."""
        from rsoups.adapters.layer_names import PREFIX
        from rsoups.bases.names import check_base
        from rsoups.soups.interpolation import interpolate
        from rsoups.soups.soup import Soup

        own_revision = self.card.revision if base is None else None
        place = source if Path(source).is_dir() or not own_revision else f"{source}@{own_revision}"
        soup = interpolate({self.name: place}, [1.0])
        assert isinstance(soup, Soup)
        if base is not None:
            check_base([(source, soup.settings)], base, revision=self.card.revision)
        else:
            base = soup.settings.base_model_name_or_path
            options = options | {"revision": soup.settings.revision or "main"}
        if not base:
            raise RewardError(f"{source!r} is an adapter that does not name its base")

        # Parameters that the adapter brings whole: its head, whose rows are the number of labels.
        shapes = {name.removeprefix(PREFIX): t.shape for name, t in soup.state_dict.items() if "lora_" not in name}
        labels = [shape[0] for shape in shapes.values() if len(shape) == 2]
        if labels:
            options = options | {"num_labels": min(labels)}
        model, missing = self._classifier(resolve(base), options)
        self._check_trained(missing - set(shapes))

        text_config = model.config.get_text_config()
        if text_config.pad_token_id is None:  # TRL trains with the tokenizer's, which no adapter's config records
            text_config.pad_token_id = self._tokenizer.pad_token_id
        return soup.load(model).merge_and_unload()

    def _check_trained(self, missing: set[str]) -> None:
        """Refuse a model with parameters that no file holds: transformers draws them at random."""
        if missing:
            raise RewardError(
                f"reward {self.name!r}: {self._model_name!r} holds no trained {min(missing)}, so its scores would be random: "
                "name a trained sequence classifier"
            )

    def _padding(self) -> int | None:
        """Return the id that pads a batch; None for an id that no row of the batch holds.

        It must be the model's own, not the tokenizer's: a decoder reads its score at the last token that is not this one. Only
        so does a row score in a batch as it does alone.
        """
        tokenizer = self._tokenizer
        if tokenizer.sep_token is None and (
            "{sep}" in self.card.input or not tokenizer.num_special_tokens_to_add(True)
        ):
            logger.info("reward %s: its tokenizer has no separator token, so its input has none", self.name)

        pad = self._model.config.get_text_config().pad_token_id
        if pad is None or not 0 <= pad < self._model.get_input_embeddings().num_embeddings:
            logger.info("reward %s: its model has no pad token; a token that no input holds replaces it", self.name)
            return None
        return int(pad)

    def _moves_with_padding(self) -> bool:
        """Whether padding changes the scores; warn about how much they move with the batch in half precision."""
        import torch

        rows = self.encode(["a", "a"], ["", " ".join(["a"] * min(self.card.max_length // 8, 32))])
        with torch.inference_mode():
            try:
                alone = torch.cat([self._logits([row]) for row in rows]).double()
            except RewardError:
                raise
            except Exception as error:
                reason = str(error).partition("\n")[0]
                raise RewardError(f"reward {self.name!r}: {self._model_name!r} cannot read a text: {reason}") from error
            try:
                difference = float((self._logits(rows).double() - alone).abs().max())
            except Exception:  # for example BART, where its pad token is its end token too
                difference = math.inf

        exact = self._dtype == torch.float32
        if difference == math.inf or (exact and difference > _ROUNDING * max(1.0, float(alone.abs().max()))):
            logger.info("reward %s: padding changes its scores, so batches are of equal lengths", self.name)
            return True

        if not exact:
            logger.warning(
                "reward %s: in %s its logits move with their batch, by %.2g in a test; dtype: float32 in its card is exact",
                self.name, self.card.dtype, difference,
            )  # fmt: skip
        return False

    def _place_of(self, config: Any, label: int | str) -> int:
        """Place of the logit with a label (or of this place)."""
        if self.card.head != "logits" and isinstance(label, int):
            return label  # the config names the places of logits only
        names = {int(i): str(name) for i, name in config.id2label.items()}
        places = [i for i, name in names.items() if label == (i if isinstance(label, int) else name)]
        if len(places) != 1:
            how_many = "no" if not places else f"{len(places)} times the"
            raise RewardError(
                f"reward {self.name!r}: {how_many} logit {label!r} in {self._model_name!r}, which has {names}"
            )
        return places[0]

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> list[dict[str, list[int]]]:
        """Return the model's input for each sample, unpadded."""
        card = self.card
        if card.input == "chat":
            return self._encode_chats(prompts, responses)
        if card.input in INPUTS or "{question}" in card.input:
            questions = [filled(card.question, question=question_of(prompt)) for prompt in prompts]
        else:
            questions = [""] * len(prompts)  # not read, so it may be empty

        parts = [card.scored_part(response) for response in responses]
        if card.input in INPUTS:
            reverse = card.input == "reversed_pair"
            return encode_pairs(self._tokenizer, questions, parts, card.max_length, reverse, card.cut)
        return encode_texts(self._tokenizer, card.input, questions, parts, card.max_length, card.cut)

    def _encode_chats(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[dict[str, list[int]]]:
        """Return the model's input of conversations; a prompt that is a text is one turn of the user."""
        import jinja2

        card = self.card
        conversations = []
        for prompt in prompts:
            question = question_of(prompt)  # refuses a prompt that asks nothing
            *before, last = [{"role": "user", "content": question}] if isinstance(prompt, str) else messages_of(prompt)
            if last["role"] != "user":
                raise RewardError(
                    f"reward {self.name!r}: the prompt ends with a message of {last['role']}: {prompt!r:.200}"
                )
            if card.system == "drop":
                before = [message for message in before if message["role"] not in ("system", "developer")]
            conversations.append([*before, {**last, "content": filled(card.question, question=last["content"])}])

        parts = [card.scored_part(response) for response in responses]
        try:
            return encode_chats(self._tokenizer, conversations, parts, card.max_length, card.cut)
        except (jinja2.TemplateError, ValueError) as error:  # ValueError: no template at all
            reason = str(error).partition("\n")[0]
            raise RewardError(
                f"reward {self.name!r}: the chat template of {self._model_name!r} does not take this conversation ({reason}). "
                "system: drop in the card leaves system messages out; a model without a template takes input: pair"
            ) from None

    def explain(self, prompt: str, response: str) -> dict[str, Any]:
        """Return what the model reads of one sample, and its answer: ``text``, ``ids``, ``logits`` by label, ``score``."""
        import torch

        (encoded,) = self.encode([prompt], [response])
        with torch.inference_mode():
            logits = self._logits([encoded])[0].tolist()
        names = self._model.config.id2label if self.card.head == "logits" else {}
        return {
            "text": self._tokenizer.decode(encoded["input_ids"]),
            "ids": encoded["input_ids"],
            "logits": {str(names.get(i, i)): value for i, value in enumerate(logits)},
            "score": self([prompt], [response])[0],
        }

    def _scores(self, prompts: list[Any], responses: list[str], columns: dict[str, Any]) -> list[float]:
        import torch

        encoded = self.encode(prompts, responses)
        scores = [0.0] * len(encoded)
        with torch.inference_mode():
            for batch in batches(encoded, self._model.device, self._even):
                logits = self._logits([encoded[i] for i in batch])
                raw = logits[:, self._logit_places[0]]
                if len(self._logit_places) == 2:
                    raw = raw - logits[:, self._logit_places[1]]
                for i, score in zip(batch, self.card.scaled(self.card.sign * raw).tolist(), strict=True):
                    scores[i] = score
        return scores

    def _logits(self, rows: list[dict[str, list[int]]]) -> Tensor:
        """Return the logits (B, labels), float32.

        For a model without a pad token, one that no row holds pads: a decoder then reads its score at each row's last token.
        """
        pad = self._pad_id
        if pad is None:
            used = {token for row in rows for token in row["input_ids"]}
            pad = next(token for token in range(len(used) + 1) if token not in used)
            self._model.config.pad_token_id = self._model.config.get_text_config().pad_token_id = pad
        out = self._model(**padded(rows, pad, self._model.device))
        logits = getattr(out, self.card.head, None)
        if logits is None or logits.ndim != 2 or max(self._logit_places) >= logits.shape[1]:
            shapes = {name: tuple(value.shape) for name, value in out.items() if hasattr(value, "shape")}
            raise RewardError(
                f"reward {self.name!r}: {self._model_name!r} has no output {self.card.head!r} of the shape (B, logits) with "
                f"the places {self._logit_places}; its outputs are {shapes}"
            )
        result: Tensor = logits.float()
        return result


class AveragedScores(LoadedReward):
    """Several loaded reward models, of any kinds: the score is the weighted mean of theirs.

    Args:
        card: A card with ``average: scores``.
        device, trust_remote_code: As for `Reward`.

    Raises:
        RewardError: Lambdas that do not fit the models, or a model that `Reward` refuses.
    """

    is_model = True

    def __init__(self, card: RewardCard, device: str = "cpu", trust_remote_code: bool = False):
        from rsoups.soups.lambdas import weights_of

        self.card, self.name = card, card.name
        try:
            (self.lambdas,) = weights_of(card.lambdas, len(card.sources), False, False)
        except RsoupsError as error:
            raise RewardError(f"reward card {self.name!r}: {error}") from error

        self.members = []
        for model, revision in card.sources:
            own = replace(card, models=None, average=None, lambdas=None, model=model, revision=revision)
            self.members.append(Reward(own, device, trust_remote_code))

    def _scores(self, prompts: list[Any], responses: list[str], columns: dict[str, Any]) -> list[float]:
        by_model = [member(prompts, responses) for member in self.members]
        return [math.fsum(map(math.prod, zip(self.lambdas, row, strict=True))) for row in zip(*by_model, strict=True)]


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
