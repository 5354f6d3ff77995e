"""What bytes get, whatever they are: one table over raw sockets, of what to send and what has to come back."""

import pytest

from .conftest import NAME, run_server
from .raw import GOOD, HOST, JSON, chunks, connect, converse, get, head, post, read_answer, sized

CHUNKED = b"Transfer-Encoding: chunked"
KEY = "open sesame"
LIMIT = 4 * 2**20
OK: tuple[int, None] = (200, None)
BAD = (400, "invalid_http")
HEADER = (400, "invalid_header")
FORGED = (400, "invalid_host")
URL = (400, "invalid_url")

# what → (the bytes, statuses of the answers, code of the last one, whether the connection ends)
ROWS: dict[str, tuple[bytes, list[int], str | None, bool]] = {}


def row(name: str, data: bytes, answer: tuple[int, str | None], *, before: tuple[int, ...] = (), ends: bool = False):
    assert name not in ROWS
    ROWS[name] = (data, [*before, answer[0]], answer[1], ends)


def head_rows() -> None:
    row("a probe", get(), OK)
    row("an empty line before it", b"\r\n" + get(), OK)
    bad = {
        "no path": b"GET\r\n\r\n",
        "HTTP/0.9": b"GET /health\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "HTTP/2 as a version": get(version=b"2.0"),
        "HTTP/1.2": get(version=b"1.2"),
        "a version in small letters": head(b"GET /health http/1.1", HOST),
        "a blank in the path": head(b"GET /he alth HTTP/1.1", HOST),
        "two blanks": head(b"GET  /health HTTP/1.1", HOST),
        "a path that is not ASCII": head("GET /hé HTTP/1.1".encode(), HOST),
        "NUL in the path": head(b"GET /\0 HTTP/1.1", HOST),
        "NUL in a value": get(b"/health", b"X-A: a\0b"),
        "NUL in a name": get(b"/health", b"X-\0: a"),
        "an escape in a value": get(b"/health", b"X-A: \x1b[31m"),
        "bare LF everywhere": get().replace(b"\r\n", b"\n"),
        "bare LF in one line": get(b"/health", b"X-A: a\nX-B: b"),
        "bare CR in a value": get(b"/health", b"X-A: a\rb"),
        "a folded value": get(b"/health", b"X-A: a\r\n b"),
        "a blank before the colon": get(b"/health", b"X-A : a"),
        "no colon": get(b"/health", b"X-A"),
        "no name": get(b"/health", b": a"),
        "no Host": head(b"GET /health HTTP/1.1"),
        "two Hosts": get(b"/health", HOST),
        "not HTTP": b"\0\1\2\3" * 100,
    }
    for name, data in bad.items():
        row(name, data, BAD, ends=True)
    row("a control character in a method", b"G\x07T", BAD, ends=True)


def size_rows() -> None:
    path = b"/" + b"a" * 8191
    row("the longest URL", get(path), (404, "not_found"))
    row("a longer one", get(path + b"a" * 100), (414, "url_too_long"), ends=True)
    row("one without end", b"GET /" + b"a" * 9000, (414, "url_too_long"), ends=True)
    row("128 headers", get(b"/health", *[b"X-A: b"] * 127), OK)
    row("129 headers", get(b"/health", *[b"X-A: b"] * 128), (431, "headers_too_large"), ends=True)
    row("32 KiB of headers", get(b"/health", *[b"X: " + b"a" * 4000] * 8), OK)
    row("more", get(b"/health", *[b"X: " + b"a" * 4200] * 10), (431, "headers_too_large"), ends=True)
    row("a header without end", get()[:-2] + b"X: " + b"a" * 45_000, (431, "headers_too_large"), ends=True)


def host_rows() -> None:
    def named(host: bytes, version: bytes = b"1.1") -> bytes:
        return head(b"GET /health HTTP/" + version, b"Host: " + host)

    for host in (b"127.0.0.1", b"localhost:80", b"LOCALHOST.", b"[::1]:8000", b"a.localhost"):
        row(f"Host {host.decode()}", named(host), OK)
    forged = (
        b"", b"evil.example", b"evil.example:8000", b"localhost.evil.example", b"localhost@evil.example", b"10.0.0.1",
        b"127.0.0.1.evil.example", b"localhost:80:80", b"localhost:x", b"localhost/health", b"a b", b"[::2]", b"\xff",
    )  # fmt: skip
    for host in forged:
        row(f"Host {host.decode('latin-1')!r}", named(host), FORGED, ends=True)
    row("HTTP/1.0", named(b"localhost", b"1.0"), OK, ends=True)
    row("HTTP/1.0 without Host", head(b"GET /health HTTP/1.0"), FORGED, ends=True)
    row("a whole URL", get(b"http://localhost/health"), OK)
    row("a whole URL of nothing more", get(b"http://localhost"), OK)
    row("a whole URL of another host", get(b"http://evil.example/health"), FORGED, ends=True)
    row("a whole URL, forged Host", head(b"GET http://localhost/health HTTP/1.1", b"Host: evil"), FORGED, ends=True)
    row("a whole URL with https", get(b"https://localhost/health"), URL, ends=True)
    row("CONNECT", get(b"localhost:443", method=b"CONNECT"), URL, ends=True)
    row("OPTIONS *", get(b"*", method=b"OPTIONS"), URL, ends=True)


def path_rows() -> None:
    for path in (b"/health?a=b", b"/%68ealth", b"/health?/../"):
        row(path.decode(), get(path), OK)
    for path in (b"/nothing", b"/health/", b"/HEALTH", b"//health", b"/health;a", b"//evil.example/health", b"/%zz"):
        row(path.decode(), get(path), (404, "not_found"))
    for path in (
        b"/v1/../health",
        b"/v1/%2e%2E/health",
        b"/./health",
        b"/health%00",
        b"/v1%5cmodels",
        b"/%ff",
        b"/%0a",
    ):
        row(path.decode(), get(path), URL)
    for method, path in (
        (b"GET", b"/v1/completions"),
        (b"BREW", b"/health"),
        (b"get", b"/health"),
        (b"TRACE", b"/ready"),
    ):
        row(f"{method.decode()} {path.decode()}", get(path, method=method), (405, "method_not_allowed"))
    row("OPTIONS", get(b"/v1/models", method=b"OPTIONS"), (405, "method_not_allowed"))
    row("HEAD", get(method=b"HEAD"), OK)


def body_rows() -> None:
    row("a completion", post(sized()), OK)
    row("in chunks", post(CHUNKED, body=chunks(GOOD[:9], GOOD[9:])), OK)
    row("chunks with extensions", post(CHUNKED, body=b"%x;a=b\r\n%b\r\n0\r\n\r\n" % (len(GOOD), GOOD)), OK)
    row("chunks with a trailer", post(CHUNKED, body=chunks(GOOD, end=b"0\r\nX-A: b\r\n\r\n")), OK)
    row("the same length twice", post(sized(), sized()), OK)
    row("a length and chunks", post(sized(), CHUNKED, body=chunks(GOOD)), HEADER, ends=True)
    row("chunks in HTTP/1.0", post(CHUNKED, body=chunks(GOOD), version=b"1.0"), HEADER, ends=True)
    for header in (b"chunked, chunked", b"gzip", b"gzip, chunked", b"identity", b"xchunked", b""):
        coding = b"Transfer-Encoding: " + header
        row(f"coding {header.decode()!r}", post(coding, body=chunks(GOOD)), BAD, ends=True)
    row("chunked twice", post(CHUNKED, CHUNKED, body=chunks(GOOD)), BAD, ends=True)
    for length in (b"-1", b"+5", b"0x10", b"1e3", b"5 5", b"5, 6", b"9" * 21, b"\xb2", b""):
        data = post(b"Content-Length: " + length)
        row(f"length {length.decode('latin-1')!r}", data, BAD, ends=True)
    row("two lengths", post(sized(), b"Content-Length: 5"), BAD, ends=True)
    for chunk in (b"zz\r\n", b"-5\r\n", b" 5\r\n", b"\r\n", b"5\n12345\r\n", b"f" * 21 + b"\r\n", b"3\r\n12345\r\n"):
        row(f"chunk {chunk!r}", post(CHUNKED, body=chunk + b"\r\n"), BAD, ends=True)
    row("a body over the limit", post(b"Content-Length: %d" % (LIMIT + 1)), (413, "request_too_large"), ends=True)
    row("a body of 10 GB", post(b"Content-Length: 10000000000"), (413, "request_too_large"), ends=True)
    large = chunks(*[b" " * 2**19] * 9)
    row("chunks over the limit", post(CHUNKED, body=large), (413, "request_too_large"), ends=True)
    row("an empty body", post(b"Content-Length: 0", body=b""), (400, "invalid_json"))
    row("no length: no body", post() + b"\r\n\r\n", BAD, before=(400,), ends=True)  # its bytes are the next request's
    row("a body nobody reads", get(b"/health", sized()) + GOOD + get(b"/nothing"), (404, "not_found"), before=(200,))
    row("text", post(sized()).replace(JSON, b"Content-Type: text/plain"), (415, "unsupported_media_type"))
    row("gzip", post(sized(), b"Content-Encoding: gzip"), (415, "unsupported_media_type"))
    row("no type", post(sized()).replace(JSON, b"X-A: b"), (415, "unsupported_media_type"))
    row("two types", post(sized(), JSON), HEADER, ends=True)


def connection_rows() -> None:
    expect = b"Expect: 100-continue"
    row("a request and another", get() + get(), OK, before=(200,))
    row("three, the second bad", get() + b"GET\r\n\r\n" + get(), BAD, before=(200,), ends=True)
    row("close", get(b"/health", b"Connection: close") + get(), OK, ends=True)
    row("close among others", get(b"/health", b"Connection: x, CLOSE"), OK, ends=True)
    row("100-continue", post(sized(), expect, body=b""), (100, None))
    row("100-continue with its body", post(sized(), expect), OK)
    row("100-continue for text", get(b"/v1/completions", sized(), expect, method=b"POST"), (415, None), ends=True)
    row("100-continue, too large", post(b"Content-Length: 5000000", expect, body=b""), (413, None), ends=True)
    row("another expectation", post(sized(), b"Expect: tea"), OK)
    row("to websocket", get(b"/health", b"Connection: Upgrade", b"Upgrade: websocket"), OK)
    row(
        "to HTTP/2", get(b"/health", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c") + get(), OK, before=(200,)
    )


for rows in (head_rows, size_rows, host_rows, path_rows, body_rows, connection_rows):
    rows()


@pytest.mark.parametrize(("data", "statuses", "code", "ends"), ROWS.values(), ids=ROWS.keys())
def test_bytes_get_what_the_table_says(served, data, statuses, code, ends):
    answers, closes = converse(served.url, data, len(statuses))
    assert [answer.status for answer in answers] == statuses, answers[-1].body
    assert closes == ends
    for answer in answers:
        if answer.status >= 400 and not data.startswith(b"HEAD"):
            assert answer.error["code"] == (code if answer is answers[-1] else answer.error["code"]) or code is None
        if answer.status == 405:
            assert answer.headers["allow"]


def test_the_table_is_long():
    assert len(ROWS) >= 60


@pytest.fixture(scope="module")
def locked(model, byte_level):
    """A server that asks for a key."""
    with run_server(model, byte_level, {"api_key": KEY}) as running:
        yield running


KEYS = {
    b"": 401,
    b"Bearer": 401,
    b"Bearer ": 401,
    b"Bearer wrong": 401,
    b"Bearer open sesame!": 401,
    b"Bearer open": 401,
    b"Bearer open sesame, Bearer x": 401,
    b"Beareropen sesame": 401,
    b"open sesame": 401,
    b"Basic b3Blbjpzc2VzYW1l": 401,
    b"Token open sesame": 401,
    b"Bearer \xff\xfe": 401,
    b"Bearer Open Sesame": 401,
    b"Bearer open sesame": 200,
    b"bearer open sesame": 200,
    b"BEARER   open sesame": 200,
    b"Bearer open sesame\r\nAuthorization: Bearer open sesame": 400,
}


@pytest.mark.parametrize(("value", "status"), KEYS.items(), ids=repr)
def test_a_key_is_right_or_it_is_401(locked, value, status):
    (answer,), _ = converse(locked.url, get(b"/v1/models", b"Authorization: " + value), 1)
    assert answer.status == status
    if status == 401:
        assert answer.headers["www-authenticate"] == "bearer"
        assert answer.error["code"] == "invalid_api_key"


SHUT = (
    b"/v1/models", b"/metrics", b"/nothing", b"/health/", b"//health", b"/HEALTH", b"/ready?/health", b"/consol",
    b"/v1", b"/v1/completions?x=/health", b"/%2fhealth", b"/console", b"/health;/v1/models", b"http://localhost/metrics",
)  # fmt: skip


@pytest.mark.parametrize("path", SHUT, ids=bytes.decode)
def test_what_is_not_open_is_shut(locked, path):
    status = 200 if path == b"/ready?/health" else 401
    assert converse(locked.url, get(path), 1)[0][0].status == status


@pytest.mark.parametrize(
    ("path", "status"), [(b"/health", 200), (b"/ready", 200), (b"/%68ealth", 200), (b"/", 200), (b"/console/x", 404)]
)
def test_what_is_open_is_open_to_all(locked, path, status):
    assert converse(locked.url, get(path), 1)[0][0].status == status


def test_a_body_without_a_key_is_neither_read_nor_in_the_way(locked):
    answers, _ = converse(locked.url, post(sized()) + get(), 2)
    assert [answer.status for answer in answers] == [401, 200]


def test_a_client_that_sends_no_more_still_gets_its_answer(served):
    assert converse(served.url, get(), 1, half_close=True)[0][0].status == 200
    (answer,), _ = converse(served.url, post(b"Content-Length: 500"), 1, half_close=True)
    assert (answer.status, answer.error["code"]) == (400, "incomplete_body")


def test_refusals_are_counted_with_the_rest(served):
    before = served.metrics()
    converse(served.url, b"GET\r\n\r\n", 1)
    converse(served.url, get(b"/nothing"), 1)
    after = served.metrics()
    for status in (400, 404):
        name = f"http_requests_total{{route=other,status={status}}}"
        assert after[name] == before.get(name, 0) + 1


def test_a_head_may_come_a_byte_at_a_time(served):
    with connect(served.url) as client:
        for byte in post(sized()):
            client.sendall(bytes([byte]))
        assert read_answer(client, bytearray()).status == 200


def test_allowed_hosts_are_names_of_the_server(serve):
    served = serve(server={"allowed_hosts": ("model.example",)})
    for host, status in ((b"Model.Example:443", 200), (b"localhost", 200), (b"other.example", 400)):
        data = head(b"GET /v1/models/%b HTTP/1.1" % NAME.encode(), b"Host: " + host)
        assert converse(served.url, data, 1)[0][0].status == status
