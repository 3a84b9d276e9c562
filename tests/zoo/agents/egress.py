"""Tries to get past the proxy at 127.0.0.1:3128: hosts, methods and paths that no rule names, bytes that two programs read differently,
spellings, names of TLS that differ from CONNECT's, inner addresses. Tells of each try which statuses came back."""

import concurrent.futures
import json
import re
import socket
import ssl
import sys

from corpus import smuggled
from zoo import tell

GET = "GET {} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n"
HIDDEN = "GET /evil HTTP/1.1\r\nHost: {}\r\n\r\n"


def dial():
    s = socket.create_connection(("127.0.0.1", 3128))
    s.settimeout(15)
    return s


def drain(s):
    """What comes until the end, or until nothing more comes."""
    answer = b""
    try:
        while piece := s.recv(65536):
            answer += piece
            s.settimeout(0.5)
    except OSError:
        pass
    s.close()
    return answer


def statuses(answer):
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer)]


def raw(data):
    s = dial()
    s.settimeout(2)
    try:
        s.sendall(data if isinstance(data, bytes) else data.encode("latin-1"))
    except OSError:
        pass
    return statuses(drain(s))


def connect(target, host=None):
    """Status of a CONNECT, and its connection."""
    s = dial()
    s.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {host or target}\r\n\r\n".encode("latin-1"))
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        piece = s.recv(1)
        if not piece:
            break
        head += piece
    return (statuses(head) or [0])[0], s


def status(target, host=None):
    code, s = connect(target, host)
    s.close()
    return [code]


def inspected(host, data):
    """Bytes through TLS that the gateway looks into."""
    code, s = connect(f"{host}:443")
    if code != 200:
        return [code]
    s = ssl.create_default_context().wrap_socket(s, server_hostname=host)
    s.settimeout(2)
    s.sendall(data if isinstance(data, bytes) else data.encode("latin-1"))
    return statuses(drain(s))


def tls(target, named):
    """Whether a TLS connection comes about under another name than CONNECT's."""
    code, s = connect(target)
    if code != 200:
        return code
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        s = context.wrap_socket(s, server_hostname=named)
        s.sendall(GET.format("/pub/tls", target.split(":")[0]).encode())
        return (statuses(drain(s)) or [0])[0]
    except OSError as error:
        return type(error).__name__


def not_tls(target, data):
    """What a tunnel gives for bytes that are no TLS: in hex, an alert at most."""
    code, s = connect(target)
    if code != 200:
        return code
    s.sendall(data)
    return drain(s).hex()


def all_of(tries):
    """name → a call; many at once, since some end by silence alone."""
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        futures = {name: pool.submit(*call) for name, call in tries.items()}
        out = {}
        for name, future in futures.items():
            try:
                out[name] = future.result()
            except (OSError, UnicodeError) as error:
                out[name] = [f"{type(error).__name__}"]
        return out


def refused():
    """Nothing of this may reach a host."""
    tries = {f"CONNECT {t}": (status, t) for t in (
        "other.example:443", "inspected.example:22", "inspected.example:80", "plain.example:443", "evil.inspected.example:443",
        "inspected.example.evil.example:443", "evilinspected.example:443", "exfil-0123456789abcdef.evil.example:443", "localhost:443")}
    tries |= {f"http {h}": (raw, GET.format(f"http://{h}/", h)) for h in (
        "other.example", "plain.example:8080", "inspected.example", "tunnel.example", "exfil-0123456789abcdef.evil.example")}
    spelled = ("inspected.example\0.evil.example", "evil.example\0.inspected.example", "evil.example#.inspected.example", "a@inspected.example",
               "inspected.example@evil.example", "inspected%2eexample", "inspected.example%00", "inspected.example:443", "inspected.example\t",
               "inspected..example", ".inspected.example", "inspected.example..", "\xednspected.example", "-inspected.example", "[inspected.example]",
               "evil.example/inspected.example", "evil.example\\.inspected.example", "inspected.example,evil.example", "*.example", "")
    tries |= {f"spelled {h!r}": (raw, f"CONNECT {h}:443 HTTP/1.1\r\nHost: {h}:443\r\n\r\n") for h in spelled}
    tries |= {f"http spelled {h!r}": (raw, GET.format(f"http://{h.replace('inspected', 'plain')}/", "x")) for h in spelled if h not in ("a@inspected.example",)}
    tries |= {
        "https in absolute form": (raw, GET.format("https://inspected.example/pub/x", "inspected.example")),
        "no proxy's form": (raw, GET.format("/pub/x", "inspected.example")),
        "ftp": (raw, GET.format("ftp://plain.example/", "plain.example")),
        "user in the URL": (raw, GET.format("http://u:p@evil.example/", "plain.example")),
        "other Host of CONNECT": (status, "inspected.example:443", "evil.example:443"),
        "CONNECT with a body": (raw, "CONNECT inspected.example:443 HTTP/1.1\r\nHost: inspected.example:443\r\nContent-Length: 4\r\n\r\nabcd"),
        "upgrade": (raw, "GET http://plain.example/pub/ws HTTP/1.1\r\nHost: plain.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"),
        "SOCKS": (raw, b"\5\1\0"), "TLS to the proxy": (raw, b"\x16\3\1\0\5hello"), "garbage": (raw, b"\0" * 4096 + b"\r\n\r\n"),
        "large head": (raw, "GET http://plain.example/ HTTP/1.1\r\nX: " + "x" * (1 << 20) + "\r\n\r\n"),
    }
    for path in ("/private", "/pub/../private", "/pub/./../private", "/pub//../private", "/pub/..;/private", "/pub;/../private", "/pub/%2e%2e/private",
                 "/pub/%2e%2e%2fprivate", "/pub/..%2fprivate", "/pub/..%5cprivate", "/pub\\..\\private", "//private", "/pub//private", "/PUB/x", "/pu%62/../private",
                 "/pub/%252e%252e/private", "/pub/x%00", "/pub/%zz", "/pub/x%0d%0aX:%20y", "*", "pub/x", "/private#/pub/x", "/private?/pub/x",
                 "http://evil.example/pub/x", "https://evil.example/pub/x"):
        tries[f"path {path}"] = (inspected, "inspected.example", GET.format(path, "inspected.example"))
    for method in ("PUT", "DELETE", "get", "CONNECT", "TRACE", "PATCH", "G\tET"):
        tries[f"method {method}"] = (inspected, "inspected.example", f"{method} /pub/x HTTP/1.1\r\nHost: inspected.example\r\nConnection: close\r\n\r\n")
    for name, host in {"other": "evil.example", "port": "inspected.example:8443", "two": "inspected.example\r\nHost: evil.example", "none": "", "user": "u@inspected.example"}.items():
        tries[f"Host {name}"] = (inspected, "inspected.example", GET.format("/pub/x", host))
    tries["upgrade inside"] = (inspected, "inspected.example", "GET /pub/ws HTTP/1.1\r\nHost: inspected.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    return all_of(tries)


def smuggle():
    """Each of these is one request or none for the host, and never the hidden one."""
    tries = {f"plain, {n}": (raw, data) for n, data in smuggled("http://plain.example/pub/plain-{n}", "plain.example", HIDDEN.format("plain.example"))}
    tries |= {f"inspected, {n}": (inspected, "inspected.example", data)
              for n, data in smuggled("/pub/inspected-{n}", "inspected.example", HIDDEN.format("inspected.example"))}
    return all_of(tries)


def names_of_tls():
    names = ["tunnel.example", "second.example", "inspected.example"]
    out = {f"{asked} as {named}": tls(f"{asked}:443", named) for asked in names for named in names}
    out |= {f"{asked} as {named}": tls(f"{asked}:443", named) for asked in names for named in (None, "evil.example", "9.9.9.9")}
    return out


def passing():
    """What is allowed passes, canonical and with nothing of ours in the place of the credential."""
    head = "Host: inspected.example\r\nAuthorization: Bearer forged\r\nauthorization: Basic forged\r\nConnection: close\r\n\r\n"
    return all_of({
        "credential": (inspected, "inspected.example", f"GET /pub/echo HTTP/1.1\r\n{head}"),
        "other case": (status, "INSPECTED.Example:443"),
        "final dot": (status, "inspected.example.:443"),
        "case and Host": (raw, GET.format("http://PLAIN.example/pub/case", "evil.example")),
        "redirect": (raw, GET.format("http://plain.example/redirect", "plain.example")),
    })


def limits():
    """More than a rule's bytes, up: the rest is not sent."""
    s = dial()
    sent = 0
    try:
        s.sendall(b"POST http://second.example:8080/pub/up HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000\r\n\r\n")
        while sent < 10_000_000:
            s.sendall(b"y" * 10_000)
            sent += 10_000
    except OSError:
        pass
    return statuses(drain(s)), raw(GET.format("http://second.example:8080/pub/again", "x"))


def addresses(port, literals):
    """Each by CONNECT and in absolute form; names that lead inside; spellings that are no address for anybody careful."""
    shown = [f"[{a}]" if ":" in a else a for a in literals]
    spelled = ["127.1", "127.0.1", "0x7f.0.0.1", "0x7f000001", "2130706433", "0177.0.0.1", "017700000001", "127.0.0.1.", "127.0.0.01", "1.1.1", "0",
               "[::1%25lo]", "[::1%lo]", "[::ffff:7f00:1", "::1", "[0:0:0:0:0:0:0:1]]", "\uff11\uff12\uff17.0.0.1".encode().decode("latin-1")]
    tries = {}
    for host in shown:
        for at in ("443", str(port)):
            tries[f"address CONNECT {host}:{at}"] = (status, f"{host}:{at}")
        tries[f"address http {host}"] = (raw, GET.format(f"http://{host}:{port}/", host))
    for host in spelled:
        tries[f"spelled CONNECT {host}"] = (raw, f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n")
        tries[f"spelled http {host}"] = (raw, GET.format(f"http://{host}:{port}/", host))
    return all_of(tries)


PARTS = {"refused": refused, "smuggle": smuggle, "tls": names_of_tls, "passing": passing, "limits": limits}
if sys.argv[1] == "addresses":
    tell(addresses=addresses(int(sys.argv[2]), sys.argv[3:]))
else:
    tell(**{part: PARTS[part]() for part in sys.argv[1:]})
    tell(not_tls={name: not_tls("tunnel.example:443", data) for name, data in {
        "HTTP": b"GET / HTTP/1.1\r\n\r\n", "SSH": b"SSH-2.0-OpenSSH\r\n", "half a record": b"\x16\3\1\0\x50\1\0\0\x4c\3\3", "zeros": b"\0" * 600}.items()}
         if "tls" in sys.argv else {})
