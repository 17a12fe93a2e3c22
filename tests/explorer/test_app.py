"""The explorer in a real browser: one server, started as a user starts it."""

import json
import re
import time

import httpx
import pytest
from browser import browser, served
from explored import NAMES
from hub_server import HubServer

import rsoups
from rsoups.common.files import read_jsonl
from rsoups.data.prompts import question_of
from rsoups.explorer.view import expected, first_axes, plot
from rsoups.fronts.front import Front

TOKEN = "hf_aTokenThatMustNotBeSeenAnywhere"


@pytest.fixture(scope="module")
def hub():
    server = HubServer()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def url(folder, hub, tmp_path_factory):
    environment = {"HF_TOKEN": TOKEN, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    log = tmp_path_factory.mktemp("log") / "server.txt"
    with served(["-m", "rsoups.cli", "explore", str(folder)], folder.parent, log, **environment) as address:
        yield address


@pytest.fixture(scope="module")
def chromium(url):
    with browser() as started:
        yield started


@pytest.fixture
def page(chromium, url):
    """The page, which must stay without errors and without requests to elsewhere."""
    opened = chromium.new_page(viewport={"width": 1280, "height": 900})
    errors, elsewhere = [], []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else elsewhere.append(r.url))
    opened.goto(url)
    opened.wait_for_selector("#plot svg")
    opened.wait_for_selector("#generate")
    yield opened
    assert errors == [] and elsewhere == []
    opened.close()


# Every state of the first text, as a reader sees it.
WATCH = """window.seen = [];
new MutationObserver(() => {
  const text = document.querySelector('#texts .chosen p').innerText.trim();
  if (text && text !== '…' && text !== seen.at(-1)) seen.push(text);
}).observe(document.querySelector('#texts'), { childList: true, subtree: true, characterData: true });"""


def until(condition, what):
    for _ in range(200):
        if found := condition():
            return found
        time.sleep(0.1)
    pytest.fail(f"never: {what}")


def texts(page):
    """By title, once no text is being written."""
    until(lambda: page.locator("#texts .chosen p").inner_text().strip(), "a text")
    until(lambda: not page.locator("#texts [aria-busy=true]").count(), "the end of the texts")
    cards = page.locator("#texts article")
    return {card.locator("h3").inner_text(): card.locator("p").inner_text().strip() for card in cards.all()}


def test_choose_a_point_slide_and_generate(page, folder):
    live = rsoups.LiveSoup.from_pretrained("rsoups/tiny-llama", {n: folder / f"ppo-{n}" for n in NAMES})
    prompts = Front.from_jsonl(folder / "records.jsonl").prompts

    def said(prompt, *lambdas):
        greedy = {"max_new_tokens": 12, "do_sample": False}
        return live.generate([prompt] * len(lambdas), list(lambdas), **greedy)

    typed = page.locator("#prompt textarea").input_value()
    prompt = next(p for p in prompts if question_of(p) == typed)
    page.evaluate(WATCH)
    page.click("#generate")
    both, first, second = (text.strip() for text in said(prompt, [0.5, 0.5], [1, 0], [0, 1]))
    found = texts(page)
    assert list(found) == ["This soup", "letters alone", "words alone", "Base"]
    assert (found["This soup"], found["letters alone"], found["words alone"]) == (both, first, second)
    assert len(set(found.values())) == 4
    grown = page.evaluate("window.seen")  # the text as it was streamed
    assert len(grown) > 3 and all(found["This soup"].startswith(text) for text in grown)

    page.locator("[data-at='0'] .dot").click()  # a point of the front: the first ingredient alone
    until(lambda: texts(page)["This soup"] == first, "the text of the first end")
    sliders = page.locator("#choose input[type=range]")
    assert [slider.input_value() for slider in sliders.all()] == ["1", "0"]
    assert "100% letters" in page.locator("#readout").inner_text()

    sliders.nth(1).focus()
    page.keyboard.press("End")  # the other slider, by keyboard: the first one follows
    until(lambda: texts(page)["This soup"] == second, "the text of the second end")
    assert [slider.input_value() for slider in sliders.all()] == ["0", "1"]
    page.keyboard.press("ArrowLeft")
    until(lambda: "1% letters, 99% words" in page.locator("#readout").inner_text(), "λ between measured ones")
    assert "between measured λ" in page.locator("#readout").inner_text()

    page.locator("#prompt textarea").fill("dog, snow")
    page.click("#generate")
    asked = prompt.replace(typed, "dog, snow")
    until(lambda: texts(page)["words alone"] == said(asked, [0, 1])[0].strip(), "the text of another prompt")


def test_the_front_by_keyboard(page):
    assert page.locator("[data-at][tabindex='0']").count() == 1
    page.locator("[data-at][tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    until(lambda: "100% words" in page.locator("#readout").inner_text(), "the last soup")
    assert page.evaluate("document.activeElement.dataset.at") == "2"
    until(lambda: page.locator("[data-at='2']").get_attribute("aria-pressed") == "true", "its being pressed")
    assert page.locator("[data-at][tabindex='0']").get_attribute("data-at") == "2"


def test_vote_blind(page, folder):
    page.get_by_role("tab", name="Vote").click()
    assert page.locator("#choice-a").is_disabled()
    page.click("#ask")
    until(lambda: page.locator("#choice-a").is_enabled(), "two texts")
    shown = page.locator("#question").inner_text()
    assert "%" not in shown and "No votes yet" in page.locator("#advice").inner_text()
    page.click("#choice-b")
    until(lambda: "%" in page.locator("#question").inner_text(), "λ after the vote")
    (vote,) = read_jsonl(folder / "votes.jsonl")
    assert set(vote) == {"prompt", "a", "b", "choice"} and vote["choice"] == "b"
    for side in "ab":
        assert vote[side]["response"].strip() in shown and sum(vote[side]["lambdas"].values()) == 1
    assert vote["a"]["lambdas"] != vote["b"]["lambdas"]
    assert "After 1 vote," in page.locator("#advice").inner_text() and page.locator("#choice-b").is_disabled()
    assert rsoups.Front.from_jsonl(folder / "records.jsonl").select(votes=folder / "votes.jsonl").share > 0
    page.click("#go")
    liked = re.search("After 1 vote, (.+) looks best", page.locator("#advice").inner_text())[1]
    until(lambda: liked in page.locator("#readout").inner_text(), "the λ that the vote likes")
    until(lambda: page.locator("#plot .advised").count() == 1, "its mark on the front")


def test_save_and_push(page, folder, hub):
    page.locator("[data-at='1'] .dot").click()
    until(lambda: "50% letters" in page.locator("#readout").inner_text(), "the middle")
    page.get_by_role("tab", name="Keep").click()
    page.locator("#soup-name input, #soup-name textarea").fill("mine")
    page.click("#save")
    until(lambda: "soups/mine" in page.locator("#saved").inner_text(), "where the soup is")
    saved = rsoups.interpolate([folder / "soups" / "mine"], [1.0])
    assert json.loads((folder / "soups" / "mine" / "soup.json").read_text())["ingredients"][0]["lambda"] == 0.5
    wanted = rsoups.interpolate({n: folder / f"ppo-{n}" for n in NAMES}, [0.5, 0.5])
    assert all((saved.state_dict[key] == tensor).all() for key, tensor in wanted.state_dict.items())
    page.click("#save")
    until(lambda: "is there already" in page.locator("body").inner_text(), "that the name is taken")

    page.locator("#repo input, #repo textarea").fill("nowhere")
    page.click("#push")
    until(lambda: "is user/name" in page.locator("body").inner_text(), "that this is no repository")
    hub.faults.append(("POST", "/api/repos/create", 403, {}))
    page.locator("#repo input, #repo textarea").fill("me/soup")
    page.click("#push")
    until(lambda: "it needs write scope for me" in page.locator("body").inner_text(), "which token is missing")
    page.click("#push")
    until(lambda: "me/soup" in page.locator("#pushed").inner_text(), "where it was published")
    assert {"adapter_model.safetensors", "README.md", "soup.json"} <= set(hub.files("me/soup"))
    assert TOKEN not in page.content() and str(folder) not in page.content()


def test_a_phone_shows_it_all(chromium, url):
    phone = chromium.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    phone.goto(url)
    phone.wait_for_selector("#generate")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    for name in ("Read", "Vote", "Keep"):
        phone.get_by_role("tab", name=name).click()
        assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    ink, ground = (
        phone.evaluate(f"getComputedStyle(document.querySelector('#header h1')).{p}") for p in ("color", "fontSize")
    )
    assert all(int(x) > 200 for x in re.findall(r"\d+", ink)[:3]) and ground
    unnamed = """[...document.querySelectorAll('input, textarea, button, [role=button]')].filter(e => e.offsetParent &&
        !(e.labels?.length || e.ariaLabel || e.getAttribute('aria-labelledby') || e.innerText?.trim() || e.title))
        .map(e => e.outerHTML.slice(0, 200))"""
    assert phone.evaluate(unnamed) == []
    phone.close()


def test_nothing_of_the_machine_is_told(url, folder):
    known = [str(folder), str(folder.parent), TOKEN]
    paths = [
        "/",
        "/config",
        "/gradio_api/info",
        "/gradio_api/startup-events",
        "/theme.css",
        "/gradio_api/app_id",
        "/nothing",
    ]
    for path in paths:
        answer = httpx.get(url + path)
        assert not [secret for secret in known if secret in answer.text], path
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    config = httpx.get(f"{url}/config").json()
    save = next(d["id"] for d in config["dependencies"] if d["api_name"] == "_save")
    for name in ("mine", "../../x", "/etc/passwd"):
        body = {"data": [name, 0.5, 0.5], "fn_index": save, "session_hash": f"s{len(name)}"}
        assert httpx.post(f"{url}/gradio_api/queue/join", json=body).status_code == 200
        with httpx.stream("GET", f"{url}/gradio_api/queue/data", params={"session_hash": f"s{len(name)}"}) as events:
            told = "".join(events.iter_text())
        assert "process_completed" in told and not [secret for secret in known if secret in told]
    assert not (folder.parent / "x").exists()


@pytest.mark.parametrize("path", ["/etc/passwd", "records.jsonl", "../a sweep/records.jsonl", "{folder}/records.jsonl"])
def test_no_file_is_served(url, folder, path):
    answer = httpx.get(f"{url}/gradio_api/file={path.format(folder=folder)}")
    assert answer.status_code in (403, 404) and "root:" not in answer.text and "lambdas" not in answer.text


def test_nothing_is_uploaded(url):
    answer = httpx.post(f"{url}/gradio_api/upload", files={"files": ("x.txt", b"more than a byte")})
    assert answer.status_code == 413


def test_other_sites_cannot_act(url):
    assert httpx.get(url, headers={"Host": "evil.example"}).status_code == 400
    body = json.dumps({"data": ["x", 1, 0], "fn_index": 0, "session_hash": "evil"})
    plain = {
        "Origin": "https://evil.example",
        "Content-Type": "text/plain",
    }  # what a browser sends without asking first
    assert httpx.post(f"{url}/gradio_api/queue/join", content=body, headers=plain).status_code == 422
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(f"{url}/gradio_api/queue/join", headers=asked)
    assert "access-control-allow-origin" not in answer.headers


def front_of(rewards, rows):
    record = {"method": "exact", "prompt": "p", "response": "r", "seed": 0}
    return Front.from_records(
        [
            record | {"name": "soup", "lambdas": row, "rewards": {r: row["a"] * i for i, r in enumerate(rewards)}}
            for row in rows
        ]
    )


def test_fronts_of_one_and_of_three_rewards():
    two = [{"a": x, "b": 1 - x} for x in (0.0, 0.5, 1.0)]
    one = front_of(["r"], two)
    assert first_axes(one) == ("λ of b", "r")
    assert plot(one, "λ of b", "r", two[0]).count("data-at=") == 3
    corners = [{"a": a, "b": b, "c": 1 - a - b} for a in (0.0, 0.5, 1.0) for b in (0.0, 0.5, 1.0) if a + b <= 1]
    three = front_of(["r<", "s", "t"], corners)
    drawn = plot(three, "t", "r<", {"a": 0.4, "b": 0.3, "c": 0.3}, advised=corners[0])
    assert drawn.count("data-at=") == 6 and "r&lt;" in drawn and "r<" not in drawn.replace("r&lt;", "")
    assert 'class="line"' not in drawn and 'class="advised"' in drawn
    for row in corners:
        assert expected(three, row) == {"r<": 0, "s": pytest.approx(row["a"]), "t": pytest.approx(2 * row["a"])}
    between = expected(three, {"a": 0.45, "b": 0.55, "c": 0.0})["s"]
    assert 0.3 < between < 0.5
