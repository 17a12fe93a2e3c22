"""What the explorer does, without its page: the simplex, prompts and their frame, streams, votes, soups that are saved."""

import json
import shutil
import threading

import pytest
import torch
from tiny import tiny_adapter, tiny_llama, tiny_tokenizer

import rsoups
from rsoups.common.files import read_jsonl
from rsoups.data.prompts import format_prompt
from rsoups.explorer.streaming import stream
from rsoups.explorer.sweep_folder import Frame, SavedSettings, SweepFolder
from rsoups.explorer.tasting import Settings, Tasting, rescaled

WORDS = [f"w{i}" for i in range(60)]
ROWS = [[1, 0], [0.3, 0.7], [0, 1]]
GREEDY = Settings(0, 8, 0)


def length(prompts, responses):
    return [float(len(r.split())) for r in responses]


def letters(prompts, responses):
    return [float(len(set(r))) for r in responses]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A folder as a sweep leaves it: a base, two ingredients, records."""
    folder = tmp_path_factory.mktemp("swept")
    tiny_llama().save_pretrained(folder / "base")
    tiny_tokenizer(WORDS).save_pretrained(folder / "base")
    adapters = {name: tiny_adapter(folder / f"ppo-{name}", seed=seed) for seed, name in enumerate("ab")}
    rsoups.sweep(
        tiny_llama(),
        adapters,
        {"length": length, "letters": letters},
        ["w1 w2", "w3 w4 w5"],
        ROWS,
        tokenizer=tiny_tokenizer(WORDS),
        temperature=0,
        max_new_tokens=8,
        progress=False,
        out=folder / "records.jsonl",
    )
    return folder


@pytest.fixture
def tasting(swept, tmp_path):
    """A tasting in a folder of its own, so that votes and soups do not meet."""
    for path in swept.iterdir():
        (tmp_path / path.name).symlink_to(path) if path.is_file() else None
    adapters = {name: str(swept / f"ppo-{name}") for name in "ab"}
    found = SweepFolder.read(tmp_path, base=str(swept / "base"), adapters=adapters)
    return Tasting(found, rsoups.LiveSoup.from_pretrained(found.base, found.adapters))


@pytest.mark.parametrize(
    "lambdas, moved, value, expected",
    [
        ([0.5, 0.5], 0, 0.8, [0.8, 0.2]),
        ([0.2, 0.6, 0.2], 0, 0.6, [0.6, 0.3, 0.1]),
        ([1.0, 0.0, 0.0], 0, 0.4, [0.4, 0.3, 0.3]),
        ([0.0, 0.5, 0.5], 0, 1.0, [1.0, 0.0, 0.0]),
    ],
)
def test_moving_one_lambda_rescales_the_others(lambdas, moved, value, expected):
    new = rescaled(lambdas, moved, value)
    assert new == pytest.approx(expected) and sum(new) == pytest.approx(1)


def test_a_typed_question_is_framed_as_the_sweeps_prompts_are():
    prompts = [format_prompt("Write.", words) for words in ("dog, run", "cat")]
    frame = Frame.of(prompts)
    assert frame.typed(prompts[0]) == "dog, run"
    assert frame.prompt("dog, run") == prompts[0] == frame.prompt(prompts[0])
    assert frame.prompt(" a\n b ") == format_prompt("Write.", "a b")
    mixed = Frame.of([*prompts, "plain"])
    assert mixed.typed(prompts[0]) == prompts[0] == mixed.prompt(prompts[0])
    chat = Frame.of([[{"role": "system", "content": "S"}, {"role": "user", "content": text}] for text in "xy"])
    assert chat.prompt("Why?") == [{"role": "system", "content": "S"}, {"role": "user", "content": "Why?"}]
    assert chat.typed(chat.prompt("Why?")) == "Why?"
    for typed in ("", " \n", "x" * 8_001):
        with pytest.raises(rsoups.DatasetError, match="between 1 and 8,000 characters"):
            frame.prompt(typed)


def test_streams_grow_to_what_generate_says(tasting):
    steps = list(stream(tasting.live, "w1 w2", [*ROWS, None], max_new_tokens=8))
    *texts, last = steps[-1]
    assert texts == tasting.live.generate(["w1 w2"] * 3, ROWS, max_new_tokens=8, do_sample=False)
    assert len(set(steps[-1])) == 4
    for earlier, later in zip(steps, steps[1:], strict=False):
        assert all(text.startswith(before) for before, text in zip(earlier, later, strict=True))
    base = tiny_llama()
    ids = tasting.live.tokenizer("w1 w2", return_tensors="pt")["input_ids"]
    said = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[0, 2:]
    assert last == tasting.live.tokenizer.decode(said, skip_special_tokens=True)


def test_a_sampled_text_is_its_rows_own(tasting):
    def last(rows, seed=0, temperature=1.0):
        return list(stream(tasting.live, "w1 w2", rows, max_new_tokens=8, temperature=temperature, seed=seed))[-1]

    together = last(ROWS)
    assert [last([row])[0] for row in ROWS] == together
    assert last([ROWS[1]] * 2) == [together[1]] * 2
    texts = {last([ROWS[1]], seed)[0] for seed in range(6)}
    assert len(texts) > 3
    found = []
    threads = [threading.Thread(target=lambda row=row: found.append((row, last([row])[0]))) for row in ROWS * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(zip(ROWS * 2, together * 2, strict=True))


@pytest.mark.parametrize(
    "setting", [{"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}, {"num_beams": 2}], ids=str
)
def test_a_stream_inherits_nothing_from_the_bases_generation_config(tasting, setting):
    """As a sweep, whose texts the page shows beside it."""
    plain = list(stream(tasting.live, "w1 w2", ROWS, max_new_tokens=8, temperature=0))[-1]
    tasting.live.model.generation_config.update(**setting)
    assert list(stream(tasting.live, "w1 w2", ROWS, max_new_tokens=8, temperature=0))[-1] == plain


def test_texts_at_a_records_lambda_seed_and_temperature_are_the_records(tasting, swept, tmp_path):
    ingredients = {name: swept / f"ppo-{name}" for name in "ab"}
    settings = {"tokenizer": tiny_tokenizer(WORDS), "temperature": 0.9, "seed": 5, "max_new_tokens": 12, "cut": str}
    out = tmp_path / "sampled.jsonl"
    rsoups.sweep(tiny_llama(), ingredients, {"r": length}, ["w1 w2"], ROWS, progress=False, out=out, **settings)
    rows = [*ROWS, None]
    *_, texts = stream(tasting.live, "w1 w2", rows, max_new_tokens=12, temperature=0.9, seed=5)
    base, *soups = read_jsonl(out)
    assert texts == [record["response"] for record in (*soups, base)]


def test_who_stops_reading_stops_the_generation(tasting):
    calls = []
    hook = tasting.live.model.register_forward_hook(lambda *_: calls.append(1))
    steps = stream(tasting.live, "w1 w2", ROWS, max_new_tokens=60)
    next(steps)
    steps.close()
    hook.remove()
    assert len(calls) == 1


def test_what_cannot_be_generated_is_refused(tasting):
    with pytest.raises(rsoups.DatasetError, match=r"has 2 tokens.* up to 63, the model reads 1 at most"):
        next(stream(tasting.live, "w1 w2", ROWS, max_new_tokens=63))
    with pytest.raises(rsoups.LambdasError, match="sum to"):
        next(stream(tasting.live, "w1 w2", [[0.5, 0.6]], max_new_tokens=4))
    for wrong in ((3, 8, 0), (0, 0, 0), (0, 10_000, 0), (0, 8, -1), (float("nan"), 8, 0)):
        with pytest.raises(rsoups.DatasetError, match="temperature is 0 to 2"):
            Settings(*wrong)


def test_reading_writes_ends_and_base_once(tasting):
    *_, first = tasting.read("w1 w2", {"a": 0.3, "b": 0.7}, GREEDY)
    live = tasting.live
    expected = live.generate(["w1 w2"] * 3, [[0.3, 0.7], [1, 0], [0, 1]], max_new_tokens=8, do_sample=False)
    assert list(first.texts[:3]) == expected and not first.busy
    assert first.texts[3] == list(stream(live, "w1 w2", [None], max_new_tokens=8))[-1][0]
    steps = list(tasting.read("w1 w2", {"a": 1.0, "b": 0.0}, GREEDY, first))
    assert all(step.texts[1:] == first.texts[1:] and list(step.busy) in ([0], []) for step in steps)
    assert steps[-1].texts[0] == first.texts[1]
    *_, other = tasting.read("w3", {"a": 1.0, "b": 0.0}, GREEDY, steps[-1])
    assert other.texts[3] != first.texts[3]


def test_votes_are_blind_written_and_followed(tasting):
    sides = set()
    for _ in range(30):
        *_, asked = tasting.ask(None, GREEDY)
        assert asked.prompt in tasting.sweep.prompts and asked.lambdas[0] != asked.lambdas[1]
        sides.add(asked.lambdas[0]["a"] < asked.lambdas[1]["a"])
        texts = tasting.live.generate(
            [asked.prompt] * 2, [list(x.values()) for x in asked.lambdas], max_new_tokens=8, do_sample=False
        )
        assert list(asked.texts) == texts
    assert sides == {True, False}
    assert tasting.suggestion is None
    for _ in range(12):  # someone who likes b
        *_, asked = tasting.ask("w5", GREEDY)
        tasting.vote(asked, "a" if asked.lambdas[0]["b"] > asked.lambdas[1]["b"] else "b")
    lines = read_jsonl(tasting.sweep.folder / "votes.jsonl")
    assert len(lines) == 12 and set(lines[0]) == {"prompt", "a", "b", "choice"}
    assert set(lines[0]["a"]) == {"lambdas", "response"} and lines[0]["prompt"] == "w5"
    assert tasting.suggestion.point.lambdas == {"a": 0, "b": 1} and tasting.suggestion.share > 0.5
    with pytest.raises(rsoups.RsoupsError, match="choice must be one of"):
        tasting.vote(asked, "c")


def test_a_saved_soup_is_an_adapter_in_the_folder(tasting):
    assert tasting.save({"a": 0.3, "b": 0.7}, " mine.1 ") == "soups/mine.1"
    saved = rsoups.interpolate([tasting.sweep.folder / "soups" / "mine.1"], [1.0])
    expected = rsoups.interpolate(tasting.sweep.adapters, [0.3, 0.7])
    assert saved.state_dict.keys() == expected.state_dict.keys()
    assert all(torch.equal(saved.state_dict[key], tensor) for key, tensor in expected.state_dict.items())
    with pytest.raises(rsoups.OutputError, match="soups/mine.1 is there already"):
        tasting.save({"a": 1.0, "b": 0.0}, "mine.1")
    for name in ("", ".", "..", "../x", "a/b", "/etc/x", ".hidden", "x" * 65, "a\0b", "a\nb"):
        with pytest.raises(rsoups.OutputError, match="a soup's name is"):
            tasting.save({"a": 1.0, "b": 0.0}, name)
    assert [path.name for path in (tasting.sweep.folder / "soups").iterdir()] == ["mine.1"]


def test_soups_that_lead_elsewhere_are_not_written(tasting, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (tasting.sweep.folder / "soups").symlink_to(elsewhere)
    with pytest.raises(rsoups.OutputError, match="leads out of"):
        tasting.save({"a": 1.0, "b": 0.0}, "mine")
    assert not any(elsewhere.iterdir())


def test_where_to_publish_is_checked_first(tasting):
    for name in ("", "name", "a/b/c", "../x", "a b/c", "/a"):
        with pytest.raises(rsoups.HubError, match="user/name"):
            tasting.push({"a": 1.0, "b": 0.0}, name, private=True)


def test_errors_tell_nothing_of_the_disk(tasting):
    folder = tasting.sweep.folder.resolve()
    told = tasting.plain(
        rsoups.OutputError(f"cannot write {folder}/votes.jsonl beside /home/me/x.txt: https://a.b/c/d")
    )
    assert str(folder) not in told and "/home" not in told
    assert told == "cannot write the sweep's folder/votes.jsonl beside x.txt: https://a.b/c/d"


def settings_of(folder, **more):
    path = folder / "records.settings.json"
    path.write_text(json.dumps(more))
    return path


@pytest.fixture
def copied(swept, tmp_path):
    """The records alone."""
    (tmp_path / "records.jsonl").write_bytes((swept / "records.jsonl").read_bytes())
    return tmp_path


def test_models_are_those_that_the_settings_name(swept, copied):
    for name, folder in (("a", "one"), ("b", "two")):
        tiny_adapter(copied / folder, seed=ord(name))
    settings_of(copied, base=None, adapters={"a": "one", "b": None})
    with pytest.raises(rsoups.AdapterError, match=r"does not say where its ingredients \['b'\] are"):
        SweepFolder.read(copied)
    settings_of(copied, base="user/base", adapters={"a": "one", "b": "two"}, temperature=0.5)
    found = SweepFolder.read(copied / "records.jsonl")
    assert found.base == "user/base" and found.settings.temperature == 0.5
    assert found.sources == {"a": str(copied / "one"), "b": str(copied / "two")}
    assert SweepFolder.read(copied, base="x/y", adapters={"b": str(copied / "one")}).sources["b"] == str(copied / "one")
    assert SweepFolder.read(copied, base="x/y").base == "x/y"


def test_models_beside_the_records_are_found_without_settings(swept, copied):
    for name in "ab":
        shutil.copytree(swept / f"ppo-{name}", copied / f"ppo-{name}")
    found = SweepFolder.read(copied, base="x/y")
    assert found.sources == {name: str(copied / f"ppo-{name}") for name in "ab"} and found.settings == SavedSettings()
    with pytest.raises(rsoups.AdapterError, match="--base"):
        SweepFolder.read(copied)


@pytest.mark.parametrize("source", ["../other", "/etc", "one/../../other", "link"])
def test_a_file_names_nothing_outside_its_folder(swept, copied, source, tmp_path_factory):
    (copied / "link").symlink_to(tmp_path_factory.mktemp("other"))
    settings_of(copied, adapters={"a": source, "b": "user/b"})
    with pytest.raises(rsoups.AdapterError, match="outside of its folder: if you trust them, --adapters a=/"):
        SweepFolder.read(copied)
    settings_of(copied, adapters={"a": "../a", "b": "../b c"})
    with pytest.raises(rsoups.AdapterError) as refused:
        SweepFolder.read(copied)
    assert str(refused.value).endswith(f"--adapters a={copied.parent}/a 'b={copied.parent}/b c'")


def test_what_cannot_be_explored_says_what_to_do(copied, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    for nothing in (None, empty, empty / "records.jsonl"):
        with pytest.raises(rsoups.FrontError, match="rsoups demo"):
            SweepFolder.read(nothing)
    with pytest.raises(rsoups.AdapterError, match=r"--adapters a=FOLDER b=FOLDER"):
        SweepFolder.read(copied)
    with pytest.raises(rsoups.AdapterError, match=r"no ingredients \['c'\]: they are \['a', 'b'\]"):
        SweepFolder.read(copied, adapters={"c": "x"})
    for text in ("{", "[]", '{"adapters": []}', '{"temperature": "hot"}'):
        (copied / "records.settings.json").write_text(text)
        with pytest.raises(rsoups.FrontError, match="settings"):
            SweepFolder.read(copied)
    rows = [row for row in read_jsonl(copied / "records.jsonl") if row["name"] == "base"]
    (copied / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(rsoups.FrontError, match="no λ to choose"):
        SweepFolder.read(copied)
