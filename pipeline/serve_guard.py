"""Who is answered by `evenlight serve`: its own page, under its own name, and nobody else."""

import ipaddress

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HERE = "127.0.0.1"
HEADERS = {
    "content-security-policy": "default-src 'none'; img-src 'self' blob: data:; "
    "connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Guard:
    """Refuses what does not come from our own page, and says to browsers what that may do."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app, self.host = app, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                pairs = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *pairs]
            await send(message)

        reason = _why_refused(Request(scope), self.host)
        app = JSONResponse({"error": reason}, 403) if reason else self.app
        await app(scope, receive, send_guarded)


def _why_refused(request: Request, host: str) -> str:
    """Empty where a request is to be served."""
    named = request.headers.get("host", "")
    if not _is_ours(named.rpartition(":")[0] or named, host):
        return f"this server does not go by the name of {named}"
    origin = request.headers.get("origin", f"http://{named}")
    if request.method not in ("GET", "HEAD") and origin != f"http://{named}":
        return "another page must not change anything here"
    asked_by = request.headers.get("sec-fetch-site", "none")
    if request.url.path != "/" and asked_by not in ("same-origin", "none"):
        return "another page must not look at anything here"
    return ""


def _is_ours(name: str, host: str) -> bool:
    """Whether a Host header names this server.  A page elsewhere can have its own name lead here
    (DNS rebinding), but not a number; a server on all addresses goes by any number."""
    if name in (HERE, "localhost", host, f"[{host}]"):
        return True
    if host not in ("0.0.0.0", "::"):
        return False
    try:
        return bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return False
