"""Guard: who may connect. A page of another site that runs in the same browser must not reach the workbench.

Host      must be this machine by name, so that another name which points here (DNS rebinding) is refused
Origin    of a socket must be the page's own: browsers send it, and other sites cannot forge it
token     a random word in the link, where the workbench listens to more than this machine
"""

import ipaddress
import secrets
from dataclasses import dataclass
from urllib.parse import urlsplit

from editkit.errors import ConfigError

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Guard:
    """`host`: what the workbench listens to. `token`: "" where none is asked for."""

    host: str = "127.0.0.1"
    token: str = ""

    @classmethod
    def of(cls, host: str) -> "Guard":
        """With a new token, unless it is this machine alone. Raises ConfigError for an empty host."""
        if not host:
            raise ConfigError("--host is empty: give an address to listen to, as 127.0.0.1.")
        return cls(host, "" if host in LOOPBACK else secrets.token_urlsafe(24))

    @property
    def everywhere(self) -> bool:
        """Whether it listens to all addresses of the machine."""
        try:
            return ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return False

    def host_is_ours(self, host: str | None) -> bool:
        """Whether a Host header names this machine. Under any address, the token has to do."""
        name = _name(f"//{host}") if host else None
        return name is not None and (name in LOOPBACK or name == self.host.lower() or (self.everywhere and bool(name)))

    def origin_is_ours(self, origin: str | None, host: str | None) -> bool:
        """Whether an Origin header is that of our own page, which was fetched from the same host and port."""
        if not origin or not host or not self.host_is_ours(host):
            return False
        parts = urlsplit(origin)
        return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()

    def token_is_ours(self, token: str | None) -> bool:
        """Whether the token is the one of the link."""
        return not self.token or secrets.compare_digest((token or "").encode(), self.token.encode())


def _name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
