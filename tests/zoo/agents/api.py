"""Everything but what is allowed, on the model's API: other credentials, methods, paths, models, fields; and the
job's own token with headers that must not pass."""

import json
import os
import socket
import sys

from zoo import tell

TOKEN = os.environ["ANTHROPIC_API_KEY"]
GOOD = {"model": "claude-sonnet-4-6", "max_tokens": 16, "messages": [{"role": "user", "content": "zoo"}]}


def ask(method="POST", path="/v1/messages", headers=(), body=GOOD, way="unix", key=True):
    """The status of the answer; 0 when the connection ended without one."""
    if way == "unix":
        s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        s.connect("/.hotcell/api.sock")
    else:
        s = socket.create_connection(("127.0.0.1", 3129))
    s.settimeout(20)
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
    extra = [("cookie", "session=of-the-agent"), ("proxy-authorization", "Basic eDp5"), ("x-forwarded-for", "10.0.0.1"), ("x-evil", "1"),
             ("anthropic-beta", "context-management-2025-06-27"), ("origin", "https://evil.example"), ("referer", "https://evil.example")]
    return {"messages": ask(headers=extra), "beta": ask(path="/v1/messages?beta=true", way="tcp"),
            "count": ask(path="/v1/messages/count_tokens"),
            "bearer": ask(key=False, headers=[("authorization", f"Bearer {TOKEN}")])}


tell(**{sys.argv[1]: refused() if sys.argv[1] == "refused" else passing()})
