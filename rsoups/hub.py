"""Publish soups on the Hugging Face Hub: one commit, with a model card that says only what is known."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from rsoups._errors import HubError

if TYPE_CHECKING:
    from rsoups.soup import Soup

_ATTEMPTS = 5
_LONGEST_WAIT = 60.0  # seconds
_T = TypeVar("_T")


def push(
    soup: Soup,
    repo_id: str,
    *,
    private: bool | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Publish a soup: adapter, soup.json and card, in one commit.

    Args:
        soup: The soup.
        repo_id: ``user/name``; made if it is not there.
        private: Of a new repository.
        commit_message: The λ by default.
        token: huggingface_hub's own by default; never logged.

    Returns:
        The URL of the commit.

    Raises:
        HubError: Refused (which token, which scope), or not reached after bounded retries. Nothing is half-published.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "soup"
        soup.save_pretrained(folder)
        (folder / "README.md").write_text(card(soup, repo_id), encoding="utf-8")
        _retried(repo_id, lambda: api.create_repo(repo_id, private=private, exist_ok=True))

        def commit() -> Any:
            # Operations remember what was uploaded, and a conflict is solved on a new head: each attempt starts afresh.
            files = sorted(path for path in folder.iterdir() if path.is_file())
            operations = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in files]
            return api.create_commit(repo_id, operations, commit_message=commit_message or f"Soup: {_mix(soup)}")

        return str(_retried(repo_id, commit).commit_url)


def card(soup: Soup, repo_id: str) -> str:
    """The model card: base, ingredients with revisions and hashes, λ, and how to load it."""
    from huggingface_hub import ModelCard, ModelCardData

    base = soup.config.base_model_name_or_path or ""
    published = base.count("/") == 1 and not base.startswith((".", "/", "~"))  # a folder's path tells no one anything
    data = ModelCardData(
        base_model=base if published else None,
        library_name="peft",
        tags=["rewarded-soups", "lora", "merge"],
        pipeline_tag="text-generation" if soup.config.task_type == "CAUSAL_LM" else None,
    )
    metadata = data.to_dict() | ({"base_model_relation": "adapter"} if published else {})
    rows = "\n".join(
        f"| {ingredient.name} | {weight:g} | `{ingredient.source}` | {ingredient.revision or ''} | `{ingredient.sha256[:16]}` |"
        for ingredient, weight in zip(soup.ingredients, soup.lambdas, strict=True)
    )
    error = "" if soup.svd_error is None else f" Relative error of the truncation: {soup.svd_error:.2e}."
    body = f"""
# {repo_id.rsplit("/", 1)[-1]}

A [rewarded soup](https://arxiv.org/abs/2306.04488): LoRA adapters, one per reward, interpolated in weight space
({_mix(soup)}; method `{soup.method}`).{error} Base: `{base or "not recorded"}`.

| ingredient | λ | source | revision | sha256 |
| --- | --- | --- | --- | --- |
{rows}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{repo_id}")
```

`soup.json` holds the whole lineage. Made with rsoups {soup.lineage["versions"]["rsoups"]}.
"""
    import yaml

    text = f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n{body}"
    return str(ModelCard(text))


def _mix(soup: Soup) -> str:
    return ", ".join(f"{weight:g} {i.name}" for i, weight in zip(soup.ingredients, soup.lambdas, strict=True))


def _retried(repo_id: str, call: Callable[[], _T]) -> _T:
    """Call, and call again where waiting or a new head can help; explain where it cannot."""
    import httpx2  # what huggingface_hub 2 speaks HTTP with
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return call()
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise HubError(
                    f"the Hub refused {repo_id} ({status}): log in with `hf auth login` using a token of write scope for "
                    f"{repo_id.split('/')[0]}"
                ) from None
            if status not in (409, 429) and status < 500:
                raise HubError(f"the Hub refused {repo_id} ({status}): {error.server_message or error}") from None
            reason, wait = f"status {status}", error.response.headers.get("Retry-After", "")
        except OfflineModeIsEnabled:
            raise HubError(f"cannot publish {repo_id}: HF_HUB_OFFLINE is set") from None
        except (httpx2.TransportError, ConnectionError, TimeoutError) as error:
            reason, wait = f"{type(error).__name__}", ""
        if attempt < _ATTEMPTS:
            time.sleep(min(float(wait) if wait.isdigit() else 2.0 ** (attempt - 1), _LONGEST_WAIT))
    raise HubError(f"the Hub did not take {repo_id} in {_ATTEMPTS} attempts ({reason}); nothing is half-published")
