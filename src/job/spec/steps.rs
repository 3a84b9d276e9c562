//! What runs in a cell beside an agent, or instead of one: the commands of `setup` and `verify`, and the command of a
//! job that has no agent. Parsing and limits only.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ENV_VALUE_BYTES_MAX, SpecError, field, text};

/// Most commands of `setup` or `verify`.
const COMMANDS_MAX: usize = 64;
/// Most arguments of a command.
const ARGUMENTS_MAX: usize = 1024;
/// Most names of hosts and sets that a step may reach.
const EGRESS_NAMES_MAX: usize = 64;
/// Most tries that an agent gets to repair what `verify` found.
const REPAIR_ATTEMPTS_MAX: u32 = 20;
/// How long the commands of one step may take together where the spec does not say, in seconds.
const STEP_TIMEOUT_S: u32 = 1800;
/// Longest that they may be given, in seconds.
const STEP_TIMEOUT_S_MAX: u32 = 7 * 86_400;

/// One command: a line for the shell, or a program with its arguments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum StepCommand {
    /// A line for the image's shell.
    Line(String),
    /// A program and its arguments, without a shell.
    Argv(Vec<String>),
}

impl StepCommand {
    /// The program and its arguments; `shell` is the image's.
    pub fn argv(&self, shell: &str) -> Vec<String> {
        match self {
            Self::Line(line) => vec![shell.to_owned(), "-c".to_owned(), line.clone()],
            Self::Argv(argv) => argv.clone(),
        }
    }

    /// The command in one line, for people.
    pub fn words(&self) -> String {
        match self {
            Self::Line(line) => line.clone(),
            Self::Argv(argv) => argv.join(" "),
        }
    }

    fn check(&self, key: &str) -> Result<(), SpecError> {
        let parts = match self {
            Self::Line(line) => std::slice::from_ref(line),
            Self::Argv(argv) => argv.as_slice(),
        };
        check_argv(key, parts)
    }
}

fn check_argv(key: &str, argv: &[String]) -> Result<(), SpecError> {
    if argv.first().is_none_or(|program| program.trim().is_empty()) {
        return Err(field(key, "is empty"));
    }
    if argv.len() > ARGUMENTS_MAX {
        return Err(field(key, &format!("has {} arguments; at most {ARGUMENTS_MAX} are taken", argv.len())));
    }
    if argv.iter().any(|part| part.contains('\0')) {
        return Err(field(key, "holds a NUL byte"));
    }
    argv.iter().try_for_each(|part| text(key, part, ENV_VALUE_BYTES_MAX))
}

/// Commands that run in the cell before its agent, or before its command. What they start in the background, such as a
/// database that tests need, lives as long as the cell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SetupSpec {
    /// In order; the first that fails ends the job.
    pub commands: Vec<StepCommand>,
    /// Seconds for all of them together; 1800 where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<u32>,
    /// What they may reach: names of sets and of hosts among those that the policy opens for setup. Absent: all of
    /// those; empty: nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Vec<String>>,
}

/// Commands that judge what the agent made: they run after it, in a fresh cell on the changed workspace, without a
/// model and without credentials. What they write is thrown away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VerifySpec {
    /// In order; the first that fails ends the verification.
    pub commands: Vec<StepCommand>,
    /// Seconds for all of them together; 1800 where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<u32>,
    /// What they may reach: names of sets and of hosts among those that the policy opens for verification. Absent: all
    /// of those; empty: nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Vec<String>>,
    /// How often the agent gets the output of a failed verification and another try; 0 where absent.
    #[serde(default)]
    pub repair_attempts: u32,
}

/// A command of the user's that runs in the cell in place of an agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CommandSpec {
    /// The program and its arguments. Empty: the image's shell.
    #[serde(default)]
    pub argv: Vec<String>,
    /// It gets a terminal of this size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<TerminalSize>,
    /// A client takes part in it by `POST /v1/jobs/{id}/attach`: it gives its input, gets its output as it is, and ends
    /// it by leaving. Off: it has no input, and its output is in the job's events.
    #[serde(default)]
    pub attached: bool,
}

/// Rows and columns of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters of a line.
    pub cols: u16,
}

fn check_step(
    key: &str,
    commands: &[StepCommand],
    timeout_s: Option<u32>,
    egress: Option<&Vec<String>>,
) -> Result<(), SpecError> {
    let place = format!("{key}.commands");
    if commands.is_empty() {
        return Err(field(&place, "is empty"));
    }
    if commands.len() > COMMANDS_MAX {
        return Err(field(&place, &format!("has {} commands; at most {COMMANDS_MAX}", commands.len())));
    }
    for (index, command) in commands.iter().enumerate() {
        command.check(&format!("{place}[{index}]"))?;
    }
    if timeout_s.is_some_and(|seconds| seconds == 0 || seconds > STEP_TIMEOUT_S_MAX) {
        return Err(field(&format!("{key}.timeout_s"), &format!("must be from 1 to {STEP_TIMEOUT_S_MAX}")));
    }
    let names = egress.map_or(&[][..], Vec::as_slice);
    if names.len() > EGRESS_NAMES_MAX {
        let problem = format!("has {} names; at most {EGRESS_NAMES_MAX} are taken", names.len());
        return Err(field(&format!("{key}.egress"), &problem));
    }
    for (index, name) in names.iter().enumerate() {
        super::name(&format!("{key}.egress[{index}]"), name)?;
    }
    Ok(())
}

fn timeout_ms(timeout_s: Option<u32>) -> u64 {
    u64::from(timeout_s.unwrap_or(STEP_TIMEOUT_S)) * 1000
}

impl SetupSpec {
    pub(super) fn check(&self) -> Result<(), SpecError> {
        check_step("setup", &self.commands, self.timeout_s, self.egress.as_ref())
    }

    /// How long all commands may take together, in milliseconds.
    pub fn timeout_ms(&self) -> u64 {
        timeout_ms(self.timeout_s)
    }
}

impl VerifySpec {
    pub(super) fn check(&self) -> Result<(), SpecError> {
        if self.repair_attempts > REPAIR_ATTEMPTS_MAX {
            return Err(field("verify.repair_attempts", &format!("must be at most {REPAIR_ATTEMPTS_MAX}")));
        }
        check_step("verify", &self.commands, self.timeout_s, self.egress.as_ref())
    }

    /// How long all commands may take together, in milliseconds.
    pub fn timeout_ms(&self) -> u64 {
        timeout_ms(self.timeout_s)
    }
}

impl CommandSpec {
    pub(super) fn check(&self) -> Result<(), SpecError> {
        if self.terminal.is_some_and(|size| size.rows == 0 || size.cols == 0) {
            return Err(field("command.terminal", "rows and cols must be at least 1"));
        }
        if self.terminal.is_some() && !self.attached {
            return Err(field("command.terminal", "needs attached = true: nobody would sit at it"));
        }
        if self.argv.is_empty() {
            return if self.attached { Ok(()) } else { Err(field("command.argv", "is empty")) };
        }
        check_argv("command.argv", &self.argv)
    }

    /// The program and its arguments; `shell` is the image's.
    pub fn argv(&self, shell: &str) -> Vec<String> {
        match self.argv.as_slice() {
            [] => vec![shell.to_owned()],
            argv => argv.to_vec(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::JobSpec;

    fn wrong(json: &str) -> String {
        JobSpec::parse(json.as_bytes()).expect_err(json).to_string()
    }

    #[test]
    fn a_job_has_a_prompt_or_a_command_and_steps_are_checked_by_key() {
        for (json, words) in [
            (r#"{}"#, "prompt: "),
            (r#"{"prompt":"x","command":{"argv":["true"]}}"#, "command: "),
            (r#"{"command":{}}"#, "command.argv: is empty"),
            (r#"{"command":{"argv":["true"],"terminal":{"rows":1,"cols":1}}}"#, "command.terminal: "),
            (r#"{"command":{"attached":true,"terminal":{"rows":0,"cols":1}}}"#, "command.terminal: "),
            (r#"{"command":{"argv":["true"]},"verify":{"commands":["true"]}}"#, "verify: "),
            (r#"{"prompt":"x","setup":{"commands":[]}}"#, "setup.commands: is empty"),
            (r#"{"prompt":"x","setup":{"commands":["a", " "]}}"#, "setup.commands[1]: is empty"),
            (r#"{"prompt":"x","setup":{"commands":[["a","b\u0000"]]}}"#, "setup.commands[0]: holds a NUL"),
            (r#"{"prompt":"x","setup":{"commands":["a"],"timeout_s":0}}"#, "setup.timeout_s: "),
            (
                r#"{"prompt":"x","verify":{"commands":["a"],"repair_attempts":99}}"#,
                "verify.repair_attempts: ",
            ),
            (r#"{"prompt":"x","verify":{"commands":["a"],"egress":[""]}}"#, "verify.egress[0]: "),
            (r#"{"prompt":"x","verify":{"commands":["a"],"env":{}}}"#, "unknown field `env`"),
        ] {
            let error = wrong(json);
            assert!(error.contains(words), "{json}: {error}");
        }
    }

    #[test]
    fn a_line_is_the_shells_and_a_list_is_the_programs() {
        let json =
            br#"{"prompt":"x","setup":{"commands":["npm ci && true",["make","-j2"]],"egress":["npm"]}}"#;
        let setup = JobSpec::parse(json).expect("spec").setup.expect("setup");
        assert_eq!(setup.commands[0].argv("/bin/sh"), ["/bin/sh", "-c", "npm ci && true"]);
        assert_eq!(setup.commands[1].argv("/bin/sh"), ["make", "-j2"]);
        assert_eq!((setup.timeout_ms(), setup.commands[1].words()), (1_800_000, "make -j2".to_owned()));
    }

    #[test]
    fn a_command_without_words_is_a_shell_for_whoever_sits_at_it() {
        let json = br#"{"command":{"attached":true,"terminal":{"rows":24,"cols":80}}}"#;
        let command = JobSpec::parse(json).expect("spec").command.expect("command");
        assert_eq!(command.argv("/bin/bash"), ["/bin/bash"]);
    }
}
