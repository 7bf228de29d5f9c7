"""The page of `to_web` in headless Chromium, from loopback alone: it answers as Python does with the same graphs.

These tests are slow. They need playwright, a Chromium, npm, and either the network or npm's archives of the page's
scripts in the folder that MINIVLM_LIBRARY names (`npm pack`, see CONVERTING.md).
"""

import json
import os
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.browser import CHROMIUM
from helpers.exports import first_pictures, prompt
from helpers.models import ROOT
from helpers.serving import PATIENCE, wait
from minivlm.commands.convert import main
from minivlm.convert.to_web import JS, RUNTIME
from minivlm.data.pictures import decode_image
from minivlm.model.loading import load_processor
from minivlm.onnx_engine.graphs import Graphs

MISSING = [name for name in ("onnxruntime", "playwright") if find_spec(name) is None]
MISSING += [] if CHROMIUM else ["chromium"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")]
QUESTION = "What is this? Answer with the name."


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A folder with npm's archives of the scripts."""
    if folder := os.environ.get("MINIVLM_LIBRARY"):
        return Path(folder)
    if not shutil.which("npm"):
        pytest.skip("not installed: npm")
    folder = tmp_path_factory.mktemp("library")
    done = subprocess.run(["npm", "pack", "--pack-destination", folder, JS, RUNTIME], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"npm pack failed: {done.stderr.strip()[-200:]}")
    return folder


@pytest.fixture(scope="module")
def folder(library, tmp_path_factory):
    folder = tmp_path_factory.mktemp("web") / "page"
    main(["to_web", str(ROOT), "--out", str(folder), "--library", str(library)])
    return folder


class Quiet(SimpleHTTPRequestHandler):
    """Serve files as `python -m http.server` does, without a line for each."""

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def serve():
    """Return a function: `serve(folder)` is the address of a static server of a folder."""
    servers = []

    def start(folder):
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    yield start
    for server in servers:
        server.shutdown()


@pytest.fixture
def visit(browser):
    """Return a function: `visit(url)` opens the page; no request may go elsewhere, and no script may fail."""
    contexts, seen, foreign, problems = [], [], [], []

    def open_page(url, locale="en-US", **options):
        context = browser.new_context(locale=locale, **options)
        contexts.append(context)

        def check(route):
            seen.append(route.request.url)
            if route.request.url.startswith(url):
                return route.continue_()
            foreign.append(route.request.url)
            return route.abort()

        context.route(lambda address: not address.startswith(("blob:", "data:")), check)
        page = context.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
        page.goto(url)
        wait(lambda: page.locator("#ask").is_enabled() or page.inner_text("#notice"))
        assert not page.locator("#notice").is_visible(), page.inner_text("#notice")
        assert any("/model/onnx/" in address for address in seen)  # what the worker asks for is seen, too
        page.problems = problems
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert foreign == [] and problems == []


def answered(page, count):
    """Wait for the end of an answer; return its text and token ids."""
    wait(lambda: page.locator("#answers li[data-all]").count() == count or page.locator("#notice").is_visible())
    assert not page.locator("#notice").is_visible(), page.inner_text("#notice")
    newest = page.locator("#answers li").first
    return newest.locator(".answer").inner_text(), json.loads(newest.get_attribute("data-ids"))


def give(page, file):
    page.set_input_files("#file", str(file))
    wait(lambda: page.locator("#preview").is_visible() or page.locator("#notice").is_visible())


def expected(folder, processor, picture, question):
    """Return Python's answer with the graphs of `folder`, as token ids."""
    inputs = {name: value.numpy() for name, value in prompt(processor, picture, question).items()}
    return Graphs(folder / "model").generate(inputs, 128)[0][0].tolist()


def test_20_of_20_answers_are_those_of_python_with_the_same_graphs(folder, serve, visit, tmp_path):
    page, processor, seen = visit(serve(folder)), load_processor(ROOT), set()
    for number, picture in enumerate(first_pictures(20), start=1):
        picture.save(tmp_path / f"{number}.png")
        give(page, tmp_path / f"{number}.png")
        page.fill("#question", QUESTION if number % 2 else "这是什么？只回答名称。")
        page.press("#question", "Enter")
        text, ids = answered(page, number)
        question = QUESTION if number % 2 else "这是什么？只回答名称。"
        assert ids == expected(folder, processor, picture, question), text
        assert text == processor.tokenizer.decode(ids, skip_special_tokens=True)
        seen.add(text)
    assert len(seen) > 10


def odd_pictures(folder):
    """Write the first pictures of the test file in forms that need work: larger, turned, transparent, grey, JPEG."""
    for number, picture in enumerate(first_pictures(12)):
        large, path = picture.resize((320, 240), Image.Resampling.BICUBIC), folder / f"{number}.png"
        if number % 4 == 1:
            exif = Image.Exif()
            exif[0x0112] = 6  # to be turned by a quarter
            large.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
        elif number % 4 == 2:
            alpha = np.where(np.asarray(large).std(-1) > 12, 255, 0).astype(np.uint8)
            large.putalpha(Image.fromarray(alpha))
            large.save(path)
        elif number % 4 == 3:
            path = path.with_suffix(".jpg")
            large.save(path, quality=90)
        else:
            large.resize((77, 200)).convert("L").save(path)
        yield path


def test_pictures_of_all_sorts_are_read_as_in_python(folder, serve, visit, tmp_path):
    page, processor = visit(serve(folder)), load_processor(ROOT)
    for number, path in enumerate(odd_pictures(tmp_path), start=1):
        give(page, path)
        page.fill("#question", QUESTION)
        page.get_by_role("button", name="Ask").click()
        text, ids = answered(page, number)
        assert ids == expected(folder, processor, decode_image(path), QUESTION), (path.name, text)


def test_both_languages_and_the_examples(folder, serve, visit):
    page = visit(serve(folder), locale="zh-CN")
    assert page.get_by_role("button", name="提问").is_enabled()
    page.locator("#examples button").last.focus()
    page.keyboard.press("Enter")
    assert "猪" not in answered(page, 1)[0]
    page.locator("#examples button[title='这是什么？只回答名称。']").first.click()
    answered(page, 2)
    page.get_by_role("button", name="English").click()
    assert page.get_by_role("button", name="Ask").is_enabled() and page.locator("html").get_attribute("lang") == "en"
    page.locator("#examples button img[alt='pig face']").click()
    assert answered(page, 3)[0] == "pig face"
    page.fill("#question", "")
    page.press("#question", "Enter")
    assert answered(page, 4)[0] == "pig face"  # the question for the name
    page.fill("#question", "What is this? <|image_pad|><|im_end|>")
    page.press("#question", "Enter")
    answered(page, 5)  # control tokens that are typed are text: else the count of image tokens is wrong


def test_the_page_is_worked_by_keyboard(folder, serve, visit):
    page, stops = visit(serve(folder)), []
    for _ in range(9):
        page.keyboard.press("Tab")
        stops.append(page.evaluate("() => document.activeElement.id || document.activeElement.parentElement.id"))
    assert stops == ["language", "file", *["examples"] * 4, "question", "ask", "sample"]


def test_wrong_files_are_one_line_and_the_page_goes_on(folder, serve, visit, tmp_path):
    page = visit(serve(folder))
    page.press("#question", "Enter")
    wait(lambda: "Choose a picture first" in page.inner_text("#notice"))
    (tmp_path / "note.png").write_text("no picture")
    (tmp_path / "large.png").write_bytes(bytes(21_000_000))
    for name, reason in (("note.png", "not a picture"), ("large.png", "20 MB")):
        give(page, tmp_path / name)
        wait(lambda: reason in page.inner_text("#notice"))
        assert not page.locator("#preview").is_visible()
    page.press("#question", "Enter")
    wait(lambda: "Choose a picture first" in page.inner_text("#notice"))
    give(page, ROOT / "data" / "examples" / "pig-face.png")
    page.press("#question", "Enter")
    assert answered(page, 1)[0] == "pig face"


def test_an_answer_streams_and_stop_ends_it(folder, serve, visit, tmp_path):
    """Without an end token an answer goes on to its limit."""
    endless = tmp_path / "page"
    shutil.copytree(folder, endless)
    path = endless / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": None}))
    page = visit(serve(endless))
    give(page, ROOT / "data" / "examples" / "pig-face.png")
    page.fill("#question", "Describe this picture.")
    page.press("#question", "Enter")
    wait(lambda: page.locator("#answers .answer").count() and page.inner_text("#answers .answer"))
    page.get_by_role("button", name="Stop").click()
    text, ids = answered(page, 1)
    assert text.endswith("(stopped)") and 1 < len(ids) < 128
    page.press("#question", "Enter")
    assert len(answered(page, 2)[1]) == 128


SPY = """
const tell = ({ blockedURI }) => postMessage({ type: "error", reason: `no ${blockedURI}` });
addEventListener("securitypolicyviolation", tell);
addEventListener("message", () => fetch("http://127.0.0.1:9/spy"));
"""


def test_the_rules_of_the_page_hold_for_its_worker(folder, serve, visit, tmp_path):
    """A worker that fetches from another origin is stopped by the browser: no request is made."""
    spied = tmp_path / "page"
    shutil.copytree(folder, spied)
    with (spied / "worker.js").open("a", encoding="utf-8") as script:
        script.write(SPY)
    page = visit(serve(spied))
    give(page, ROOT / "data" / "examples" / "pig-face.png")
    wait(lambda: "no http://127.0.0.1:9/spy" in page.inner_text("#notice"))
    assert all("Content Security Policy" in line or "Failed to fetch" in line for line in page.problems)
    page.problems.clear()
