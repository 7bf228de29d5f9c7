"""Call the server's guard as ASGI, with a dummy for transformers' server behind it."""

import asyncio
import base64
import io
import json

from PIL import Image

from minivlm.server.bodies import Bodies
from minivlm.server.guard import CHAT, Guard
from minivlm.server.limits import Limits

CONTROL = ["<|im_start|>", "<|im_end|>", "<|image_pad|>", "<think>"]
LIMITS = Limits(
    body=400_000, pictures=3, picture=100_000, pixels=1_000_000, messages=6, text=500, new_tokens=20, running=1,
    waiting=2, seconds=5,
)  # fmt: skip


class Inner:
    """Stand for transformers' server: keep the bodies, and answer each after `pause`."""

    def __init__(self, pause=None):
        self.bodies, self.pause, self.now, self.most = [], pause, 0, 0

    async def __call__(self, scope, receive, send):
        if scope["path"] == CHAT:
            message = await receive()
            assert not message["more_body"] and int(dict(scope["headers"])[b"content-length"]) == len(message["body"])
            self.bodies.append(json.loads(message["body"]))
            self.now += 1
            self.most = max(self.most, self.now)
            try:
                if self.pause is not None:
                    await self.pause()
            finally:
                self.now -= 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


def make_guard(inner=None, key=None, limits=LIMITS, hosts=(), prepare=None, **options):
    return Guard(inner or Inner(), Bodies("toy", limits, CONTROL, hosts, **options), key, prepare)


async def call(guard, body=b"", method="POST", path=CHAT, left=None, take=None, **headers):
    """Return (status, body, headers), or None; the client leaves when `left` is set, and takes pieces by `take`."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content_type": "application/json", "host": "127.0.0.1:8000"} | headers
    pairs = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": pairs}
    pieces, sent = [body[i : i + 50_000] for i in range(0, len(body), 50_000)] or [b""], []

    async def receive():
        if pieces:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
        await (left or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if take is not None:
            await take()
        sent.append(message)

    await asyncio.wait_for(guard(scope, receive, send), 60)
    if not sent:
        return None
    text = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], text, dict(sent[0]["headers"])


def ask(guard, *args, **options):
    return asyncio.run(call(guard, *args, **options))


def encode(image, kind="PNG", **options):
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def chat(*parts, **fields):
    """Return a request: texts are strings, pictures are bytes or `{"url": ...}`."""

    def part(value):
        if isinstance(value, str):
            return {"type": "text", "text": value}
        return {"type": "image_url", "image_url": {"url": url(value)} if isinstance(value, bytes) else value}

    return {"messages": [{"role": "user", "content": [part(value) for value in parts]}]} | fields


def turns(*messages):
    return {"messages": list(messages)}


PICTURE = encode(Image.new("RGB", (8, 8), "red"))
