//! What people put before a model's API without hotcell, each set up as well as it can be: connections kept,
//! nothing buffered, nothing logged, the provider's key put in. They must never reach anything but loopback.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};

use super::process::{Process, free_port};

/// A program of the virtual environment that `make bench-tools` makes.
fn python_tool(name: &str) -> Result<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench-tools/bin").join(name);
    ensure!(path.exists(), "{name} is missing: run `make bench-tools`");
    Ok(path)
}

/// nginx as a reverse proxy.
pub(crate) fn nginx(dir: &Path, upstream: SocketAddr, key: &str) -> Result<Process> {
    let address = free_port()?;
    let dir = own(dir, "nginx")?;
    let config = format!(
        "daemon off; user root; worker_processes auto; worker_rlimit_nofile 8192; pid nginx.pid; error_log stderr;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_max_body_size 32m; client_body_buffer_size 256k; client_body_temp_path body;
  proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
  keepalive_timeout 600s; keepalive_requests 10000000;
  upstream model {{ server {upstream}; keepalive 1024; keepalive_requests 10000000; }}
  server {{
    listen {address} backlog=2048;
    location / {{
      proxy_pass http://model; proxy_http_version 1.1; proxy_set_header connection \"\";
      proxy_set_header x-api-key \"{key}\";
      proxy_buffering off; proxy_request_buffering off; proxy_read_timeout 600s;
    }}
  }}
}}
"
    );
    let file = dir.join("nginx.conf");
    std::fs::write(&file, config)?;
    let found = ["/usr/sbin/nginx", "/sbin/nginx"].into_iter().find(|path| Path::new(path).exists());
    let mut command = Command::new(found.unwrap_or("nginx"));
    command.arg("-p").arg(&dir).arg("-e").arg("stderr").arg("-c").arg(file);
    Process::start(command, &dir, address)
}

/// mitmproxy without its screen, as a reverse proxy that streams.
pub(crate) fn mitmproxy(dir: &Path, upstream: SocketAddr, key: &str) -> Result<Process> {
    let address = free_port()?;
    let dir = own(dir, "mitmproxy")?;
    let mut command = Command::new(python_tool("mitmdump")?);
    command.arg("--quiet").args(["--mode", &format!("reverse:http://{upstream}")]);
    command.args(["--listen-host", "127.0.0.1", "--listen-port", &address.port().to_string()]);
    command.args(["--modify-headers", &format!("|~q|x-api-key|{key}")]);
    command.args(["--set", "stream_large_bodies=1", "--set", "flow_detail=0"]);
    command.arg("--set").arg(format!("confdir={}", dir.display()));
    Process::start(command, &dir, address)
}

/// LiteLLM's proxy with one Anthropic model, no database, no keys of its own.
pub(crate) fn litellm(dir: &Path, upstream: SocketAddr, key: &str, model: &str) -> Result<Process> {
    let address = free_port()?;
    let dir = own(dir, "litellm")?;
    let config = format!(
        "model_list:\n  - model_name: {model}\n    litellm_params:\n      model: anthropic/{model}\n      \
         api_base: http://{upstream}\n      api_key: {key}\nlitellm_settings:\n  telemetry: false\n  \
         num_retries: 0\n  request_timeout: 600\n"
    );
    let file = dir.join("config.yaml");
    std::fs::write(&file, config)?;
    let mut command = Command::new(python_tool("litellm")?);
    command.arg("--config").arg(file).args(["--host", "127.0.0.1", "--port", &address.port().to_string()]);
    command.args(["--num_workers", "1", "--telemetry", "False"]);
    // No line for each request.
    let logs = dir.join("logs.json");
    std::fs::write(
        &logs,
        r#"{"version":1,"loggers":{"uvicorn.access":{"level":"CRITICAL","propagate":false}}}"#,
    )?;
    command.arg("--log_config").arg(logs);
    // Its lists come with the package; without these they would be fetched from outside.
    for list in ["MODEL_COST_MAP", "ANTHROPIC_BETA_HEADERS", "BLOG_POSTS", "POLICY_TEMPLATES"] {
        command.env(format!("LITELLM_LOCAL_{list}"), "True");
    }
    command.env("LITELLM_LOG", "ERROR").env("LITELLM_MODE", "PRODUCTION");
    Process::start(command, &dir, address)
}

fn own(dir: &Path, name: &str) -> Result<PathBuf> {
    let dir = dir.join(name);
    std::fs::create_dir(&dir)?;
    Ok(dir)
}
