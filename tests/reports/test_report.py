"""The report holds what the records say, whole and without anything from elsewhere."""

import json
import re
from html.parser import HTMLParser
from itertools import islice

import numpy as np
import pytest
from front_records import PUBLISHED, above, noisy, record, records, resampled, three_rewards
from matplotlib.image import imread
from matplotlib.path import Path

import rsoups
from rsoups import Front, write_report
from rsoups.fronts.attainment import outlines
from rsoups.reports.plots import draw_chord, draw_front

VOID = {"meta", "input", "br", "img", "path", "circle"}


@pytest.fixture
def two_rewards(tmp_path):
    found, _ = records(n=30, bulge=0.1)
    for row in found:
        row["prompt"] = f"### Instruction: Write. ### Input: {row['prompt']} <b> ### Response: "
        row["response"] = f"{row['name']} says & <script>alert(1)</script> {row['lambdas']}"
    write_report(Front.from_records(found), found, tmp_path / "report")
    return found, tmp_path / "report"


class Page(HTMLParser):
    """Tags, attributes and texts; and every tag is closed where it should be."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, name):
        return [value for found, value in self.attributes if found == name]


def page_of(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_is_one_file_and_safe(two_rewards):
    _, folder = two_rewards
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = page_of(folder)
    assert page.tags.count("script") == 1 and not {"link", "iframe", "img", "object"} & set(page.tags)
    assert "alert(1)" not in text.split("<script>", 1)[1]  # the page's own script is the last thing in it
    assert all(value.startswith("#") for value in page.all("href")) and not page.all("src")
    assert not re.findall(r"https?://|url\(|@import|\bon\w+=", text)
    assert "$" not in "".join(page.text)
    assert set(page.all("href")) == {f"#{name}" for name in page.all("id") if f"{name}-h" in page.all("id")}


def test_every_mark_and_chart_tells_what_it_shows(two_rewards):
    page = page_of(two_rewards[1])
    labels = page.all("aria-label")
    assert page.tags.count("title") - 1 == sum(role == "img" for role in page.all("role")) > 30
    front = next(label for label in labels if label.startswith("b against a, higher is better"))
    assert "base" in front and "λ 1 / 0" in front
    assert any(re.fullmatch(r"λ 0.5 / 0.5\na \S+ \[.*\]\nminus the chord 0.100 \[0.100, 0.100\]", x) for x in labels)
    assert any(label.startswith("base\n") and label.endswith("beaten by another point") for label in labels)


def test_the_page_shows_each_prompts_texts_side_by_side(two_rewards):
    found, folder = two_rewards
    page = page_of(folder)
    assert page.tags.count("article") == 12
    assert page.all("class").count("text") == 12 * 7  # every model ...
    assert page.tags.count("details") == 12  # ... of which MORL, which is not among the base and five λ, is unfolded
    text = "".join(page.text)
    assert len(re.findall(r"prompt \d+ <b>", text)) == 12 and "### Response" not in text
    response = next(r["response"] for r in found if r["lambdas"] == {"A": 0.5, "B": 0.5})
    assert response in text
    assert "above it with 95% confidence at 3 of 3" in " ".join(text.split())


def test_the_picture_is_a_picture(two_rewards):
    image = imread(two_rewards[1] / "front.png")
    assert image.shape[0] > 600 and image.shape[1] > 800
    assert image.std() > 0.01


def test_the_table_is_the_same_in_markdown(two_rewards):
    text = (two_rewards[1] / "report.md").read_text(encoding="utf-8")
    assert "| λ 0.25 / 0.75 | " in text and "| MORL | " in text and "Every reward is maximized" in text
    cells = re.findall(r"<td>(.*?)</td>", (two_rewards[1] / "report.html").read_text(encoding="utf-8"))
    shown = {re.sub(r"</?small>", "", cell) for cell in cells}
    rows = [line for line in text.splitlines() if line.startswith("| λ")]
    assert len(rows) == 5 and all(cell in shown for row in rows for cell in row.strip("| ").split(" | ")[1:])


def test_the_band_holds_what_some_draws_attain_and_others_do_not(tmp_path):
    found = noisy(n=40)
    front = Front.from_records(found)
    write_report(front, [row | {"response": "some"} for row in found], tmp_path)
    band, median = outlines(front.attainment())
    draws = list(islice(resampled(front, front.soups), 200))
    left, bottom = band.min(axis=0)
    for goal in np.random.default_rng(0).uniform((left, bottom), (1.6, 1.6), size=(300, 2)):
        reached = np.mean([(points >= goal).all(axis=1).any() for points in draws])
        assert Path(band).contains_point(goal) == (0.025 <= reached < 0.975)
        below = np.searchsorted(median[1::2, 0], goal[0])  # the first corner of the median that is not to the left
        assert (below < len(median) // 2 and median[1::2, 1][below] >= goal[1]) == (reached >= 0.5)
    page = page_of(tmp_path)
    assert page.all("class").count("median soup") == 2  # in the chart and in its legend
    told = "to the lower edge in 97.5% of the bootstrap draws"
    assert told in "".join(page.text) and any(told in label for label in page.all("aria-label"))
    axes = draw_front(front).axes[0]
    assert np.array_equal(axes.patches[0].get_xy()[:-1], band)
    assert "reach in 95% of draws" in [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("rows", [noisy(n=1), three_rewards()], ids=["one prompt", "three rewards"])
def test_there_is_no_band_without_draws_of_two_rewards(tmp_path, rows):
    front = Front.from_records(rows)
    write_report(front, [row | {"response": "some"} for row in rows], tmp_path)
    page = page_of(tmp_path)
    assert not front.has_band and "median soup" not in page.all("class") and "Shaded" not in "".join(page.text)
    assert not draw_front(front).axes[0].patches


def test_hypervolume_and_other_fronts_are_told_with_their_reference(tmp_path):
    rows = noisy(n=20)
    front = Front.from_records(rows)
    told = write_report(
        front, rows, tmp_path, reference={"a": -3, "b": -3}, others={"seed <1>": Front.from_records(noisy(20, 1))}
    )
    assert told[2] == f"Hypervolume of the soups: {front.hypervolume({'a': -3, 'b': -3})}."
    gain = front.advantage({"a": -3, "b": -3})
    assert str(gain.gain) in told[3] and "(2 runs)" in told[3] and "(4 runs" in told[3]
    assert str(gain.utility) in told[3] and str(gain.utility_of_all) in told[3]
    assert told[4].startswith("Against seed <1> (20 common prompts)")
    page = page_of(tmp_path)
    assert all(sentence in "".join(page.text) for sentence in told)
    marks = [label for label in page.all("aria-label") if "\nhypervolume " in label]
    reaches = [("MORL", reach.runs, reach.others) for reach in gain.curve]
    reaches += [("soups", reach.runs, reach.soups) for reach in gain.curve if reach.soups]
    assert marks == [f"{name}\n{n} {'run' if n == 1 else 'runs'}\nhypervolume {e}" for name, n, e in reaches]
    assert len(marks) == 4 + 2 and "runs" in page.all("id")
    assert sum(label.startswith("seed <1>: λ") for label in page.all("aria-label")) == 5
    with pytest.raises(rsoups.FrontError, match="finite reference"):
        write_report(front, rows, tmp_path / "none", reference={"a": 0})
    assert not (tmp_path / "none").exists()


def test_soups_that_are_fewer_than_morl_runs_are_not_compared_and_it_is_said(tmp_path):
    rows = [r for r in noisy(n=6) if r["lambdas"] is None or r["lambdas"]["A"] in (0, 1)]
    told = write_report(Front.from_records(rows), rows, tmp_path, reference={"a": -3, "b": -3})
    (sentence,) = (text for text in told if "MORL" in text)
    assert sentence.startswith("Soups are not compared with MORL: ") and "2 soups for 4 MORL runs" in sentence
    assert "runs" not in page_of(tmp_path).all("id")


def test_choices_tell_where_they_are_not_above_the_base(tmp_path):
    """First what is above it in every reward, where there is something."""
    rows = above([(1.0, -0.2), (0.6, 0.1), (0.3, 0.3)])
    told = write_report(front := Front.from_records(rows), rows, tmp_path)
    assert told[-2] == f"Best soup above the base: {front.select(above_base=True)}."
    text = " ".join("".join(page_of(tmp_path).text).split("Which λ?")[-1].split())
    first, second = text.index("above the base in every reward"), text.index("all rewards count alike")
    assert first < text.index("λ 0.5 / 0.5") < second < text.index("not above the base: b")
    rows = above([(1.0, -0.2), (0.6, -0.1), (-0.3, 0.3)])
    told = write_report(Front.from_records(rows), rows, tmp_path)
    assert told[-2].startswith("No good choice: no soup is above the base in every reward; the nearest is λ")
    assert "No good choice" in (tmp_path / "report.md").read_text("utf-8")


def test_how_it_was_made_comes_from_the_settings_beside_the_records(tmp_path):
    rows = records(n=3)[0]
    settings = {"command": "rsoups sweep <x>", "seed": 7, "versions": {"torch": "2.x"}, "held_out": ["b"], "others": {}}
    (tmp_path / "records.settings.json").write_text(json.dumps(settings))
    write_report(Front.from_records(rows), rows, tmp_path)
    text = "".join(page_of(tmp_path).text)
    assert "rsoups sweep <x>" in text and "torch2.x" in text and "No run was trained on b." in text and "seed7" in text


def test_three_ingredients_and_three_rewards(tmp_path):
    rows = three_rewards()
    front = Front.from_records(rows)
    assert len(draw_front(front).axes) == 3
    write_report(front, rows, tmp_path)
    page = page_of(tmp_path)
    labels = page.all("aria-label")
    charts = [label for label in labels if "\n" not in label]
    assert (
        sum("over the triangle of λ" in label for label in charts) == 3 + 4
    )  # rewards; KL, perplexity, tokens, distinct-2
    assert sum("against its chord" in label for label in charts) == 3
    assert sum("against" in label and "higher is better" in label for label in charts) == 3
    assert any(label.startswith("Every model as a line") for label in charts)
    assert any("as polygons" in label for label in charts)
    assert any(label.startswith("soup nearest to uniform (λ 0.5 / 0.25 / 0.25)\n") for label in labels)
    assert any(label.startswith("A alone\nλ 1 / 0 / 0\n") for label in labels)
    with pytest.raises(rsoups.FrontError, match="two ingredients"):
        draw_chord(front)


def soups(*rows, n=3, **rewards):
    """Soups of A, B, ... whose rewards are functions of λ and the prompt's number."""
    return [
        record("soup", dict(zip("ABC", row, strict=False)), f"p{i}", **{name: f(row, i) for name, f in rewards.items()})
        for i in range(n)
        for row in rows
    ]


LINE = (1.0, 0.0), (0.5, 0.5), (0.0, 1.0)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([record("base", None, "p", a=1.0) | {"response": ""}], "All responses of all models are empty"),
        ([record("base", None, f"p{i}", a=1.0, b=i) for i in range(3)], "one point only, base"),
        (soups(*LINE, a=lambda row, i: row[0] + i), "one reward only"),
        (soups(*rsoups.simplex(3, 3), a=lambda row, i: row[0]), "one reward only"),
        (soups(LINE[1], a=lambda row, i: i, b=lambda row, i: 1), "one point only"),
        (soups(LINE[0], LINE[2], a=lambda row, i: 1, b=lambda row, i: 1), "Rewarded soups"),
    ],
)
def test_little_is_reported_too_and_said(tmp_path, rows, words):
    write_report(Front.from_records(rows), rows, tmp_path)
    assert words in "".join(page_of(tmp_path).text)
    assert (words in (tmp_path / "report.md").read_text(encoding="utf-8")) == (words != "Rewarded soups")
    assert imread(tmp_path / "front.png").std() > 0.01


def test_a_published_front_is_reported_by_its_means(tmp_path):
    (tmp_path / "front.csv").write_text(PUBLISHED)
    told = write_report(Front.from_csv(tmp_path / "front.csv"), [], tmp_path, reference={"a": 0, "b": 0})
    assert told[0] == "a: between the ends the soups are +0.200 from the chord on average."
    page = page_of(tmp_path)
    assert "article" not in page.tags and "Means from elsewhere" in "".join(page.text)


def test_prompts_may_be_messages(tmp_path):
    rows = [
        record(name, None, [{"role": "user", "content": f"Why <{i}>?"}], a=i, b=1.0)
        for i in range(3)
        for name in ("base", "x")
    ]
    front = Front.from_records(rows)
    assert front.prompts[0] == '[{"role": "user", "content": "Why <0>?"}]'
    write_report(front, rows, tmp_path)
    assert "Why <0>?" in page_of(tmp_path).text


def test_names_and_settings_are_escaped_too(tmp_path):
    """Responses are tested above; models, rewards, notes and settings come from files as well."""
    bad = "<img src=x onerror=alert(1)>\"'"
    rows = [
        record("soup", {bad: x, "B": 1 - x}, f"p{i} {bad}", **{bad: x + i, "b": 1 - x}) | {"tokens": 1, "kl": 0.5}
        for i in range(3)
        for x in (1.0, 0.5, 0.0)
    ]
    rows += [
        record(name, None, f"p{i} {bad}", **{bad: 0.0, "b": i}) for i in range(3) for name in ("base", "MORL" + bad)
    ]
    front = Front.from_records(rows)
    settings = {
        bad: [bad],
        "command": bad,
        "held_out": [bad],
        "trained_on": {bad: {bad: 1.0}},
        "trained_prompts": {bad: 1},
    }
    write_report(front, rows, tmp_path, reference={bad: -1, "b": -1}, others={bad: front}, settings=settings)
    page = page_of(tmp_path)
    assert "img" not in page.tags and "onerror" not in {name for name, _ in page.attributes}
    assert "".join(page.text).count(bad) > 20


def test_a_page_stays_small_however_long_its_texts(tmp_path):
    rows = three_rewards(n=13)
    for row in rows:
        row["response"] = "long " * 4_000
    write_report(Front.from_records(rows), rows, tmp_path)
    page = tmp_path / "report.html"
    assert page.stat().st_size < 1_000_000
    assert re.search(r"… <em>\d+ more characters</em>", page.read_text("utf-8"))
