"""What a request's body may be, whatever it is for: how long, and in no encoding."""

from starlette.types import Receive

from service.errors import Disconnected, Malformed, TooLarge, UnsupportedContentType

MOST_IGNORED_BYTES = 1 << 16
LONGEST_LENGTH = 18  # digits; as many as an int may have is a way to hold the loop


def check_length(num_bytes: int, limit: int) -> None:
    """Raises TooLarge for a body, or the part of one, that is more than anybody needs."""
    if num_bytes > limit:
        raise TooLarge(f"the body is larger than {limit} bytes")


def check_announced(length: bytes, limit: int) -> None:
    """The same of a Content-Length."""
    if not length.isdigit():
        raise Malformed("the Content-Length is not a number")
    check_length(int(length[: LONGEST_LENGTH + 1]), limit)


def check_encoding(header: bytes, given: bytes) -> None:
    """Raises UnsupportedContentType for a body that is not as it is; `header` says what of it."""
    plain = "chunked" if header == b"transfer-encoding" else "identity"
    encodings = [token.strip().lower() for token in given.decode("latin-1").split(",")]
    for encoding in encodings:
        if encoding not in ("", plain):
            name = "-".join(word.capitalize() for word in header.decode().split("-"))
            raise UnsupportedContentType(f"the {name} is {encoding[:80]!r}; send the body as it is")


async def read_body(receive: Receive, limit: int) -> bytearray:
    """All of it, from ASGI. Raises TooLarge, and Disconnected where the rest never comes."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected("the client hung up")
        body += message.get("body", b"")
        check_length(len(body), limit)
        if not message.get("more_body", False):
            return body


async def read_ignored(receive: Receive) -> None:
    """Waits for the end of a body that says nothing: half a request is none. Raises likewise."""
    await read_body(receive, MOST_IGNORED_BYTES)
