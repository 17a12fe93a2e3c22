"""The revision that a reward card names is the one that is loaded."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_classifier
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rsoups


@pytest.mark.parametrize(("line", "revision"), [("revision: v2", "v2"), ("", "main")])
def test_tokenizer_and_model_are_of_the_cards_revision(tmp_path, monkeypatch, line, revision):
    folder = tiny_classifier(tmp_path / "model", "electra")
    (tmp_path / "card.yaml").write_text(f"name: r\nmodel: {folder}\n{line}")
    asked = []
    for kind in (AutoTokenizer, AutoModelForSequenceClassification):

        def load(source, *args, real=kind.from_pretrained, **options):
            asked.append(options["revision"])
            return real(source, *args, **options)

        monkeypatch.setattr(kind, "from_pretrained", load)
    rsoups.load_reward(tmp_path / "card.yaml")(["w1"], ["w2"])
    assert len(asked) >= 2 and set(asked) == {revision}


def test_an_adapter_is_of_the_cards_revision(tmp_path, monkeypatch):
    """Two revisions of an adapter in the Hub's cache, on one base on this disk."""
    base = tiny_classifier(tmp_path / "base", "electra")
    repository = tmp_path / "hub" / "models--user--adapter"
    (repository / "refs").mkdir(parents=True)
    by_peft = {}
    for seed, name in enumerate(("main", "v2"), 1):
        folder = repository / "snapshots" / (str(seed) * 40)
        lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["classifier"])
        model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), lora)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.5)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        (repository / "refs" / name).write_text(str(seed) * 40)
        missing = (
            repository / ".no_exist" / (str(seed) * 40)
        )  # what the cache notes of files that the Hub does not have
        missing.mkdir(parents=True)
        (missing / "config.json").touch()

        inputs = AutoTokenizer.from_pretrained(base)("w1", "w2", return_tensors="pt")
        with torch.no_grad():
            by_peft[name] = model(**inputs).logits.item()

    for module in ("huggingface_hub.constants", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    for line, name in (("revision: v2", "v2"), ("", "main")):
        (tmp_path / "card.yaml").write_text(f"name: r\nmodel: user/adapter\n{line}")
        assert rsoups.load_reward(tmp_path / "card.yaml")(["w1"], ["w2"]) == pytest.approx([by_peft[name]], abs=1e-5)
    assert abs(by_peft["v2"] - by_peft["main"]) > 0.01
