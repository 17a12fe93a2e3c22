"""Model cards that say only what is known: of a trained adapter, of a soup, of a front of soups."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined

from rsoups.adapters.lineage import Manifest, parents_of
from rsoups.adapters.lineage_tree import log
from rsoups.bases.names import short_name
from rsoups.common.assets import asset, origin
from rsoups.hub.evaluation import Evaluation
from rsoups.hub.licenses import EMBEDDED_PREFIX, Terms, on_hub

if TYPE_CHECKING:
    from rsoups.adapters.settings import LoraSettings

_PACKAGES = ("rsoups", "peft", "torch", "transformers", "trl")


def card(
    repo_id: str,
    config: LoraSettings,
    manifests: Mapping[str, Manifest],
    terms: Terms,
    evaluation: Evaluation | None = None,
) -> str:
    """Return the model card of a repository.

    Args:
        repo_id: ``user/name``.
        config: PEFT's config, which has the public name of the base.
        manifests: Manifest of each adapter by its folder in the repository; "" is the repository itself. Several are
            soups of the same ingredients.
        terms: License of the repository.
        evaluation: Front of the soups, if they were evaluated.
    """
    from huggingface_hub import ModelCard, ModelCardData

    (folder, manifest), *_ = manifests.items()
    kind = "front" if folder else "soup" if "ingredients" in manifest else "adapter"
    name = repo_id.rsplit("/", 1)[-1]
    base = short_name(config.base_model_name_or_path) or ""
    data = ModelCardData(
        base_model=base if on_hub(base) else None,
        base_model_relation="adapter" if on_hub(base) else None,
        library_name="peft",
        license=terms.license,
        tags=["rewarded-soups", "lora", "rlhf", *(["merge"] if kind != "adapter" else [])],
        datasets=_datasets(manifest) or None,
        pipeline_tag="text-generation" if config.task_type == "CAUSAL_LM" else None,
        model_name=name if evaluation else None,
        eval_results=evaluation.results() if evaluation else None,
    )

    body = (
        _environment()
        .from_string(asset("card.md.j2"))
        .render(
            base=base,
            commands=_commands(manifest),
            config=config,
            embedded=base.startswith(EMBEDDED_PREFIX),
            evaluation=evaluation,
            folder=folder,
            ingredients=parents_of(manifest),
            kind=kind,
            manifest=manifest,
            manifests=manifests,
            name=name,
            repo_id=repo_id,
            terms=terms,
            tree=log(manifest, name),
        )
    )
    tidy = re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{tidy}"))


def _environment() -> Environment:
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    environment.globals["linked"] = _linked
    environment.filters["g"] = "{:g}".format
    return environment


def _linked(name: Any, revision: str | None = None) -> str:
    """A name with a link to it, where it is on the Hub."""
    name = str(name or "")
    if on_hub(name):
        return f"[{name}](https://huggingface.co/{name}{f'/tree/{revision}' if revision else ''})"
    if name.startswith(EMBEDDED_PREFIX):
        return f"`{name}` ({origin(name)})"
    return f"`{name}`" if name else "not recorded"


def _datasets(manifest: Manifest) -> list[str]:
    """Datasets on the Hub that the model and its ancestors were trained on."""
    manifests = [manifest, *manifest.get("history", {}).values()]
    names = [str((each.get("data") or {}).get("dataset") or "") for each in manifests]
    return sorted({name for name in names if on_hub(name)})


def _commands(manifest: Manifest) -> list[str]:
    """Commands that make the model again."""
    versions = manifest.get("versions") or {}
    # Without the local part of a version, such as +cu128, which no index has.
    pins = [f"{name}=={str(versions[name]).partition('+')[0]}" for name in _PACKAGES if name in versions]
    install = f"pip install {' '.join(pins)}"
    if "ingredients" not in manifest:
        return [install, manifest.get("command") or "not recorded"]

    ingredients, history = parents_of(manifest), manifest.get("history", {})
    trained = [str(history[each["sha256"]].get("command")) for each in ingredients if each["sha256"] in history]
    return [install, *dict.fromkeys(trained), _interpolation(manifest)]


def _interpolation(soup: Manifest) -> str:
    ingredients = parents_of(soup)
    lambdas = [float(each["lambda"]) for each in ingredients]
    words = ["rsoups interpolate"]
    for each in ingredients:
        source = each["source"].partition("@")[0]
        words.append(f"{source}@{each['revision']}" if each["revision"] else source)

    words += ["--lambdas", *map(repr, lambdas)]
    if soup["method"] != "exact":
        words.append(f"--method {soup['method']}")
    if soup["method"] == "svd":
        words.append(f"--rank {soup.get('rank')}")
    if abs(sum(lambdas) - 1) > 1e-6 or not all(0 <= weight <= 1 for weight in lambdas):
        words.append("--extrapolate")
    return " ".join([*words, "--out soup"])
