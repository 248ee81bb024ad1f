"""Who may act and who may change the policy: requests held against the keys of two files."""

import logging
from ipaddress import ip_address
from pathlib import Path

from fastapi import Request

from service.errors import Forbidden, Unauthorized
from service.http.key_file import KeyFile, digest_of

logger = logging.getLogger(__name__)

NOT_OF_THIS_MACHINE = {
    *(b"forwarded", b"x-real-ip", b"x-client-ip", b"x-cluster-client-ip", b"cf-connecting-ip"),
    *(b"true-client-ip", b"fastly-client-ip", b"x-original-forwarded-for", b"via"),
    *(b"origin", b"sec-fetch-site"),
}
"""Headers of what a proxy passed on, or a page in a browser sent, wherever it came from last.

Node's `fetch` is no page and sends `Sec-Fetch-Mode`.
"""
NOR_WHAT_BEGINS_SO = (b"x-forwarded-", b"x-envoy-")


class Keys:
    """What the keys of `--act-keys` and `--admin-keys` open. Raises KeyFileError.

    `may_act` and `may_administer` are dependencies of routes. FastAPI reads a body that a route
    declares before them: one that is to learn nothing first reads it from the request.
    """

    def __init__(self, act_file: Path | None = None, admin_file: Path | None = None) -> None:
        self._act = None if act_file is None else KeyFile(act_file)
        self._admin = None if admin_file is None else KeyFile(admin_file)
        self.are_needed_to_act = self._act is not None
        self.are_needed_to_administer = self._admin is not None

    def reload(self) -> None:
        """Reads the files again: what is in them now counts from the next request on."""
        files = [file for file in (self._act, self._admin) if file is not None]
        if not files:
            logger.info("there are no files of keys to read again")
        for file in files:
            file.reload()

    def check_act(self, authorization: bytes | None) -> None:
        """Raises Unauthorized where a key is needed to act, and this header has none.

        A key of either file does.
        """
        if self._act is not None:
            self._names(authorization)

    async def may_act(self, request: Request) -> None:
        """Raises as `check_act`."""
        self.check_act(_authorization(request))

    async def may_administer(self, request: Request) -> str:
        """Whose request it is, for the log. Raises Unauthorized or Forbidden without an admin key.

        Where there are none it has to come from this machine.
        """
        if self._admin is None:
            if not _is_of_this_machine(request):
                raise Forbidden(
                    "without --admin-keys FILE this route answers only programs on the server's "
                    "own machine, and no proxy or browser"
                )
            return "this machine"
        _, admin = self._names(_authorization(request))
        if admin is None:
            raise Forbidden("the key may act, and this route takes one of --admin-keys")
        return f"the key {admin}"

    def _names(self, authorization: bytes | None) -> tuple[str | None, str | None]:
        """What the key is called in either file; in one of them it is."""
        scheme, _, rest = (authorization or b"").partition(b" ")
        key = rest.strip(b" ")
        if scheme.lower() != b"bearer" or not key:
            raise Unauthorized("there is no key; send `Authorization: Bearer KEY`")
        digest = digest_of(key)
        act = None if self._act is None else self._act.name_of(digest)
        admin = None if self._admin is None else self._admin.name_of(digest)
        if act is None and admin is None:
            raise Unauthorized("the key is not one of this server's")
        return act, admin


def is_loopback(host: str) -> bool:
    """Whether an IP address is of the machine itself; a name is not looked up."""
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _authorization(request: Request) -> bytes | None:
    # Given twice it is no key: none has a space in it.
    given = [value for name, value in request.scope["headers"] if name == b"authorization"]
    return b", ".join(given) or None


def _is_of_this_machine(request: Request) -> bool:
    if request.client is None or not is_loopback(request.client.host):
        return False
    names = {name for name, _ in request.scope["headers"]}
    return names.isdisjoint(NOT_OF_THIS_MACHINE) and not any(
        name.startswith(NOR_WHAT_BEGINS_SO) for name in names
    )
