//! Which answers are kept and how long they need not be asked for again: RFC 9111, as a shared cache, with what a
//! policy says of files that never change. Pure. It must never keep an answer that its host forbids to store.

use std::time::{Duration, SystemTime};

use http_cache_semantics::{BeforeRequest, CacheOptions, CachePolicy};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode, Uri};

use super::key::Key;

/// Headers of a stored answer that make a new one unnecessary when they are sent back.
const VALIDATORS: [(HeaderName, HeaderName); 2] =
    [(header::ETAG, header::IF_NONE_MATCH), (header::LAST_MODIFIED, header::IF_MODIFIED_SINCE)];
/// What of an answer a 304 may not change: it belongs to the body that is kept.
const OF_THE_BODY: [HeaderName; 4] =
    [header::CONTENT_LENGTH, header::CONTENT_ENCODING, header::CONTENT_RANGE, header::CONTENT_TYPE];

/// An answer's head, and when it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Its headers, without those of the connection.
    pub headers: HeaderMap,
    /// When it came, or was last said to be still right.
    pub at: SystemTime,
}

impl Head {
    /// Whether the answer is worth keeping.
    pub fn is_kept(&self, key: &Key, immutable: bool) -> bool {
        let says = |wanted: &str| {
            let values = self.headers.get_all(header::CACHE_CONTROL).iter().filter_map(|v| v.to_str().ok());
            values.flat_map(|value| value.split(',')).any(|word| word.trim().eq_ignore_ascii_case(wanted))
        };
        // What cannot be written down exactly would be given out as something else.
        if self.headers.values().any(|value| value.to_str().is_err()) || says("no-store") {
            return false;
        }
        let vary = self.headers.get_all(header::VARY).iter().any(|value| value.as_bytes().contains(&b'*'));
        if vary {
            return false;
        }
        let policy = self.policy(key);
        let again = VALIDATORS.iter().any(|(name, _)| self.headers.contains_key(name));
        immutable || (policy.is_storable() && (again || !policy.time_to_live(self.at).is_zero()))
    }

    /// Whether it may be given out without a word to its host. `wish`: what a request says of `Cache-Control`.
    pub fn is_fresh(&self, key: &Key, wish: &HeaderMap, now: SystemTime) -> bool {
        let mut request = request(key);
        for name in [header::CACHE_CONTROL, header::PRAGMA] {
            for value in wish.get_all(&name) {
                request.headers_mut().append(name.clone(), lower(value));
            }
        }
        matches!(self.policy(key).before_request(&request, now), BeforeRequest::Fresh(_))
    }

    /// How old it is.
    pub fn age(&self, key: &Key, now: SystemTime) -> Duration {
        self.policy(key).age(now)
    }

    /// The headers that ask its host whether it is still right; empty where it cannot be asked.
    pub fn validators(&self) -> HeaderMap {
        let found = VALIDATORS.iter().filter_map(|(from, to)| Some((to.clone(), self.headers.get(from)?)));
        found.map(|(name, value)| (name, value.clone())).collect()
    }

    /// The same answer after its host said 304 with these headers; `None` where that was said of another one.
    #[must_use]
    pub fn renewed(&self, by: &HeaderMap, at: SystemTime) -> Option<Self> {
        let plain = |value: &HeaderValue| {
            let bytes = value.as_bytes();
            bytes.strip_prefix(b"W/").unwrap_or(bytes).to_vec()
        };
        if let (Some(old), Some(new)) = (self.headers.get(header::ETAG), by.get(header::ETAG))
            && plain(old) != plain(new)
        {
            return None;
        }
        if by.values().any(|value| value.to_str().is_err()) {
            return None;
        }
        let mut headers = self.headers.clone();
        // Of its age, only what is said now counts.
        headers.remove(header::AGE);
        for name in by.keys().filter(|name| !OF_THE_BODY.contains(name) && **name != header::SET_COOKIE) {
            headers.remove(name);
            by.get_all(name).iter().for_each(|value| {
                headers.append(name.clone(), value.clone());
            });
        }
        Some(Self { headers, at })
    }

    fn policy(&self, key: &Key) -> CachePolicy {
        let mut answer = Response::new(());
        *answer.status_mut() = StatusCode::OK;
        for (name, value) in &self.headers {
            // The words of Cache-Control are looked for in lower case.
            let value = if *name == header::CACHE_CONTROL { lower(value) } else { value.clone() };
            answer.headers_mut().append(name.clone(), value);
        }
        let options = CacheOptions { shared: true, ..CacheOptions::default() };
        CachePolicy::new_options(&request(key), &answer, self.at, options)
    }
}

/// The request of a key: the same for its storing and for every later look at it.
fn request(key: &Key) -> Request<()> {
    let mut request = Request::new(());
    *request.method_mut() = Method::GET;
    *request.uri_mut() = key.url.parse::<Uri>().unwrap_or_default();
    request
}

fn lower(value: &HeaderValue) -> HeaderValue {
    let lower = value.to_str().ok().and_then(|text| HeaderValue::try_from(text.to_ascii_lowercase()).ok());
    lower.unwrap_or_else(|| value.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> Key {
        let (policy, url) = ("p".to_owned(), "https://a.example/x?y=1".to_owned());
        Key { policy, credential: None, url, accept: "*/*".into(), gzip: true }
    }

    fn map(lines: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(HeaderName::try_from(*name).unwrap(), HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    fn head(lines: &[(&str, &str)]) -> Head {
        Head { headers: map(lines), at: SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000) }
    }

    #[test]
    fn what_a_host_forbids_to_store_is_not_kept() {
        let kept = |lines: &[(&str, &str)]| head(lines).is_kept(&key(), false);
        assert!(kept(&[("cache-control", "max-age=60")]) && kept(&[("etag", "\"a\"")]));
        assert!(kept(&[("last-modified", "Mon, 05 Jan 1970 00:00:00 GMT")]));
        assert!(kept(&[("cache-control", "no-cache"), ("etag", "\"a\"")]), "kept, and asked for each time");
        for lines in [
            &[("cache-control", "max-age=60, No-Store")][..],
            &[("cache-control", "max-age=60"), ("cache-control", "no-store")],
            &[("cache-control", "Private, max-age=60")],
            &[("cache-control", "max-age=60"), ("vary", "*")],
            &[("cache-control", "max-age=60"), ("vary", "accept, *")],
            // Nothing says how long, and its host cannot be asked: the next request would fetch it anyway.
            &[("content-type", "text/plain")],
            &[("cache-control", "max-age=0")],
        ] {
            assert!(!kept(lines), "{lines:?}");
        }
    }

    #[test]
    fn what_never_changes_is_kept_unless_storing_is_forbidden() {
        let kept = |lines: &[(&str, &str)]| head(lines).is_kept(&key(), true);
        assert!(
            kept(&[]) && kept(&[("cache-control", "private")]) && kept(&[("cache-control", "max-age=0")])
        );
        assert!(!kept(&[("cache-control", "no-store")]) && !kept(&[("vary", "*")]));
    }

    #[test]
    fn it_is_fresh_for_as_long_as_its_host_said_and_the_cell_may_want_it_newer() {
        let head = head(&[("cache-control", "Max-Age=60, must-revalidate")]);
        let after = |s| head.at + Duration::from_secs(s);
        let none = HeaderMap::new();
        assert!(head.is_fresh(&key(), &none, after(59)) && !head.is_fresh(&key(), &none, after(61)));
        for (name, value) in
            [("cache-control", "No-Cache"), ("cache-control", "max-age=0"), ("pragma", "no-cache")]
        {
            assert!(!head.is_fresh(&key(), &map(&[(name, value)]), after(30)), "{name}: {value}");
        }
        let stale = map(&[("cache-control", "max-stale")]);
        assert!(!head.is_fresh(&key(), &stale, after(61)), "its host said that it must be asked");
        assert_eq!(head.age(&key(), after(7)).as_secs(), 7);
    }

    #[test]
    fn a_304_renews_what_it_speaks_of() {
        let old = head(&[
            ("etag", "\"a\""),
            ("cache-control", "max-age=1"),
            ("content-length", "5"),
            ("age", "9"),
            ("x-old", "1"),
        ]);
        let later = old.at + Duration::from_secs(100);
        let by = map(&[
            ("etag", "W/\"a\""),
            ("cache-control", "max-age=60"),
            ("content-length", "0"),
            ("set-cookie", "x"),
        ]);
        let new = old.renewed(&by, later).unwrap();
        assert!(new.is_fresh(&key(), &HeaderMap::new(), later + Duration::from_secs(59)));
        assert_eq!(new.headers.get("content-length").unwrap(), "5");
        assert_eq!(
            (new.headers.contains_key("x-old"), new.headers.contains_key("set-cookie")),
            (true, false)
        );
        assert_eq!(old.renewed(&map(&[("etag", "\"b\"")]), later), None);
        let validators = old.validators();
        assert_eq!(validators.get("if-none-match").unwrap(), "\"a\"");
    }
}
