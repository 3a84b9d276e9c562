//! What git obeys in a repository of ours: its configuration, its attributes, its environment. Nobody else adds to it,
//! and nothing in it runs a program.

/// What our repositories obey.
pub(super) const CONFIG: &str = "\
[core]
	bare = true
	filemode = true
	logAllRefUpdates = false
	hooksPath = /dev/null
	fsmonitor = false
	attributesFile = /dev/null
	excludesFile = /dev/null
	editor = :
	pager = cat
	sshCommand = /bin/false
	askPass = /bin/false
	quotePath = true
	bigFileThreshold = 32m
	packedGitWindowSize = 64m
	packedGitLimit = 4g
	protectHFS = true
	protectNTFS = true
[credential]
	helper =
[protocol]
	allow = never
[transfer]
	fsckObjects = true
[gc]
	auto = 0
[maintenance]
	auto = false
[pack]
	threads = 2
	windowMemory = 256m
[fastimport]
	unpackLimit = 1
[diff]
	renameLimit = 2000
	noPrefix = false
	mnemonicPrefix = false
	suppressBlankEmpty = false
[color]
	ui = false
[submodule]
	recurse = false
";
/// A repository's attributes would come after these and cannot: ours stand in `info/attributes`, which wins.
pub(super) const ATTRIBUTES: &str =
    "* !diff !merge -text -filter -ident -working-tree-encoding -export-subst -export-ignore -eol\n";

/// What git is told by its environment.
pub(super) const ENVIRONMENT: [(&str, &str); 24] = [
    ("PATH", "/usr/local/bin:/usr/bin:/bin"),
    ("LC_ALL", "C"),
    ("TZ", "UTC"),
    ("GIT_CONFIG_NOSYSTEM", "1"),
    ("GIT_CONFIG_SYSTEM", "/dev/null"),
    ("GIT_CONFIG_GLOBAL", "/dev/null"),
    ("GIT_ATTR_NOSYSTEM", "1"),
    ("GIT_TERMINAL_PROMPT", "0"),
    ("GIT_ASKPASS", "/bin/false"),
    ("SSH_ASKPASS", "/bin/false"),
    ("GIT_SSH_COMMAND", "/bin/false"),
    ("GIT_EDITOR", ":"),
    ("GIT_SEQUENCE_EDITOR", ":"),
    ("GIT_PAGER", "cat"),
    ("GIT_ALLOW_PROTOCOL", ""),
    ("GIT_NO_REPLACE_OBJECTS", "1"),
    ("GIT_NO_LAZY_FETCH", "1"),
    ("GIT_OPTIONAL_LOCKS", "0"),
    ("GIT_LITERAL_PATHSPECS", "1"),
    ("GIT_DISCOVERY_ACROSS_FILESYSTEM", "0"),
    ("GIT_AUTHOR_NAME", "hotcell"),
    ("GIT_AUTHOR_EMAIL", "hotcell@localhost"),
    ("GIT_COMMITTER_NAME", "hotcell"),
    ("GIT_COMMITTER_EMAIL", "hotcell@localhost"),
];
