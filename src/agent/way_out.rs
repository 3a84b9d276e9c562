//! What tells the tools in a cell about its way out: proxy variables where egress allows something, and the
//! certificate authorities where some host is looked into. It must never point anywhere but at init's own ports.

use crate::policy::Plan;

/// Port on the cell's loopback where init answers as the proxy.
pub const EGRESS_PORT: u16 = 3128;
/// The directory of sockets and certificate authorities, as the cell sees it.
const RUN_DIR: &str = "/.hotcell";
/// Its file with all certificate authorities that the cell trusts.
pub const ALL_AUTHORITIES: &str = "ca.pem";
/// Its file with those alone that no tool knows by itself.
pub const MORE_AUTHORITIES: &str = "ca-more.pem";
/// Its file with all of them as Java wants them.
pub const JAVA_AUTHORITIES: &str = "ca.p12";

/// Variables with the proxy's address. Yarn from 2 on looks at its own alone.
const PROXY: [&str; 6] =
    ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "YARN_HTTP_PROXY", "YARN_HTTPS_PROXY"];
/// Variables whose file takes the place of a tool's own authorities.
const ALL: [&str; 8] = [
    "SSL_CERT_FILE",
    "CURL_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "PIP_CERT",
    "CARGO_HTTP_CAINFO",
    "AWS_CA_BUNDLE",
    "NIX_SSL_CERT_FILE",
];
/// Variables whose file comes beside them.
const MORE: [&str; 2] = ["NODE_EXTRA_CA_CERTS", "DENO_CERT"];

/// Java's trust store, as the cell sees it.
pub(super) fn java_authorities() -> String {
    format!("{RUN_DIR}/{JAVA_AUTHORITIES}")
}

/// The variables of a plan's way out; none where it reaches nothing. `authorities`: the two files are there.
pub fn environment(plan: &Plan, authorities: bool) -> Vec<(String, String)> {
    if !plan.cell_has_egress() {
        return Vec::new();
    }
    let proxy = format!("http://127.0.0.1:{EGRESS_PORT}");
    let mut variables: Vec<(String, String)> = PROXY.map(|name| (name.to_owned(), proxy.clone())).into();
    // Node's own fetch looks at them only when it is told to.
    variables.push(("NODE_USE_ENV_PROXY".to_owned(), "1".to_owned()));
    if authorities {
        variables.extend(ALL.map(|name| (name.to_owned(), format!("{RUN_DIR}/{ALL_AUTHORITIES}"))));
        variables.extend(MORE.map(|name| (name.to_owned(), format!("{RUN_DIR}/{MORE_AUTHORITIES}"))));
    }
    variables
}
