"""Write the explorer as a Hugging Face Space: a folder with app, requirements, card, records and ingredients."""

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

_APP = '''"""The explorer of a sweep, as a Hugging Face Space. Written by `rsoups explore --export`."""

import os
from pathlib import Path

import rsoups

# Strangers may read and vote, but neither save nor publish: that uses a disk and a token.
rsoups.explore(Path(__file__).parent, host=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), publish=False)
'''
_PINNED = ("torch", "transformers", "peft")
# Settings that a Space needs; others name this machine's folders.
_PUBLIC = ("temperature", "max_new_tokens", "seed", "chat_template_kwargs")


def write_space(
    folder: str | Path | None,
    out: str | Path,
    *,
    base: str | None = None,
    adapters: Mapping[str, str] | None = None,
    allow_base_mismatch: bool = False,
) -> None:
    """Write the explorer of a sweep as a Space; ``hf upload user/name OUT . --repo-type space`` publishes it.

    Ingredients in folders are copied (weights and config, nothing of their training); ingredients on the Hub are named.

    Args:
        folder: Folder of a sweep, as in `explore`.
        out: New folder.
        base: Base, embedded or on the Hub; the sweep's by default.
        adapters: Ingredients by name; the sweep's by default.
        allow_base_mismatch: Accept ingredients that name other bases.

    Raises:
        FrontError: As in `SweepFolder.read`.
        AdapterError: As in `SweepFolder.read`; the base is a folder on this machine.
        OutputError: `out` exists already, or cannot be written.
    """
    sweep = SweepFolder.read(folder, base=base, adapters=adapters, allow_base_mismatch=allow_base_mismatch)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} is there already: choose a new folder")
    if _is_local(sweep.base):
        raise AdapterError(f"the base {sweep.base!r} is a folder here: publish it, and say --base user/name")
    renamed = _check_base(sweep)

    with whole_folder(out, RECORDS) as partial:
        sources = {
            name: _copied(partial, number, name, sweep) if _is_local(source) else source
            for number, (name, source) in enumerate(sweep.sources.items(), 1)
        }
        shutil.copyfile(sweep.records, partial / RECORDS)
        settings = {name: getattr(sweep.settings, name) for name in _PUBLIC}
        settings |= {"base": sweep.base, "adapters": sources, "base_mismatch_allowed": sweep.base_mismatch or renamed}
        (partial / RECORDS).with_suffix(".settings.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        (partial / "app.py").write_text(_APP, "utf-8")
        (partial / "requirements.txt").write_text(_requirements(), "utf-8")
        (partial / "README.md").write_text(_card(sweep, sources), "utf-8")


def _check_base(sweep: SweepFolder) -> bool:
    """Whether ingredients name the base otherwise: by a folder, from before the base was published.

    Raises:
        AdapterError: Ingredients name another base on the Hub.
    """
    sources = [(adapter.source, adapter.settings) for adapter in sweep.adapters.values()]
    on_hub = [(source, config) for source, config in sources if is_on_hub(config.base_model_name_or_path)]
    check_base(on_hub, sweep.base, sweep.base_mismatch)
    return any(not same_base(config.base_model_name_or_path, sweep.base) for _, config in sources)


def _is_local(source: str) -> bool:
    return Path(source).expanduser().exists() or source.startswith(("/", ".", "~"))


def _copied(partial: Path, number: int, name: str, sweep: SweepFolder) -> str:
    """Copy an ingredient. Returns its folder within the Space."""
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")
    inside = f"adapters/{number}-{slug}"
    # An absolute path, of which the lineage records the last part only.
    adapter: Adapter = read_adapter(Path(sweep.sources[name]).expanduser().resolve())
    alone = interpolate({name: adapter}, [1.0])
    if _is_local(alone.settings.base_model_name_or_path or "."):
        alone.config.base_model_name_or_path = sweep.base
    alone.save_pretrained(partial / inside)
    return inside


def _requirements() -> str:
    pins = [f"{name}=={version(name).partition('+')[0]}" for name in _PINNED]
    own = version("rsoups")
    lines = [f"rsoups[app]=={own}  # or a wheel beside this file: ./rsoups-{own}-py3-none-any.whl", *pins]
    return "\n".join(lines) + "\n"


def _card(sweep: SweepFolder, sources: Mapping[str, str]) -> str:
    from huggingface_hub import SpaceCardData

    names = ", ".join(sweep.front.rewards)
    models = [source for source in (sweep.base, *sources.values()) if _is_on_hub(source)]
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

[Rewarded soups](https://arxiv.org/abs/2306.04488): one LoRA adapter per reward ({", ".join(sweep.front.ingredients)}) on
`{sweep.base}`, interpolated in weight space. Choose λ on the measured front, read its responses, and vote blind.

Made with rsoups {version("rsoups")}. Votes are appended to `votes.jsonl`, which a Space loses when it restarts, unless it has
persistent storage.
"""


def _is_on_hub(source: str) -> bool:
    return not source.startswith(("rsoups/", "adapters/"))
