//! The table of all settings. Key, variable, flag and help come from here, so that they cannot differ.

/// One setting: its key in the file, from which its variable and its flag are made.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// The key, with dots for nesting.
    pub key: &'static str,
    /// What stands for the value in help texts.
    pub value_name: &'static str,
    /// What it is, with its default.
    pub help: &'static str,
    /// Shown by `-h` too, not only by `--help`.
    pub everyday: bool,
}

impl Setting {
    /// The variable, e.g. `HOTCELL_LIMITS_SLOTS`.
    pub fn variable(&self) -> String {
        format!("HOTCELL_{}", self.key.replace('.', "_").to_uppercase())
    }

    /// The flag without its dashes, e.g. `limits-slots`.
    pub fn flag(&self) -> String {
        self.key.replace(['.', '_'], "-")
    }

    /// The setting with this key.
    pub fn of(key: &str) -> Option<&'static Self> {
        SETTINGS.iter().find(|s| s.key == key)
    }
}

const fn setting(key: &'static str, value_name: &'static str, help: &'static str) -> Setting {
    Setting { key, value_name, help, everyday: false }
}

const fn everyday(key: &'static str, value_name: &'static str, help: &'static str) -> Setting {
    Setting { key, value_name, help, everyday: true }
}

/// All settings.
pub const SETTINGS: [Setting; 45] = [
    everyday(
        "state_dir",
        "DIR",
        "Database, journals, bundles and cells [default: /var/lib/hotcell as root, else $XDG_STATE_HOME/hotcell]",
    ),
    everyday(
        "socket",
        "PATH",
        "The API's unix socket [default: /run/hotcell/hotcell.sock as root, else $XDG_RUNTIME_DIR/hotcell.sock]",
    ),
    setting(
        "socket_mode",
        "OCTAL",
        "Permission bits of the socket [default: 0660 with a socket_group, else 0600]",
    ),
    setting("socket_group", "GROUP", "Group of the socket, by name or id [default: the daemon's own]"),
    everyday("engine", "ADDRESS", "The container engine, unix:///path [default: searched for]"),
    everyday(
        "metrics",
        "ADDRESS",
        "Serve /metrics over TCP too: a port of 127.0.0.1, or ADDRESS:PORT [default: only on the socket]",
    ),
    setting(
        "policy_dirs",
        "DIR[:DIR…]",
        "Directories of policy files; they win over the built-in ones [default: policies, beside the file]",
    ),
    setting("prices_file", "FILE", "Prices of models, instead of the built-in ones"),
    setting(
        "provider.anthropic.base_url",
        "URL",
        "Where the model is reached [default: https://api.anthropic.com]",
    ),
    setting(
        "provider.anthropic.api_key_env",
        "NAME",
        "Variable of the daemon that holds the API key [default: ANTHROPIC_API_KEY]",
    ),
    setting("provider.anthropic.api_key_file", "FILE", "File that holds the API key"),
    setting("provider.anthropic.api_key_command", "COMMAND", "Shell command that prints the API key"),
    setting("defaults.policy", "NAME", "Policy of jobs that name none [default: default]"),
    setting(
        "defaults.model",
        "NAME",
        "Model of jobs where neither job nor policy names one [default: claude-sonnet-4-6]",
    ),
    setting(
        "defaults.image",
        "REF",
        "Image of jobs where neither job nor policy names one [default: hotcell/cell]",
    ),
    setting("defaults.agent", "VERSION", "Agent bundle of jobs that name none [default: the one in use]"),
    setting(
        "defaults.provider",
        "NAME",
        "Provider of jobs where neither job nor policy names one [default: the only [[provider]], else anthropic]",
    ),
    everyday("limits.slots", "N", "Jobs that run at the same time [default: the number of cores]"),
    setting("limits.queued_jobs_max", "N", "Jobs that may wait; more are refused [default: 10000]"),
    setting("limits.journal_bytes_max", "BYTES", "Size of one job's journal [default: 268435456]"),
    setting(
        "limits.cancel_grace_s",
        "SECONDS",
        "From asking an agent to end until it is killed [default: 10]",
    ),
    setting(
        "limits.drain_s",
        "SECONDS",
        "What running jobs get when the daemon is told to stop [default: 60]",
    ),
    setting(
        "limits.disk_reserve_mib",
        "MIB",
        "Disk space that jobs must leave free in the state directory [default: 1024]",
    ),
    setting(
        "limits.memory_reserve_mib",
        "MIB",
        "Memory that must be free beside what a job needs before a further one starts [default: 512]",
    ),
    setting("budgets.user_day_usd", "USD", "What each user may spend in a day [default: no limit]"),
    setting("budgets.day_usd", "USD", "What all jobs may spend in a day [default: no limit]"),
    setting("budgets.month_usd", "USD", "What all jobs may spend in a month [default: no limit]"),
    setting(
        "budgets.time_zone",
        "ZONE",
        "Whose midnight ends a day, e.g. Europe/Berlin [default: the machine's time zone]",
    ),
    setting(
        "network.proxy",
        "URL",
        "A proxy through which the model and the hosts of egress are reached, http://HOST:PORT; it looks names up \
         and answers for their addresses [default: none]",
    ),
    setting(
        "network.no_proxy",
        "HOST[,HOST…]",
        "Hosts and .suffixes reached without the proxy; loopback always is [default: none]",
    ),
    setting(
        "network.ca_file",
        "FILE",
        "Further certificate authorities (PEM), for the model, for egress and in the cells [default: none]",
    ),
    setting(
        "cache.bytes_max",
        "BYTES",
        "Size of the cache of packages; 0 keeps nothing [default: 21474836480]",
    ),
    setting("cache.entry_bytes_max", "BYTES", "Largest file that it keeps [default: 2147483648]"),
    setting("cache.free_bytes_min", "BYTES", "Disk space that it leaves free [default: 2147483648]"),
    setting("retention.days", "DAYS", "How long jobs that are over are kept [default: 30]"),
    setting(
        "retention.undecided_days",
        "DAYS",
        "The same where nobody has applied or discarded what they changed [default: 180]",
    ),
    setting("retention.jobs", "N", "Most jobs that are over [default: 10000]"),
    setting(
        "retention.bytes",
        "BYTES",
        "Most bytes of their events, reports and change sets [default: 21474836480]",
    ),
    setting(
        "retention.mirror_days",
        "DAYS",
        "How long an unused mirror of a repository is kept [default: 30]",
    ),
    setting("retention.mirror_bytes", "BYTES", "Most bytes of one user's mirrors [default: 34359738368]"),
    setting(
        "retention.image_days",
        "DAYS",
        "How long an unused image that was built for a repository is kept [default: 30]",
    ),
    setting(
        "retention.agent_days",
        "DAYS",
        "How long versions of the agent are kept that nothing names [default: 90]",
    ),
    setting("admin_uids", "UID[,UID…]", "Users who see and cancel everybody's jobs [default: 0]"),
    setting("init_binary", "FILE", "The static hotcell-init [default: beside this executable]"),
    everyday("log", "FILTER", "What is logged, e.g. info,hotcell=debug [default: info]"),
];
