//! What a path alone says: the table of names that something obeys or runs, and where git looks. Pure.

use super::super::{Flag, TreePath};

/// How a path stands to the `.git` directories of a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GitPlace {
    /// It is in none.
    Outside,
    /// It is a `.git` itself.
    Top,
    /// It is in one.
    Inside,
    /// It is in one, and runs something or leads git elsewhere: hooks, configuration, attributes, other object stores.
    Runs,
    /// It is, or is in, something that another system takes for `.git`: `.GIT`, `git~1`, `.git ` and their like.
    Disguised,
}

/// Where `path` is.
pub fn git_place(path: &TreePath) -> GitPlace {
    let parts: Vec<&[u8]> = path.parts().collect();
    if let Some(at) = parts.iter().position(|part| *part == b".git") {
        return match &parts[at + 1..] {
            [] => GitPlace::Top,
            rest if runs(rest) => GitPlace::Runs,
            _ => GitPlace::Inside,
        };
    }
    if parts.iter().any(|part| disguised(part)) { GitPlace::Disguised } else { GitPlace::Outside }
}

/// What stands at a path below a directory that is a repository without being called `.git`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarePart {
    /// By it git knows the directory for a repository.
    Makes,
    /// It runs something or leads git elsewhere.
    Runs,
}

/// What `rest`, a path below some directory, would be if that were a bare repository.
pub fn bare_part(rest: &[&[u8]]) -> Option<BarePart> {
    match rest {
        [b"HEAD"] | [b"objects" | b"refs", ..] if !runs(rest) => Some(BarePart::Makes),
        _ => runs(rest).then_some(BarePart::Runs),
    }
}

/// Whether git runs, or is led by, what stands at `rest` in a git directory.
fn runs(rest: &[&[u8]]) -> bool {
    match rest {
        [b"modules" | b"worktrees"] => false,
        [b"modules" | b"worktrees", below @ ..] => (1..=below.len()).any(|at| runs(&below[at..])),
        [b"hooks", ..] | [b"commondir" | b"gitdir" | b".git"] => true,
        [b"info", b"attributes"] => true,
        [b"objects", b"info", b"alternates" | b"http-alternates"] => true,
        [name] => name.to_ascii_lowercase().starts_with(b"config"),
        _ => false,
    }
}

/// Whether some file system or git itself takes this name for `.git`.
fn disguised(name: &[u8]) -> bool {
    let parts = name.split(|byte| *byte == b'\\');
    parts.into_iter().any(|part| {
        if part == b".git" {
            // Only as one of several parts, since the plain name never comes here.
            return true;
        }
        let visible = without_ignorable(part).to_ascii_lowercase();
        visible == b".git" || [&b".git"[..], b"git~1"].iter().any(|known| windows_name(&visible, known))
    })
}

/// Whether Windows opens `known` where it is asked for `name`: blanks and dots at the end go, a stream is cut off.
fn windows_name(name: &[u8], known: &[u8]) -> bool {
    let Some(rest) = name.strip_prefix(known) else { return false };
    let rest = &rest[rest.iter().take_while(|byte| matches!(byte, b' ' | b'.')).count()..];
    rest.is_empty() || rest[0] == b':'
}

/// Without the code points that HFS+ does not see.
fn without_ignorable(name: &[u8]) -> Vec<u8> {
    let Ok(text) = std::str::from_utf8(name) else { return name.to_vec() };
    let ignorable = |c: &char| matches!(*c, '\u{200c}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{206a}'..='\u{206f}' | '\u{feff}');
    text.chars().filter(|c| !ignorable(c)).collect::<String>().into_bytes()
}

/// How a row of the table matches; everything in lower case.
enum At {
    /// The last part, at any depth.
    Name(&'static str),
    /// The beginning of the last part.
    Begins(&'static str),
    /// The end of the last part.
    Ends(&'static str),
    /// Some parts in a row, with whatever lies below.
    Below(&'static str),
}

/// Names, and what they are flagged as. A path may match several rows.
const TABLE: &[(Flag, &[At])] = &[
    (
        Flag::Submodule,
        &[
            At::Name(".gitmodules"),
            At::Name("gitmod~1"),
            At::Name(".gitattributes"),
            At::Name("gitatt~1"),
            At::Name(".lfsconfig"),
        ],
    ),
    (
        Flag::Ci,
        &[
            At::Below(".github"),
            At::Below(".gitlab"),
            At::Begins(".gitlab-ci"),
            At::Ends(".gitlab-ci.yml"),
            At::Below(".gitea"),
            At::Below(".forgejo"),
            At::Below(".circleci"),
            At::Below(".buildkite"),
            At::Below(".woodpecker"),
            At::Begins(".woodpecker.y"),
            At::Below(".azure-pipelines"),
            At::Begins("azure-pipelines"),
            At::Begins("bitbucket-pipelines"),
            At::Begins("jenkinsfile"),
            At::Ends(".jenkinsfile"),
            At::Name(".travis.yml"),
            At::Begins(".appveyor.y"),
            At::Begins("appveyor.y"),
            At::Begins(".drone."),
            At::Begins(".cirrus."),
            At::Begins("cloudbuild."),
            At::Begins("buildspec."),
            At::Below(".teamcity"),
            At::Below(".semaphore"),
            At::Below(".tekton"),
            At::Name("codefresh.yml"),
            At::Name("wercker.yml"),
            At::Begins(".pre-commit-"),
            At::Name("lefthook.yml"),
            At::Name(".lefthook.yml"),
            At::Begins(".lintstagedrc"),
            At::Begins("lint-staged.config."),
            At::Below(".husky"),
            At::Name("codeowners"),
            At::Begins("renovate.json"),
            At::Begins(".renovaterc"),
            At::Name(".mergify.yml"),
            At::Begins("netlify.toml"),
            At::Begins("vercel.json"),
            At::Begins("dangerfile"),
        ],
    ),
    (
        Flag::AgentSettings,
        &[
            At::Below(".claude"),
            At::Begins(".claude.json"),
            At::Below(".claude-plugin"),
            At::Name(".mcp.json"),
            At::Name("mcp.json"),
            At::Name("claude.md"),
            At::Name("claude.local.md"),
            At::Name("agents.md"),
            At::Name("agents.override.md"),
            At::Name("agent.md"),
            At::Name("gemini.md"),
            At::Below(".agents"),
            At::Below(".agent"),
            At::Below(".cursor"),
            At::Begins(".cursorrules"),
            At::Name(".cursorignore"),
            At::Below(".codex"),
            At::Below(".gemini"),
            At::Name(".geminiignore"),
            At::Below(".github/instructions"),
            At::Below(".github/prompts"),
            At::Below(".github/agents"),
            At::Below(".github/chatmodes"),
            At::Below(".github/skills"),
            At::Begins("copilot-instructions"),
            At::Begins("copilot-setup-steps"),
            At::Below(".copilot"),
            At::Begins(".windsurfrules"),
            At::Below(".windsurf"),
            At::Begins(".clinerules"),
            At::Below(".clinerules"),
            At::Below(".cline"),
            At::Begins(".roorules"),
            At::Begins(".roomodes"),
            At::Below(".roo"),
            At::Below(".kilocode"),
            At::Below(".kiro"),
            At::Below(".amazonq"),
            At::Below(".junie"),
            At::Below(".aider"),
            At::Begins(".aider."),
            At::Below(".continue"),
            At::Name(".continuerules"),
            At::Below(".opencode"),
            At::Begins("opencode.json"),
            At::Below(".openhands"),
            At::Below(".goose"),
            At::Name(".goosehints"),
            At::Below(".augment"),
            At::Name(".augment-guidelines"),
            At::Below(".trae"),
            At::Below(".qwen"),
            At::Name("qwen.md"),
            At::Below(".crush"),
            At::Name("crush.md"),
            At::Name("crush.json"),
            At::Name("warp.md"),
            At::Name("skill.md"),
            At::Name(".rules"),
        ],
    ),
    (
        Flag::Editor,
        &[
            At::Below(".vscode"),
            At::Below(".vscode-server"),
            At::Ends(".code-workspace"),
            At::Below(".idea"),
            At::Below(".run"),
            At::Ends(".iml"),
            At::Ends(".ipr"),
            At::Ends(".iws"),
            At::Below(".zed"),
            At::Below(".fleet"),
            At::Below(".vs"),
            At::Ends(".sublime-project"),
            At::Ends(".sublime-workspace"),
            At::Below(".nvim"),
            At::Below(".vim"),
            At::Name(".exrc"),
            At::Name("_exrc"),
            At::Name(".nexrc"),
            At::Name(".vimrc"),
            At::Name("_vimrc"),
            At::Name(".gvimrc"),
            At::Name(".nvimrc"),
            At::Name(".nvim.lua"),
            At::Name(".lvimrc"),
            At::Name(".vimspector.json"),
            At::Begins(".dir-locals"),
            At::Name(".projectile"),
            At::Below(".settings"),
            At::Name(".classpath"),
            At::Below(".helix"),
            At::Below(".kakrc"),
            At::Below(".devcontainer"),
            At::Name(".devcontainer.json"),
            At::Name(".gitpod.yml"),
            At::Name(".gdbinit"),
            At::Name(".lldbinit"),
            At::Name(".ycm_extra_conf.py"),
        ],
    ),
    (
        Flag::Shell,
        &[
            At::Begins(".envrc"),
            At::Below(".direnv"),
            At::Name(".mise.toml"),
            At::Begins(".mise."),
            At::Name("mise.toml"),
            At::Begins("mise."),
            At::Below(".mise"),
            At::Below(".rtx"),
            At::Name(".rtx.toml"),
            At::Name(".autoenv"),
            At::Begins(".autoenv."),
            At::Name(".bashrc"),
            At::Name(".bash_profile"),
            At::Name(".bash_login"),
            At::Name(".bash_logout"),
            At::Name(".bash_aliases"),
            At::Name(".profile"),
            At::Name(".zshrc"),
            At::Name(".zshenv"),
            At::Name(".zprofile"),
            At::Name(".zlogin"),
            At::Name(".zlogout"),
            At::Name(".kshrc"),
            At::Name(".cshrc"),
            At::Name(".tcshrc"),
            At::Name(".inputrc"),
            At::Name("config.fish"),
            At::Name(".tmux.conf"),
            At::Name(".screenrc"),
            At::Name(".gitconfig"),
            At::Name(".npmrc"),
            At::Name(".yarnrc"),
            At::Name(".yarnrc.yml"),
            At::Name(".pypirc"),
            At::Name("pip.conf"),
            At::Below(".ssh"),
            At::Name("devenv.nix"),
            At::Name("shell.nix"),
            At::Name("flake.nix"),
            At::Name("flake.lock"),
            At::Below(".config/fish"),
            At::Below(".config/git"),
            At::Below(".config/mise"),
        ],
    ),
    (
        Flag::Package,
        &[
            At::Name("package.json"),
            At::Name("package-lock.json"),
            At::Name("npm-shrinkwrap.json"),
            At::Name("yarn.lock"),
            At::Begins("pnpm-lock."),
            At::Name("pnpm-workspace.yaml"),
            At::Begins(".pnpmfile."),
            At::Name(".pnp.cjs"),
            At::Below(".yarn"),
            At::Begins("bun.lock"),
            At::Name("bunfig.toml"),
            At::Begins("deno.json"),
            At::Name("deno.lock"),
            At::Name("cargo.toml"),
            At::Name("cargo.lock"),
            At::Name("build.rs"),
            At::Below(".cargo"),
            At::Begins("rust-toolchain"),
            At::Name("go.mod"),
            At::Name("go.sum"),
            At::Begins("go.work"),
            At::Name("setup.py"),
            At::Name("setup.cfg"),
            At::Name("pyproject.toml"),
            At::Name("conftest.py"),
            At::Name("sitecustomize.py"),
            At::Name("usercustomize.py"),
            At::Ends(".pth"),
            At::Name("tox.ini"),
            At::Name("noxfile.py"),
            At::Begins("requirements"),
            At::Begins("constraints.t"),
            At::Begins("pipfile"),
            At::Name("poetry.lock"),
            At::Name("uv.lock"),
            At::Name("uv.toml"),
            At::Name("pdm.lock"),
            At::Name("pixi.toml"),
            At::Name("pixi.lock"),
            At::Begins("environment.y"),
            At::Name("gemfile"),
            At::Name("gemfile.lock"),
            At::Name("gems.rb"),
            At::Name("gems.locked"),
            At::Ends(".gemspec"),
            At::Name("rakefile"),
            At::Below(".bundle"),
            At::Name("composer.json"),
            At::Name("composer.lock"),
            At::Begins("makefile"),
            At::Name("gnumakefile"),
            At::Ends(".mk"),
            At::Name("cmakelists.txt"),
            At::Ends(".cmake"),
            At::Begins("cmakepresets"),
            At::Name("meson.build"),
            At::Name("configure"),
            At::Name("configure.ac"),
            At::Name("justfile"),
            At::Name(".justfile"),
            At::Begins("taskfile."),
            At::Begins("build.gradle"),
            At::Begins("settings.gradle"),
            At::Name("gradle.properties"),
            At::Name("gradle.lockfile"),
            At::Begins("gradlew"),
            At::Begins("gradle-wrapper."),
            At::Name("pom.xml"),
            At::Begins("mvnw"),
            At::Below(".mvn"),
            At::Name("build.sbt"),
            At::Begins("build.bazel"),
            At::Name("build"),
            At::Begins("workspace.bazel"),
            At::Begins("module.bazel"),
            At::Name(".bazelrc"),
            At::Name("mix.exs"),
            At::Name("mix.lock"),
            At::Begins("rebar."),
            At::Ends(".csproj"),
            At::Ends(".fsproj"),
            At::Ends(".vbproj"),
            At::Ends(".vcxproj"),
            At::Ends(".sln"),
            At::Begins("directory.build."),
            At::Begins("nuget.config"),
            At::Name("packages.lock.json"),
            At::Name("package.swift"),
            At::Name("package.resolved"),
            At::Name("podfile"),
            At::Name("podfile.lock"),
            At::Name("pubspec.yaml"),
            At::Name("pubspec.lock"),
            At::Begins("dockerfile"),
            At::Ends(".dockerfile"),
            At::Begins("containerfile"),
            At::Begins("docker-compose"),
            At::Begins("compose.y"),
            At::Name("vagrantfile"),
            At::Begins("webpack.config."),
            At::Begins("vite.config."),
            At::Begins("vitest.config."),
            At::Begins("jest.config."),
            At::Begins("babel.config."),
            At::Begins(".babelrc"),
            At::Begins("rollup.config."),
            At::Begins("eslint.config."),
            At::Begins(".eslintrc"),
            At::Begins("prettier.config."),
            At::Begins(".prettierrc"),
            At::Begins("postcss.config."),
            At::Begins("next.config."),
            At::Begins("gruntfile."),
            At::Begins("gulpfile."),
        ],
    ),
];

/// What the names on the way say.
pub(super) fn flags(path: &[u8]) -> Vec<Flag> {
    let lower = path.to_ascii_lowercase();
    let name = lower.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    let hit = |at: &At| match at {
        At::Name(wanted) => name == wanted.as_bytes(),
        At::Begins(wanted) => name.starts_with(wanted.as_bytes()),
        At::Ends(wanted) => name.ends_with(wanted.as_bytes()),
        At::Below(wanted) => below(&lower, wanted.as_bytes()),
    };
    TABLE.iter().filter(|(_, rows)| rows.iter().any(hit)).map(|(flag, _)| *flag).collect()
}

/// Whether `wanted`, one part or some in a row, stands in `path` as whole parts.
fn below(path: &[u8], wanted: &[u8]) -> bool {
    let mut at = 0;
    loop {
        let rest = &path[at..];
        if let Some(tail) = rest.strip_prefix(wanted)
            && (tail.is_empty() || tail[0] == b'/')
        {
            return true;
        }
        match rest.iter().position(|byte| *byte == b'/') {
            Some(slash) => at += slash + 1,
            None => return false,
        }
    }
}
