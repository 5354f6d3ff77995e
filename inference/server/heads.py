"""Where the head of a request ends in what has been read, how long it may be, and which bytes no head has."""

import re

from .errors import ApiError

MAX_URL = 8 * 1024  # bytes of a request's target
MAX_HEADERS = 32 * 1024  # bytes of all its header lines
MAX_FIELDS = 128  # header lines
LINE = MAX_URL + 64  # of the request line, with method and version

_NONE = re.compile(rb"[^\t\r\n -~\x80-\xff]|\r(?=[^\n])|(?<!\r)\n|\n[\t ]")
"""Control characters, bare CR or LF, a folded line: two servers may read such a head as two different ones."""


class Heads:
    """What has been read behind the last request; every byte is looked at once."""

    def __init__(self) -> None:
        self._read = bytearray()
        self._scanned = 0

    def __len__(self) -> int:
        return len(self._read)

    def add(self, data: bytes) -> None:
        """Take what has been read."""
        self._read += data

    def rest(self) -> bytes:
        """Give away all that is left: it belongs to a body."""
        rest, self._read = bytes(self._read), bytearray()
        return rest

    def take(self) -> bytes | None:
        """The next request's head, once it is whole.

        Raises:
            ApiError: it is too long, or has bytes that no head has.
        """
        while self._read.startswith(b"\r\n"):
            del self._read[:2]
        end = self._read.find(b"\r\n\r\n", max(0, self._scanned - 3))
        size = len(self._read) if end < 0 else end + 4
        if _NONE.search(self._read, max(0, self._scanned - 2), size):
            raise ApiError(400, "the head has control characters, bare line feeds or folded lines", code="invalid_http")
        self._scanned = size
        if size >= LINE and self._read.find(b"\r\n", 0, LINE) < 0:
            raise ApiError(414, f"the URL must not exceed {MAX_URL} bytes", code="url_too_long")
        if size > LINE + MAX_HEADERS or self._read.count(b"\r\n", 0, size) > MAX_FIELDS + 2:
            rule = f"the headers must not exceed {MAX_HEADERS} bytes and {MAX_FIELDS} lines"
            raise ApiError(431, rule, code="headers_too_large")
        if end < 0:
            return None
        head, self._scanned = bytes(self._read[:size]), 0
        del self._read[:size]
        return head
