"""Fetch a picture from an allowed host, so that a request cannot make the server read from its own network.

A name is resolved once, all its addresses must be public, and the connection goes to the address that was checked. A
redirect is checked like the first address. Proxies of the environment are not used.
"""

import http.client
import ipaddress
import socket
import ssl
from collections.abc import Iterable
from time import monotonic
from urllib.parse import quote, urljoin, urlsplit

from minivlm.server.limits import Refusal

PORTS = {"http": 80, "https": 443}
MAX_REDIRECTS = 3
MAX_SECONDS = 15.0  # for a picture, redirects included
MAX_URL = 2000  # characters
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # Python calls it global, and it leads to any IPv4 address


def refuse(url: str, reason: str) -> Refusal:
    """Return a refusal that names the URL."""
    return Refusal(f"picture {url[:200]!r}: {reason}", param="image_url")


def is_public(address: str) -> bool:
    """Return whether an address is one of the public internet, and not IPv4 inside of IPv6."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # an IPv6 address with a zone, as fe80::1%eth0
        return False
    if ip.version == 6 and (ip.ipv4_mapped or ip.sixtofour or ip.teredo or ip.is_site_local or ip in NAT64):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_loopback or ip.is_link_local)


def split(url: str, hosts: Iterable[str]) -> tuple[str, str, str]:
    """Return scheme, host and path with query of a URL whose host is allowed.

    Raises:
        Refusal: anything else; the message says what.
    """
    if len(url) > MAX_URL or not url.isascii() or any(character <= " " or character == "\x7f" for character in url):
        raise refuse(
            url, f"a URL has at most {MAX_URL} ASCII characters and no blanks. Send the bytes as a data: URL."
        )
    try:
        parts = urlsplit(url)
        port, host = parts.port, (parts.hostname or "").lower().removesuffix(".")
    except ValueError as error:
        raise refuse(url, f"it is no URL: {error}. Send the bytes as a data: URL.") from error
    if parts.scheme not in PORTS:
        raise refuse(url, f"scheme {parts.scheme!r}. Only data:, http and https are taken.")
    if "@" in parts.netloc or "\\" in url:
        raise refuse(url, "it has a user name or a backslash. Leave it out.")
    if host not in hosts:
        allowed = ", ".join(sorted(hosts)) or "none"
        raise refuse(
            url, f"host {host!r} is not allowed, allowed: {allowed}. Send the bytes as a data: URL, or start "
            "the server with --allow_url HOST.",
        )  # fmt: skip
    if port not in (None, PORTS[parts.scheme]):
        raise refuse(url, f"port {port}. Only {PORTS[parts.scheme]} is used with {parts.scheme}.")
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    return parts.scheme, host, path + (f"?{parts.query}" if parts.query else "")


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host."""
    return [found[4][0] for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def connect(scheme: str, host: str, address: str, seconds: float) -> http.client.HTTPConnection:
    """Return a connection to `address`; the certificate must be that of `host`."""
    sock = socket.create_connection((address, PORTS[scheme]), timeout=seconds)
    if scheme == "http":
        connection = http.client.HTTPConnection(host, timeout=seconds)
    else:
        context = ssl.create_default_context()
        try:
            sock = context.wrap_socket(sock, server_hostname=host)
        except BaseException:
            sock.close()
            raise
        connection = http.client.HTTPSConnection(host, timeout=seconds, context=context)
    connection.sock = sock  # or http.client would look up the name once more
    return connection


def read(response: http.client.HTTPResponse, limit: int, end: float, url: str) -> bytes:
    """Return the body of an answer.

    Raises:
        Refusal: it has more than `limit` bytes, is not there at the time `end`, or is compressed.
    """
    if (response.getheader("Content-Encoding") or "identity") != "identity":
        raise refuse(url, "its host compresses it, although plain bytes were asked for. Send it as a data: URL.")
    data = bytearray()
    while piece := response.read1(65536):
        data += piece
        if len(data) > limit:
            raise Refusal(f"picture {url[:200]!r}: more than {limit:,} bytes. Scale it down.", 413, "image_url")
        if monotonic() > end:
            raise refuse(url, f"not there after {MAX_SECONDS:.0f} seconds. Send it as a data: URL.")
    return bytes(data)


def step(url: str, hosts: Iterable[str], limit: int, end: float) -> bytes | str:
    """Return the bytes that a URL names, or the URL that it redirects to."""
    scheme, host, path = split(url, hosts)
    addresses = resolve(host, PORTS[scheme])
    if not addresses or not all(map(is_public, addresses)):
        raise refuse(url, f"{host} has an address outside of the public internet. Send it as a data: URL.")
    seconds = max(0.1, end - monotonic())
    connection = connect(scheme, host, addresses[0], seconds)
    try:
        connection.request("GET", path, headers={"Accept-Encoding": "identity", "User-Agent": "minivlm"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308) and (target := response.getheader("Location")):
            return urljoin(url, target)
        if response.status != 200:
            raise refuse(url, f"its host answers with status {response.status}. Check the address.")
        return read(response, limit, end, url)
    finally:
        connection.close()


def fetch(url: str, hosts: Iterable[str], limit: int) -> bytes:
    """Return the bytes that a URL names; follow at most `MAX_REDIRECTS` redirects, each to an allowed host.

    Raises:
        Refusal: the URL or a redirect is not allowed, there are more than `limit` bytes, or the host does not answer.
    """
    end, place = monotonic() + MAX_SECONDS, url
    for _ in range(MAX_REDIRECTS + 1):
        try:
            found = step(place, hosts, limit, end)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            reason = f"{type(error).__name__} at its host. Check the address, or send it as a data: URL."
            raise refuse(place, reason) from error
        if isinstance(found, bytes):
            return found
        place = found
    raise refuse(url, f"more than {MAX_REDIRECTS} redirects. Give the last address.")
