//! Closed lists of values that labels of metrics can have. A value that is not here must never become one.

/// What a sweep or a restart had to remove.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orphan {
    /// A container.
    Container,
    /// A mount, or the directory of a cell.
    Directory,
    /// A reservation of money.
    Reservation,
}

impl Orphan {
    pub(super) const ALL: [Self; 3] = [Self::Container, Self::Directory, Self::Reservation];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Container => "container",
            Self::Directory => "directory",
            Self::Reservation => "reservation",
        }
    }
}

/// What retention removes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retired {
    /// A job that is over, with all that is kept of it.
    Job,
    /// A mirror of a repository.
    Mirror,
    /// An image built for a repository.
    Image,
    /// A version of the agent.
    Agent,
}

impl Retired {
    pub(super) const ALL: [Self; 4] = [Self::Job, Self::Mirror, Self::Image, Self::Agent];

    /// As in the metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Job => "job",
            Self::Mirror => "mirror",
            Self::Image => "image",
            Self::Agent => "agent",
        }
    }
}

/// What a private copy of a workspace costs a job in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyStep {
    /// Listing the workspace as it is, and keeping that.
    Snapshot,
    /// All else until a cell can see it: staging, masks, scratch space, overlay.
    SetUp,
    /// Making the change set.
    Extraction,
    /// Taking down all of a cell, whatever its workspace, and proving it.
    Removal,
}

impl CopyStep {
    pub(super) const ALL: [Self; 4] = [Self::Snapshot, Self::SetUp, Self::Extraction, Self::Removal];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::SetUp => "set_up",
            Self::Extraction => "extraction",
            Self::Removal => "removal",
        }
    }
}
