//! Tickets: a key to one stream for a client that can set no header, such as a browser's `EventSource`.
//!
//! A ticket is the caller's own token, sealed together with when it ends and bound to one resource. Nothing of it is kept
//! here, so it survives a restart; each use verifies the token anew. Who finds one in a log learns nothing of the token
//! and can hear this one stream for ten minutes at most.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey},
    hmac,
};
use axum::{
    Json,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode, Uri},
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};

use super::resource::{PATH, Resource};
use crate::http::{
    App,
    identity::{query_parameter, token_of},
    object,
    refusal::Refusal,
};
use walcast_engine::TokenError;

/// However long the token lives.
const LONGEST: Duration = Duration::from_secs(600);

#[derive(Debug)]
pub struct Tickets(RandomizedNonceKey);

#[derive(Debug, PartialEq, Eq)]
pub struct Opened {
    pub token: String,
    /// Seconds since 1970.
    pub expires_at: u64,
}

impl Tickets {
    /// The same secret reads the same tickets, also after a restart.
    pub fn new(secret: &str) -> Tickets {
        let key = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes()), b"walcast sse ticket 1");
        // 32 bytes of HMAC-SHA256 are a key of AES-256.
        let key = RandomizedNonceKey::new(&AES_256_GCM, key.as_ref()).expect("the key has the algorithm's length");
        Tickets(key)
    }

    fn seal(&self, resource: &str, token: &str, expires_at: u64) -> Option<String> {
        let mut sealed = expires_at.to_be_bytes().to_vec();
        sealed.extend_from_slice(token.as_bytes());
        let nonce = self.0.seal_in_place_append_tag(Aad::from(resource.as_bytes()), &mut sealed).ok()?;
        Some(URL_SAFE_NO_PAD.encode([nonce.as_ref().as_slice(), &sealed].concat()))
    }

    /// None: forged, of another secret, or of another resource.
    fn open(&self, resource: &str, ticket: &str) -> Option<Opened> {
        let bytes = URL_SAFE_NO_PAD.decode(ticket).ok()?;
        let (nonce, sealed) = bytes.split_at_checked(NONCE_LEN)?;
        let mut sealed = sealed.to_vec();
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let opened = self.0.open_in_place(nonce, Aad::from(resource.as_bytes()), &mut sealed).ok()?;
        let (expires_at, token) = opened.split_first_chunk::<8>()?;
        Some(Opened { token: String::from_utf8(token.to_vec()).ok()?, expires_at: u64::from_be_bytes(*expires_at) })
    }

    pub fn admit(&self, resource: &Resource, ticket: &str) -> Result<Opened, Refusal> {
        let opened = self.open(&resource.name(), ticket).ok_or_else(|| {
            Refusal::new(StatusCode::UNAUTHORIZED, "bad_ticket", "this ticket does not open this stream")
                .hint("a ticket is good for the very resource that it was made for: POST /sse/v1/ticket makes another")
        })?;
        if opened.expires_at <= now() {
            return Err(Refusal::new(StatusCode::UNAUTHORIZED, "ticket_expired", "the ticket has expired")
                .hint("POST /sse/v1/ticket with a token makes another"));
        }
        Ok(opened)
    }
}

#[derive(Deserialize)]
struct Wanted {
    /// As one would `GET` it, without a key.
    resource: String,
}

#[derive(Debug, Serialize)]
pub struct Ticket {
    pub ticket: String,
    /// Seconds since 1970.
    pub expires_at: u64,
    /// For `new EventSource(url)`.
    pub url: String,
}

/// `POST /sse/v1/ticket`. Only a token in a header makes one: neither a cookie nor another ticket.
pub async fn post(State(app): State<App>, uri: Uri, headers: HeaderMap, body: Bytes) -> Result<Json<Ticket>, Refusal> {
    let token = token_of(&headers, &uri).ok_or(TokenError::Missing)?;
    let claims = app.engine.verify(&token)?;
    let bad = |text: String| {
        Refusal::new(StatusCode::BAD_REQUEST, "bad_resource", text)
            .hint(format!(r#"send {{"resource": "{PATH}?table=patients&filter=id=eq.7"}}"#))
    };
    let wanted: Wanted = object::read(&body).map_err(|error| bad(format!("the body is not what it should be: {error}")))?;
    let wanted_uri: Uri = wanted.resource.parse().map_err(|error| bad(format!("`resource` is no path with a query: {error}")))?;
    if wanted_uri.path() != PATH || wanted_uri.host().is_some() || wanted.resource.contains('#') {
        return Err(bad(format!("there are tickets for {PATH} alone")));
    }
    if ["ticket", "apikey", "last_event_id"].iter().any(|name| query_parameter(&wanted_uri, name).is_some()) {
        return Err(bad("`resource` says what to listen to: neither a key nor a position belongs in it".into()));
    }
    let resource = Resource::parse(&wanted_uri)?;
    let expires_at = claims.expires_at().min(now() + LONGEST.as_secs());
    let sealed = app.sse.tickets.seal(&resource.name(), &token, expires_at);
    let ticket =
        sealed.ok_or_else(|| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "ticket", "the ticket could not be sealed"))?;
    let url = format!("{}&ticket={ticket}", wanted.resource.trim_end_matches('&'));
    Ok(Json(Ticket { ticket, expires_at, url }))
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p3_a_ticket_opens_the_resource_it_was_made_for_and_no_other() {
        let tickets = Tickets::new("a secret of at least thirty-two bytes");
        let ticket = tickets.seal("one", "token", 7).unwrap();
        assert_eq!(tickets.open("one", &ticket), Some(Opened { token: "token".into(), expires_at: 7 }));
        assert_eq!(Tickets::new("a secret of at least thirty-two bytes").open("one", &ticket).unwrap().token, "token");
        assert_eq!(tickets.open("two", &ticket), None);
        assert_eq!(Tickets::new("another secret of at least that length").open("one", &ticket), None);
        assert!(!ticket.contains("token"));
        assert_ne!(tickets.seal("one", "token", 7).unwrap(), ticket, "no two are alike");
    }

    #[test]
    fn p3_what_was_changed_opens_nothing() {
        let tickets = Tickets::new("a secret of at least thirty-two bytes");
        let ticket = URL_SAFE_NO_PAD.decode(tickets.seal("one", "token", 7).unwrap()).unwrap();
        for at in 0..ticket.len() {
            let mut changed = ticket.clone();
            changed[at] ^= 1;
            assert_eq!(tickets.open("one", &URL_SAFE_NO_PAD.encode(&changed)), None, "byte {at}");
            assert_eq!(tickets.open("one", &URL_SAFE_NO_PAD.encode(&ticket[..at])), None, "{at} bytes");
        }
        for bad in ["", "x", "é", "====", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"] {
            assert_eq!(tickets.open("one", bad), None, "{bad}");
        }
    }
}
