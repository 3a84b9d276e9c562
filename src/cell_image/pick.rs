//! Which image fits a repository, by the names of the files at its top. Pure; looks at nothing itself.

/// What was picked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pick {
    /// The image.
    pub image: String,
    /// Why, in a sentence for people.
    pub why: String,
}

/// Files that speak for a toolchain; the first one in this order that is there decides. A final `*` stands
/// for the rest of the name of a text file.
const SIGNS: [(&str, &[&str]); 6] = [
    ("rust", &["Cargo.toml"]),
    ("go", &["go.mod", "go.work"]),
    (
        "java",
        &[
            "pom.xml",
            "build.gradle",
            "build.gradle.kts",
            "settings.gradle",
            "settings.gradle.kts",
            "gradlew",
            "mvnw",
        ],
    ),
    (
        "python",
        &[
            "pyproject.toml",
            "setup.py",
            "setup.cfg",
            "requirements*",
            "Pipfile",
            "poetry.lock",
            "uv.lock",
            "tox.ini",
        ],
    ),
    ("node", &["package.json", "pnpm-workspace.yaml"]),
    (
        "cc",
        &[
            "CMakeLists.txt",
            "meson.build",
            "configure",
            "configure.ac",
            "configure.in",
            "autogen.sh",
            "Makefile",
            "makefile",
            "GNUmakefile",
        ],
    ),
];
/// Programs that only one toolchain's image has.
const TOOLS: [(&str, &[&str]); 6] = [
    ("rust", &["cargo", "rustc", "rustfmt", "clippy-driver"]),
    ("go", &["go", "gofmt"]),
    ("java", &["java", "javac", "jar", "mvn", "gradle"]),
    ("python", &["pip", "pip3", "python"]),
    ("node", &["yarn", "pnpm", "corepack"]),
    (
        "cc",
        &[
            "cmake",
            "ctest",
            "ninja",
            "meson",
            "autoconf",
            "automake",
            "autoreconf",
            "cc",
            "gcc",
            "g++",
            "c++",
        ],
    ),
];
/// Other toolchains that are named at most.
const OTHERS_MAX: usize = 5;

/// The image for a repository with these files at its top; `default` where none of them speaks for another.
pub fn pick<'a>(names: impl IntoIterator<Item = &'a str>, default: &str) -> Pick {
    let names: Vec<&str> = names.into_iter().collect();
    let mut seen = SIGNS.iter().filter_map(|(toolchain, signs)| {
        let sign = signs.iter().find_map(|sign| names.iter().find(|name| fits(sign, name)))?;
        Some((*toolchain, *sign))
    });
    let Some((toolchain, sign)) = seen.next() else {
        let why = format!("the image {default} is taken: no file at the top names a toolchain");
        return Pick { image: default.to_owned(), why };
    };
    let image = format!("hotcell/{toolchain}");
    let others: Vec<String> =
        seen.take(OTHERS_MAX).map(|(toolchain, sign)| format!("{sign} (hotcell/{toolchain})")).collect();
    let beside = match others.as_slice() {
        [] => String::new(),
        others => format!("; there is also {}", others.join(", ")),
    };
    Pick { why: format!("the image {image} is taken since there is {sign}{beside}"), image }
}

/// The image that has a program which the default one lacks.
pub fn image_with(tool: &str) -> Option<String> {
    let (toolchain, _) = TOOLS.iter().find(|(_, tools)| tools.contains(&tool))?;
    Some(format!("hotcell/{toolchain}"))
}

fn fits(sign: &str, name: &str) -> bool {
    match sign.strip_suffix('*') {
        // Such as requirements.txt and requirements-dev.txt.
        Some(start) => name.starts_with(start) && name.ends_with(".txt"),
        None => sign == name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cell_image::toolchain;

    #[test]
    fn each_kind_of_repository_gets_its_image() {
        for (names, image) in [
            (&["Cargo.toml", "src"][..], "hotcell/rust"),
            (&["go.mod", "main.go"], "hotcell/go"),
            (&["go.work"], "hotcell/go"),
            (&["pom.xml"], "hotcell/java"),
            (&["build.gradle.kts", "gradlew"], "hotcell/java"),
            (&["pyproject.toml"], "hotcell/python"),
            (&["requirements-dev.txt"], "hotcell/python"),
            (&["setup.py", "Makefile"], "hotcell/python"),
            (&["package.json"], "hotcell/node"),
            (&["CMakeLists.txt"], "hotcell/cc"),
            (&["configure.ac"], "hotcell/cc"),
            (&["Makefile"], "hotcell/cc"),
            (&["README.md", "requirements", "cargo.toml", "my-pom.xml"], "x/default"),
            (&[], "x/default"),
        ] {
            let picked = pick(names.iter().copied(), "x/default");
            assert_eq!(picked.image, image, "{names:?}");
            let name = image.strip_prefix("hotcell/");
            assert!(name.is_none_or(|name| toolchain(name).is_some()), "{image} has a recipe");
        }
    }

    #[test]
    fn the_reason_names_the_file_and_what_else_was_seen() {
        let picked = pick(["Makefile", "package.json", "Cargo.toml"], "d");
        assert_eq!(
            picked.why,
            "the image hotcell/rust is taken since there is Cargo.toml; there is also package.json (hotcell/node), \
             Makefile (hotcell/cc)"
        );
        assert_eq!(pick(["a"], "d").why, "the image d is taken: no file at the top names a toolchain");
    }

    #[test]
    fn the_order_of_the_files_does_not_matter() {
        assert_eq!(pick(["go.mod", "Cargo.toml"], "d"), pick(["Cargo.toml", "go.mod"], "d"));
    }
}
