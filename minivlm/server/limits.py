"""Hold the limits of the server, and the error that refuses a request."""

import json
from dataclasses import dataclass

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Limits:
    """Say how large a request and its parts may be, and how many requests are taken at once."""

    body: int = 32_000_000  # bytes of a request
    pictures: int = 8  # in a request
    picture: int = 10_000_000  # bytes of a picture
    pixels: int = 25_000_000  # of a picture; 75 MB as RGB
    messages: int = 100
    text: int = 20_000  # characters of all messages
    new_tokens: int = 256  # of an answer
    running: int = 2  # requests that are checked and answered; the others wait
    waiting: int = 64
    seconds: float = 30.0  # to send a request; also to take a piece of an answer


class Refusal(ValueError):
    """Refuse a request; the message states value, limit and remedy.

    Args:
        status: of HTTP, 400 to 503.
        param: the field of the request that is wrong.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None):
        super().__init__(message)
        self.status, self.param = status, param

    def body(self) -> bytes:
        """Return the error in OpenAI's format, as one line of JSON."""
        kind = {401: "authentication_error", 503: "overloaded_error"}.get(self.status, "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.status}
        return json.dumps({"error": error}, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
