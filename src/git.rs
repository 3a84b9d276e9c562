//! Hand on git: runs the git program for hotcell's own ends. Never in a directory that an agent wrote, never with a
//! repository's own configuration, hooks, filters, attributes or helpers, and never as anybody but the person whose
//! repository it is, or as a user that owns nothing.
