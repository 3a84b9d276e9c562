//! Bytes that two programs might read as different requests: the host behind must see one request or none.

use super::*;

/// Requests as they are written to the proxy; `{}` stands for the target.
const CORPUS: [(&str, &str); 25] = [
    (
        "CL.TE",
        "POST {} HTTP/1.1\r\nHost: a.example\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /evil HTTP/1.1\r\nHost: a.example\r\n\r\n",
    ),
    (
        "TE.CL",
        "POST {} HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n2f\r\nGET /evil HTTP/1.1\r\nHost: a.example\r\n\r\n\r\n\r\n0\r\n\r\n",
    ),
    (
        "two lengths",
        "POST {} HTTP/1.1\r\nHost: a.example\r\nContent-Length: 0\r\nContent-Length: 39\r\n\r\nGET /evil HTTP/1.1\r\nHost: a.example\r\n\r\n",
    ),
    (
        "two lengths in one",
        "POST {} HTTP/1.1\r\nHost: a.example\r\nContent-Length: 0, 39\r\n\r\nGET /evil HTTP/1.1\r\nHost: a.example\r\n\r\n",
    ),
    (
        "plus",
        "POST {} HTTP/1.1\r\nHost: a.example\r\nContent-Length: +5\r\n\r\nhelloGET /evil HTTP/1.1\r\nHost: a.example\r\n\r\n",
    ),
    (
        "minus",
        "POST {} HTTP/1.1\r\nHost: a.example\r\nContent-Length: -1\r\n\r\nGET /evil HTTP/1.1\r\nHost: a.example\r\n\r\n",
    ),
    (
        "hex length",
        "POST {} HTTP/1.1\r\nHost: a.example\r\nContent-Length: 0x5\r\n\r\nhelloGET /evil HTTP/1.1\r\n\r\n",
    ),
    (
        "huge length",
        "POST {} HTTP/1.1\r\nHost: a.example\r\nContent-Length: 18446744073709551621\r\n\r\nhelloGET /evil HTTP/1.1\r\n\r\n",
    ),
    (
        "space before colon",
        "POST {} HTTP/1.1\r\nHost: a.example\r\nContent-Length : 39\r\n\r\nGET /evil HTTP/1.1\r\nHost: a.example\r\n\r\n",
    ),
    (
        "te with space",
        "POST {} HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\nGET /evil HTTP/1.1\r\n\r\n",
    ),
    (
        "xchunked",
        "POST {} HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\nGET /evil HTTP/1.1\r\nHost: a.example\r\n\r\n",
    ),
    (
        "chunked then identity",
        "POST {} HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\nGET /evil HTTP/1.1\r\n\r\n",
    ),
    (
        "two encodings",
        "POST {} HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\nGET /evil HTTP/1.1\r\n\r\n",
    ),
    (
        "http/1.0 chunked",
        "POST {} HTTP/1.0\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /evil HTTP/1.1\r\n\r\n",
    ),
    (
        "folded header",
        "POST {} HTTP/1.1\r\nHost: a.example\r\nX: a\r\n Content-Length: 39\r\n\r\nGET /evil HTTP/1.1\r\nHost: a.example\r\n\r\n",
    ),
    (
        "folded encoding",
        "POST {} HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\nGET /evil HTTP/1.1\r\n\r\n",
    ),
    (
        "bare cr",
        "POST {} HTTP/1.1\r\nHost: a.example\rContent-Length: 39\r\n\r\nGET /evil HTTP/1.1\r\nHost: a.example\r\n\r\n",
    ),
    (
        "nul in header",
        "POST {} HTTP/1.1\r\nHost: a.example\r\nX: a\0b\r\n\r\nGET /evil HTTP/1.1\r\nHost: a.example\r\n\r\n",
    ),
    (
        "chunk extension",
        "POST {} HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n5;a=\"\nGET /evil HTTP/1.1\"\r\nhello\r\n0\r\n\r\n",
    ),
    (
        "chunk size plus",
        "POST {} HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n+5\r\nhello\r\n0\r\n\r\nGET /evil HTTP/1.1\r\n\r\n",
    ),
    (
        "chunk size huge",
        "POST {} HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000005\r\nhello\r\n0\r\n\r\nGET /evil HTTP/1.1\r\n\r\n",
    ),
    (
        "chunk without crlf",
        "POST {} HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhelloGET /evil HTTP/1.1\r\n\r\n0\r\n\r\n",
    ),
    (
        "trailers",
        "POST {} HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\nTrailer: Host\r\n\r\n0\r\nHost: evil\r\nContent-Length: 9\r\n\r\n",
    ),
    (
        "upgrade",
        "GET {} HTTP/1.1\r\nHost: a.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nGET /evil HTTP/1.1\r\nHost: a.example\r\n\r\n",
    ),
    (
        "get with body",
        "GET {} HTTP/1.1\r\nHost: a.example\r\nContent-Length: 39\r\nConnection: close\r\n\r\nGET /evil HTTP/1.1\r\nHost: a.example\r\n\r\n",
    ),
];

#[tokio::test]
async fn the_host_sees_one_request_or_none_of_an_ambiguous_one() {
    let rules = format!(
        "{}{}",
        rule("plain.example", "ports = [80]"),
        rule("a.example", "inspect = true\npaths = [\"/ok\"]")
    );
    let mut cell = Cell::new(&rules).await;
    cell.http(80).await;
    cell.https(443, &["a.example"]).await;
    cell.name("plain.example", &[&[PUBLIC]]);
    cell.name("a.example", &[&[PUBLIC]]);
    for (what, bytes) in CORPUS {
        for tunnel in [false, true] {
            let before = cell.seen().len();
            let answer = if tunnel {
                let mut stream = cell.tls("a.example:443", "a.example", true).await.unwrap();
                exchange(&mut stream, bytes.replace("{}", "/ok").as_bytes()).await
            } else {
                let mut stream = cell.dial().await;
                exchange(&mut stream, bytes.replace("{}", "http://plain.example/ok").as_bytes()).await
            };
            let seen = cell.seen().split_off(before);
            assert!(seen.len() <= 1, "{what}: {seen:?}");
            assert!(seen.iter().all(|seen| !seen.head.contains("evil")), "{what}: {seen:?}");
            assert!(seen.iter().all(|seen| seen.head.ends_with(" /ok")), "{what}: {seen:?}");
            assert!(answer.matches("HTTP/1.1 200").count() <= 1, "{what}: {answer}");
        }
    }
    cell.end().await;
}

#[tokio::test]
async fn line_feeds_in_a_target_or_a_header_make_no_request() {
    let mut cell = Cell::new(&rule("plain.example", "ports = [80]")).await;
    cell.http(80).await;
    cell.name("plain.example", &[&[PUBLIC]]);
    for request in [
        "GET http://plain.example/a\nb HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET http://plain.example/a%0d%0aX:%20y HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET http://plain.example/a b HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET http://plain.example/ HTTP/1.1 evil\r\nHost: x\r\n\r\n",
        "GET  http://plain.example/ HTTP/1.1\r\nHost: x\r\n\r\n",
        "G\0T http://plain.example/ HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET http://plain.example/ HTTP/9.9\r\nHost: x\r\n\r\n",
        "GET http://plain.example/ HTTP/1.1\r\nX\0: y\r\n\r\n",
    ] {
        let mut stream = cell.dial().await;
        let answer = exchange(&mut stream, request.as_bytes()).await;
        assert!(!answer.contains("200 OK"), "{request:?}: {answer}");
    }
    assert_eq!(cell.seen().len(), 0);
    let long = format!("GET http://plain.example/ HTTP/1.1\r\nX: {}\r\n\r\n", "y".repeat(200 << 10));
    let mut stream = cell.dial().await;
    assert!(!exchange(&mut stream, long.as_bytes()).await.contains("200 OK"), "a head has a limit");
    assert_eq!(cell.seen().len(), 0);
    cell.end().await;
}

/// Writes all, ends its side, and reads until the other side ends, too.
async fn exchange(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), bytes: &[u8]) -> String {
    // The proxy may close before it has read everything: that is an answer as well.
    let _ = stream.write_all(bytes).await;
    let _ = stream.flush().await;
    let _ = stream.shutdown().await;
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    let _ = tokio::time::timeout(Duration::from_secs(10), read).await.expect("the connection ends");
    String::from_utf8_lossy(&answer).into_owned()
}
