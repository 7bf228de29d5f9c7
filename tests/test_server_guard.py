"""The server's guard: key, paths, the queue, and clients that leave, are slow or never finish."""

import asyncio
import json
import os

import pytest

from helpers.server import Inner, ask, call, chat, make_guard
from minivlm.__main__ import main
from minivlm.server import launch
from minivlm.server.guard import CHAT
from minivlm.server.limits import Limits

KEY = "0123456789abcdef"


@pytest.mark.parametrize(
    "options, status",
    [
        ({"path": "/load_model"}, 404),
        ({"path": "/reset"}, 404),
        ({"path": "/v1/responses"}, 404),
        ({"path": "/v1/completions"}, 404),
        ({"path": "/docs", "method": "GET"}, 404),
        ({"method": "GET"}, 405),
        ({"content_type": "text/plain"}, 415),
        ({"host": "evil.example"}, 403),
        ({"host": "evil.example:8000"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"content_length": "400001"}, 413),
        ({"content_length": "9" * 4000}, 413),
    ],
)
def test_what_is_not_a_chat_request_is_refused(options, status):
    got, text, _ = ask(make_guard(inner := Inner()), chat("Hello"), **options)
    assert (got, inner.bodies) == (status, []) and json.loads(text)["error"]["message"]


def test_models_are_the_one_that_is_served():
    guard = make_guard()
    status, text, _ = ask(guard, method="GET", path="/v1/models")
    assert status == 200 and [model["id"] for model in json.loads(text)["data"]] == ["toy"]
    assert json.loads(ask(guard, method="GET", path="/v1/models/toy")[1])["id"] == "toy"
    assert ask(guard, method="GET", path="/v1/models/other")[0] == 404


@pytest.mark.parametrize(
    "given", ["", KEY, "Bearer", "Bearer ", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", f"bearer {KEY}", "Bearer é"]
)
def test_a_wrong_key_is_refused_and_nothing_shows_the_right_one(given, capfd):
    guard = make_guard(inner := Inner(), key=KEY)
    for path, method in ((CHAT, "POST"), ("/v1/models", "GET"), ("/reset", "POST")):
        status, text, headers = ask(guard, chat("Hello"), method, path, authorization=given)
        assert status == 401 and headers[b"www-authenticate"] == b"Bearer" and KEY.encode() not in text
    assert inner.bodies == [] and KEY not in "".join(capfd.readouterr())
    assert ask(guard, chat("Hello"), authorization=f"Bearer {KEY}", host="any.example")[0] == 200
    assert ask(guard, method="GET", path="/health")[0] == 200


def test_requests_wait_their_turn_and_those_beyond_are_told_to_come_back():
    async def run():
        go = asyncio.Event()
        guard = make_guard(inner := Inner(go.wait))
        tasks = []
        for number in range(5):
            tasks.append(asyncio.create_task(call(guard, chat(str(number)))))
            await asyncio.sleep(0.05)
        assert inner.now == 1 and [task.done() for task in tasks] == [False] * 3 + [True] * 2
        go.set()
        results = await asyncio.gather(*tasks)
        return inner, guard, results

    inner, guard, results = asyncio.run(run())
    assert [status for status, *_ in results] == [200] * 3 + [503] * 2
    assert all(int(headers[b"retry-after"]) > 0 for _, _, headers in results[3:])
    assert "at most 3 are taken" in json.loads(results[3][1])["error"]["message"]
    assert inner.most == 1 and guard.queue.inside == 0
    assert [body["messages"][0]["content"][0]["text"] for body in inner.bodies] == ["0", "1", "2"]


def test_a_client_that_leaves_frees_its_place_and_its_answer_is_stopped():
    async def run():
        async def until_left():
            while not guard.left:
                await asyncio.sleep(0.01)

        guard = make_guard(inner := Inner(until_left))
        running, waiting = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(call(guard, chat("running"), left=running))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(call(guard, chat("waiting"), left=waiting))
        await asyncio.sleep(0.05)
        assert guard.queue.inside == 2 and inner.now == 1
        waiting.set()
        await second
        assert guard.queue.inside == 1 and not guard.left
        running.set()
        await first
        assert (guard.queue.inside, guard.left, inner.now) == (0, set(), 0)
        inner.pause = None
        assert (await call(guard, chat("next")))[0] == 200
        return [body["messages"][0]["content"][0]["text"] for body in inner.bodies]

    assert asyncio.run(run()) == ["running", "next"]


def test_a_client_that_takes_nothing_frees_its_place():
    async def run():
        guard = make_guard(limits=Limits(running=1, waiting=0, seconds=0.1))
        await call(guard, chat("Hello"), take=asyncio.Event().wait)
        assert (await call(guard, chat("next")))[0] == 200

    asyncio.run(run())


def test_a_request_that_is_not_sent_is_given_up():
    async def run():
        guard = make_guard(limits=Limits(seconds=0.1))
        sent = []

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers}
        guard_task = guard(scope, asyncio.Event().wait, send)
        await asyncio.wait_for(guard_task, 30)
        assert sent[0]["status"] == 408 and guard.queue.inside == 0

    asyncio.run(run())


def test_a_fault_of_the_app_frees_the_place():
    async def run():
        async def fail():
            raise RuntimeError("a fault")

        guard = make_guard(inner := Inner(fail))
        for _ in range(5):
            with pytest.raises(RuntimeError, match="a fault"):
                await call(guard, chat("Hello"))
        inner.pause = None
        assert (await call(guard, chat("Hello")))[0] == 200 and guard.queue.inside == 0

    asyncio.run(run())


def test_a_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    monkeypatch.setenv(launch.KEY, "environment-key-1")
    assert launch.read_key(str(path), "0.0.0.0") == KEY
    assert launch.KEY not in os.environ, "processes that are started would have it"
    monkeypatch.setenv(launch.KEY, "environment-key-1")
    assert launch.read_key(None, "0.0.0.0") == "environment-key-1"
    assert launch.read_key(None, "127.0.0.1") is None
    for text in ("short", "", "a key with blanks in it", "schlüssel-schlüssel"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="at least 16 ASCII characters") as error:
            launch.read_key(str(path), "127.0.0.1")
        assert not text or text not in str(error.value)


@pytest.mark.parametrize(
    "arguments, missing, wanted",
    [
        (["--port", "8000"], True, "error: minivlm serve needs the packages fastapi, openai, uvicorn. Install them"),
        (
            ["--host", "0.0.0.0"],
            False,
            "error: --host 0.0.0.0: other machines can reach the server, and it has no key",
        ),
        (["--api_key_file", "no-such-file"], False, "error: no-such-file: No such file or directory."),
    ],
)
def test_a_mistake_at_the_start_is_one_line(arguments, missing, wanted, monkeypatch, capsys):
    monkeypatch.setattr("minivlm.commands.serve.find_spec", lambda name: None if missing else name)
    assert main(["serve", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(wanted) and error.count("\n") == 1
