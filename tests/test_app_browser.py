"""The page in headless Chromium: answers stream and stop, users do not mix, no file of the server is read.

These tests are slow; `pip install .[app] playwright` and a Chromium are needed.
"""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from helpers.browser import CHROMIUM
from helpers.models import ROOT
from helpers.serving import PATIENCE, save_endless, wait
from minivlm.app.sentences import NAME_QUESTION, SENTENCES

ANSWERS_AT_ONCE, QUEUE = 2, 16  # as in minivlm/app/page.py, which imports gradio
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None] + ([] if CHROMIUM else ["chromium"])


def browser_test(test):
    """Mark a test that opens the page in Chromium."""
    return pytest.mark.slow(pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")(test))


@contextmanager
def serving(model, folder):
    """Start app.py with a model; yield its address, and its output at the end."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": str(folder / "uploads")}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "no_proxy": "127.0.0.1,localhost"}
    log = (folder / "log").open("w+")
    command = [sys.executable, str(ROOT / "app.py"), str(model), "--device", "cpu"]
    server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(20 * PATIENCE):
            text = (folder / "log").read_text()
            if found := re.search(r"answers at (http\S+)", text):
                break
            assert server.poll() is None, text
            time.sleep(0.2)
        yield found[1].rstrip("/")
        raised = re.findall(r"^[\w.]+(?:Error|Exception)\b", (folder / "log").read_text(), re.M)
        assert set(raised) <= {"gradio.exceptions.InvalidPathError"}, raised  # of a file that was refused
    finally:
        server.terminate()
        server.wait(30)
        log.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with serving(ROOT, tmp_path_factory.mktemp("server")) as address:
        yield address


@pytest.fixture(scope="module")
def endless_url(tmp_path_factory):
    """Serve the root's weights without an end token: an answer is as long as the slider says."""
    model = save_endless(tmp_path_factory.mktemp("endless"))
    with serving(model, tmp_path_factory.mktemp("server")) as address:
        yield address


@pytest.fixture
def visit(browser):
    """Return a function: `visit(url)` opens the page as another user."""
    contexts = []

    def open_page(url, locale="en-US"):
        contexts.append(browser.new_context(locale=locale, viewport={"width": 1180, "height": 980}))
        page = contexts[-1].new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.foreign = []
        page.on(
            "request", lambda r: page.foreign.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else 0
        )
        page.goto(url)
        page.get_by_role("button", name=SENTENCES["zh" if locale == "zh-CN" else "en"]["stop"]).wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()


def send(page, question, *files):
    """Give pictures and put a question."""
    if files:
        page.set_input_files("#box input[type=file]", [str(file) for file in files])
        page.wait_for_function(f"document.querySelectorAll('#box .thumbnail-item').length == {len(files)}")
    page.fill("#box textarea", question)
    page.press("#box textarea", "Enter")


def said(page):
    """Return the answers in the chat."""
    return [text.strip() for text in page.locator("#chat .bot.message").all_inner_texts()]


def events(url):
    """Return what the page can start: entries of gradio's table, with (element, event) pairs as `starts`."""
    config = json.load(urlopen(f"{url}/config", timeout=PATIENCE))
    names = {c["id"]: c["props"].get("elem_id") for c in config["components"]}
    return [d | {"starts": [(names.get(t[0]), t[1]) for t in d["targets"]]} for d in config["dependencies"]]


def join(url, event, session, data):
    """Put an event into the queue as the page does."""
    body = {"data": data, "fn_index": event, "session_hash": session}
    request = Request(f"{url}/gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urlopen(request, timeout=PATIENCE).read().decode()


PIG, HORSE = ROOT / "data" / "examples" / "pig-face.png", ROOT / "data" / "examples" / "horse.png"


@browser_test
def test_a_picture_is_asked_about_and_a_second_question_follows(url, visit):
    page = visit(url)
    send(page, "What is this? Answer with the name.", PIG)
    wait(lambda: said(page) == ["pig face"])
    wait(lambda: "pig face" in page.inner_text("#names") and "%" in page.inner_text("#names"))
    send(page, "What is its main color?")
    wait(lambda: len(said(page)) == 2 and len(said(page)[1]) > 2)
    assert said(page)[0] == "pig face" and page.locator("#chat img").count() >= 1
    assert page.foreign == []  # fonts and scripts come from this server


@browser_test
def test_several_pictures_and_the_examples(url, visit):
    page = visit(url)
    send(page, "What is this? Answer with the name.", PIG, HORSE)
    wait(lambda: said(page) and said(page)[0])
    wait(lambda: "horse" in page.inner_text("#names"))  # of the newest
    page.get_by_role("button", name="New conversation").click()
    wait(lambda: not said(page))
    page.locator(".gallery-item:visible, table tr.tr-body:visible").first.click()
    wait(lambda: page.input_value("#box textarea") == NAME_QUESTION["en"])
    page.press("#box textarea", "Enter")
    wait(lambda: said(page) == ["pig face"])


@browser_test
def test_the_page_is_chinese(url, visit):
    page = visit(url, locale="zh-CN")
    assert page.get_by_role("button", name="停止").count() and page.get_by_text(SENTENCES["zh"]["intro"]).count()
    send(page, "", PIG)
    wait(lambda: said(page) == ["猪头"])
    wait(lambda: "猪头" in page.inner_text("#names"))
    assert not page.get_by_role("button", name=re.compile("^(Share|分享)$")).count()  # it would upload the picture
    page.get_by_text("English", exact=True).click()
    page.get_by_role("button", name="Stop").wait_for()
    assert page.get_by_text(SENTENCES["en"]["intro"]).count()


@browser_test
def test_a_wrong_file_is_one_line_and_the_page_goes_on(url, visit, tmp_path):
    (tmp_path / "note.png").write_text("no picture")
    page = visit(url)
    send(page, "What is this?", tmp_path / "note.png")
    wait(lambda: "it is no PNG" in page.inner_text("#notice"))
    assert said(page) == []
    send(page, "What is this? Answer with the name.", PIG)
    wait(lambda: said(page) == ["pig face"] and not page.inner_text("#notice").strip())


@browser_test
def test_an_answer_streams_and_stop_ends_it(endless_url, visit):
    page = visit(endless_url)
    for slider, value in (("length", "400"), ("temperature", "2")):  # the likeliest answer ends in end tokens, unseen
        page.fill(f"#{slider} input[type=number]", value)
        page.press(f"#{slider} input[type=number]", "Tab")
    send(page, "What is this?", PIG)
    seen = []
    wait(lambda: seen.extend(said(page)) or len(set(seen)) >= 4)
    distinct = list(dict.fromkeys(seen))
    assert all(longer.startswith(shorter) for shorter, longer in zip(distinct, distinct[1:]))
    page.get_by_role("button", name="Stop").click()
    wait(lambda: (before := said(page)) and (time.sleep(3), before == said(page))[1])
    [stopped] = said(page)
    page.fill("#length input[type=number]", "400")
    send(page, "What is this?")  # a page that only hid the answer would say that one is being written
    wait(lambda: len(said(page)) == 2 and said(page)[1])
    assert said(page)[0] == stopped and not page.inner_text("#notice").strip()
    page.get_by_role("button", name="New conversation").click()
    wait(lambda: not said(page))


@browser_test
def test_two_users_at_once_do_not_mix(endless_url, visit):
    pages = [visit(endless_url), visit(endless_url)]
    for page in pages:
        page.fill("#length input[type=number]", "40")
        page.press("#length input[type=number]", "Tab")
    for page, picture in zip(pages, (PIG, HORSE)):
        send(page, "What is this? Answer with the name.", picture)
    texts = [wait(lambda: any(said(page)) and said(page)) for page in pages]
    wait(lambda: [len(said(page)) for page in pages] == [1, 1])
    wait(lambda: all(word in said(page)[0] for word, page in zip(("pig face", "horse"), pages)))
    assert all(len(text) == 1 for text in texts)
    assert "horse" not in said(pages[0])[0] and "pig" not in said(pages[1])[0]


@browser_test
def test_no_file_of_the_server_is_read(url):
    for name in (
        "/etc/passwd",
        str(ROOT / "config.json"),
        "config.json",
        "app.py",
        "../config.json",
        "/proc/self/environ",
    ):
        with pytest.raises(HTTPError) as refused:
            urlopen(f"{url}/gradio_api/file={name}", timeout=PATIENCE)
        assert refused.value.code in (403, 404), name
    file = {"path": str(ROOT / "config.json"), "meta": {"_type": "gradio.FileData"}}
    asked = next(d for d in events(url) if ("box", "submit") in d["starts"])
    try:
        join(url, asked["id"], "thief", [{"text": "What?", "files": [file]}, None, "English"])
        stream = urlopen(f"{url}/gradio_api/queue/data?session_hash=thief", timeout=PATIENCE)
        answer = ""
        for line in stream:
            answer += line.decode()
            if "process_completed" in answer or "close_stream" in answer:
                break
        assert '"success":false' in answer.replace(" ", "") and "config.json" not in answer.partition("output")[2]
    except HTTPError as refused:
        assert refused.code in (400, 403, 404, 422)


@browser_test
def test_a_file_that_is_too_large_is_refused_and_the_page_goes_on(url, visit, tmp_path):
    (tmp_path / "large.png").write_bytes(PIG.read_bytes() + bytes(21 * 2**20))
    page = visit(url)
    page.set_input_files("#box input[type=file]", str(tmp_path / "large.png"))
    wait(lambda: "exceed" in page.inner_text("body").lower())
    page.reload()
    send(page, "What is this? Answer with the name.", PIG)
    wait(lambda: said(page) == ["pig face"])


@browser_test
def test_a_full_queue_says_so(endless_url, visit):
    answer = next(d["id"] for d in events(endless_url) if d["targets"][0][1] == "then")
    late, *first = [visit(endless_url) for _ in range(1 + ANSWERS_AT_ONCE)]
    for page in first:
        page.fill("#length input[type=number]", "800")
        page.press("#length input[type=number]", "Tab")
    for page in first:
        send(page, "What is this?", PIG)
    for page in first:
        wait(lambda: any(said(page)))
    with pytest.raises(HTTPError) as refused:
        for number in range(2 * QUEUE):  # some may have their turn meanwhile
            join(endless_url, answer, f"user{number}", [None, "English", 0, 8])
    assert refused.value.code == 503 and "full" in refused.value.read().decode() and number >= QUEUE - 1
    send(late, "What is this?")
    wait(lambda: "currently busy" in late.inner_text("body"))
    for page in first:
        page.get_by_role("button", name="Stop").click()
