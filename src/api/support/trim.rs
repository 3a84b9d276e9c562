//! Takes out of events, job and spec what people said and what is in files, where nobody asked for it: a marker with
//! its length stands in its place, so that the form stays useful. Pure. What it does not know is left out.

use serde_json::{Map, Value};

/// What may be in a pack, beside what always is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub(super) struct Wish {
    /// Prompts, system prompts, and what the agent says.
    pub(super) prompt: bool,
    /// Inputs and results of tools, output of commands, contents of files.
    pub(super) contents: bool,
}

/// How much was left out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub(super) struct LeftOut {
    /// Texts that `--with-prompt` would show.
    pub(super) prompt: u64,
    /// Texts that `--with-contents` would show.
    pub(super) contents: u64,
    /// Texts that are never shown: values of the job's environment, pieces of what is whole elsewhere.
    pub(super) never: u64,
}

/// Keys of a frame whose value is what a tool got or gave.
const CONTENTS: [&str; 15] = [
    "input",
    "tool_input",
    "updatedInput",
    "arguments",
    "params",
    "tool_use_result",
    "tool_response",
    "structured_output",
    "mcp_response",
    "deferred_tool_use",
    "permission_suggestions",
    "command",
    "output",
    "stdout",
    "stderr",
];

/// Keys of a frame whose value is a word of the protocol.
const WORDS: [&str; 44] = [
    "type",
    "subtype",
    "role",
    "id",
    "uuid",
    "session_id",
    "request_id",
    "tool_use_id",
    "parent_tool_use_id",
    "tool_name",
    "name",
    "model",
    "stop_reason",
    "terminal_reason",
    "permissionMode",
    "mode",
    "behavior",
    "version",
    "claude_code_version",
    "apiKeySource",
    "output_style",
    "service_tier",
    "inference_geo",
    "speed",
    "callback_id",
    "hook_event_name",
    "hook_event",
    "status",
    "error",
    "fast_mode_state",
    "task_id",
    "task_type",
    "subagent_type",
    "decision_reason_type",
    "trigger",
    "original_model",
    "fallback_model",
    "server_name",
    "method",
    "effort",
    "tools",
    "mcp_servers",
    "state",
    "cwd",
];
/// Longest word of the protocol, in bytes.
const WORD_BYTES_MAX: usize = 128;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Talk,
    Contents,
}

/// Leaves things out, and counts them.
#[derive(Debug, Default)]
pub(super) struct Trimmer {
    wish: Wish,
    /// What was left out so far.
    pub(super) left_out: LeftOut,
}

impl Trimmer {
    /// One that keeps what is wished.
    pub(super) fn new(wish: Wish) -> Self {
        Self { wish, left_out: LeftOut::default() }
    }

    fn shows(&self, class: Class) -> bool {
        match class {
            Class::Talk => self.wish.prompt,
            Class::Contents => self.wish.contents,
        }
    }

    fn out(&mut self, value: &mut Value, class: Class) {
        if value.is_null() || self.shows(class) {
            return;
        }
        match class {
            Class::Talk => self.left_out.prompt += 1,
            Class::Contents => self.left_out.contents += 1,
        }
        *value = marker(value);
    }

    fn never(&mut self, value: &mut Value) {
        if !value.is_null() {
            self.left_out.never += 1;
            *value = marker(value);
        }
    }

    fn field(&mut self, of: &mut Value, key: &str, class: Class) {
        if let Some(value) = of.get_mut(key) {
            self.out(value, class);
        }
    }

    /// A line of a journal; what is none gives nothing but its length.
    pub(super) fn event(&mut self, line: &str) -> String {
        let Ok(mut event) = serde_json::from_str::<Value>(line) else {
            self.left_out.never += 1;
            return marker(&line.into()).to_string();
        };
        match event["type"].as_str().unwrap_or_default() {
            "frame" | "sent" => {
                if let Some(frame) = event.get_mut("frame") {
                    self.frame(frame);
                }
            }
            "output" => self.field(&mut event, "text", Class::Contents),
            "attempt" => self.field(&mut event, "repair", Class::Contents),
            "tool" => self.field(&mut event, "input", Class::Contents),
            "summary" => self.field(&mut event, "result", Class::Talk),
            _ => {}
        }
        event.to_string()
    }

    fn frame(&mut self, frame: &mut Value) {
        if frame["type"] == "stream_event" {
            // Pieces of what comes whole after them; a secret in pieces would not be found.
            if let Some(event) = frame.get_mut("event") {
                self.never(event);
            }
        }
        self.walk(frame, "", Class::Talk);
    }

    fn walk(&mut self, value: &mut Value, key: &str, class: Class) {
        match value {
            Value::Object(map) => {
                let result = map.get("type").is_some_and(|kind| kind == "tool_result");
                for (key, value) in map {
                    let contents = CONTENTS.contains(&key.as_str()) || (result && key == "content");
                    if !contents {
                        self.walk(value, key, class);
                    } else if self.shows(Class::Contents) {
                        self.walk(value, key, Class::Contents);
                    } else {
                        self.out(value, Class::Contents);
                    }
                }
            }
            Value::Array(items) => items.iter_mut().for_each(|item| self.walk(item, key, class)),
            Value::String(text) => {
                let word = WORDS.contains(&key)
                    && text.len() <= WORD_BYTES_MAX
                    && !text.contains(char::is_whitespace);
                if !word {
                    self.out(value, class);
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    /// A job's spec.
    pub(super) fn spec(&mut self, spec: &mut Value) {
        for key in ["prompt", "system_prompt", "append_system_prompt"] {
            self.field(spec, key, Class::Talk);
        }
        self.environment(spec, "env");
    }

    /// A job as its owner sees it.
    pub(super) fn view(&mut self, view: &mut Value) {
        self.field(view, "title", Class::Talk);
        self.field(view, "result", Class::Talk);
    }

    /// What was accepted: the plan and the directories.
    pub(super) fn accepted(&mut self, accepted: &mut Value) {
        if let Some(plan) = accepted.get_mut("plan") {
            self.environment(plan, "env");
        }
    }

    fn environment(&mut self, of: &mut Value, key: &str) {
        if let Some(env) = of.get_mut(key).and_then(Value::as_object_mut) {
            let env: &mut Map<String, Value> = env;
            env.values_mut().for_each(|value| self.never(value));
        }
    }
}

/// What stands in the place of a value.
fn marker(of: &Value) -> Value {
    let bytes = match of {
        Value::String(text) => text.len(),
        other => other.to_string().len(),
    };
    format!("[left out: {bytes} bytes]").into()
}

/// A patch without the contents of files that are no text: they are coded, and what is in them would not be found.
pub(super) fn text_only(patch: &str) -> String {
    let mut out = String::with_capacity(patch.len());
    let mut binary = 0;
    for line in patch.split_inclusive('\n') {
        if binary > 0 && line.starts_with("diff --git ") {
            out.push_str(&format!("[left out: {binary} bytes of a file that is no text]\n"));
            binary = 0;
        }
        if binary > 0 || line.trim_end() == "GIT binary patch" {
            binary += line.len();
        } else {
            out.push_str(line);
        }
    }
    if binary > 0 {
        out.push_str(&format!("[left out: {binary} bytes of a file that is no text]\n"));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Frames of each kind that holds a text, with `TALK` and `STUFF` where those are.
    fn events() -> Vec<Value> {
        let frame = |kind: &str, frame: Value| json!({"seq": 1, "type": kind, "frame": frame});
        vec![
            frame("sent", json!({"type":"user","message":{"role":"user","content":"TALK"}})),
            frame(
                "sent",
                json!({"type":"control_request","request_id":"r1","request":{"subtype":"initialize","appendSystemPrompt":"TALK","systemPrompt":["TALK"],"agents":{"a":{"prompt":"TALK"}}}}),
            ),
            frame(
                "sent",
                json!({"type":"control_response","response":{"request_id":"r","response":{"behavior":"allow","updatedInput":{"command":"STUFF"}}}}),
            ),
            frame(
                "frame",
                json!({"type":"assistant","message":{"content":[{"type":"text","text":"TALK"},{"type":"thinking","thinking":"TALK"},{"type":"tool_use","id":"t1","name":"Bash","input":{"command":"STUFF","type":"STUFF"}}]}}),
            ),
            frame(
                "frame",
                json!({"type":"user","message":{"content":[{"type":"tool_result","tool_use_id":"t1","content":"STUFF"},{"type":"tool_result","content":[{"type":"text","text":"STUFF"}]}]},"tool_use_result":{"stdout":"STUFF"}}),
            ),
            frame(
                "frame",
                json!({"type":"control_request","request":{"subtype":"can_use_tool","tool_name":"Bash","input":{"command":"STUFF"},"description":"TALK"}}),
            ),
            frame(
                "frame",
                json!({"type":"result","result":"TALK","permission_denials":[{"tool_name":"Bash","tool_input":{"command":"STUFF"}}],"num_turns":3}),
            ),
            frame(
                "frame",
                json!({"type":"system","subtype":"init","cwd":"/workspace","tools":["Bash"],"unheard_of":"TALK"}),
            ),
            json!({"seq":2,"type":"output","stream":"stderr","text":"STUFF"}),
            json!({"seq":3,"type":"attempt","attempt":2,"repair":"STUFF"}),
            json!({"seq":4,"type":"tool","tool":"Bash","rule":"tools.allow *","input":{"command":"STUFF"}}),
            json!({"seq":5,"type":"summary","outcome":"succeeded","result":"TALK"}),
            json!({"seq":6,"type":"note","text":"a note of ours"}),
        ]
    }

    fn shown(wish: Wish) -> (String, LeftOut) {
        let mut trimmer = Trimmer::new(wish);
        let lines: Vec<String> = events().iter().map(|event| trimmer.event(&event.to_string())).collect();
        (lines.join("\n"), trimmer.left_out)
    }

    #[test]
    fn what_was_said_and_what_tools_saw_stay_out_and_the_form_stays() {
        let (text, left_out) = shown(Wish::default());
        assert!(!text.contains("TALK") && !text.contains("STUFF"), "{text}");
        for word in [
            "can_use_tool",
            "\"t1\"",
            "tools.allow *",
            "a note of ours",
            "\"num_turns\":3",
            "/workspace",
            "[left out: 4 bytes]",
        ] {
            assert!(text.contains(word), "{word}: {text}");
        }
        assert_eq!((left_out.prompt, left_out.contents, left_out.never), (10, 10, 0), "{text}");
    }

    #[test]
    fn each_wish_brings_its_own_back() {
        let (prompt, _) = shown(Wish { prompt: true, contents: false });
        assert!(!prompt.contains("STUFF") && prompt.matches("TALK").count() == 10, "{prompt}");
        let (contents, _) = shown(Wish { prompt: false, contents: true });
        assert!(!contents.contains("TALK") && contents.matches("STUFF").count() >= 11, "{contents}");
        let (both, left_out) = shown(Wish { prompt: true, contents: true });
        let all: Vec<String> = events().iter().map(Value::to_string).collect();
        assert_eq!((both, left_out), (all.join("\n"), LeftOut::default()));
    }

    #[test]
    fn pieces_of_a_stream_and_values_of_the_environment_are_never_in() {
        let mut trimmer = Trimmer::new(Wish { prompt: true, contents: true });
        let stream =
            json!({"type":"frame","frame":{"type":"stream_event","event":{"delta":{"text":"sk-a"}}}});
        assert!(!trimmer.event(&stream.to_string()).contains("sk-a"));
        let mut spec = json!({"prompt":"p","env":{"TOKEN":"hidden"},"labels":{"a":"b"}});
        trimmer.spec(&mut spec);
        assert_eq!(spec, json!({"prompt":"p","env":{"TOKEN":"[left out: 6 bytes]"},"labels":{"a":"b"}}));
        let mut accepted = json!({"plan":{"env":{"A":"hidden"},"set_env":{"B":"c"}}});
        trimmer.accepted(&mut accepted);
        assert!(!accepted.to_string().contains("hidden"));
        assert!(!trimmer.event("{\"type\":\"frame\", no").contains("no"));
        assert_eq!(trimmer.left_out.never, 4);
    }

    #[test]
    fn contents_that_are_no_text_are_taken_out_of_a_patch() {
        let patch = "diff --git a/x b/x\n+text\ndiff --git a/y b/y\nindex 1\nGIT binary patch\nliteral 9\nzcoded\n\nliteral 0\nHcmV?d00001\n\ndiff --git a/z b/z\n+more\n";
        let text = text_only(patch);
        assert!(!text.contains("zcoded") && !text.contains("HcmV"), "{text}");
        assert!(
            text.contains("+text\n") && text.contains("+more\n") && text.contains("[left out: "),
            "{text}"
        );
        assert_eq!(
            text_only("diff --git a/x b/x\n+GIT binary patch\n"),
            "diff --git a/x b/x\n+GIT binary patch\n"
        );
    }
}
