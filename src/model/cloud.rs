//! The shapes in which cloud providers serve the same model: Amazon Bedrock and Google Vertex, by path. Pure: from a
//! request to one of the vendor's own API, and from its answer back. Microsoft Foundry is the vendor's API below
//! another path. A request without a credential of the right form is refused, as there.

use bytes::Bytes;
use serde_json::{Value, json};

use super::eventstream;
use super::reply::{Answer, Step};
use super::script::error_json;

/// Who is played.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cloud {
    /// `/model/{id}/invoke` and `/model/{id}/invoke-with-response-stream`.
    Bedrock {
        /// Whether the answer is an event stream.
        stream: bool,
    },
    /// `…/publishers/anthropic/models/{id}:rawPredict` and `:streamRawPredict`.
    Vertex,
    /// `…/publishers/anthropic/models/count-tokens:rawPredict`.
    VertexCount,
}

/// The provider and the model's id that a path means; `None` for the vendor's own paths.
pub fn of_path(path: &str) -> Option<(Cloud, String)> {
    let decode = |id: &str| id.replace("%3A", ":").replace("%2F", "/").replace("%40", "@");
    if let Some((_, rest)) = path.split_once("/publishers/anthropic/models/") {
        let (id, action) = rest.rsplit_once(':')?;
        let cloud = match (id, action) {
            ("count-tokens", "rawPredict") => Cloud::VertexCount,
            (_, "rawPredict" | "streamRawPredict") => Cloud::Vertex,
            _ => return None,
        };
        return Some((cloud, decode(id)));
    }
    let (_, rest) = path.split_once("/model/")?;
    let (id, action) = rest.split_once('/')?;
    let stream = match action {
        "invoke" => false,
        "invoke-with-response-stream" => true,
        _ => return None,
    };
    Some((Cloud::Bedrock { stream }, decode(id)))
}

/// What the provider refuses before it looks at the request: no credential, or one of another form.
pub fn unauthorised(cloud: Cloud, headers: &[(String, String)]) -> Option<Answer> {
    let value = headers.iter().find(|(name, _)| name == "authorization").map_or("", |(_, value)| value);
    let bearer = value.strip_prefix("Bearer ").is_some_and(|token| !token.is_empty());
    match cloud {
        Cloud::Bedrock { .. } if bearer || value.starts_with("AWS4-HMAC-SHA256 Credential=") => None,
        Cloud::Bedrock { .. } => {
            Some(Answer::json(403, json!({ "message": "Missing Authentication Token" }).to_string()))
        }
        Cloud::Vertex | Cloud::VertexCount if bearer => None,
        Cloud::Vertex | Cloud::VertexCount => {
            let error =
                json!({ "error": { "code": 401, "status": "UNAUTHENTICATED", "message": "no token" } });
            Some(Answer::json(401, error.to_string()))
        }
    }
}

/// The body as the vendor's API has it.
///
/// # Errors
/// The answer of a provider to a body that is not of its form.
pub fn request(cloud: Cloud, id: String, mut body: Value) -> Result<Value, Answer> {
    let wrong = |message: &str| Answer::json(400, error_json("invalid_request_error", message));
    let Some(fields) = body.as_object_mut() else { return Err(wrong("body is not an object")) };
    let (version, alien): (_, &[&str]) = match cloud {
        Cloud::Bedrock { .. } => ("bedrock-2023-05-31", &["model", "stream"]),
        Cloud::Vertex => ("vertex-2023-10-16", &["model"]),
        Cloud::VertexCount => return Ok(body),
    };
    if let Some(key) = alien.iter().find(|key| fields.contains_key(**key)) {
        return Err(wrong(&format!("{key}: extra inputs are not permitted")));
    }
    if fields.remove("anthropic_version") != Some(Value::from(version)) {
        return Err(wrong("anthropic_version: is missing or of another provider"));
    }
    fields.insert("model".to_owned(), Value::from(id));
    if let Cloud::Bedrock { stream } = cloud {
        fields.insert("stream".to_owned(), Value::from(stream));
    }
    Ok(body)
}

/// The answer in the provider's form.
pub fn answer(cloud: Cloud, answer: Answer) -> Answer {
    let streams = answer.content_type.starts_with("text/event-stream");
    if !matches!(cloud, Cloud::Bedrock { stream: true }) || !streams {
        return answer;
    }
    let steps = answer.steps.into_iter().map(|step| Step { bytes: frame(&step.bytes), ..step }).collect();
    Answer { steps, content_type: "application/vnd.amazon.eventstream".to_owned(), ..answer }
}

/// One SSE event as a frame; what is no event becomes a damaged frame.
fn frame(event: &[u8]) -> Bytes {
    let text = std::str::from_utf8(event).unwrap_or_default();
    let Some(data) = text.lines().find_map(|line| line.strip_prefix("data: ")) else {
        let mut damaged = eventstream::chunk(event);
        if let Some(last) = damaged.last_mut() {
            *last ^= 0xff;
        }
        return damaged.into();
    };
    let event: Value = serde_json::from_str(data).unwrap_or_default();
    if event["type"] != "error" {
        return eventstream::chunk(data.as_bytes()).into();
    }
    let kind = match event["error"]["type"].as_str() {
        Some("overloaded_error") => "serviceUnavailableException",
        Some("rate_limit_error") => "throttlingException",
        _ => "modelStreamErrorException",
    };
    eventstream::exception(kind, event["error"]["message"].as_str().unwrap_or_default()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_provider_and_model() {
        let of = |path: &str| of_path(path);
        let bedrock = |stream| Cloud::Bedrock { stream };
        assert_eq!(
            of("/model/us.anthropic.x-v1%3A0/invoke"),
            Some((bedrock(false), "us.anthropic.x-v1:0".into()))
        );
        assert_eq!(of("/p/model/x/invoke-with-response-stream"), Some((bedrock(true), "x".into())));
        let vertex = "/v1/projects/p/locations/l/publishers/anthropic/models/";
        assert_eq!(of(&format!("{vertex}x@1:streamRawPredict")), Some((Cloud::Vertex, "x@1".into())));
        assert_eq!(of(&format!("{vertex}count-tokens:rawPredict")).map(|(c, _)| c), Some(Cloud::VertexCount));
        assert_eq!(of("/v1/messages"), None);
        assert_eq!(of("/model/x/converse"), None);
    }

    #[test]
    fn a_credential_of_the_right_form_is_needed() {
        let with = |value: &str| vec![("authorization".to_owned(), value.to_owned())];
        let bedrock = Cloud::Bedrock { stream: true };
        assert_eq!(unauthorised(bedrock, &with("Bearer k")), None);
        assert_eq!(unauthorised(bedrock, &with("AWS4-HMAC-SHA256 Credential=A/…")), None);
        assert_eq!(unauthorised(bedrock, &[]).map(|a| a.status), Some(403));
        assert_eq!(unauthorised(Cloud::Vertex, &with("Bearer ")).map(|a| a.status), Some(401));
    }
}
