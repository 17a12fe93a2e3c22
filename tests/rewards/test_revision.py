"""The revision that a reward card names is the one that is loaded."""

import pytest
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
