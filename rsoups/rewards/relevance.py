"""A reward for what a response is about: the cosine of its embedding and a text's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rsoups.common.errors import RewardError
from rsoups.data.prompts import question_of
from rsoups.rewards.text_metrics import words

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["relevance"]  # what a card may name

_BATCH = 32  # texts
_LONGEST = 256  # tokens, as sentence-transformers reads with these models
_IN_A_ROW = 3  # words that count as copied


def relevance(model: str, copied: float = 0.0) -> Callable[..., list[float]]:
    """Cosine of a response and what it is about, -1 to 1, less the share of the response that is copied.

    A text is the mean of its tokens' last hidden states (Reimers and Gurevych 2019). It is the dataset's column ``plot``, or
    else the question.

    Args:
        model: Encoder of sentences: folder, Hub id or ``rsoups/...``.
        copied: Weight of the share of the response's three words in a row that the text has too; a policy learns to repeat
            the text where it costs nothing.
    """
    if isinstance(copied, bool) or not isinstance(copied, (int, float)) or copied < 0:
        raise RewardError(f"relevance: copied is {copied!r}, must be a number, 0 or more")
    embed = _encoder(model)

    def reward(
        prompts: Sequence[Any], completions: Sequence[str], plot: Sequence[str | None] | None = None
    ) -> list[float]:
        given = plot or [None] * len(prompts)
        texts = [text or question_of(prompt) for text, prompt in zip(given, prompts, strict=True)]
        places = {text: place for place, text in enumerate(dict.fromkeys([*texts, *completions]))}
        embedded = embed(list(places))

        scores = []
        for text, completion in zip(texts, completions, strict=True):
            cosine = float(embedded[places[text]] @ embedded[places[completion]])
            scores.append(cosine - copied * _share_copied(completion, text))
        return scores

    reward.__name__ = "relevance"
    return reward


def _share_copied(response: str, text: str) -> float:
    """Share of a response's words in a row that are in a text; 0 for a response that is shorter."""
    of_response, of_text = (_in_a_row(words(part)) for part in (response, text))
    return sum(each in set(of_text) for each in of_response) / len(of_response) if of_response else 0.0


def _in_a_row(found: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(found[place : place + _IN_A_ROW]) for place in range(len(found) - _IN_A_ROW + 1)]


def _encoder(source: str) -> Callable[[list[str]], Tensor]:
    """Return a function of texts to their embeddings (n, d), float32, of length 1."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from rsoups.bases.load import from_safetensors
    from rsoups.common.assets import resolve

    folder = resolve(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")  # on the left it would move positions
        model = from_safetensors(AutoModel.from_pretrained, folder, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise RewardError(f"relevance: cannot load the encoder {source!r}: {reason}") from error

    @torch.inference_mode()
    def embed(texts: list[str]) -> Tensor:
        embedded = torch.empty(len(texts), model.config.hidden_size)
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            inputs = tokenizer(
                [texts[place] for place in batch],
                padding=True,
                truncation=True,
                max_length=_LONGEST,
                return_tensors="pt",
            )
            mask = inputs["attention_mask"][..., None].float()
            states = model(**inputs).last_hidden_state * mask
            embedded[batch] = torch.nn.functional.normalize(states.sum(1) / mask.sum(1).clamp(min=1), dim=-1)
        return embedded

    return embed
