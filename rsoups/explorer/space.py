"""The explorer as a folder that runs as a Hugging Face Space: app, requirements, card, records and ingredients."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rsoups.adapters.adapter import Adapter, read_adapter
from rsoups.bases.names import check_base, is_on_hub, same_base
from rsoups.common.errors import AdapterError, OutputError
from rsoups.common.files import whole_folder
from rsoups.explorer.sweep_folder import RECORDS, SweepFolder
from rsoups.soups.interpolation import interpolate
from rsoups.soups.soup import Soup

_APP = '''"""The explorer of a sweep, as a Hugging Face Space. Written by `rsoups explore --export`."""

import os
from pathlib import Path

import rsoups

# Strangers may read and vote; what acts with a disk or a token is not offered to them.
rsoups.explore(Path(__file__).parent, host=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), publish=False)
'''
_PINNED = ("torch", "transformers", "peft")
_KEPT = ("temperature", "max_new_tokens", "seed")  # of the sweep's settings; others tell of this machine's folders


def write_space(
    folder: str | Path | None,
    out: str | Path,
    *,
    base: str | None = None,
    adapters: Mapping[str, str] | None = None,
    allow_base_mismatch: bool = False,
) -> None:
    """Write the explorer of a sweep as a Space. ``hf upload user/name OUT . --repo-type space`` publishes it.

    Ingredients that are folders are copied (weights and config, nothing of their training); those on the Hub are named.

    Args:
        folder: Of a sweep, as `explore` takes it.
        out: A new folder.
        base: The sweep's by default: embedded, or on the Hub.
        adapters: By name, the sweep's by default.
        allow_base_mismatch: Accept ingredients that name other bases.

    Raises:
        FrontError: As `SweepFolder.read`.
        AdapterError: Also for a base that only this machine has.
        OutputError: `out` is there already, or cannot be written.
    """
    found = SweepFolder.read(folder, base=base, adapters=adapters, allow_base_mismatch=allow_base_mismatch)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} is there already: choose a new folder")
    if _is_local(found.base):
        raise AdapterError(f"the base {found.base!r} is a folder here: publish it, and say --base user/name")
    renamed = _check_base(found)
    with whole_folder(out, RECORDS) as partial:
        sources = {
            name: _copied(partial, number, name, found) if _is_local(source) else source
            for number, (name, source) in enumerate(found.sources.items(), 1)
        }
        shutil.copyfile(found.records, partial / RECORDS)
        settings = {key: found.settings[key] for key in _KEPT if key in found.settings}
        settings |= {"base": found.base, "adapters": sources, "base_mismatch_allowed": found.base_mismatch or renamed}
        (partial / RECORDS).with_suffix(".settings.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        (partial / "app.py").write_text(_APP, "utf-8")
        (partial / "requirements.txt").write_text(_requirements(), "utf-8")
        (partial / "README.md").write_text(_card(found, sources), "utf-8")


def _check_base(found: SweepFolder) -> bool:
    """Whether ingredients tell another name of the base: one that is not on the Hub, where it is published under a name now.

    Raises:
        AdapterError: Ingredients of another base.
    """
    named = [(adapter.source, adapter.config) for adapter in found.adapters.values()]
    hubs = [(source, config) for source, config in named if is_on_hub(config.base_model_name_or_path)]
    check_base(hubs, found.base, found.base_mismatch)
    return any(not same_base(config.base_model_name_or_path, found.base) for _, config in named)


def _is_local(source: str) -> bool:
    return Path(source).expanduser().exists() or source.startswith(("/", ".", "~"))


def _copied(partial: Path, number: int, name: str, found: SweepFolder) -> str:
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")
    inside = f"adapters/{number}-{slug}"
    # By its whole path, of which the lineage keeps the last part only.
    adapter: Adapter = read_adapter(Path(found.sources[name]).expanduser().resolve())
    alone = interpolate({name: adapter}, [1.0])
    assert isinstance(alone, Soup)
    if _is_local(alone.config.base_model_name_or_path or "."):
        alone.config.base_model_name_or_path = found.base
    alone.save_pretrained(partial / inside)
    return inside


def _requirements() -> str:
    pins = [f"{name}=={version(name).partition('+')[0]}" for name in _PINNED]
    own = version("rsoups")
    lines = [f"rsoups[app]=={own}  # or a wheel beside this file: ./rsoups-{own}-py3-none-any.whl", *pins]
    return "\n".join(lines) + "\n"


def _card(found: SweepFolder, sources: Mapping[str, str]) -> str:
    from huggingface_hub import SpaceCardData

    names = ", ".join(found.front.rewards)
    models = [source for source in (found.base, *sources.values()) if _is_on_hub(source)]
    more: dict[str, Any] = {"emoji": "🍲", "colorFrom": "blue", "colorTo": "indigo", "pinned": False}
    data = SpaceCardData(
        title=f"Rewarded soups: {names}",
        short_description="Choose a trade-off between rewards, read what it writes",
        sdk="gradio",
        sdk_version=version("gradio"),
        python_version="3.11",
        app_file="app.py",
        models=[model.partition("@")[0] for model in models] or None,
        tags=["rewarded-soups"],
        **more,
    )
    return f"""---
{data.to_yaml()}
---

# Rewarded soups: {names}

[Rewarded soups](https://arxiv.org/abs/2306.04488): one LoRA adapter per reward ({", ".join(found.front.ingredients)}) on
`{found.base}`, interpolated in weight space. Choose λ on the measured front, read what it writes, and vote blind.

Made with rsoups {version("rsoups")}. Votes are appended to `votes.jsonl`, which a Space forgets when it restarts, unless it
has persistent storage.
"""


def _is_on_hub(source: str) -> bool:
    return not source.startswith(("rsoups/", "adapters/"))
