//! A Dockerfile taken apart: logical lines, stages, and what each stage is built on. Pure. Only what the engine's plain
//! builder does is known; what needs BuildKit, and what would make the engine fetch something by itself, is refused with
//! its line. It must never read a line as harmless that a builder would read as an instruction of its own.

use std::collections::BTreeMap;

use super::DockerfileError;
use super::expand::expand;

/// Most logical lines.
const LINES_MAX: usize = 2_000;

/// What a line does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Instruction {
    /// Begins a stage.
    From,
    /// Runs something while the image is built.
    Run,
    /// Copies from the context, a stage or an image.
    Copy,
    /// The same, and unpacks archives.
    Add,
    /// A build argument.
    Arg,
    /// What is left out: labels say nothing in a cell.
    Label,
    /// Everything else: words for the image's configuration.
    Other,
}

impl Instruction {
    fn of(word: &str) -> Option<Self> {
        Some(match word {
            "FROM" => Self::From,
            "RUN" => Self::Run,
            "COPY" => Self::Copy,
            "ADD" => Self::Add,
            "ARG" => Self::Arg,
            "LABEL" => Self::Label,
            "CMD" | "ENTRYPOINT" | "ENV" | "EXPOSE" | "HEALTHCHECK" | "MAINTAINER" | "SHELL"
            | "STOPSIGNAL" | "USER" | "VOLUME" | "WORKDIR" => Self::Other,
            _ => return None,
        })
    }

    /// It runs something.
    pub fn runs(self) -> bool {
        self == Self::Run
    }
}

/// One logical line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Where it begins, counted from 1.
    pub number: usize,
    /// What it does.
    pub instruction: Instruction,
    /// The instruction as written.
    pub word: String,
    /// What follows it, joined to one line.
    pub rest: String,
    /// For `COPY --from=`: the image that is named there, where it is no stage.
    pub from: Option<String>,
}

/// What a stage is built on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Base {
    /// Nothing.
    Scratch,
    /// An earlier stage, by its name.
    Stage(String),
    /// An image.
    Image(String),
}

/// One stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    /// Its line.
    pub number: usize,
    /// What it is built on.
    pub base: Base,
    /// Its name.
    pub name: Option<String>,
    /// Its lines, `FROM` left out.
    pub lines: Vec<Line>,
}

/// A Dockerfile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dockerfile {
    /// The escape character.
    pub escape: char,
    /// `ARG` lines before the first stage.
    pub before: Vec<Line>,
    /// The stages, in order, up to the one that is built.
    pub stages: Vec<Stage>,
}

impl Dockerfile {
    /// Takes a Dockerfile apart. `args` are the build arguments, `target` the stage that is wanted.
    ///
    /// # Errors
    /// [`DockerfileError::Line`] for the first line that is not built here.
    pub fn parse(
        file: &str,
        text: &str,
        args: &BTreeMap<String, String>,
        target: Option<&str>,
    ) -> Result<Self, DockerfileError> {
        let at =
            |line: usize, problem: String| DockerfileError::Line { file: file.to_owned(), line, problem };
        let (escape, logical) = logical_lines(text).map_err(|(line, problem)| at(line, problem))?;
        let mut reader = Reader { variables: BTreeMap::new(), args, before: Vec::new(), stages: Vec::new() };
        for (number, text) in logical {
            reader.line(number, &text, escape).map_err(|problem| at(number, problem))?;
        }
        let Reader { before, mut stages, .. } = reader;
        if stages.is_empty() {
            return Err(at(1, "there is no FROM".to_owned()));
        }
        if let Some(target) = target {
            let index = stage_index(&stages, target)
                .ok_or_else(|| at(1, format!("there is no stage {target:?}, which is to be built")))?;
            stages.truncate(index + 1);
        }
        Ok(Self { escape, before, stages })
    }

    /// Lines that run something: the engine's plain builder does all stages up to the one that is wanted.
    pub fn runs(&self) -> impl Iterator<Item = &Line> {
        self.stages.iter().flat_map(|stage| &stage.lines).filter(|line| line.instruction.runs())
    }

    /// Every image that is built on or copied from, with the line that names it first.
    pub fn bases(&self) -> BTreeMap<&str, usize> {
        let mut bases = BTreeMap::new();
        for stage in &self.stages {
            if let Base::Image(image) = &stage.base {
                bases.entry(image.as_str()).or_insert(stage.number);
            }
            for line in &stage.lines {
                if let Some(image) = &line.from {
                    bases.entry(image.as_str()).or_insert(line.number);
                }
            }
        }
        bases
    }
}

fn stage_index(stages: &[Stage], name: &str) -> Option<usize> {
    let named = |stage: &Stage| stage.name.as_deref().is_some_and(|own| own.eq_ignore_ascii_case(name));
    stages.iter().position(named).or_else(|| name.parse::<usize>().ok().filter(|index| *index < stages.len()))
}

/// Joined lines with their numbers, and the escape character. Comments and empty lines are gone, within a joined line too.
type Logical = (char, Vec<(usize, String)>);

fn logical_lines(text: &str) -> Result<Logical, (usize, String)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let escape = escape_of(text)?;
    let mut lines: Vec<(usize, String)> = Vec::new();
    let mut open: Option<(usize, String)> = None;
    for (index, line) in text.lines().enumerate() {
        let (number, trimmed) = (index + 1, line.trim());
        if line.contains(['\0', '\r', '\u{b}', '\u{c}', '\u{85}', '\u{2028}', '\u{2029}']) {
            return Err((
                number,
                "it holds a character that some would take for the end of a line".to_owned(),
            ));
        }
        if trimmed.is_empty() || trimmed.starts_with('#') {
            continue;
        }
        let line = line.trim_end();
        let (body, goes_on) = match line.strip_suffix(escape) {
            Some(body) if body.ends_with(escape) => {
                // Older builders join here, newer ones do not.
                return Err((
                    number,
                    format!("a line that ends in {escape}{escape} is not clear: end it with a word"),
                ));
            }
            Some(body) => (body, true),
            None => (line, false),
        };
        let (first, mut joined) = open.take().unwrap_or((number, String::new()));
        joined.push_str(if joined.is_empty() { body.trim_start() } else { body });
        match goes_on {
            true => open = Some((first, joined)),
            false => lines.push((first, joined)),
        }
        if lines.len() > LINES_MAX {
            return Err((number, format!("it has more than {LINES_MAX} lines")));
        }
    }
    lines.extend(open.filter(|(_, text)| !text.trim().is_empty()));
    Ok((escape, lines))
}

/// The directive at its top.
fn escape_of(text: &str) -> Result<char, (usize, String)> {
    for (index, line) in text.lines().enumerate() {
        let Some((key, value)) = line.trim().strip_prefix('#').and_then(|line| line.split_once('=')) else {
            break;
        };
        if !key.trim().eq_ignore_ascii_case("escape") {
            continue;
        }
        return match value.trim() {
            "\\" => Ok('\\'),
            "`" => Ok('`'),
            other => Err((index + 1, format!("the escape character cannot be {other:?}"))),
        };
    }
    Ok('\\')
}

struct Reader<'a> {
    /// What `FROM` may name.
    variables: BTreeMap<String, String>,
    args: &'a BTreeMap<String, String>,
    before: Vec<Line>,
    stages: Vec<Stage>,
}

impl Reader<'_> {
    fn line(&mut self, number: usize, text: &str, escape: char) -> Result<(), String> {
        let (word, rest) = text.split_once(|c: char| c.is_ascii_whitespace()).unwrap_or((text, ""));
        let rest = rest.trim().to_owned();
        let upper = word.to_ascii_uppercase();
        if upper == "ONBUILD" {
            return Err("ONBUILD is not built here: nothing is built on a cell's image".to_owned());
        }
        let Some(instruction) = Instruction::of(&upper) else {
            let shown: String = word.chars().take(40).collect();
            return Err(format!("{shown:?} is no instruction"));
        };
        if rest.is_empty() {
            return Err(format!("{upper} needs something after it"));
        }
        if instruction == Instruction::From {
            return self.stage(number, &rest);
        }
        let mut line = Line { number, instruction, word: upper, rest, from: None };
        match instruction {
            Instruction::Run => check_run(&line.rest)?,
            Instruction::Copy => line.from = self.check_copy(&line.rest)?,
            Instruction::Add => check_add(&line.rest, escape)?,
            Instruction::From | Instruction::Arg | Instruction::Label | Instruction::Other => {}
        }
        match self.stages.last_mut() {
            Some(stage) => stage.lines.push(line),
            None if instruction == Instruction::Arg => {
                self.argument(&line.rest)?;
                self.before.push(line);
            }
            None => return Err(format!("{} stands before the first FROM", line.word)),
        }
        Ok(())
    }

    /// `ARG` before the first stage.
    fn argument(&mut self, rest: &str) -> Result<(), String> {
        for word in rest.split_ascii_whitespace() {
            let (name, default) =
                word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)));
            let value = match (self.args.get(name), default) {
                (Some(given), _) => given.clone(),
                (None, Some(default)) => expand(default, &self.variables)?,
                (None, None) => continue,
            };
            self.variables.insert(name.to_owned(), value);
        }
        Ok(())
    }

    fn stage(&mut self, number: usize, rest: &str) -> Result<(), String> {
        let mut words = rest.split_ascii_whitespace().peekable();
        // There is one platform, and the image is chosen by what is on this machine.
        while words.next_if(|word| word.starts_with("--platform=")).is_some() {}
        if let Some(flag) = words.peek().filter(|word| word.starts_with("--")) {
            return Err(format!("FROM has {flag}, which is not built here"));
        }
        let image = words.next().ok_or("FROM names no image")?;
        let name = match (words.next(), words.next(), words.next()) {
            (None, ..) => None,
            (Some(word), Some(name), None) if word.eq_ignore_ascii_case("as") => Some(checked_name(name)?),
            _ => return Err("FROM is written as FROM image [AS name]".to_owned()),
        };
        let image = expand(image, &self.variables)?;
        let known = stage_named(&self.stages, &image);
        let base = match image.as_str() {
            "" => return Err("FROM comes to no image: an ARG before it has no value".to_owned()),
            "scratch" => Base::Scratch,
            _ if known => Base::Stage(image.to_ascii_lowercase()),
            _ => Base::Image(checked_image(&image)?),
        };
        self.stages.push(Stage { number, base, name, lines: Vec::new() });
        Ok(())
    }

    /// The image behind `--from=`, where that is no stage.
    fn check_copy(&self, rest: &str) -> Result<Option<String>, String> {
        no_heredoc("COPY", rest)?;
        let mut from = None;
        for flag in flags(rest) {
            match flag.split_once('=') {
                Some(("--from", name)) => {
                    let index = name.parse::<usize>();
                    // The stage that this line stands in is no source of it.
                    let earlier = self.stages.len().saturating_sub(1);
                    let stages = &self.stages[..earlier];
                    from = match index {
                        Ok(index) if index < earlier => None,
                        Ok(_) => return Err(format!("COPY --from={name}: there is no such stage")),
                        Err(_) if stage_named(stages, name) => None,
                        Err(_) => Some(checked_image(name)?),
                    };
                }
                Some(("--chown", _)) => {}
                _ => return Err(needs_buildkit(&format!("COPY {flag}"))),
            }
        }
        Ok(from)
    }
}

fn stage_named(stages: &[Stage], name: &str) -> bool {
    stages.iter().any(|stage| stage.name.as_deref().is_some_and(|own| own.eq_ignore_ascii_case(name)))
}

fn checked_name(name: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let fits = name.starts_with(|c: char| c.is_ascii_alphabetic()) && name.chars().all(plain);
    if !fits || name.eq_ignore_ascii_case("scratch") {
        return Err(format!("{name:?} is no name of a stage"));
    }
    Ok(name.to_ascii_lowercase())
}

fn checked_image(name: &str) -> Result<String, String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'/' | b':' | b'@');
    if name.is_empty() || name.len() > 300 || !name.bytes().all(plain) {
        let shown: String = name.chars().take(80).collect();
        return Err(format!("{shown:?} is no name of an image"));
    }
    Ok(name.to_owned())
}

fn flags(rest: &str) -> impl Iterator<Item = &str> {
    rest.split_ascii_whitespace().take_while(|word| word.starts_with("--"))
}

fn needs_buildkit(what: &str) -> String {
    format!("{what} needs BuildKit, which is not used here: write it without")
}

fn check_run(rest: &str) -> Result<(), String> {
    if let Some(flag) = flags(rest).next() {
        return Err(needs_buildkit(&format!("RUN {flag}")));
    }
    no_heredoc("RUN", rest)
}

/// The engine fetches what is not in the context by itself, past the gateway: only plain paths pass.
fn check_add(rest: &str, escape: char) -> Result<(), String> {
    no_heredoc("ADD", rest)?;
    let mut after = rest;
    for flag in flags(rest) {
        if !flag.starts_with("--chown=") {
            return Err(needs_buildkit(&format!("ADD {flag}")));
        }
        after = after.trim_start().strip_prefix(flag).unwrap_or(after);
    }
    // A colon may be hidden in a variable, and in the escapes of a JSON list.
    if after.contains([':', '$', escape, '\\', '`']) {
        let words = "ADD takes only plain paths of the context here: the engine would fetch an address by itself, past the \
                     gateway; fetch it in a RUN line instead";
        return Err(words.to_owned());
    }
    Ok(())
}

/// `<<NAME` begins a text over several lines for newer builders, and is the shell's for older ones.
fn no_heredoc(instruction: &str, rest: &str) -> Result<(), String> {
    for (at, _) in rest.match_indices("<<") {
        let before = rest[..at].trim_end_matches(|c: char| c.is_ascii_digit());
        let begins =
            before.is_empty() || before.ends_with(|c: char| c.is_whitespace() || matches!(c, '"' | '\''));
        let after = rest[at + 2..].trim_start_matches(['-', '"', '\'']);
        if begins && after.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_') {
            return Err(needs_buildkit(&format!("a here-document after {instruction}")));
        }
    }
    Ok(())
}
