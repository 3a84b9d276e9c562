//! What a request says, as far as a script can ask for it. Pure. Takes any JSON; a missing part is empty.

use serde_json::Value;

/// The parts of one `POST /v1/messages` that conditions and templates use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ask {
    /// The model asked for.
    pub model: String,
    /// Text of the first user message, reminders left out.
    pub prompt: String,
    /// Text of the latest user message that has any.
    pub last: String,
    /// The system prompt.
    pub system: String,
    /// Text of the tool results in the last message, when it has any.
    pub tool_result: Option<String>,
    /// How many assistant messages the request holds.
    pub turn: u64,
    /// Whether any tool is offered.
    pub has_tools: bool,
    /// Whether the answer is to be streamed.
    pub stream: bool,
    /// `max_tokens`.
    pub output_tokens_max: Option<u64>,
    /// `thinking.budget_tokens` where thinking is enabled.
    pub thinking_budget: Option<u64>,
    /// Request headers.
    pub headers: Vec<(String, String)>,
    /// Size of the request body.
    pub body_bytes: usize,
}

impl Ask {
    /// Reads a request body.
    pub fn read(body: &Value, body_bytes: usize, headers: Vec<(String, String)>) -> Self {
        let messages = body["messages"].as_array().map_or(&[][..], Vec::as_slice);
        let of_role = |role: &'static str| messages.iter().filter(move |m| m["role"] == role);
        let user_texts = || of_role("user").map(|m| own_text(&m["content"])).filter(|t| !t.is_empty());
        let results: Vec<&Value> = messages
            .last()
            .and_then(|m| m["content"].as_array())
            .map_or(&[][..], Vec::as_slice)
            .iter()
            .filter(|block| block["type"] == "tool_result")
            .collect();
        let thinking = &body["thinking"];
        Self {
            model: body["model"].as_str().unwrap_or_default().to_owned(),
            prompt: user_texts().next().unwrap_or_default(),
            last: user_texts().next_back().unwrap_or_default(),
            system: text_of(&body["system"]),
            tool_result: (!results.is_empty())
                .then(|| results.iter().map(|r| text_of(&r["content"])).collect::<Vec<_>>().join("\n")),
            turn: of_role("assistant").count() as u64,
            has_tools: body["tools"].as_array().is_some_and(|tools| !tools.is_empty()),
            stream: body["stream"] == true,
            output_tokens_max: body["max_tokens"].as_u64(),
            thinking_budget: (thinking["type"] == "enabled")
                .then(|| thinking["budget_tokens"].as_u64())
                .flatten(),
            headers,
            body_bytes,
        }
    }

    /// `text` with `{{prompt}}`, `{{last}}`, `{{turn}}`, `{{model}}` and `{{tool_result}}` filled in, once:
    /// what is filled in is not looked at again.
    pub fn fill(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(open) = rest.find("{{") {
            let Some(close) = rest[open..].find("}}") else { break };
            out.push_str(&rest[..open]);
            match rest[open + 2..open + close].trim() {
                "prompt" => out.push_str(&self.prompt),
                "last" => out.push_str(&self.last),
                "turn" => out.push_str(&self.turn.to_string()),
                "model" => out.push_str(&self.model),
                "tool_result" => out.push_str(self.tool_result.as_deref().unwrap_or_default()),
                _ => out.push_str(&rest[open..open + close + 2]),
            }
            rest = &rest[open + close + 2..];
        }
        out + rest
    }

    /// The same in every string of a JSON value.
    pub fn fill_value(&self, value: &Value) -> Value {
        match value {
            Value::String(text) => Value::String(self.fill(text)),
            Value::Array(items) => items.iter().map(|item| self.fill_value(item)).collect(),
            Value::Object(map) => map.iter().map(|(k, v)| (k.clone(), self.fill_value(v))).collect(),
            other => other.clone(),
        }
    }
}

/// Text of a string, or of the text blocks in a list.
fn text_of(content: &Value) -> String {
    join(content, |_| true)
}

/// The same without the reminders that the CLI adds to what the user wrote.
fn own_text(content: &Value) -> String {
    join(content, |text| !text.trim_start().starts_with("<system-reminder>"))
}

fn join(content: &Value, keep: impl Fn(&str) -> bool) -> String {
    if let Some(text) = content.as_str() {
        return if keep(text) { text.to_owned() } else { String::new() };
    }
    let texts = content.as_array().map_or(&[][..], Vec::as_slice).iter().filter_map(|b| b["text"].as_str());
    texts.filter(|text| keep(text)).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn reminders_are_not_the_prompt_and_results_are_read() {
        let body = json!({ "model": "m", "stream": true, "tools": [{}], "messages": [
            { "role": "user", "content": [{ "type": "text", "text": "<system-reminder>x</system-reminder>" },
                                          { "type": "text", "text": "do it" }] },
            { "role": "assistant", "content": [{ "type": "tool_use" }] },
            { "role": "user", "content": [{ "type": "tool_result", "content": "out" }] },
        ]});
        let ask = Ask::read(&body, 0, Vec::new());
        assert_eq!((ask.prompt.as_str(), ask.turn, ask.has_tools), ("do it", 1, true));
        assert_eq!(ask.tool_result.as_deref(), Some("out"));
        assert_eq!(ask.fill("{{prompt}}/{{ turn }}/{{nope}}/{{"), "do it/1/{{nope}}/{{");
    }
}
