"""Cards that are refused before anything of them is loaded or run, and the shipped ones, which are valid."""

import json
from dataclasses import fields

import pytest
import torch
from classifier_cards import write_card
from tiny import tiny_classifier

import rsoups
from rsoups import RewardCard, load_reward
from rsoups.common.assets import shipped
from rsoups.rewards.functions import FunctionCard
from rsoups.rewards.judge import JudgeCard, JudgeSettings
from rsoups.rewards.load import cards, read_card


def test_code_that_comes_with_a_model_runs_on_leave_only(tmp_path, monkeypatch):
    """A folder whose config names Python code of its own, which leaves a mark when it runs."""
    folder = tiny_classifier(tmp_path / "m", "electra")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
    mark = tmp_path / "ran"
    (folder / "own.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import ElectraConfig, ElectraForSequenceClassification\n"
        "class OwnConfig(ElectraConfig):\n    model_type = 'own'\n"
        "class OwnModel(ElectraForSequenceClassification):\n    config_class = OwnConfig\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    card = write_card(tmp_path, name="r", model=folder)
    for source in (card, folder):
        with pytest.raises(rsoups.RewardError, match="brings Python code of its own.*trust_remote_code"):
            load_reward(source)
    assert not mark.exists()
    assert len(load_reward(card, trust_remote_code=True)(["w1"], ["w2"])) == 1 and mark.exists()
    selfish = write_card(tmp_path, name="r", model=folder, trust_remote_code="true")  # no card gives itself leave
    with pytest.raises(rsoups.RewardError, match=r"unknown field\(s\) \['trust_remote_code'\]"):
        load_reward(selfish)


def test_a_pickled_reward_is_never_opened(tmp_path):
    folder = tiny_classifier(tmp_path / "m", "electra")

    class Bomb:
        def __reduce__(self):
            return ((tmp_path / "opened").touch, ())

    (folder / "model.safetensors").unlink()
    torch.save(Bomb(), folder / "pytorch_model.bin")
    with pytest.raises(rsoups.RewardError, match="rsoups convert"):
        load_reward(write_card(tmp_path, name="r", model=folder))
    assert not (tmp_path / "opened").exists()


BAD_CARDS = [
    *(
        (f"name: x\nmodel: y\nlogit: {text}", "field logit is (True|False): YAML reads yes")
        for text in ("yes", "no", "On", "false")
    ),
    ("name: x\nmodel: y\nminus: no", "minus is False: YAML reads yes"),
    ("name: no\nmodel: y", "name is False: YAML reads yes"),
    ("name: 7\nmodel: y", "field name is 7: it must be a text: put it in quotes"),
    ("name: x\nmodels: [a, yes]\naverage: scores", "field models.1 is True: YAML reads yes"),
    ("name: x\nmodel: y\nlogit: 1.0", "field logit is 1.0: it must be a text"),
    ("name: x\nfunction: length\nsign: yes", "field sign is True: input should be an integer"),
    (
        "name: x\nfunction: length\narguments: {target: yes}",
        "target is True, must be a number",
    ),
    ("name: x\nfunction: valid_json\narguments: {keys: [no]}", "must be a list of texts"),
    ("name: x\nmodel: y\ninput: '{response} {nothing}'", r"no field \['nothing'\]"),
    ("name: x\nmodel: y\nquestion: '{response}'", r"no field \['response'\]"),
    ("name: x\nmodel: y\nresponse: last", "response is 'last'"),
    ("[1, 2]", "mapping"),
    ("model: x", "field name is missing"),
    ("name: x", "names either its model, or models"),
    ("name: x\nmodel: y\nmodels: [a, b]\naverage: weights", "names either its model, or models"),
    ("name: x\nmodel: y\naverage: weights", "average and lambdas go with models"),
    ("name: x\nmodels: [a]\naverage: weights", r"field models is \['a'\]: value should have at least 2 items"),
    ("name: x\nmodels: a\naverage: weights", "field models is 'a': input should be a valid array"),
    ("name: x\nmodels: [a, b]", "average is None"),
    ("name: x\nmodels: [a, b]\naverage: scores\nrevision: main", "write each as id@revision"),
    ("name: x\nmodel: y\ncut: middle", "cut is 'middle'"),
    ("name: x\nmodel: y\ndtype: int8", "dtype is 'int8'"),
    ("name: x\nmodel: y\nmax_length: 0", "max_length is 0"),
    ("name: x\nmodel: y\ntemplate: z", r"unknown field\(s\) \['template'\]"),
    ("name: x\nmodel: y\ninput: triple", "input is 'triple'"),
    ("name: x\nmodel: y\nsign: 2", "sign is 2"),
    ("name: x\nmodel: y\nstd: 0", "std is 0"),
    ("name: x\nmodel: y\nmean: .nan", "mean is nan"),
    ("name: [", "not YAML"),
    ("name: x\nmodel: rsoups/nothing", "no embedded asset"),
    ("model: x", "field name is missing"),
    ("name: x\nmodel: y\nfunction: length", r"unknown field\(s\) \['model'\]"),
    ("name: x\nmodel: y\narguments: {target: 3}", r"unknown field\(s\) \['arguments'\]"),
    ("name: x\nfunction: length\narguments: 3", "field arguments is 3: input should be an object"),
    ("name: x\nfunction: length\narguments: {words: 3}", r"length: .*'target'"),
    ("name: x\nfunction: length\nsign: 0", "sign is 0"),
    ("name: x\nfunction: length\nstd: -1", "std is -1"),
    *(
        (
            f"name: x\nfunction: '{function}'",
            "must be one of .*'length'.*write no card: pass module:function",
        )
        for function in (
            "os:system",
            "rsoups.cli.main:main",
            "rsoups.rewards.text_metrics:library",  # imports what it is told to
            "rsoups.rewards.text_metrics:read_jsonl",
            "rsoups.rewards.text_checks:__builtins__",
            "text_checks:length",
            "re:compile",
            "rsoups.rewards.text_checks",
        )
    ),
]


@pytest.mark.parametrize(("text", "words"), BAD_CARDS)
def test_bad_cards_are_refused(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(rsoups.RsoupsError, match=words):
        load_reward(path)


def test_an_unknown_reward_lists_the_shipped_ones():
    with pytest.raises(rsoups.RewardError, match="deberta-v3-large-v2"):
        load_reward("no-such-reward")


@pytest.mark.parametrize("name", sorted(cards()))
def test_shipped_cards_are_valid(name):
    card = read_card(cards()[name])
    assert card.name == name
    if isinstance(card, RewardCard):
        assert card.model.count("/") == 1


@pytest.mark.parametrize("kind", [RewardCard, FunctionCard, JudgeCard, JudgeSettings])
def test_the_schema_is_documented(kind):
    text = (shipped("rewards") / "README.md").read_text("utf-8")
    assert not [field.name for field in fields(kind) if f"`{field.name}`" not in text]
