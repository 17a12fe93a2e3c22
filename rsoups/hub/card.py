"""Model cards that say only what is known: of a soup, of a front of soups, of a trained adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsoups.adapters.lineage import Manifest
from rsoups.adapters.lineage_tree import log
from rsoups.bases.names import short_name
from rsoups.common.errors import FrontError
from rsoups.common.published import scrubbed
from rsoups.data.tasks import TASKS
from rsoups.fronts.front import Front
from rsoups.fronts.points import Point

if TYPE_CHECKING:
    from peft import LoraConfig

    from rsoups.soups.soup import Soup

from rsoups.adapters.filenames import PICTURE_FILE
from rsoups.hub.licenses import EMBEDDED_PREFIX, license_of, on_hub

_PAPER = "https://arxiv.org/abs/2306.04488"
_SETTINGS = (
    "task",
    "dataset",
    "temperature",
    "max_new_tokens",
    "samples",
    "seed",
)  # of a sweep; the rest may name a disk
_PACKAGES = ("rsoups", "peft", "torch", "transformers", "trl")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A front, which of its points are being published, and how it was sampled, as far as the sweep wrote it down."""

    front: Front
    points: list[Point]
    settings: dict[str, Any]

    @classmethod
    def of(cls, front: Front | str | Path | None, *soups: Soup) -> Evaluation | None:
        """Of a front or a records file; None where there is none.

        Raises:
            FrontError: A soup's λ was not evaluated.
        """
        if front is None:
            return None
        settings: dict[str, Any] = {}
        if not isinstance(front, Front):
            beside = Path(front).with_suffix(".settings.json")
            found = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
            settings = scrubbed({key: found[key] for key in _SETTINGS if found.get(key) is not None})
            front = Front.from_jsonl(front)
        return cls(front, [_point_of(front, soup) for soup in soups], settings)

    @property
    def dataset(self) -> str | None:
        """What the prompts are from."""
        task = TASKS.get(str(self.settings.get("task")))
        return self.settings.get("dataset") or (task.dataset if task else None)

    def results(self) -> list[Any]:
        """huggingface_hub's `EvalResult`: mean of each reward of the first point, n and interval among its arguments."""
        from huggingface_hub import EvalResult

        (point, *_), name = self.points, self.dataset or "prompts"
        # One prompt has no interval, nor have points that were read from a table.
        bounds = {r: (point.low[r], point.high[r]) for r in self.front.rewards if r in point.low}
        return [
            EvalResult(
                task_type="text-generation",
                task_name="Text generation",
                dataset_type=name,
                dataset_name=f"{name}, {point.n} prompts",
                metric_type=reward,
                metric_name=f"{reward}, mean reward"
                + (" [95% interval {:.4g}, {:.4g}]".format(*bounds[reward]) if reward in bounds else ""),
                metric_value=round(point.mean[reward], 6),
                metric_args={"n": point.n}
                | {side: round(value, 6) for side, value in zip(("low", "high"), bounds.get(reward, ()), strict=False)}
                | self.settings,
            )
            for reward in self.front.rewards
        ]

    def section(self) -> str:
        """The picture, the table, and what its figures are."""
        told = "".join(f", {key} {value}" for key, value in self.settings.items())
        names = " and ".join(f"`{point.label}`" for point in self.points)
        figures = f"Mean rewards with 95% bootstrap intervals over {len(self.front.prompts)} prompts{told}"
        return f"""## Evaluation

![The front: rewards at every λ]({PICTURE_FILE})

{figures}. Published here: {names}. `front.json` holds the figures.

{self.front.to_markdown()}
"""


def _point_of(front: Front, soup: Soup) -> Point:
    wanted = {i.name: weight for i, weight in zip(soup.ingredients, soup.lambdas, strict=True)}
    for point in front.soups:
        found = point.lambdas or {}
        alike = list(found.values()) if found.keys() != wanted.keys() else [found[name] for name in wanted]
        if len(alike) == len(wanted) and all(abs(a - b) < 1e-6 for a, b in zip(alike, wanted.values(), strict=True)):
            return point
    raise FrontError(f"the front has no soup at λ {wanted}; it has {[point.lambdas for point in front.soups]}")


def soup_card(
    soup: Soup,
    repo_id: str,
    evaluation: Evaluation | None = None,
    license: str | None = None,
    place: str | None = None,
) -> str:
    """The card of one soup.

    Args:
        soup: The soup, as it is published.
        repo_id: ``user/name``.
        evaluation: Its front, if there is one.
        license: As `rsoups.hub.push.push`.
        place: Where the base is read, for its license; where its config says by default.
    """
    base = short_name(soup.config.base_model_name_or_path) or ""
    known, about = license_of(place or soup.config.base_model_name_or_path or "", _parents(soup), license)
    name = repo_id.rsplit("/", 1)[-1]
    body = f"""# {name}

A [rewarded soup]({_PAPER}): LoRA adapters, one for each reward, interpolated in weight space,
θ = θ₀ + Σ λᵢ·Δᵢ. This one is {soup.mix}, by method `{soup.method}`.

Base: {_linked(base, soup.config.revision)}.

{_ingredients(soup)}
{evaluation.section() if evaluation else ""}
{_usage(base, repo_id)}
{_reproduction(soup)}
{_limits(soup, evaluation, about)}
## Lineage

```
{log(soup.lineage, name)}
```

`soup.json` holds all of it: `rsoups log {repo_id}`, `rsoups verify {repo_id}`.
"""
    return _card(name, base, soup.config, soup.lineage, evaluation, known, body)


def front_card(
    folders: Mapping[str, Soup],
    repo_id: str,
    evaluation: Evaluation | None = None,
    license: str | None = None,
    place: str | None = None,
) -> str:
    """The card of a repository that holds one soup in each of its folders. Arguments as those of `soup_card`."""
    (folder, first), *_ = folders.items()
    base = short_name(first.config.base_model_name_or_path) or ""
    known, about = license_of(place or first.config.base_model_name_or_path or "", _parents(first), license)
    name = repo_id.rsplit("/", 1)[-1]
    rows = "\n".join(f"| [{key}](./{key}) | {' | '.join(f'{x:g}' for x in s.lambdas)} |" for key, s in folders.items())
    names = [ingredient.name for ingredient in first.ingredients]
    body = f"""# {name}

{len(folders)} [rewarded soups]({_PAPER}) of the same LoRA adapters, one for each trade-off between their rewards:
θ = θ₀ + Σ λᵢ·Δᵢ, by method `{first.method}`. Each folder is an adapter of its own.

Base: {_linked(base, first.config.revision)}.

| folder | {" | ".join(f"λ {n}" for n in names)} |
| --- |{" ---: |" * len(names)}
{rows}

{_ingredients(first, weights=False)}
{evaluation.section() if evaluation else ""}
{_usage(base, repo_id, folder)}
{_reproduction(first)}
{_limits(first, evaluation, about)}"""
    return _card(name, base, first.config, first.lineage, evaluation, known, body)


def adapter_card(
    config: LoraConfig, manifest: Manifest, repo_id: str, license: str | None = None, place: str | None = None
) -> str:
    """The card of a trained adapter: reward and what it reads, KL, data, how to train it again. Arguments as `soup_card`."""
    manifest = scrubbed(manifest)
    base = short_name(config.base_model_name_or_path) or ""
    parents = [(parent["source"].partition("@")[0], parent["revision"]) for parent in manifest.get("parents", [])]
    known, about = license_of(place or config.base_model_name_or_path or "", parents, license)
    name, kind = repo_id.rsplit("/", 1)[-1], str(manifest.get("kind", "adapter")).upper()
    rewards = [str(reward.get("name")) for reward in manifest.get("rewards") or ()]
    settings = sorted((manifest.get("config") or {}).items())
    listed = "\n".join(["| setting | value |", "| --- | --- |", *(f"| {key} | `{value}` |" for key, value in settings)])
    body = f"""# {name}

A LoRA adapter, trained by {kind}{f" against {' and '.join(rewards)}" if rewards else ""}: an ingredient of a [soup]({_PAPER}).

Base: {_linked(base, config.revision)}.

{_training(manifest)}
{_usage(base, repo_id)}
## Reproduce

```
{_install(manifest)}
{manifest.get("command") or "not recorded"}
```

{listed}

## Limits

Rewards are models: what they like is not always good, and a policy learns their faults. No safety evaluation was made.
{about}

## Lineage

```
{log(manifest, name)}
```
"""
    return _card(name, base, config, manifest, None, known, body, merged=False)


def _training(manifest: Manifest) -> str:
    """Reward, template, KL and data of a run."""
    settings, data = manifest.get("config") or {}, manifest.get("data") or {}
    lines = ["## Training", ""]
    if rewards := manifest.get("rewards"):
        lines += ["| reward | model | what it reads | weight |", "| --- | --- | --- | ---: |"]
        for reward in rewards:
            model = _linked(str(reward.get("model") or ""), reward.get("revision"))
            reads = f"`{reward.get('input', 'not recorded')}`, question `{reward.get('question', '{question}')}`"
            lines.append(f"| {reward.get('name')} | {model} | {reads} | {reward.get('weight', 1)} |")
        lines.append("")
    if "kl_coef" in settings or "beta" in settings:
        lines.append(f"- **KL:** to the start of the run, coefficient {settings.get('kl_coef', settings.get('beta'))}.")
    where = _linked(str(data.get("dataset") or ""))
    count = f"{data['rows']:,} rows" if isinstance(data.get("rows"), int) else "rows"
    lines.append(
        f"- **Data:** {count} of {where}, split {data.get('split', 'train')}; task {data.get('task', 'not recorded')}."
    )
    lines.append(f"- **Template:** `{data.get('template') or 'not recorded'}`")
    lines.append(f"- **Seed:** {manifest.get('seed')}. SHA-256 of what it was trained on: `{data.get('sha256')}`.")
    results = manifest.get("results") or {}
    if isinstance(before := results.get("before"), dict) and isinstance(after := results.get("after"), dict):
        lines += ["", f"On {results.get('prompts')} held-out prompts, one sample each:", ""]
        lines += ["| | before | after |", "| --- | ---: | ---: |"]
        lines += [f"| {key} | {before.get(key, 0):.3f} | {after[key]:.3f} |" for key in after]
    return "\n".join(lines) + "\n"


# --- parts -----------------------------------------------------------------------------------------------------------


def _card(
    name: str,
    base: str,
    config: LoraConfig,
    manifest: Manifest,
    evaluation: Evaluation | None,
    license: str | None,
    body: str,
    merged: bool = True,
) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        base_model=base if on_hub(base) else None,
        base_model_relation="adapter" if on_hub(base) else None,
        library_name="peft",
        license=license,
        tags=["rewarded-soups", "lora", "rlhf", *(["merge"] if merged else [])],
        datasets=_datasets(manifest) or None,
        pipeline_tag="text-generation" if config.task_type == "CAUSAL_LM" else None,
        model_name=name if evaluation else None,
        eval_results=evaluation.results() if evaluation else None,
    )
    tidy = re.sub(r"\n{3,}", "\n\n", body)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{tidy}"))


def _datasets(manifest: Manifest) -> list[str]:
    """What any of the ancestors was trained on, where it is on the Hub."""
    manifests = [manifest, *manifest.get("history", {}).values()]
    names = [str((m.get("data") or {}).get("dataset") or "") for m in manifests]
    return sorted({name for name in names if on_hub(name)})


def _linked(name: str, revision: str | None = None) -> str:
    """A name with a link to it, where it is on the Hub."""
    if on_hub(name):
        return f"[{name}](https://huggingface.co/{name}{f'/tree/{revision}' if revision else ''})"
    if name.startswith(EMBEDDED_PREFIX):
        return f"`{name}` (ships with rsoups)"
    return f"`{name}`" if name else "not recorded"


def _ingredients(soup: Soup, weights: bool = True) -> str:
    lines = [f"| ingredient |{' λ |' if weights else ''} source | revision | sha256 |"]
    lines.append(f"| --- |{' ---: |' if weights else ''} --- | --- | --- |")
    for ingredient, weight in zip(soup.ingredients, soup.lambdas, strict=True):
        source = ingredient.source.partition("@")[0]
        source = _linked(source, ingredient.revision) if ingredient.revision else f"`{source}`"  # a folder
        revision = f"`{ingredient.revision[:12]}`" if ingredient.revision else "a folder"
        cell = f" {weight:g} |" if weights else ""
        lines.append(f"| {ingredient.name} |{cell} {source} | {revision} | `{ingredient.sha256[:16]}` |")
    return "## Ingredients\n\n" + "\n".join(lines) + "\n"


def _usage(base: str, repo_id: str, folder: str | None = None) -> str:
    where = f', subfolder="{folder}"' if folder else ""
    name, more = f'"{base}"', ""
    if base.startswith(EMBEDDED_PREFIX):
        name, more = f'resolve("{base}")', "from rsoups.common.assets import resolve  # the base ships with rsoups\n"
    return f"""## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM
{more}
base = AutoModelForCausalLM.from_pretrained({name})
model = PeftModel.from_pretrained(base, "{repo_id}"{where})
```

Or as an ingredient: `rsoups.interpolate(["{repo_id}{f"/{folder}" if folder else ""}", ...], [...])`.
"""


def _install(manifest: Manifest) -> str:
    versions = manifest.get("versions") or {}
    told = [f"{package}=={str(versions[package]).partition('+')[0]}" for package in _PACKAGES if package in versions]
    return f"pip install {' '.join(told)}"


def _reproduction(soup: Soup) -> str:
    sources = [i.source.partition("@")[0] + (f"@{i.revision}" if i.revision else "") for i in soup.ingredients]
    weights = " ".join(repr(weight) for weight in soup.lambdas)
    options = f" --method {soup.method}" if soup.method != "exact" else ""
    options += f" --rank {soup.lineage.get('rank')}" if soup.method == "svd" else ""
    options += (
        " --extrapolate"
        if abs(sum(soup.lambdas) - 1) > 1e-6 or any(not 0 <= weight <= 1 for weight in soup.lambdas)
        else ""
    )
    history = soup.lineage.get("history", {})
    trained = [str(history[i.sha256].get("command")) for i in soup.ingredients if i.sha256 in history]
    lines = [_install(soup.lineage), *dict.fromkeys(trained)]
    lines.append(f"rsoups interpolate {' '.join(sources)} --lambdas {weights}{options} --out soup")
    return "## Reproduce\n\n```\n" + "\n".join(lines) + "\n```\n"


def _limits(soup: Soup, evaluation: Evaluation | None, about_license: str) -> str:
    told = ["Rewards are models: what they like is not always good, and a policy learns their faults."]
    told.append("No safety evaluation was made." if evaluation else "It was not evaluated here.")
    if soup.svd_error is not None:
        told.append(f"Relative error of the truncation: {soup.svd_error:.2e}.")
    if soup.factors_distance is not None:
        told.append(
            f"Its ingredients do not share their start: its Δ is {soup.factors_distance:.0%} away from Σ λᵢ·Δᵢ."
        )
    if soup.base_mismatch:
        told.append("Its ingredients name different bases, which was allowed on purpose.")
    if any(i.revision is None for i in soup.ingredients):
        told.append("Ingredients without a revision were folders: whoever wants to make it again needs them.")
    return f"## Limits\n\n{' '.join([*told, about_license]).strip()}\n"


# --- licenses --------------------------------------------------------------------------------------------------------


def _parents(soup: Soup) -> list[tuple[str, str | None]]:
    if soup._adapters:
        return [(adapter.source.partition("@")[0], adapter.revision) for adapter in soup._adapters.values()]
    return [(ingredient.source.partition("@")[0], ingredient.revision) for ingredient in soup.ingredients]
