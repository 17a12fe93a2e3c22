"""The prompts of a sweep, checked and in tokens."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rsoups.common.errors import DatasetError
from rsoups.data.prompts import fit_prompts, question_of
from rsoups.generation.decoding import Prompt, encode
from rsoups.sweeps.base import Base
from rsoups.sweeps.settings import SweepSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptTable:
    """The prompts that leave room for a response.

    Attributes:
        prompts: Texts or messages.
        ids: Tokens of each prompt.
        columns: Further values of each prompt, by name, for rewards.
    """

    prompts: list[Prompt]
    ids: list[list[int]]
    columns: dict[str, list[Any]]

    @classmethod
    def of(
        cls,
        prompts: Sequence[Prompt],
        columns: Mapping[str, Sequence[Any]],
        base: Base,
        template: Mapping[str, Any],
        settings: SweepSettings,
    ) -> PromptTable:
        """Check prompts, and tokenize them with the chat template's variables in `template`.

        Raises:
            DatasetError: No prompts, equal prompts, a prompt without a question or without tokens, a column of another
                length, or prompts that are too long.
        """
        for prompt in prompts:
            question_of(prompt)  # refuses a prompt without a question
        different = {json.dumps(prompt) for prompt in prompts}
        if not prompts or len(different) != len(prompts):
            raise DatasetError(
                f"got {len(prompts)} prompts, {len(different)} of them different; pass at least one, and each once"
            )
        for name, column in columns.items():
            if len(column) != len(prompts):
                raise DatasetError(
                    f"column {name!r} has {len(column)} values for {len(prompts)} prompts; pass one each"
                )
        ids = [encode(base.tokenizer, prompt, template) for prompt in prompts]
        if not all(ids):
            raise DatasetError(f"prompt {prompts[ids.index([])]!r} has no tokens; leave it out")

        places = list(range(len(prompts)))
        if base.context is not None:
            longest = base.context - settings.max_new_tokens
            places = fit_prompts(places, [len(tokens) for tokens in ids], longest, settings.long_prompts)
        if len(places) < len(prompts):
            logger.warning(
                "%d of %d prompts are dropped because they are too long", len(prompts) - len(places), len(prompts)
            )
        kept = {name: [column[place] for place in places] for name, column in columns.items()}
        return cls([prompts[place] for place in places], [ids[place] for place in places], kept)
