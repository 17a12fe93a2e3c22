"""Reward cards and rewards: prompts and responses in, one float each out.

A card (``rewards/*.yaml``) says which model scores, what its input is made of, and which logit is the score. The
question is always in the input: `question_of` finds it in the prompt (the paper's released code lost it for two tasks).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsoups.bases.load import from_safetensors, why_not
from rsoups.common.assets import resolve
from rsoups.common.errors import RewardError, RsoupsError
from rsoups.data.prompts import question_of
from rsoups.rewards.functions import check_scores
from rsoups.rewards.inputs import batches, encode_pairs, encode_texts, filled, padded

if TYPE_CHECKING:
    from torch import Tensor

from rsoups.rewards.cards import INPUTS, RewardCard

_ROUNDING = 1e-3  # of float32 logits, in a batch and alone

logger = logging.getLogger(__name__)


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
        from rsoups.soups.whole_models import interpolate_checkpoints

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
        from rsoups.adapters.layer_names import PREFIX
        from rsoups.soups.interpolation import interpolate
        from rsoups.soups.soup import Soup

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
        reads = card.input in INPUTS or "{question}" in card.input
        questions = [filled(card.question, question=question_of(prompt)) if reads else "" for prompt in prompts]
        said = [card.said(response) for response in responses]
        if card.input in INPUTS:
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
