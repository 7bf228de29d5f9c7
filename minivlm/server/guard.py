"""Stand in front of transformers' server: an ASGI middleware that admits, checks and counts requests.

A request passes the key, the queue and `Bodies.check`. The app behind it then sees a body of known fields, with
pictures in the request itself. Every refusal is one line of JSON in OpenAI's format.
"""

import asyncio
import hmac
import json
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from uuid import uuid4

from minivlm.server.bodies import Bodies
from minivlm.server.limits import LOOPBACK, Limits, Refusal

CHAT = "/v1/chat/completions"
RETRY_AFTER = b"2"  # seconds
DRAIN, DRAIN_SECONDS = 4, 5.0  # a refused body is read up to this many times the limit and so long


class Guard:
    """Admit requests to an ASGI app.

    Args:
        app: transformers' server.
        key: that clients must send; None takes requests without one, from this machine alone.
        prepare: given a name for the request and its decoding, returns the value of `generation_config`.

    Attributes:
        left: names of requests whose client has left; what computes their answers must stop.
    """

    def __init__(self, app, bodies: Bodies, key: str | None = None, prepare: Callable[[str, dict], str] | None = None):
        self.app, self.bodies, self.limits = app, bodies, bodies.limits
        self.key, self.prepare, self.left = key, prepare, set()
        self.queue, self.started = Queue(bodies.limits), int(time.time())

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # a websocket
            return await send({"type": "websocket.close", "code": 1008})
        inbox = Inbox(receive)
        try:
            await self.route(scope, inbox, send)
        except Refusal as refusal:
            await inbox.drain(DRAIN * self.limits.body)
            await answer(send, refusal.status, refusal.body())

    async def route(self, scope, receive, send) -> None:
        """Answer, or pass on what is asked for; raise `Refusal` for what is not served."""
        place = (scope["method"], scope["path"])
        if place == ("GET", "/health"):
            return await self.app(scope, receive, send)
        self.check_client(scope)
        if place == ("GET", "/v1/models"):  # transformers would list what is in the cache of the Hub
            return await answer(send, 200, json.dumps({"object": "list", "data": [self.model()]}).encode())
        if place == ("GET", f"/v1/models/{self.bodies.name}"):
            return await answer(send, 200, json.dumps(self.model()).encode())
        if scope["path"] != CHAT:
            raise Refusal(f"{scope['path'][:80]}: not served. There are {CHAT}, /v1/models and /health.", 404)
        if scope["method"] != "POST":
            raise Refusal(f"{scope['method']} {CHAT}: send POST.", 405)
        if header(scope, b"content-type").partition(";")[0].strip().lower() != "application/json":
            # A web page can send any other type to a server on its reader's machine without asking.
            raise Refusal("Content-Type must be application/json. Set this header.", 415)
        async with self.queue.place():
            client = Client(receive, send, self.limits)
            await client.read(header(scope, b"content-length"))
            await self.while_there(client, scope)

    def check_client(self, scope) -> None:
        """Refuse a client without the key; without one, a page whose name was made to lead to this machine."""
        if self.key is not None:
            given = header(scope, b"authorization")
            if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {self.key}".encode()):
                raise Refusal("No valid API key. Send it as the header Authorization: Bearer KEY.", 401)
            return
        host = header(scope, b"host")
        name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
        if name and name.lower() not in LOOPBACK:
            raise Refusal(
                f"Host {host[:80]!r} is not this machine. Start the server with a key, or use 127.0.0.1.", 403
            )

    def model(self) -> dict:
        """Return the entry of the model in the list of models."""
        return {"id": self.bodies.name, "object": "model", "created": self.started, "owned_by": "minivlm"}

    async def while_there(self, client: "Client", scope) -> None:
        """Answer until it is done or the client leaves; then stop the computation, and wait until it has ended."""
        name = uuid4().hex
        task, watch = asyncio.ensure_future(self.chat(scope, client, name)), asyncio.ensure_future(client.watch())
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self.left.add(name)
                if not client.passed:  # it waits for its turn, or its pictures are read
                    task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                if not client.gone.is_set():
                    raise
        finally:
            watch.cancel()
            task.cancel()
            self.left.discard(name)

    async def chat(self, scope, client: "Client", name: str) -> None:
        """Wait for a turn, check the body, and pass it on."""
        async with self.queue.turns:
            # In a thread: pictures take time, and others are still to be answered.
            checked, decoding = await asyncio.to_thread(self.bodies.check, client.take())
            if self.prepare is not None:
                checked["generation_config"] = self.prepare(name, decoding)
            client.body, client.passed = json.dumps(checked).encode(), True
            kept = [(k, v) for k, v in scope["headers"] if k not in (b"content-length", b"transfer-encoding")]
            length = (b"content-length", str(len(client.body)).encode())
            await self.app({**scope, "headers": [*kept, length]}, client.receive, client.send)


class Queue:
    """Count requests: `running` have their turn, `waiting` wait in order of arrival, the rest are refused."""

    def __init__(self, limits: Limits):
        self.limits, self.inside, self.turns = limits, 0, asyncio.Semaphore(limits.running)

    @asynccontextmanager
    async def place(self):
        """Hold a place from the first byte to the end of the answer.

        Raises:
            Refusal: there is none.
        """
        most = self.limits.running + self.limits.waiting
        if self.inside >= most:
            raise Refusal(f"{self.inside} requests are here, at most {most} are taken. Try again in a moment.", 503)
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


class Inbox:
    """Receive messages, and know whether more of the body is to come."""

    def __init__(self, receive):
        self._receive, self.more = receive, True

    async def __call__(self) -> dict:
        message = await self._receive()
        self.more = self.more and message["type"] == "http.request" and message.get("more_body", False)
        return message

    async def drain(self, most: int) -> None:
        """Read up to `most` bytes for a few seconds: many clients send all before they read the answer."""

        async def drain(size: int = 0) -> None:
            while self.more and size < most:
                size += len((await self()).get("body", b""))

        try:
            await asyncio.wait_for(drain(), DRAIN_SECONDS)
        except asyncio.TimeoutError:
            pass  # the connection is closed with the answer


class Client:
    """Hold both ends of a request: its body, whether the client is still there, and what was sent to it."""

    def __init__(self, receive, send, limits: Limits):
        self._receive, self._send, self.limits = receive, send, limits
        self.body, self.gone, self.passed = b"", asyncio.Event(), False

    async def read(self, declared: str) -> None:
        """Read the body.

        Raises:
            Refusal: it is too large or slow, or the client leaves.
        """
        most, data, more = self.limits.body, bytearray(), True
        end = asyncio.get_running_loop().time() + self.limits.seconds
        too_large = declared.isdigit() and int(declared[:20]) > most
        while more and not too_large:
            left = end - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(self._receive(), max(left, 0.01))
            except asyncio.TimeoutError:
                seconds = f"{self.limits.seconds:g} seconds"
                raise Refusal(f"The request was not sent in {seconds}. Send smaller pictures.", 408) from None
            if message["type"] == "http.disconnect":
                raise Refusal("The client left.")
            data += message.get("body", b"")
            more, too_large = message.get("more_body", False), len(data) > most
        if too_large:
            raise Refusal(f"The request has more than {most:,} bytes. Send fewer or smaller pictures.", 413)
        self.body = bytes(data)

    def take(self) -> bytes:
        """Return the body and let go of it."""
        body, self.body = self.body, b""
        return body

    async def watch(self) -> None:
        """Return when the client has left, or takes nothing more."""
        while not self.gone.is_set() and (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone.set()

    async def receive(self) -> dict:
        """Give the checked body to the app, then wait until the client leaves."""
        if body := self.take():
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message) -> None:
        """Pass a piece of the answer on; a client that takes none for a while counts as gone."""
        if self.gone.is_set():
            return
        try:
            await asyncio.wait_for(self._send(message), self.limits.seconds)
        except (asyncio.TimeoutError, OSError):
            self.gone.set()


def header(scope, name: bytes) -> str:
    """Return the value of a header; empty without one."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


async def answer(send, status: int, body: bytes) -> None:
    """Send a whole answer."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 503:
        headers.append((b"retry-after", RETRY_AFTER))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
