"""Pictures are fetched from allowed hosts of the public internet alone, whatever URL, name server or host says."""

import http.server
from threading import Thread

import pytest

from minivlm.server import remote
from minivlm.server.limits import Refusal

PUBLIC, OTHER = "93.184.216.34", "151.101.1.69"
NAMES = {  # what the name server says
    "good.example": [PUBLIC],
    "other.example": [OTHER],
    "inside.example": ["127.0.0.1"],
    "half.example": [PUBLIC, "10.0.0.5"],
    "mapped.example": ["::ffff:169.254.169.254"],
    "nowhere.example": [],
}
ALLOWED = [*NAMES, "127.0.0.1", "2130706433", "0x7f000001", "017700000001", "0177.0.0.1", "127.1", "::1", "0.0.0.0"]
ALLOWED += ["::ffff:127.0.0.1", "169.254.169.254", "[::1]", "::ffff:7f00:1", "64:ff9b::7f00:1", "10.0.0.5"]


class Response:
    """A host's answer."""

    def __init__(self, status=200, body=b"picture", **headers):
        self.status, self.body = status, body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def getheader(self, name):
        return self.headers.get(name)

    def read1(self, size):
        piece, self.body = self.body[:size], self.body[size:]
        return piece


@pytest.fixture
def network(monkeypatch):
    """Replace name server and hosts; return the dict of pages, and the list of connections that were made."""
    pages, made, really = {}, [], remote.resolve
    monkeypatch.setattr(
        remote, "resolve", lambda host, port: NAMES[host] if host in NAMES else really(host, port)
    )  # fmt: skip

    def connect(scheme, host, address, seconds):
        class Connection:
            def request(self, method, path, headers):
                made.append((scheme, host, address, path))
                self.response = pages.get(f"{scheme}://{host}{path}", Response())

            def getresponse(self):
                return self.response

            def close(self):
                pass

        return Connection()

    monkeypatch.setattr(remote, "connect", connect)
    return pages, made


REFUSED = [  # URL, a word of the reason
    ("http://evil.example/a.png", "not allowed"),
    ("http://good.example.evil.example/a.png", "not allowed"),
    ("http://127.0.0.1/a.png", "public"),
    ("http://2130706433/a.png", "public"),
    ("http://0x7f000001/a.png", "public"),
    ("http://017700000001/a.png", "public"),
    ("http://0177.0.0.1/a.png", "public"),
    ("http://127.1/a.png", "public"),
    ("http://0.0.0.0/a.png", "public"),
    ("http://10.0.0.5/a.png", "public"),
    ("http://169.254.169.254/latest/meta-data", "public"),
    ("http://[::1]/a.png", "public"),
    ("http://[::ffff:127.0.0.1]/a.png", "public"),
    ("http://[::ffff:7f00:1]/a.png", "public"),
    ("http://[64:ff9b::7f00:1]/a.png", "public"),
    ("http://inside.example/a.png", "public"),
    ("http://half.example/a.png", "public"),
    ("http://mapped.example/a.png", "public"),
    ("http://nowhere.example/a.png", "public"),
    ("http://user@good.example/a.png", "user name"),
    ("http://good.example:pw@evil.example/a.png", "user name"),
    ("http://good.example\\@evil.example/a.png", "backslash"),
    ("http://good.example:22/a.png", "port 22"),
    ("http://good.example:8000/a.png", "port 8000"),
    ("http://good.example:443/a.png", "port 443"),
    ("http://good.example:99999/a.png", "no URL"),
    ("https://good.example:80/a.png", "port 80"),
    ("file:///etc/passwd", "scheme 'file'"),
    ("ftp://good.example/a.png", "scheme 'ftp'"),
    ("gopher://good.example/a.png", "scheme 'gopher'"),
    ("//good.example/a.png", "scheme ''"),
    ("/etc/passwd", "scheme ''"),
    ("http://good.example/a\r\nHost: x", "blanks"),
    ("http://good.exämple/a.png", "ASCII"),
    ("http://good.example/" + "a" * 2000, "2000"),
    ("http://[::1/a.png", "no URL"),
    ("", "scheme ''"),
]


@pytest.mark.parametrize("url, reason", REFUSED)
def test_a_url_is_refused_and_no_connection_is_made(url, reason, network):
    with pytest.raises(Refusal) as refused:
        remote.fetch(url, ALLOWED, 100)
    assert reason in str(refused.value) and refused.value.status == 400 and "\n" not in str(refused.value)
    assert network[1] == []


ADDRESSES = """
    127.0.0.1 127.255.255.254 10.1.2.3 172.16.0.1 172.31.255.255 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 0.1.2.3
    192.0.0.1 192.0.2.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 240.0.0.1 255.255.255.255 :: ::1 fe80::1
    fe80::1%eth0 fc00::1 fd12::1 fec0::1 ff02::1 2001:db8::1 ::ffff:8.8.8.8 ::ffff:10.0.0.1 2002:7f00:1::1 2002:808::
    2001:0:4136:e378:8000:63bf:3fff:fdd2 64:ff9b::808:808 ::127.0.0.1 100::1 text
""".split()


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_not_public(address):
    assert not remote.is_public(address)


@pytest.mark.parametrize("address", [PUBLIC, OTHER, "8.8.8.8", "2606:4700:4700::1111", "172.32.0.1", "100.128.0.1"])
def test_an_address_is_public(address):
    assert remote.is_public(address)


def redirect(to, status=302):
    return Response(status, b"", Location=to)


REDIRECTS = [
    ("http://127.0.0.1/a.png", "public"),
    ("http://169.254.169.254/latest", "public"),
    ("http://inside.example/a.png", "public"),
    ("http://evil.example/a.png", "not allowed"),
    ("//evil.example/a.png", "not allowed"),
    ("http://good.example:6379/", "port 6379"),
    ("file:///etc/passwd", "scheme 'file'"),
    ("data:image/png;base64,AAAA", "scheme 'data'"),
    ("http://user@good.example/b.png", "user name"),
]


@pytest.mark.parametrize("to, reason", REDIRECTS)
def test_a_redirect_is_checked_like_the_first_address(to, reason, network):
    pages, made = network
    pages["http://good.example/a.png"] = redirect(to)
    with pytest.raises(Refusal, match=reason):
        remote.fetch("http://good.example/a.png", ALLOWED, 100)
    assert made == [("http", "good.example", PUBLIC, "/a.png")]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_three_redirects_are_followed_and_a_fourth_is_not(status, network):
    pages, made = network
    pages["http://good.example/1"] = redirect("https://other.example/2", status)
    pages["https://other.example/2"] = redirect("/3?x=1", status)
    pages["https://other.example/3?x=1"] = redirect("http://good.example/4", status)
    assert remote.fetch("http://GOOD.example./1", ALLOWED, 100) == b"picture"
    assert [(host, address) for _, host, address, _ in made] == [
        ("good.example", PUBLIC), ("other.example", OTHER), ("other.example", OTHER), ("good.example", PUBLIC)
    ]  # fmt: skip
    pages["http://good.example/4"] = redirect("http://good.example/5", status)
    with pytest.raises(Refusal, match="more than 3 redirects"):
        remote.fetch("http://good.example/1", ALLOWED, 100)


def test_a_name_is_resolved_once_and_the_connection_goes_to_that_address(network, monkeypatch):
    """A name server that answers differently the second time (DNS rebinding) gains nothing."""
    answers = iter([[PUBLIC], ["127.0.0.1"]])
    monkeypatch.setattr(remote, "resolve", lambda host, port: next(answers))
    assert remote.fetch("http://good.example/a.png", ALLOWED, 100) == b"picture"
    assert network[1] == [("http", "good.example", PUBLIC, "/a.png")] and next(answers) == ["127.0.0.1"]


@pytest.mark.parametrize(
    "response, reason",
    [
        (Response(200, b"x" * 101), "more than 100 bytes"),
        (Response(404), "status 404"),
        (Response(304), "status 304"),
        (Response(200, Content_Encoding="gzip"), "compresses"),
    ],
)
def test_an_answer_of_a_host_is_refused(response, reason, network):
    network[0]["http://good.example/a.png"] = response
    with pytest.raises(Refusal, match=reason):
        remote.fetch("http://good.example/a.png", ALLOWED, 100)


def test_a_host_that_sends_slowly_is_left(network, monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(remote, "monotonic", lambda: next(clock))
    network[0]["http://good.example/a.png"] = Response(200, b"x" * 1_000_000)
    with pytest.raises(Refusal, match="not there after 15 seconds"):
        remote.fetch("http://good.example/a.png", ALLOWED, 10**9)


def test_nothing_is_fetched_without_an_allowed_host(network):
    with pytest.raises(Refusal, match="allowed: none"):
        remote.fetch("http://good.example/a.png", (), 100)
    assert network[1] == []


def test_bytes_come_over_a_real_connection_with_the_name_in_the_header(monkeypatch):
    """Without the two checks that forbid it, a server of this machine is asked as the host would be."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers["Host"], self.headers["Accept-Encoding"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * 200_000)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(remote, "PORTS", {"http": server.server_port})
        monkeypatch.setattr(remote, "is_public", lambda address: True)
        monkeypatch.setattr(remote, "resolve", lambda host, port: ["127.0.0.1"])
        assert remote.fetch("http://good.example/a%20b.png?q=1", ["good.example"], 300_000) == b"x" * 200_000
        with pytest.raises(Refusal, match="more than 100,000 bytes"):
            remote.fetch("http://good.example/a.png", ["good.example"], 100_000)
        server.shutdown()
    assert seen[0] == ("/a%20b.png?q=1", "good.example", "identity")


def test_a_host_that_does_not_answer_is_one_line(monkeypatch):
    monkeypatch.setattr(remote, "resolve", lambda host, port: [PUBLIC])

    def connect(*args):
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(remote, "connect", connect)
    with pytest.raises(Refusal, match="ConnectionRefusedError at its host. Check the address"):
        remote.fetch("http://good.example/a.png", ["good.example"], 100)
