"""How others join the lab: an address that they can type, and its QR code for the camera of a phone."""

from __future__ import annotations

import re
import socket
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil
import segno

from labkit.serving.guard import is_loopback

LONGEST = 200  # characters of an address, so that its code can be read across a room
_EVERYWHERE = ("0.0.0.0", "::")  # what a server listens at that listens at all addresses of its machine


class Served(NamedTuple):
    """Where a page is served.

    Args:
        listens: the address that the server listens at; "" for a page inside another app.
        local_url: the page's address on its own machine, with the port.
        share_url: its public link, if it has one.
    """

    listens: str = ""
    local_url: str = ""
    share_url: str = ""


class Joining(NamedTuple):
    """An address, and the dark modules of its QR code.

    Args:
        address: the address; "" if other machines cannot reach the page.
        size: how many modules the code has on each side, without a margin.
        path: the dark modules as the path of an SVG, each a square of 1 x 1.
    """

    address: str = ""
    size: int = 0
    path: str = ""


def joining(shown: str, served: Served) -> Joining:
    """How to join a page that a browser shows under the address `shown`."""
    address = address_of(shown, served)
    return Joining(address, *qr_code(address)) if address else Joining()


def address_of(shown: str, served: Served) -> str:
    """The address under which others reach the page; "" if there is none.

    The address in the browser is the best one unless only this machine knows it. What follows its path, such
    as the key of the host, is left out.
    """
    if opened := _opened(shown):
        return opened
    if served.share_url:
        return served.share_url.rstrip("/")
    if served.listens in _EVERYWHERE and (here := lan_address()):
        server = urlsplit(served.local_url)
        return f"{server.scheme}://{here}:{server.port}"
    return ""


def _opened(shown: str) -> str:
    """The address in a browser, if other machines can use it, else ""."""
    try:
        parts = urlsplit(shown)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return ""
    plain = re.fullmatch(r"[\w.:-]+ [\w./~-]*", f"{host} {parts.path}", re.ASCII)
    if not plain or parts.scheme not in ("http", "https") or is_loopback(host) or host in _EVERYWHERE:
        return ""
    name = (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "")
    address = f"{parts.scheme}://{name}{parts.path}".rstrip("/")
    return address if len(address) <= LONGEST else ""


def lan_address() -> str:
    """This machine's own IPv4 address in its network; "" if it is in none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it asks which way leads out of here
            found = [probe.getsockname()[0]]
        except OSError:  # no way out, as on a laptop that is its own access point
            cards = psutil.net_if_addrs().values()
            found = [each.address for card in cards for each in card if each.family == socket.AF_INET]
    return next((address for address in found if not is_loopback(address)), "")


def qr_code(address: str) -> tuple[int, str]:
    """The size and the path of an address's QR code (ISO/IEC 18004, error correction M or better)."""
    rows = segno.make(address, error="m", micro=False).matrix
    dark = [(x, y) for y, row in enumerate(rows) for x, module in enumerate(row) if module]
    return len(rows), "".join(f"M{x} {y}h1v1h-1z" for x, y in dark)
