//! A request that the package cache may answer. The request that goes to the host in its place is ours: of the cell's it
//! has path, query, `Accept`, and whether it may be compressed, and all of these name the entry, so that nothing else a
//! job sends can change what the next one gets. A request with a credential of the job's own is never answered from
//! here, and what it brings back is never kept.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::{Body as _, Incoming};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode, Uri};

use super::back::{Keeping, Sent, Source, shown};
use super::door::Refused;
use super::exchange::{Passage, RequestBody};
use crate::gateway::packages::{Found, Head, Kept, Key, PackageCache, Used};
use crate::gateway::secret::Secrets;

/// Who asks.
const USER_AGENT: &str = concat!("hotcell/", env!("CARGO_PKG_VERSION"));
/// Headers by which a job says who it is.
const OWN_CREDENTIALS: [&str; 9] = [
    "authorization",
    "cookie",
    "deploy-token",
    "job-token",
    "private-token",
    "x-api-key",
    "x-auth-token",
    "x-jfrog-art-api",
    "x-nuget-apikey",
];
/// What of a kept answer's head belongs to a 304.
const OF_NOT_MODIFIED: [HeaderName; 7] = [
    header::AGE,
    header::CACHE_CONTROL,
    header::DATE,
    header::ETAG,
    header::EXPIRES,
    header::LAST_MODIFIED,
    header::VARY,
];

/// What the cache may have, or keep, for a request; none where it must pass on as it is.
pub(super) fn key_of(passage: &Passage<'_>, request: &Request<Incoming>) -> Option<Key> {
    let Passage { asked, terms, credential, shared, .. } = passage;
    let known = [Method::GET, Method::HEAD].contains(request.method());
    let replaced = |name: &str| credential.as_ref().is_some_and(|ours| ours.name.as_str() == name);
    let own = OWN_CREDENTIALS.iter().any(|name| request.headers().contains_key(*name) && !replaced(name));
    if !terms.cache || !known || own || !request.body().is_end_stream() {
        return None;
    }
    let accept: Result<Vec<&str>, _> =
        request.headers().get_all(header::ACCEPT).iter().map(HeaderValue::to_str).collect();
    let used = |name: &String| Used { name: name.clone(), uid: shared.spec.credentials.whose(name) };
    let scheme = if asked.secure { "https" } else { "http" };
    let key = Key {
        policy: shared.plan.policy.clone(),
        credential: terms.credential.as_ref().map(used),
        url: format!("{scheme}://{}{}", asked.authority(), asked.target(request.uri().query())),
        accept: accept.ok()?.join(", "),
        // What a host repeats of a credential is found in plain text only.
        gzip: credential.is_none() && takes_gzip(request.headers()),
    };
    key.is_bounded().then_some(key)
}

fn takes_gzip(headers: &HeaderMap) -> bool {
    let values = headers.get_all(header::ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|word| {
        let (name, weight) = word.split_once(';').unwrap_or((word, ""));
        let never = weight.trim().strip_prefix("q=").is_some_and(|q| q.parse::<f32>() == Ok(0.0));
        name.trim().eq_ignore_ascii_case("gzip") && !never
    })
}

/// The answer to a request that [`key_of`] gave a key for; none where it must pass on as it is after all.
pub(super) async fn answer(
    passage: &Passage<'_>,
    cache: &Arc<PackageCache>,
    key: Key,
    request: &Request<Incoming>,
) -> Result<Option<Sent>, Refused> {
    let count = &cache.counters;
    let found = cache.find(&key).await;
    if let Some(entry) = &found
        && (passage.terms.immutable || entry.head.is_fresh(&key, request.headers(), SystemTime::now()))
        && let Some(body) = cache.open_body(entry).await
    {
        count.hits.fetch_add(1, Ordering::Relaxed);
        return served(passage, &key, entry, body, request).await.map(Some);
    }
    // A part of an answer says nothing of the rest.
    if request.method() != Method::GET || request.headers().contains_key(header::RANGE) {
        return Ok(None);
    }
    let validators = found.as_ref().map(|entry| entry.head.validators()).unwrap_or_default();
    let mut response = passage.exchange(canonical(passage, &key, request, validators)?).await?;
    if response.status() == StatusCode::NOT_MODIFIED
        && let Some(entry) = &found
    {
        let said = shown(response.headers(), &secrets(passage));
        let renewed = entry.head.renewed(&said, SystemTime::now());
        if let (Some(head), Some(body)) = (renewed, cache.open_body(entry).await) {
            cache.renew(key.clone(), entry, head.clone()).await;
            count.revalidated.fetch_add(1, Ordering::Relaxed);
            let entry = entry.with(head);
            return served(passage, &key, &entry, body, request).await.map(Some);
        }
        response = passage.exchange(canonical(passage, &key, request, HeaderMap::new())?).await?;
    }
    count.misses.fetch_add(1, Ordering::Relaxed);
    if let (Some(entry), StatusCode::NOT_FOUND | StatusCode::GONE) = (&found, response.status()) {
        cache.forget(entry).await;
    }
    let length = whole_length(&response, &key);
    let mut sent = Sent::of_host(response, Arc::clone(&passage.meter), passage.before, secrets(passage));
    let head = Head { headers: stored(&sent.headers), at: SystemTime::now() };
    if let Some(length) = length.filter(|_| head.is_kept(&key, passage.terms.immutable)) {
        let fill = cache.begin(passage.shared.spec.job.as_str(), length).await;
        sent.keeping = fill.map(|fill| Keeping { fill, key, head });
    }
    Ok(Some(sent))
}

fn secrets(passage: &Passage<'_>) -> Secrets {
    passage.credential.as_ref().map(|credential| credential.secrets.clone()).unwrap_or_default()
}

/// The request that is sent for all that have this key.
fn canonical(
    passage: &Passage<'_>,
    key: &Key,
    request: &Request<Incoming>,
    validators: HeaderMap,
) -> Result<Request<RequestBody>, Refused> {
    let target = passage.asked.target(request.uri().query());
    let uri: Uri = target.parse().map_err(|_| Refused::malformed("the path is none"))?;
    let mut canonical = Request::new(Empty::<Bytes>::new().map_err(|never| match never {}).boxed_unsync());
    *canonical.uri_mut() = uri;
    let headers = canonical.headers_mut();
    headers.extend(validators);
    headers.insert(header::USER_AGENT, HeaderValue::from_static(USER_AGENT));
    if !key.accept.is_empty() {
        let accept = HeaderValue::from_str(&key.accept);
        headers.insert(header::ACCEPT, accept.map_err(|_| Refused::malformed("what it accepts is none"))?);
    }
    let encoding = if key.gzip { "gzip" } else { "identity" };
    headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static(encoding));
    if let Some(credential) = &passage.credential {
        headers.insert(credential.name.clone(), credential.value.clone());
    }
    Ok(canonical)
}

/// Whether the end of an answer's body can be told from its breaking off, and its encoding is one that was asked for;
/// within that, its length where it is known.
fn whole_length(response: &Response<Incoming>, key: &Key) -> Option<Option<u64>> {
    let text = |name: HeaderName| response.headers().get(name).and_then(|value| value.to_str().ok());
    let encoded = match response.headers().contains_key(header::CONTENT_ENCODING) {
        false => true,
        true => match text(header::CONTENT_ENCODING)?.to_ascii_lowercase().as_str() {
            "identity" => true,
            "gzip" | "x-gzip" => key.gzip,
            _ => false,
        },
    };
    let chunked = text(header::TRANSFER_ENCODING).is_some_and(|value| value.eq_ignore_ascii_case("chunked"));
    let length = text(header::CONTENT_LENGTH).and_then(|value| value.parse().ok()).filter(|_| !chunked);
    let whole = response.status() == StatusCode::OK && encoded && (chunked || length.is_some());
    whole.then_some(length)
}

/// The headers of an answer that are kept.
fn stored(headers: &HeaderMap) -> HeaderMap {
    let mut stored = headers.clone();
    // The request had no cookies, and jobs share none; the length is that of the file.
    for name in [header::SET_COOKIE, header::CONTENT_LENGTH] {
        stored.remove(name);
    }
    stored
}

/// A kept answer as this request wants it: whole, a part of it, its head alone, or the word that it has not changed.
async fn served(
    passage: &Passage<'_>,
    key: &Key,
    entry: &Found,
    mut body: Kept,
    request: &Request<Incoming>,
) -> Result<Sent, Refused> {
    let mut headers = entry.head.headers.clone();
    headers.insert(header::AGE, entry.head.age(key, SystemTime::now()).as_secs().into());
    let wanted = wanted(request.headers(), &headers, entry.body_bytes);
    let unreadable = |_| Refused::failed(passage.terms.permit.rule(), "the package cache cannot be read");
    let (status, length) = match wanted {
        Wanted::Same => {
            let names: Vec<HeaderName> = headers.keys().cloned().collect();
            for name in names.into_iter().filter(|name| !OF_NOT_MODIFIED.contains(name)) {
                headers.remove(name);
            }
            (StatusCode::NOT_MODIFIED, None)
        }
        Wanted::Whole => (StatusCode::OK, Some(entry.body_bytes)),
        Wanted::Part { from, length } => {
            body.cut(from, length).await.map_err(unreadable)?;
            let range = format!("bytes {from}-{}/{}", from + length - 1, entry.body_bytes);
            headers.extend(HeaderValue::try_from(range).ok().map(|value| (header::CONTENT_RANGE, value)));
            (StatusCode::PARTIAL_CONTENT, Some(length))
        }
        Wanted::Beyond => {
            let range = format!("bytes */{}", entry.body_bytes);
            headers.extend(HeaderValue::try_from(range).ok().map(|value| (header::CONTENT_RANGE, value)));
            (StatusCode::RANGE_NOT_SATISFIABLE, Some(0))
        }
    };
    if let Some(length) = length {
        headers.insert(header::CONTENT_LENGTH, length.into());
    }
    let bodiless = request.method() == Method::HEAD || length.is_none_or(|length| length == 0);
    let body = if bodiless { Source::Nothing } else { Source::Kept(body) };
    let (meter, before, secrets) = (Arc::clone(&passage.meter), passage.before, Secrets::default());
    Ok(Sent { status, headers, body, keeping: None, meter, before, secrets })
}

/// What of a kept answer a request wants.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    Whole,
    /// At least one byte.
    Part {
        from: u64,
        length: u64,
    },
    /// A part that it has not.
    Beyond,
    /// The cell has it already.
    Same,
}

fn wanted(request: &HeaderMap, kept: &HeaderMap, bytes: u64) -> Wanted {
    let text = |map: &HeaderMap, name: HeaderName| map.get(name)?.to_str().ok().map(str::to_owned);
    let bare = |tag: &str| tag.trim().trim_start_matches("W/").to_owned();
    let etag = text(kept, header::ETAG);
    let modified = text(kept, header::LAST_MODIFIED);
    if let Some(tags) = text(request, header::IF_NONE_MATCH) {
        let has = |etag: &String| tags.trim() == "*" || tags.split(',').any(|tag| bare(tag) == bare(etag));
        if etag.as_ref().is_some_and(has) {
            return Wanted::Same;
        }
    } else if modified.is_some() && text(request, header::IF_MODIFIED_SINCE) == modified {
        return Wanted::Same;
    }
    let (Some(range), true) = (text(request, header::RANGE), bytes > 0) else { return Wanted::Whole };
    // Only a strong validator says that the parts fit together.
    if let Some(only) = text(request, header::IF_RANGE)
        && (Some(&only) != etag.as_ref() || only.starts_with("W/"))
        && Some(&only) != modified.as_ref()
    {
        return Wanted::Whole;
    }
    // Whoever asks for several parts, or for something else, gets the whole.
    let Some((from, to)) = range.strip_prefix("bytes=").and_then(|range| range.split_once('-')) else {
        return Wanted::Whole;
    };
    let number = |text: &str| if text.is_empty() { Some(None) } else { text.parse::<u64>().ok().map(Some) };
    match (number(from.trim()), number(to.trim())) {
        (Some(Some(from)), Some(_)) if from >= bytes => Wanted::Beyond,
        (Some(Some(from)), Some(to)) if to.is_none_or(|to| to >= from) => {
            let to = to.unwrap_or(u64::MAX).min(bytes - 1);
            Wanted::Part { from, length: to - from + 1 }
        }
        (Some(None), Some(Some(0))) => Wanted::Beyond,
        (Some(None), Some(Some(last))) => {
            let length = last.min(bytes);
            Wanted::Part { from: bytes - length, length }
        }
        _ => Wanted::Whole,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn map(lines: &[(&str, &str)]) -> HeaderMap {
        let line = |(name, value): &(&str, &str)| {
            (HeaderName::try_from(*name).unwrap(), HeaderValue::from_str(value).unwrap())
        };
        lines.iter().map(line).collect()
    }

    #[test]
    fn a_part_is_what_was_asked_for() {
        let part = |from, length| Wanted::Part { from, length };
        for (range, expected) in [
            ("bytes=0-", part(0, 10)),
            ("bytes=2-4", part(2, 3)),
            ("bytes=9-99", part(9, 1)),
            ("bytes=-3", part(7, 3)),
            ("bytes=-30", part(0, 10)),
            ("bytes=10-", Wanted::Beyond),
            ("bytes=-0", Wanted::Beyond),
            ("bytes=4-2", Wanted::Whole),
            ("bytes=0-1,3-4", Wanted::Whole),
            ("lines=1-2", Wanted::Whole),
            ("bytes=-", Wanted::Whole),
            ("bytes=x-1", Wanted::Whole),
        ] {
            assert_eq!(wanted(&map(&[("range", range)]), &HeaderMap::new(), 10), expected, "{range}");
        }
        let kept = map(&[("etag", "\"a\"")]);
        let with = |only| wanted(&map(&[("range", "bytes=1-1"), ("if-range", only)]), &kept, 10);
        assert_eq!((with("\"a\""), with("\"b\"")), (part(1, 1), Wanted::Whole));
    }

    #[test]
    fn a_cell_that_has_it_is_told_so() {
        let kept = map(&[("etag", "W/\"a\""), ("last-modified", "Mon, 05 Jan 1970 00:00:00 GMT")]);
        let ask = |name, value| wanted(&map(&[(name, value)]), &kept, 10);
        assert_eq!(ask("if-none-match", "\"x\", \"a\""), Wanted::Same);
        assert_eq!(ask("if-none-match", "*"), Wanted::Same);
        assert_eq!(ask("if-none-match", "\"x\""), Wanted::Whole);
        assert_eq!(ask("if-modified-since", "Mon, 05 Jan 1970 00:00:00 GMT"), Wanted::Same);
        assert_eq!(ask("if-modified-since", "Tue, 06 Jan 1970 00:00:00 GMT"), Wanted::Whole);
    }

    #[test]
    fn compression_is_one_question() {
        for (value, gzip) in [
            ("gzip, deflate, br", true),
            ("GZIP;q=0.5", true),
            ("gzip;q=0", false),
            ("gzip;q=0.0", false),
            ("identity", false),
            ("br", false),
        ] {
            assert_eq!(takes_gzip(&map(&[("accept-encoding", value)])), gzip, "{value}");
        }
    }

    proptest! {
        #[test]
        fn a_part_lies_within_the_whole(range in "bytes=[0-9]{0,4}-[0-9]{0,4}", bytes in 1u64..2000) {
            if let Wanted::Part { from, length } = wanted(&map(&[("range", &range)]), &HeaderMap::new(), bytes) {
                prop_assert!(length > 0 && from + length <= bytes);
            }
        }
    }
}
