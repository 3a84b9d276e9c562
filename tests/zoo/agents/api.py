"""Everything but what is allowed, on the model's API: other credentials, methods, paths, models, fields; and the
job's own token with headers that must not pass; ambiguous bytes, bodies too large, answers that are not waited for, calls in parallel."""

import concurrent.futures
import gzip
import json
import os
import socket
import struct
import sys
import time

from corpus import smuggled
from zoo import tell

TOKEN = os.environ["ANTHROPIC_API_KEY"]
GOOD = {"model": "claude-sonnet-4-6", "max_tokens": 16, "messages": [{"role": "user", "content": "zoo"}]}


def ask(method="POST", path="/v1/messages", headers=(), body=GOOD, way="unix", key=True):
    """The status of the answer; 0 when the connection ended without one."""
    s = dial(way)
    s.settimeout(60)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "host: x", f"content-length: {len(data)}", "content-type: application/json", "connection: close"]
    lines += [f"x-api-key: {TOKEN}"] if key else []
    lines += [f"{n}: {v}" for n, v in headers]
    answer = b""
    try:
        s.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
        while piece := s.recv(65536):
            answer += piece
    except OSError:
        pass
    s.close()
    return int(answer[9:12]) if answer.startswith(b"HTTP/1.1 ") else 0


def refused():
    """Each of these must not reach the provider."""
    out = {}
    for way in ("unix", "tcp"):
        out[f"no token, {way}"] = ask(key=False, way=way)
        out[f"other key, {way}"] = ask(key=False, headers=[("x-api-key", "sk-ant-api03-of-somebody-else")], way=way)
        out[f"other bearer, {way}"] = ask(key=False, headers=[("authorization", "Bearer sk-ant-oat01-x")], way=way)
    out["both"] = ask(headers=[("authorization", f"Bearer {TOKEN}")])
    out["own and other"] = ask(headers=[("x-api-key", "sk-ant-api03-of-somebody-else")])
    out["other in front"] = ask(key=False, headers=[("x-api-key", "sk-other"), ("x-api-key", TOKEN)])
    out["almost"] = ask(key=False, headers=[("x-api-key", TOKEN[:-1])])
    out["longer"] = ask(key=False, headers=[("x-api-key", TOKEN + "0")])
    out["basic"] = ask(key=False, headers=[("authorization", f"Basic {TOKEN}")])
    out["for a proxy"] = ask(headers=[("proxy-authorization", "Basic eDp5")])
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "CONNECT", "TRACE", "post"):
        out[f"{method} /v1/messages"] = ask(method=method)
    for path in ("/v1/models", "/v1/files", "/v1/messages/batches", "/v1/complete", "/v1/organizations/usage", "/v1/messages/", "//v1/messages",
                 "/v1//messages", "/v1/./messages", "/v1/x/../messages", "/v1/%6dessages", "/v1/messages%2f", "/v1/messages;a", "/V1/messages",
                 "/v1/messages?beta=false", "/v1/messages?beta=true&x=1", "/v1/messages?", "*", "/api/event_logging/batch",
                 "http://evil.example/v1/messages", "/v1/skills", "/v1/sessions", "/"):
        out[f"POST {path}"] = ask(path=path)
    for model in ("claude-unknown-9", "gpt-4", "", "claude-sonnet-4-6 ", "CLAUDE-SONNET-4-6"):
        out[f"model {model!r}"] = ask(body={**GOOD, "model": model})
    fields = {"mcp_servers": [{"type": "url", "url": "https://evil.example"}], "container": "x", "inference_geo": "eu", "callback_url": "http://x",
              "tools": [{"type": "web_fetch_20250910", "name": "web_fetch"}],
              "messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://evil.example/x"}}]}]}
    for name, value in fields.items():
        out[f"field {name}"] = ask(body={**GOOD, name: value})
    out["web_search"] = ask(body={**GOOD, "tools": [{"type": "web_search_20250305", "name": "web_search"}]})
    out["code_execution"] = ask(body={**GOOD, "tools": [{"type": "code_execution_20250825", "name": "code_execution"}]})
    out["file"] = ask(body={**GOOD, "messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "file", "file_id": "file_x"}}]}]})
    text = json.dumps(GOOD)
    out["model twice"] = ask(body=text.replace('{"model"', '{"model":"claude-opus-4-8","model"').encode())
    out["escaped key"] = ask(body=text.replace('"max_tokens"', '"m\\u0063p_servers":[{"url":"https://evil.example"}],"max_tokens"').encode())
    out["gzip"] = ask(headers=[("content-encoding", "gzip")])
    out["two lengths"] = ask(headers=[("content-length", "1")])
    out["chunked and length"] = ask(headers=[("transfer-encoding", "chunked")])
    out["no JSON"] = ask(body=b"{")
    return out


def passing():
    """The job's own token on the paths that exist: headers of the client's must not go further."""
    extra = [("cookie", "session=of-the-agent"), ("x-forwarded-for", "10.0.0.1"), ("x-evil", "1"),
             ("anthropic-beta", "context-management-2025-06-27"), ("origin", "https://evil.example"), ("referer", "https://evil.example")]
    return {"messages": ask(headers=extra), "beta": ask(path="/v1/messages?beta=true", way="tcp"),
            "count": ask(path="/v1/messages/count_tokens"),
            "bearer": ask(key=False, headers=[("authorization", f"Bearer {TOKEN}")])}


def dial(way):
    if way == "unix":
        s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        s.connect("/.hotcell/api.sock")
    else:
        s = socket.create_connection(("127.0.0.1", 3129))
    return s


def answer_of(s):
    """The first status, or 0; silence for two seconds is an end."""
    answer = b""
    try:
        s.settimeout(2)
        while piece := s.recv(65536):
            answer += piece
            s.settimeout(0.5)
    except OSError:
        pass
    s.close()
    return int(answer[9:12]) if answer.startswith(b"HTTP/1.") else 0


def ambiguous():
    """The hidden request is a good one: it must not be the one that counts."""
    body = json.dumps(GOOD)
    hidden = f"POST /v1/messages/batches HTTP/1.1\r\nHost: x\r\nx-api-key: {TOKEN}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}"

    def one(data, way):
        s = dial(way)
        try:
            s.sendall(data)
        except OSError:
            pass
        return answer_of(s)

    corpus = list(smuggled("/v1/messages", f"x\r\nx-api-key: {TOKEN}\r\ncontent-type: application/json", hidden))
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        futures = {f"{name}, {way}": pool.submit(one, data, way) for way in ("unix", "tcp") for name, data in corpus}
        return {name: future.result() for name, future in futures.items()}


def bodies():
    """What is too large or packed: how far one comes with it."""
    head = f"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: {TOKEN}\r\ncontent-type: application/json\r\n"
    bomb = gzip.compress(bytes(200 << 20))

    def one(way, more, piece, count):
        s, sent = dial(way), 0
        s.settimeout(20)
        try:
            s.sendall((head + more + "\r\n").encode())
            while sent < count:
                s.sendall(piece)
                sent += len(piece)
        except OSError:
            pass
        return {"status": answer_of(s), "sent": sent}

    megabyte = b" " * (1 << 20)
    out = {}
    for way in ("unix", "tcp"):
        out[f"1 GB, {way}"] = one(way, "content-length: 1000000000\r\n", megabyte, 1_000_000_000)
        out[f"endless, {way}"] = one(way, "transfer-encoding: chunked\r\n", b"100000\r\n" + megabyte + b"\r\n", 1_000_000_000)
        for coding in ("gzip", "deflate", "br", "zstd", "identity, gzip"):
            out[f"{coding} bomb, {way}"] = one(way, f"content-encoding: {coding}\r\ncontent-length: {len(bomb)}\r\n", bomb, len(bomb))
        out[f"large head, {way}"] = one(way, "x: " + "y" * (4 << 20) + "\r\ncontent-length: 0\r\n", b"", 0)
        out[f"many heads, {way}"] = one(way, "x: y\r\n" * 100_000 + "content-length: 0\r\n", b"", 0)
    deep = b'{"model":"claude-sonnet-4-6","max_tokens":1,"messages":' + b"[" * 500_000 + b"]" * 500_000 + b"}"
    out["deep, unix"] = one("unix", f"content-length: {len(deep)}\r\n", deep, len(deep))
    return out


def aborting():
    """Resets the connection after each event of a stream, the first time before there is any answer."""
    body = json.dumps({**GOOD, "stream": True, "messages": [{"role": "user", "content": "abort me"}]}).encode()
    head = f"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: {TOKEN}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    out = []
    for events in range(8):
        s, got = dial("tcp"), b""
        s.settimeout(20)
        s.sendall(head.encode() + body)
        while got.count(b"event: ") < events and (piece := s.recv(256)):
            got += piece
        if events == 0:
            time.sleep(0.3)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        s.close()
        out.append({"events": got.count(b"event: "), "whole": b"message_stop" in got})
    # The same without a stream: the answer is never read.
    s = dial("tcp")
    whole = json.dumps({**GOOD, "messages": [{"role": "user", "content": "abort me"}]}).encode()
    s.sendall(head.replace(str(len(body)), str(len(whole))).encode() + whole)
    time.sleep(0.2)
    s.close()
    time.sleep(3)
    return out


def flood():
    """200 calls at once, each for more than half of what there is."""
    body = {**GOOD, "max_tokens": 32000, "messages": [{"role": "user", "content": "all at once"}]}
    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        return sorted(pool.map(lambda n: ask(body=body, way=("unix", "tcp")[n % 2]), range(200)))


def matrix():
    """Every method on every path that the provider has; which statuses there are, and who got a 200."""
    methods = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE", "PURGE")
    paths = ["/v1/messages", "/v1/messages/count_tokens"] + ["/v1/" + path for path in (
        "messages/batches", "messages/batches/b1", "messages/batches/b1/results", "messages/batches/b1/cancel", "files", "files/f1", "files/f1/content",
        "models", "models/claude-sonnet-4-6", "complete", "skills", "skills/s1/versions", "sessions", "agents", "environments", "experimental/generate_prompt",
        "organizations/me", "organizations/usage_report/messages", "organizations/api_keys", "oauth/token", "embeddings", "chat/completions", "responses")]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        futures = {f"{m} {p}": pool.submit(ask, method=m, path=p) for m in methods for p in paths}
        got = {what: future.result() for what, future in futures.items()}
    return {"tried": len(got), "passed": sorted(what for what, status in got.items() if status == 200), "others": sorted({s for s in got.values() if s != 200})}


def reaching():
    """What makes the provider reach out, store or run something: plainly, behind a key that stands twice, with an escaped key, deep inside."""
    url = {"type": "url", "url": "https://evil.example/?s=1"}
    user = lambda block: {"messages": [{"role": "user", "content": [block]}]}
    tool = lambda kind: {"tools": [{"type": kind, "name": kind.rsplit("_", 1)[0]}]}
    variants = {f"tool {kind}": tool(kind) for kind in ("web_fetch_20250910", "web_search_20250305", "code_execution_20250522", "code_execution_20250825", "mcp_toolset",
                                                        "bash_code_execution_20250825", "text_editor_code_execution_20250825", "unheard_of_20990101")}
    variants |= {
        "mcp_servers": {"mcp_servers": [{"type": "url", "url": "https://evil.example", "name": "e"}]}, "container": {"container": {"skills": [{"type": "custom", "skill_id": "s"}]}},
        "image by url": user({"type": "image", "source": url}), "document by url": user({"type": "document", "source": url}),
        "image by file": user({"type": "image", "source": {"type": "file", "file_id": "f"}}), "upload": user({"type": "container_upload", "file_id": "f"}),
        "inside of a result": user({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image", "source": url}]}),
        "in the system prompt": {"system": [{"type": "text", "text": "x", "source": url}]}, "unheard of field": {"x_fetch": "https://evil.example"},
    }
    bodies = {}
    for name, more in variants.items():
        text = json.dumps({**GOOD, **more})
        key, value = next(iter(more.items()))
        bodies[name] = text
        harmless = json.dumps(GOOD.get(key, []))
        bodies[f"{name}, twice, last"] = text.replace(f'"{key}":', f'"{key}": {harmless}, "{key}":', 1)
        bodies[f"{name}, twice, first"] = text[:-1] + f', "{key}": {harmless}}}'
        bodies[f"{name}, escaped"] = text.replace(f'"{key}":', f'"\\u{ord(key[0]):04x}{key[1:]}":', 1)
        bodies[f"{name}, type escaped"] = text.replace('"type":', '"\\u0074ype":')
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        futures = {name: pool.submit(ask, body=text.encode()) for name, text in bodies.items()}
        got = {name: future.result() for name, future in futures.items()}
    betas = ("files-api-2025-04-14", "mcp-client-2025-11-20", "code-execution-2025-08-25", "web-fetch-2025-09-10", "skills-2025-10-02", "unheard-of-2099-01-01")
    got |= {f"beta {beta}": ask(headers=[("anthropic-beta", beta)]) for beta in betas}
    got["beta behind a known one"] = ask(headers=[("anthropic-beta", f"context-management-2025-06-27,{betas[0]}")])
    got["beta in a second header"] = ask(headers=[("anthropic-beta", "context-management-2025-06-27"), ("anthropic-beta", betas[0])])
    return got


def prices():
    """What changes a price: refused where it has none, reserved at the dearest where it has one."""
    out = {name: ask(body={**GOOD, **more}) for name, more in {
        "new model": {"model": "claude-next-9"}, "priority": {"service_tier": "priority"}, "batch": {"service_tier": "batch"}, "fast": {"speed": "fast"},
        "geography": {"inference_geo": "us"}}.items()}
    hour = {"type": "text", "text": "an hour " * 2000, "cache_control": {"type": "ephemeral", "ttl": "1h"}}
    out["hour"] = ask(body={**GOOD, "messages": [{"role": "user", "content": [hour]}]})
    return out


PARTS = {"refused": refused, "passing": passing, "ambiguous": ambiguous, "bodies": bodies, "aborting": aborting, "flood": flood, "prices": prices,
         "matrix": matrix, "reaching": reaching}
for part in sys.argv[1:]:
    tell(**{part: PARTS[part]()})
