//! How a command reaches a running server: where it is, and with which token.
//!
//! Called by `tail`, `invalidate` and `explain-visibility`. The server is `--url`, else the running dev, else `server.listen`; the token is `--token`,
//! else one for `service_role`, signed with the secret of the settings or of the running dev.

use std::time::Duration;

use reqwest::StatusCode;
use serde_json::{Map, Value};

use super::{
    tail::lines,
    token::{mint, no_secret, running_dev},
};
use crate::{failure::Failure, settings::Settings};

/// A token is made for each connection, so its life only bounds a single one.
const TOKEN_LIFE: Duration = Duration::from_secs(3600);

pub struct Reach {
    /// Without a slash at the end.
    pub base: String,
    pub client: reqwest::Client,
    token: TokenSource,
}

enum TokenSource {
    Given(String),
    Secret(String),
}

impl Reach {
    pub fn new(settings: &Settings, url: Option<&str>, token: Option<&str>) -> Result<Reach, Failure> {
        let secret = settings.auth.jwt_secret.as_ref().map(|secret| secret.expose().to_owned());
        // Asked for only if something is still missing: another user's state file need not trouble us.
        let dev = if secret.is_some() || (url.is_some() && token.is_some()) { None } else { running_dev()? };
        let base = match (url, &dev) {
            (Some(url), _) => url.to_owned(),
            (None, Some(dev)) => dev.url.clone(),
            (None, None) => format!("http://{}", reachable(settings.server.listen)),
        };
        let token = match (token, secret, dev) {
            (Some(token), _, _) => TokenSource::Given(token.to_owned()),
            (_, Some(secret), _) => TokenSource::Secret(secret),
            (_, _, Some(dev)) => TokenSource::Secret(dev.jwt_secret),
            _ => return Err(no_secret()),
        };
        let client = reqwest::Client::builder()
            .connect_timeout(Duration::from_secs(10))
            .build()
            .map_err(|error| Failure::new("client", format!("no HTTP client can be made: {error}")))?;
        Ok(Reach { base: plain(&base)?, client, token })
    }

    pub fn token(&self) -> Result<String, Failure> {
        match &self.token {
            TokenSource::Given(token) => Ok(token.clone()),
            TokenSource::Secret(secret) => {
                mint(secret, Map::from_iter([("role".to_owned(), Value::from("service_role"))]), TOKEN_LIFE)
            }
        }
    }
}

/// What a problem document says, as a failure.
pub async fn refused(response: reqwest::Response, else_hint: &str) -> Failure {
    let status = response.status();
    let problem: Value = response.json().await.unwrap_or_default();
    let text = |name: &str| problem.get(name).and_then(Value::as_str).map(lines::clean);
    let detail = text("detail").or_else(|| text("title")).unwrap_or_else(|| "no further word".into());
    let code = text("code").map(|code| format!(", code {code}")).unwrap_or_default();
    let hint = text("hint").unwrap_or_else(|| match status {
        StatusCode::UNAUTHORIZED => "is WALCAST_JWT_SECRET the same as the server's?".into(),
        _ => else_hint.into(),
    });
    Failure::new("refused", format!("the server refuses ({status}{code}): {detail}")).hint(hint)
}

/// The innermost reason, which is the one that helps.
pub fn cause(error: &reqwest::Error) -> String {
    let mut deepest: &dyn std::error::Error = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    format!(" ({deepest})")
}

fn plain(base: &str) -> Result<String, Failure> {
    let wrong = |why: &str| {
        Failure::usage("wrong_argument", format!("--url {base:?} {why}"))
            .hint("for example: --url http://127.0.0.1:4000".to_owned())
    };
    if base.starts_with("https://") {
        return Err(wrong("asks for TLS, which the commands do not speak: use them beside the server or through a tunnel"));
    }
    if !base.starts_with("http://") {
        return Err(wrong("does not begin with http://"));
    }
    Ok(base.trim_end_matches('/').to_owned())
}

/// A server that listens everywhere is reached here.
fn reachable(mut listen: std::net::SocketAddr) -> std::net::SocketAddr {
    if listen.ip().is_unspecified() {
        let here: std::net::IpAddr = if listen.is_ipv4() { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() };
        listen.set_ip(here);
    }
    listen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_plain_http_and_a_server_that_listens_everywhere_is_reached_here() {
        assert_eq!(plain("http://h:1/").unwrap(), "http://h:1");
        assert!(plain("https://h").is_err() && plain("h:1").is_err());
        assert_eq!(reachable("0.0.0.0:5".parse().unwrap()).to_string(), "127.0.0.1:5");
    }
}
