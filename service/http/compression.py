"""Bodies in gzip or deflate (RFC 9110, 8.4.1), bounded in what they become."""

import zlib

from service.errors import Malformed, UnsupportedContentType
from service.http.accept import quality
from service.http.body import check_length

WBITS = {"gzip": 31, "deflate": 15}
"""What zlib calls them; deflate is its own format, whatever the name says."""
FASTEST = 1


def decompressed(body: bytes | bytearray, encoding: str, limit: int) -> bytes | bytearray:
    """The body, once it is out of its `Content-Encoding`.

    Raises TooLarge where that is more than `limit` bytes, Malformed where it is not in that
    encoding, whole and with nothing behind it, and UnsupportedContentType for another one.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in WBITS:
        raise UnsupportedContentType(
            f"the Content-Encoding is {encoding[:80]!r}; send gzip, deflate or the body as it is"
        )
    stream = zlib.decompressobj(WBITS[encoding])
    try:
        content = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise Malformed(f"the body is not {encoding}") from error
    check_length(len(content), limit)
    if not stream.eof or stream.unused_data:
        raise Malformed(f"the body is not one whole {encoding} stream")
    return content


def preferred(accept_encoding: str) -> str | None:
    """The encoding the client would have, of those there are; None is none."""
    encoding = max(WBITS, key=lambda encoding: quality(accept_encoding, encoding))
    least = quality(accept_encoding, "identity")
    return encoding if quality(accept_encoding, encoding) > least else None


def compressed(content: bytes, encoding: str) -> bytes:
    """The content in that encoding."""
    stream = zlib.compressobj(FASTEST, wbits=WBITS[encoding])
    return stream.compress(content) + stream.flush()
