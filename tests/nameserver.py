"""A DNS server of a few names, which may be changed while it runs; it knows no other."""

import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tests.connection import Address

HEADER = struct.Struct("!HHHHHH")
ANSWERED, NO_SUCH_NAME = 0x8180, 0x8183
ADDRESS_OF_IPV4 = 1
STOP = b"stop"


@contextmanager
def nameserver(names: Mapping[str, str]) -> Iterator[Address]:
    """Where it is asked; `names` are read anew for each answer."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=serve, args=(asked, names))
        thread.start()
        try:
            yield asked.getsockname()
        finally:
            asked.sendto(STOP, asked.getsockname())
            thread.join(10)


def serve(asked: socket.socket, names: Mapping[str, str]) -> None:
    while True:
        query, client = asked.recvfrom(2048)
        if query == STOP:
            return
        asked.sendto(answer(query, names), client)


def answer(query: bytes, names: Mapping[str, str]) -> bytes:
    labels, at = [], HEADER.size
    while query[at]:
        labels.append(query[at + 1 : at + 1 + query[at]].decode())
        at += query[at] + 1
    (kind,) = struct.unpack_from("!H", query, at + 1)
    address = names.get(".".join(labels))
    record = b""
    if address is not None and kind == ADDRESS_OF_IPV4:
        # The question's name again, which begins after the header; for one second.
        head = struct.pack("!HHHIH", 0xC000 | HEADER.size, kind, 1, 1, 4)
        record = head + socket.inet_aton(address)
    (number,) = struct.unpack_from("!H", query)
    flags = NO_SUCH_NAME if address is None else ANSWERED
    return HEADER.pack(number, flags, 1, bool(record), 0, 0) + query[HEADER.size : at + 5] + record
