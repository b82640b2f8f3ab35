//! A joined topic: its join, its subscription, and when it ends. Joining, renewing a token, leaving.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use serde_json::{Value, json};
use walcast_engine::{
    Asked, Engine, Opening, Shape, SubscribeError, SubscribeRequest, SubscriptionHandle, TokenError, Vital, model::Claims,
    registry::Listing, resync_event,
};
use walcast_protocol::{
    join::{Join, RawBinding},
    phoenix::{Inbound, Vsn, end, push, reply},
    websocket,
};

use super::{ByTopic, Socket};
use crate::http::limits::{LimitRefusal, TopicPermit};

/// What a connection keeps of each join is bounded, whoever chose it.
const TOPIC_BYTES: usize = 512;
const REFERENCE_BYTES: usize = 64;
const JOIN_BYTES: usize = 64 << 10;

/// A rejoin with a token that has just expired waits so long for its new one: the stock client asks for it
/// only after an answer.
const QUARANTINE: Duration = Duration::from_secs(5);

pub struct Channel {
    topic: Arc<str>,
    join_ref: Option<String>,
    join: Join,
    token: String,
    ends_at: SystemTime,
    /// None while quarantined, or without bindings.
    handle: Option<SubscriptionHandle>,
    listing: Option<Listing>,
    quarantined: bool,
    /// Counts for as long as the topic is joined.
    permit: Option<TopicPermit>,
}

/// The topics of one connection.
pub struct Channels {
    by_topic: ByTopic,
    limit: usize,
    /// Of those that are behind, the one that reads on first.
    turn: usize,
}

impl Channels {
    pub fn new(limit: usize) -> Channels {
        Channels { by_topic: ByTopic::new(), limit, turn: 0 }
    }

    pub fn get(&self, topic: &str) -> Option<&Channel> {
        self.by_topic.get(topic)
    }

    pub fn is_empty(&self) -> bool {
        self.by_topic.is_empty()
    }

    pub fn remove(&mut self, topic: &str) -> Option<Channel> {
        self.by_topic.remove(topic)
    }

    pub fn next_end(&self) -> Option<SystemTime> {
        self.by_topic.values().map(|channel| channel.ends_at).min()
    }

    pub fn clear(&mut self) {
        self.by_topic.clear();
    }

    /// Those that had more to hear than fitted go on reading.
    pub async fn catch_up(&mut self, engine: &Engine) {
        let behind = |handle: &&SubscriptionHandle| handle.subscriber.gate.is_behind();
        let behind: Vec<_> = self.by_topic.values().filter_map(|channel| channel.handle.as_ref()).filter(behind).collect();
        // Each time another is the first: it has the room.
        self.turn = self.turn.wrapping_add(1);
        let (before, from) = behind.split_at(self.turn % behind.len().max(1));
        for handle in from.iter().chain(before) {
            let outbox = handle.subscriber.gate.outbox();
            if !outbox.has_room() {
                return outbox.want_room();
            }
            engine.catch_up(handle).await;
        }
    }

    pub fn take_due(&mut self) -> Vec<Channel> {
        let now = SystemTime::now();
        self.by_topic.extract_if(|_, channel| channel.ends_at <= now).map(|(_, channel)| channel).collect()
    }
}

impl Channel {
    pub fn is_quarantined(&self) -> bool {
        self.quarantined
    }

    pub fn message_in(&self) -> Result<(), LimitRefusal> {
        self.permit.as_ref().map_or(Ok(()), TopicPermit::message_in)
    }

    pub fn ended(&self, vsn: Vsn, event: &str, payload: &Value) -> Bytes {
        end(vsn, self.join_ref.as_deref(), &self.topic, event, payload)
    }

    pub fn system(&self, vsn: Vsn, extension: &str, status: &str, message: &str) -> Bytes {
        let channel = self.topic.strip_prefix("realtime:").unwrap_or(&self.topic);
        let payload = json!({ "extension": extension, "status": status, "message": message, "channel": channel });
        push(vsn, &self.topic, "system", payload.to_string().as_bytes())
    }

    fn asked(&self) -> Vec<Asked> {
        let asked = |binding: &RawBinding| Asked {
            event: binding.event.clone(),
            schema: binding.schema.clone(),
            table: binding.table.clone(),
            filter: binding.filter.clone(),
            select: binding.select.clone(),
            client_id: binding.id(),
        };
        self.join.bindings.iter().map(asked).collect()
    }

    fn live(&self, vsn: Vsn) -> Vec<Bytes> {
        if self.join.bindings.is_empty() {
            return Vec::new();
        }
        vec![self.system(vsn, "postgres_changes", "ok", "Subscribed to PostgreSQL")]
    }
}

impl Socket {
    pub(super) async fn join(&mut self, frame: Inbound, bytes: usize) {
        let reference = frame.join_ref.as_ref().or(frame.reference.as_ref()).map_or(0, String::len);
        if bytes > JOIN_BYTES || reference > REFERENCE_BYTES {
            let most = format!("a join has at most {JOIN_BYTES} bytes, its reference {REFERENCE_BYTES}");
            return self.refuse(&frame, &format!("PayloadTooLarge: {most}; this has {bytes} and {reference}"));
        }
        if let Some(old) = self.channels.by_topic.remove(frame.topic.as_str()) {
            self.say(&old.ended(self.vsn, "phx_close", &json!({})));
        }
        let join = Join::parse(&frame.payload);
        if let Err(reason) = self.may_open(&frame.topic, &join) {
            return self.refuse(&frame, &reason);
        }
        let token = self.token_or_key(join.access_token.as_deref());
        let mut channel = Channel {
            topic: frame.topic.as_str().into(),
            join_ref: frame.join_ref.clone().or_else(|| frame.reference.clone()),
            join,
            token,
            ends_at: UNIX_EPOCH,
            handle: None,
            listing: None,
            quarantined: false,
            permit: None,
        };
        let verified = self.app.engine.verify(&channel.token);
        let tenant = verified.as_ref().ok().and_then(|claims| self.app.engine.tenant_of(claims));
        match self.permit.join(&frame.topic, tenant.as_deref()) {
            Ok(permit) => channel.permit = Some(permit),
            Err(refusal) => return self.refuse(&frame, &refusal.phoenix_reason()),
        }
        match verified {
            Ok(claims) => match self.subscribe(&mut channel, claims, Some(&frame)).await {
                Ok(()) => {}
                Err(error) => return self.refuse(&frame, &reason_of(&error)),
            },
            Err(TokenError::Expired(_)) => {
                channel.quarantined = true;
                channel.ends_at = SystemTime::now() + QUARANTINE;
                self.say(&reply(self.vsn, &frame, "ok", &json!({ "postgres_changes": echoes(&channel.join) })));
            }
            Err(error) => return self.refuse(&frame, &format!("{}: {error}", error.code())),
        }
        self.connection.joined(&channel.topic);
        self.channels.by_topic.insert(channel.topic.clone(), channel);
    }

    /// Registers, then answers, then lets the changes through. Without a frame to answer (a lifted quarantine)
    /// only the `system` message tells.
    async fn subscribe(&self, channel: &mut Channel, claims: Claims, answer: Option<&Inbound>) -> Result<(), SubscribeError> {
        channel.ends_at = UNIX_EPOCH + Duration::from_secs(claims.expires_at());
        let response = json!({ "postgres_changes": echoes(&channel.join) });
        let asked = channel.asked();
        let listing = self.connection.list(channel.topic.clone(), channel.join.component.as_deref(), &claims, &asked);
        let listed = channel.listing.insert(listing).entry();
        if channel.join.bindings.is_empty() {
            if let Some(frame) = answer {
                self.say(&reply(self.vsn, frame, "ok", &response));
            }
            return Ok(());
        }
        let shape = Shape::Realtime { vsn: self.vsn, topic: channel.topic.clone(), positions: channel.join.tracks_position };
        let (after, unreadable) = match channel.join.after.as_deref().map(str::parse) {
            Some(Ok(position)) => (Some(position), false),
            Some(Err(_)) => (None, true),
            None => (None, false),
        };
        let request = SubscribeRequest { claims, asked, shape, outbox: self.outbox.clone(), listed, after };
        let opened = self.app.engine.subscribe(request).await?;
        let mut first = Vec::new();
        if let Some(frame) = answer {
            let mut response = response;
            if channel.join.tracks_position {
                let (status, reason) = match opened.opening {
                    Opening::Live if unreadable => ("resync", Some("the position cannot be read")),
                    Opening::Live => ("live", None),
                    Opening::Resumed => ("resumed", None),
                    Opening::Resync(reason) => ("resync", Some(reason)),
                };
                response["walcast"] = json!({ "status": status, "reason": reason, "position": opened.position.to_string() });
            }
            first.push(websocket::text(&reply(self.vsn, frame, "ok", &response)));
        } else if let Opening::Resync(reason) = opened.opening {
            // Answered long ago, in quarantine: a gap must be told all the same.
            first.push(resync_event(&opened.handle.audience.shape, &opened.position, reason));
        }
        first.extend(channel.live(self.vsn).iter().map(|text| websocket::text(text)));
        channel.handle = Some(opened.release(first));
        Ok(())
    }

    pub(super) async fn access_token(&mut self, frame: &Inbound) {
        let sent = frame.payload["access_token"].as_str();
        let token = self.token_or_key(sent);
        let Some(mut channel) = self.channels.by_topic.remove(frame.topic.as_str()) else { return };
        // No token, or the connection's own key: the channel keeps what it has.
        let same = sent.is_none() || (token == self.key && !channel.quarantined) || token == channel.token;
        if same {
            self.channels.by_topic.insert(channel.topic.clone(), channel);
            return;
        }
        match self.app.engine.verify(&token) {
            Ok(claims) => {
                channel.token = token;
                if channel.quarantined {
                    channel.quarantined = false;
                    if let Err(error) = self.subscribe(&mut channel, claims, None).await {
                        return self.end_with_error(channel, &reason_of(&error));
                    }
                } else {
                    channel.ends_at = UNIX_EPOCH + Duration::from_secs(claims.expires_at());
                    if let Some(listing) = &channel.listing {
                        listing.set_claims(&claims);
                    }
                    if let Some(handle) = channel.handle.take() {
                        match self.app.engine.renew(handle, claims, channel.asked()).await {
                            Ok(opened) => channel.handle = Some(opened.release_renewed()),
                            Err(error) => return self.end_with_error(channel, &reason_of(&error)),
                        }
                    }
                }
                self.channels.by_topic.insert(channel.topic.clone(), channel);
            }
            Err(error) => self.end_with_error(channel, &format!("{}: {error}", error.code())),
        }
    }

    fn may_open(&self, topic: &str, join: &Join) -> Result<(), String> {
        let Some(name) = topic.strip_prefix("realtime:") else {
            return Err("unmatched topic".into());
        };
        if name.is_empty() {
            return Err("TopicNameRequired: a topic is `realtime:` and a name".into());
        }
        if topic.len() > TOPIC_BYTES {
            return Err(format!("TopicNameRequired: a topic has at most {TOPIC_BYTES} bytes, this has {}", topic.len()));
        }
        if self.channels.by_topic.len() >= self.channels.limit {
            return Err(format!("ChannelRateLimitReached: Too many channels ({} on one connection)", self.channels.limit));
        }
        if join.private {
            return Err("Unauthorized: private channels are not available in this version of Walcast".into());
        }
        Ok(())
    }

    /// The connection's own key, and keys of the form `sb_…`, mean: what the connection was opened with.
    fn token_or_key(&self, token: Option<&str>) -> String {
        match token {
            Some(token) if !token.is_empty() && !token.starts_with("sb_") => token.to_owned(),
            _ => self.key.clone(),
        }
    }

    fn refuse(&self, frame: &Inbound, reason: &str) {
        metrics::counter!("walcast_joins_refused_total").increment(1);
        self.connection.error(Vital::JoinRefused);
        self.answer(frame, "error", json!({ "reason": reason }));
    }
}

/// In the client's order, each as it was sent, with its id.
fn echoes(join: &Join) -> Vec<Value> {
    let echo = |binding: &RawBinding| {
        let mut echo = binding.echo.clone();
        echo.insert("id".into(), binding.id().into());
        Value::Object(echo)
    };
    join.bindings.iter().map(echo).collect()
}

fn reason_of(error: &SubscribeError) -> String {
    let code = if error.is_away() { "UnableToConnectToProject" } else { "RealtimeDisabledForConfiguration" };
    format!("{code}: {error}")
}
