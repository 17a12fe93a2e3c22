"""The card that is published: its metadata, its license, and the figures of a front."""

import json

import yaml
from hub_pushes import FILES, card_of, cli, push, python

import rsoups
from rsoups.hub.licenses import strictest


def test_the_license_is_that_of_the_revision(hub, two, tmp_path):
    for license in ("mit", "apache-2.0"):
        push(hub, two, license=license)
    first, second = (commit["oid"] for commit in hub.history("someone/soup"))
    code = (
        "import sys; from rsoups.hub.licenses import _stated; print([_stated('someone/soup', r) for r in sys.argv[1:]])"
    )
    assert python(hub, tmp_path, code, first, second) == "['mit', 'apache-2.0']"


def test_a_front_goes_along(hub, two, front, tmp_path):
    """Its figures, its picture, and evaluation results with n and interval in the card's metadata."""
    weights = next(p for p in rsoups.Front.from_jsonl(front).soups if 0 < p.lambdas["helpful"] < 1)
    rsoups.interpolate(
        dict(zip(("helpful", "harmless"), two, strict=True)), list(weights.lambdas.values())
    ).save_pretrained(tmp_path / "soup")
    cli(hub, tmp_path, "push", "soup", "someone/soup", "--front", front, "--license", "mit")
    files = hub.files("someone/soup")
    assert set(files) == FILES | {"front.json", "front.png"} and files["front.png"].startswith(b"\x89PNG")
    data = json.loads(files["front.json"])
    assert data["settings"] == {"temperature": 0.7, "seed": 3, "task": "assistant"} and "/home" not in str(files)
    (mine,) = [p for p in data["points"] if p["lambdas"] == weights.lambdas]
    card = files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---")[1])
    (result,) = metadata["model-index"][0]["results"]
    assert metadata["license"] == "mit" and result["dataset"]["type"] == "Anthropic/hh-rlhf"
    found = {m["type"]: (m["value"], m["args"]["low"], m["args"]["high"], m["args"]["n"]) for m in result["metrics"]}
    expected = {r: tuple(round(mine[k][r], 6) for k in ("mean", "low", "high")) + (mine["n"],) for r in data["rewards"]}
    assert found == expected
    assert "![The front: rewards at every λ](front.png)" in card and "rsoups interpolate" in card
    # A push without a front takes the old one's files away: they would tell of another soup.
    cli(hub, tmp_path, "push", "soup", "someone/soup")
    assert set(hub.files("someone/soup")) == FILES


def test_a_front_without_this_soup_is_refused(hub, two, front, tmp_path):
    rsoups.interpolate(two, [0.123, 0.877]).save_pretrained(tmp_path / "soup")
    assert "no soup at λ" in cli(hub, tmp_path, "push", "soup", "someone/soup", "--front", front, expect=2)
    assert not hub.repositories


def test_the_card_is_true(two, tmp_path):
    soup = rsoups.interpolate({"helpful": two[0], "harmless": two[1]}, [0.3, 0.7])
    text = card_of(soup, tmp_path / "dry")
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["library_name"] == "peft" and {"rewarded-soups", "lora", "merge"} <= set(metadata["tags"])
    assert "base_model" not in metadata  # it was made from a config, and has no name on the Hub
    assert "license" not in metadata and "none is known of" in text
    assert "| helpful | 0.3 |" in text and str(tmp_path) not in text
    assert "--lambdas 0.3 0.7 --out soup" in text
    for folder in two:
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "huggyllama/llama-7b"
        (folder / "adapter_config.json").write_text(json.dumps(config))
    metadata = yaml.safe_load(card_of(rsoups.interpolate(two), tmp_path / "dry", license="other").split("---")[1])
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("huggyllama/llama-7b", "adapter")
    assert metadata["license"] == "other"


def test_licenses_are_not_guessed(two, tmp_path):
    assert strictest({"base": "apache-2.0", "a": "mit"}) == ("apache-2.0", "")
    assert strictest({"base": "llama2", "a": "mit"})[0] == "llama2"
    license, why = strictest({"base": "llama2", "a": "cc-by-nc-4.0"})
    assert license is None and "several sets of terms" in why and "a: cc-by-nc-4.0" in why
    license, why = strictest({"base": "mit", "a": None})
    assert license is None and "none is known of a" in why
    for folder in two:
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "rsoups/tiny-llama"
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    text = card_of(rsoups.interpolate(two), tmp_path / "dry")
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["license"] == "apache-2.0" and "base_model" not in metadata  # the embedded base is not on the Hub
