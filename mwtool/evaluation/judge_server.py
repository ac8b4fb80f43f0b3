"""A judge behind an OpenAI-compatible server. The token goes to that server alone: redirects are not followed."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from http.client import HTTPException
from ipaddress import ip_address
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

from mwtool.errors import BadValue, line_of

TOKEN = "MWTOOL_JUDGE_TOKEN"  # noqa: S105 # the name of a variable
"""Environment variable with the server's token. It is in no document and no message."""
TIMEOUT, TRIES, WAIT = 120.0, 4, 1.0
"""Seconds to wait for an answer; attempts at a busy or silent server; seconds before the second, doubled each time."""
BUSY = {408, 429, 500, 502, 503, 504}
"""Statuses after which it is worth trying again."""
MOST = 2**20
"""Bytes of an answer that are read."""


@dataclass(frozen=True, slots=True)
class Server:
    """url: up to and including `/v1`. model: as the server names it."""

    url: str
    model: str

    @property
    def name(self) -> str:
        """As results name the judge."""
        return f"{self.url}#{self.model}"

    def ask(self, prompt: str, new_tokens: int) -> str:
        """The answer to one message, decoded greedily. Raises BadValue where there is none."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": new_tokens,
        }
        found = _asked(f"{self.url}/chat/completions", body)
        try:
            message = found["choices"][0]["message"]
            text = message.get("content") or message.get("refusal") or ""
        except (KeyError, IndexError, TypeError, AttributeError) as fault:
            raise BadValue(
                f"the judge {self.url} gave no chat completion; expected an OpenAI-compatible server"
            ) from fault
        return text if isinstance(text, str) else ""


def is_url(judge: str) -> bool:
    """Whether a judge is a server and no model to load."""
    return judge.startswith(("http://", "https://"))


def server_at(judge: str) -> Server:
    """The server of `URL` or `URL#MODEL`; without a model, the only one the server has.

    Raises BadValue for an address that is none or names a user, and where the server has several models or none.
    """
    parts = urlsplit(judge)
    if not parts.hostname or parts.username is not None or parts.query:
        raise BadValue(
            f"--judge {_without_user(judge)} is no address of a server; expected such as "
            f"http://127.0.0.1:8000/v1#MODEL, and a token, if it needs one, in {TOKEN}"
        )
    url = judge.partition("#")[0].rstrip("/")
    if parts.fragment:
        return Server(url, parts.fragment)
    listed = _asked(f"{url}/models").get("data")
    names = [str(one.get("id")) for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    if len(names) != 1:
        has = f"has {len(names)} models ({', '.join(names[:5])})" if names else "lists no model"
        raise BadValue(f"the judge {url} {has}; name one: --judge {url}#MODEL")
    return Server(url, names[0])


class _NoRedirect(HTTPRedirectHandler):
    """A redirect is an error: its target would receive the token."""

    def redirect_request(self, *_arguments: Any, **_options: Any) -> None:
        return None


def _opener(host: str) -> OpenerDirector:
    """Without a proxy for this machine itself."""
    try:
        local = ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    return build_opener(_NoRedirect(), *([ProxyHandler({})] if local else []))


def _asked(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object that a server answers. Raises BadValue."""
    headers = {"Content-Type": "application/json"}
    if os.environ.get(TOKEN):
        headers["Authorization"] = f"Bearer {os.environ[TOKEN]}"
    data = None if body is None else json.dumps(body).encode()
    opener = _opener(urlsplit(url).hostname or "")
    for attempt in range(TRIES):
        try:
            with opener.open(Request(url, data, headers), timeout=TIMEOUT) as answer:  # noqa: S310 # http or https
                return _object(url, answer.read(MOST))
        except HTTPError as fault:
            fault.close()
            said, again = f"answered {fault.code} {fault.reason}", fault.code in BUSY
        except (URLError, HTTPException, OSError) as fault:
            said, again = f"cannot be reached: {line_of(fault)}", True
        if not again or attempt == TRIES - 1:
            break
        time.sleep(WAIT * 2**attempt)
    raise BadValue(f"the judge {url} {said}; check the address, the model's name, and the token in {TOKEN}")


def _object(url: str, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError as fault:
        raise BadValue(f"the judge {url} gave no JSON; expected an OpenAI-compatible server") from fault
    if not isinstance(found, dict):
        raise BadValue(f"the judge {url} gave a {type(found).__name__}; expected a JSON object")
    return found


def _without_user(judge: str) -> str:
    scheme, _, rest = judge.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
