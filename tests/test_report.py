"""The report holds what the records say, whole and without anything from elsewhere."""

import re
from html.parser import HTMLParser

import pytest
from matplotlib.image import imread
from test_front import record, records

import rsoups
from rsoups import Front, write_report
from rsoups.report import draw_chord, draw_front


@pytest.fixture
def two_rewards(tmp_path):
    found, _ = records(n=30, bulge=0.1)
    for row in found:
        row["prompt"] = f"### Instruction: Write. ### Input: {row['prompt']} <b> ### Response: "
        row["response"] = f"{row['name']} says & <script>alert(1)</script> {row['lambdas']}"
    write_report(Front.from_records(found), found, tmp_path / "report")
    return found, tmp_path / "report"


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_one_file_and_safe(two_rewards):
    _, folder = two_rewards
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.findall(r"https?://|url\(|@import", text)
    assert all(value for name, value in page.attributes if name == "alt")
    assert "$" not in "".join(page.text)


def test_the_page_shows_each_prompts_texts_side_by_side(two_rewards):
    found, folder = two_rewards
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("article") == 12
    assert page.tags.count("section") == 12 * 6  # the base, and five λ
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
    assert "| λ 0.25 / 0.75 | " in text and "| MORL | " in text and "30 of 30" not in text.split("λ 0.25")[1]


def test_three_rewards_and_one(tmp_path):
    three = [
        record("soup", {"A": a, "B": b, "C": 1 - a - b}, f"p{i}", a=a + i, b=b - i, c=1 - a - b)
        for i in range(3)
        for a, b in ((1, 0), (0, 1), (0, 0), (1 / 3, 1 / 3))
    ]
    front = Front.from_records(three)
    assert len(draw_front(front).axes) == 3
    write_report(front, three, tmp_path)
    assert (tmp_path / "report.html").read_text().count("<section>") == 3 * 4
    one = [record("soup", {"A": x, "B": 1 - x}, f"p{i}", a=x + i) for i in range(3) for x in (0.0, 0.5, 1.0)]
    assert len(draw_front(Front.from_records(one)).axes) == 1
    with pytest.raises(rsoups.FrontError, match="two ingredients"):
        draw_chord(front)
