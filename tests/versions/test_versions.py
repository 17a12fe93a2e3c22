"""Soups as software: what differs, whether a soup is what its manifest says, ingredients added and taken out, conflicts."""

import json
import math
import shutil

import pytest
import torch
from front_records import record, records
from tiny import tiny_adapter, tiny_llama

import rsoups
from rsoups.adapters.adapter import read_adapter
from rsoups.adapters.layer_names import PREFIX
from rsoups.adapters.lineage import manifest_of
from rsoups.cli.main import main
from rsoups.fronts.barriers import barriers
from rsoups.versions.compare import compare, diff
from rsoups.versions.inspect import inspect_adapters
from rsoups.versions.rebuild import locate, patch, revert, verify


def test_diff_against_the_dense_change(here):
    one, other = read_adapter("helpful"), read_adapter("harmless")

    def dense(adapter):
        soup = rsoups.interpolate([adapter], [1.0])
        pairs = [k for k in soup.state_dict if ".lora_A" in k]
        return torch.cat(
            [(2 * soup.state_dict[k.replace("_A", "_B")] @ soup.state_dict[k]).flatten() for k in pairs]
        ).double()

    a, b = dense(one), dense(other)  # alpha 8, rank 4: scaled by 2
    found = compare(one, other)
    assert list(found) == ["model.layers.0", "model.layers.1", "all layers"]
    whole = found["all layers"]
    assert whole.relative == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-5)
    assert whole.cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), rel=1e-4)
    assert whole.conflict == pytest.approx(float((a * b < 0).double().mean()), abs=1e-4)
    assert whole.weights == a.numel() and found["model.layers.0"].weights + found["model.layers.1"].weights == a.numel()
    same = compare(one, one)["all layers"]
    assert (same.relative, same.conflict) == (0, 0) and same.cosine == pytest.approx(1, abs=1e-12)


def test_diff_names_what_changed_among_the_ingredients(here, capsys):
    names = {"helpful": "helpful", "funny": "funny"}
    rsoups.interpolate(names, [0.5, 0.5]).save_pretrained("other")
    assert diff("soup", "other").ingredients == ["+ funny λ 0.5", "- harmless λ 0.75", "~ helpful: λ 0.25 → λ 0.5"]
    assert main(["diff", "soup", "other"]) == 0
    shown = capsys.readouterr().out
    assert "opposite signs" in shown and "+ funny λ 0.5" in shown and "all layers" in shown
    assert main(["diff", "soup", "soup"]) == 0 and "the same ingredients at the same λ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "more"), [("exact", {}), ("factors", {}), ("svd", {"rank": 2}), ("svd", {"rank": 0.3})]
)
def test_verify_makes_it_again(here, method, more):
    two = {"helpful": "helpful", "harmless": "harmless"}
    if method == "factors":
        with pytest.warns(UserWarning, match="do not start from one"):
            rsoups.interpolate(two, [0.3, 0.7], method=method).save_pretrained("made")
        with pytest.warns(UserWarning, match="do not start from one"):
            assert "bit for bit" in verify("made")
    else:
        rsoups.interpolate(two, [0.3, 0.7], method=method, **more).save_pretrained("made")
        assert ("bit for bit" if method == "exact" else "as its truncation to rank") in verify("made")


def test_verify_finds_what_is_not_so(here, capsys):
    made = json.loads((here / "soup" / "soup.json").read_text())
    path = here / "soup" / "soup.json"
    made["ingredients"][0]["lambda"], made["ingredients"][1]["lambda"] = 0.3, 0.7
    path.write_text(json.dumps(made))
    with pytest.raises(rsoups.LineageError, match="another soup"):
        verify("soup")
    path.write_text(json.dumps(made | {"sha256": "0" * 64}))
    assert main(["verify", "soup"]) == 2 and "was written for 000000000000" in capsys.readouterr().err
    rsoups.interpolate({"helpful": "helpful", "harmless": "harmless"}, [0.25, 0.75]).save_pretrained("soup")
    assert main(["verify", "soup"]) == 0
    shutil.move("helpful", "moved")
    assert main(["verify", "soup"]) == 2 and "say --ingredient helpful=FOLDER" in capsys.readouterr().err
    assert main(["verify", "soup", "--ingredient", "helpful=moved"]) == 0
    assert main(["verify", "soup", "--ingredient", "helpful=funny"]) == 2
    assert "is not the 'helpful' that went into the soup" in capsys.readouterr().err
    assert (
        main(["verify", "soup", "--ingredient", "x=funny"]) == 2 and main(["verify", "soup", "--ingredient", "x"]) == 2
    )


SOURCES = {"upwards": "../outside", "absolute": "{here}/outside", "a link": "link", "home": "~/outside"}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_manifest_leads_nowhere_else(here, kind, monkeypatch):
    """Ingredients are named by whoever wrote soup.json: they are looked for below the current folder only."""
    rsoups.interpolate({"helpful": "helpful"}, [1.0]).save_pretrained("alone")
    assert locate(rsoups.Soup.from_pretrained("alone"))["helpful"].sha256 == read_adapter("helpful").sha256
    (here / "inner").mkdir()
    shutil.move("alone", "inner/soup")
    shutil.move("helpful", "outside")
    monkeypatch.chdir(here / "inner")
    monkeypatch.setenv("HOME", str(here))
    (here / "inner" / "link").symlink_to(here / "outside")
    path = here / "inner" / "soup" / "soup.json"
    data = json.loads(path.read_text())
    data["ingredients"][0]["source"] = SOURCES[kind].format(here=here)
    path.write_text(json.dumps(data))
    with pytest.raises(rsoups.LineageError, match="ingredient 'helpful'.*is not here: say --ingredient helpful=FOLDER"):
        locate(rsoups.Soup.from_pretrained("soup"))


@pytest.mark.parametrize(
    ("source", "revision"), [("../outside", "x"), ("a", "/../../outside"), ("{here}/outside", "x")]
)
def test_a_revision_makes_no_hub_id_of_a_path(here, source, revision, monkeypatch):
    """`source@revision` is a folder's name too, where somebody made such a folder."""
    rsoups.interpolate({"helpful": "helpful"}, [1.0]).save_pretrained("alone")
    (here / "inner" / "a@").mkdir(parents=True)
    shutil.move("alone", "inner/soup")
    shutil.copytree("helpful", "outside@x")
    shutil.move("helpful", "outside")
    monkeypatch.chdir(here / "inner")
    path = here / "inner" / "soup" / "soup.json"
    data = json.loads(path.read_text())
    data["ingredients"][0] |= {"source": source.format(here=here), "revision": revision}
    path.write_text(json.dumps(data))
    with pytest.raises(rsoups.LineageError, match="ingredient 'helpful'.*is no Hub id"):
        locate(rsoups.Soup.from_pretrained("soup"))


def test_a_soup_made_with_its_base_is_made_again_with_it(here, capsys):
    """One ingredient holds a whole head, the others do not: the base's own stands in for theirs."""
    tiny_llama().save_pretrained("base")
    tiny_adapter("headed", seed=4, modules_to_save=["lm_head"])
    parts = {"helpful": "helpful", "headed": "headed"}
    rsoups.interpolate(parts, [0.25, 0.75], base="base", allow_base_mismatch=True).save_pretrained("blended")
    capsys.readouterr()
    assert main(["verify", "blended"]) == 2 and "pass --base" in capsys.readouterr().err
    assert "bit for bit" in verify("blended", base="base")
    assert main(["verify", "blended", "--base", "base"]) == 0
    soup = rsoups.Soup.from_pretrained("blended")
    reverted = revert(soup, "helpful", base="base")
    assert reverted.lambdas == (0.0, 1.0)
    patched = patch(soup, "harmless", 0.5, base="base")
    assert patched.lambdas == (0.125, 0.375, 0.5)
    head = f"{PREFIX}lm_head.weight"
    own, trained = tiny_llama().lm_head.weight, read_adapter("headed").tensor(head)
    assert torch.allclose(patched.state_dict[head], own + 0.375 * (trained - own), atol=1e-6)


def test_patch_keeps_the_others_ratio(here, capsys):
    assert main(["patch", "soup", "funny", "--lambda", ".2", "--out", "patched"]) == 0
    assert "0.2 helpful, 0.6 harmless, 0.2 funny" in capsys.readouterr().out
    patched = rsoups.Soup.from_pretrained("patched")
    whole = rsoups.interpolate({n: n for n in ("helpful", "harmless", "funny")}, [0.2, 0.6, 0.2])
    whole.save_pretrained("whole")
    assert compare(read_adapter("patched"), read_adapter("whole"))["all layers"].relative < 1e-6
    assert patched.ingredients == whole.ingredients and patched.lambdas == pytest.approx(whole.lambdas)
    assert manifest_of("patched")["history"].keys() == manifest_of("whole")["history"].keys()
    assert "ingredients give" in verify("patched")
    with pytest.raises(rsoups.LambdasError, match="already"):
        patch(patched, "funny", 0.1)
    again = patch(patch(rsoups.Soup.from_pretrained("soup"), "funny", 0.2), "sft", 0.5, name="sft")
    assert again.lambdas == pytest.approx((0.1, 0.3, 0.1, 0.5)) and again.truncate(3).config.r == 3
    with pytest.raises(rsoups.LambdasError):
        patch(patched, "sft", 1.5)


def test_revert_takes_one_out(here, capsys):
    patch(rsoups.Soup.from_pretrained("soup"), "funny", 0.2).save_pretrained("patched")
    assert main(["revert", "patched", "funny", "--out", "reverted"]) == 0
    reverted = rsoups.Soup.from_pretrained("reverted")
    assert reverted.lambdas == pytest.approx((0.25, 0.75, 0))
    assert compare(read_adapter("reverted"), read_adapter("soup"))["all layers"].relative < 1e-6
    with pytest.raises(rsoups.LineageError, match="no ingredient"):
        revert(reverted, "other")
    alone = rsoups.interpolate({"helpful": "helpful"}, [1.0])
    with pytest.raises(rsoups.LineageError, match="nothing is left"):
        revert(alone, "helpful")
    assert main(["log", "reverted"]) == 0 and "0 × funny" in capsys.readouterr().out


def test_a_patch_of_a_truncated_soup_has_the_soup_as_its_ingredient(here):
    rsoups.interpolate(["helpful", "harmless"], [0.25, 0.75], method="svd", rank=2).save_pretrained("cut")
    made = patch(rsoups.Soup.from_pretrained("cut"), "funny", 0.2)
    assert [i.name for i in made.ingredients] == ["soup", "funny"] and made.lambdas == (0.8, 0.2)


def test_conflicts_are_told_with_their_remedy(here, capsys):
    adapters = {name: read_adapter(name) for name in ("helpful", "harmless")}
    (text,) = inspect_adapters(adapters).conflicts()
    assert "different initializations" in text and "use exact or svd" in text and "Permutation alignment" in text
    assert inspect_adapters({"a": adapters["helpful"], "b": adapters["helpful"]}).conflicts() == []
    assert main(["inspect", "helpful", "harmless"]) == 0 and "conflict: helpful and harmless" in capsys.readouterr().out


def test_a_barrier_is_a_middle_below_both_ends_by_more_than_its_interval(here, capsys):
    rng = torch.Generator().manual_seed(0)

    def rows(dip):
        noise = torch.randn(60, 3, generator=rng).tolist()
        found = []
        for i, each in enumerate(noise):
            for x, below, own in zip((0, 0.5, 1), (0, dip, 0), each, strict=True):
                found.append(record("soup", {"A": x, "B": 1 - x}, f"prompt {i}", r=0.1 * own - below))
        return found

    front = rsoups.Front.from_records(rows(1.0))
    (text,) = barriers(front)
    assert "barrier between A and B: at λ 0.5 / 0.5 r is -1." in text and "use exact" in text
    assert barriers(rsoups.Front.from_records(rows(0.0))) == []
    linear, _ = records(n=40)  # the middle is the mean of the ends: below one of them only
    assert barriers(rsoups.Front.from_records(linear)) == []
    path = here / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(1.0)))
    assert main(["inspect", "helpful", "helpful/", "--records", str(path)]) == 0
    assert "conflict: barrier between A and B" in capsys.readouterr().out
    assert not math.isnan(front.soups[0].mean["r"])
