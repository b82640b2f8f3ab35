//! A limit that was reached: which, at how much, and when to try again. Every refusal is counted by its limit.

use std::{fmt, time::Duration};

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::json;
use walcast_protocol::problem::Problem;

/// What can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Limit {
    Connections,
    Connects,
    ConnectionsPerIp,
    ConnectionsPerTenant,
    JoinsPerConnection,
    JoinsPerTenant,
    SubscribersPerTopic,
    MessagesInPerConnection,
    MessagesInPerTopic,
    MessagesInPerTenant,
    MessagesOutPerConnection,
    MessagesOutPerTenant,
    Payload,
    StreamsPerResource,
    /// No limit, but answered as one: the server is ending.
    Draining,
}

/// Show it as it is, or as [`LimitRefusal::phoenix_reason`], [`LimitRefusal::upgrade_response`] or a problem document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub struct LimitRefusal {
    pub limit: Limit,
    pub most: u64,
    pub retry_after: Duration,
}

impl Limit {
    /// The setting that says how much.
    pub fn setting(self) -> &'static str {
        match self {
            Limit::Connections => "server.max_connections",
            Limit::Connects => "limits.connects_per_second",
            Limit::ConnectionsPerIp => "limits.connections_per_ip",
            Limit::ConnectionsPerTenant => "limits.connections_per_tenant",
            Limit::JoinsPerConnection => "limits.joins_per_second_per_connection",
            Limit::JoinsPerTenant => "limits.joins_per_second_per_tenant",
            Limit::SubscribersPerTopic => "limits.subscribers_per_topic",
            Limit::MessagesInPerConnection => "limits.messages_in_per_second_per_connection",
            Limit::MessagesInPerTopic => "limits.messages_in_per_second_per_topic",
            Limit::MessagesInPerTenant => "limits.messages_in_per_second_per_tenant",
            Limit::MessagesOutPerConnection => "limits.messages_out_per_second_per_connection",
            Limit::MessagesOutPerTenant => "limits.messages_out_per_second_per_tenant",
            Limit::Payload => "limits.payload_bytes",
            Limit::StreamsPerResource => "sse.max_streams_per_resource",
            Limit::Draining => "server.drain",
        }
    }

    /// Upstream's code, where it has one, and the words that go with it.
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Limit::Connections | Limit::ConnectionsPerTenant => ("ConnectionRateLimitReached", "Too many connected users"),
            Limit::ConnectionsPerIp => ("ConnectionRateLimitReached", "Too many connections from this address"),
            Limit::Connects => ("ConnectionRateLimitReached", "Too many new connections per second"),
            Limit::JoinsPerConnection | Limit::JoinsPerTenant => ("ClientJoinRateLimitReached", "Too many joins per second"),
            Limit::SubscribersPerTopic => ("ChannelRateLimitReached", "Too many subscribers of this topic"),
            Limit::MessagesInPerConnection
            | Limit::MessagesInPerTopic
            | Limit::MessagesInPerTenant
            | Limit::MessagesOutPerConnection
            | Limit::MessagesOutPerTenant => ("MessageRateLimitReached", "Too many messages per second"),
            Limit::Payload => ("PayloadTooLarge", "The payload is too large"),
            Limit::StreamsPerResource => ("StreamRateLimitReached", "Too many streams of one user on one resource"),
            Limit::Draining => ("RealtimeRestarting", "The server is shutting down"),
        }
    }

    /// In problem documents.
    fn code(self) -> &'static str {
        match self {
            Limit::Connections | Limit::ConnectionsPerIp | Limit::ConnectionsPerTenant => "too_many_connections",
            Limit::Connects => "too_many_connects",
            Limit::JoinsPerConnection | Limit::JoinsPerTenant => "too_many_joins",
            Limit::SubscribersPerTopic => "too_many_subscribers",
            Limit::StreamsPerResource => "too_many_streams",
            Limit::Payload => "payload_too_large",
            Limit::Draining => "draining",
            _ => "too_many_messages",
        }
    }

    fn hint(self) -> &'static str {
        match self {
            Limit::Connections | Limit::Connects | Limit::Draining => "come back after Retry-After",
            Limit::StreamsPerResource => "close streams that nobody looks at, share one among a user's tabs, or raise the limit",
            Limit::Payload => "send less at once",
            _ => "come back after Retry-After, or raise the limit",
        }
    }

    /// The server's own state, or the asker's doing.
    fn status(self) -> StatusCode {
        match self {
            Limit::Connections | Limit::Connects | Limit::Draining => StatusCode::SERVICE_UNAVAILABLE,
            Limit::Payload => StatusCode::PAYLOAD_TOO_LARGE,
            _ => StatusCode::TOO_MANY_REQUESTS,
        }
    }
}

impl LimitRefusal {
    /// Counted here: whoever makes one refuses.
    pub fn new(limit: Limit, most: u64, retry_after: Duration) -> LimitRefusal {
        metrics::counter!("walcast_limits_reached_total", "limit" => limit.setting()).increment(1);
        LimitRefusal { limit, most, retry_after }
    }

    /// As upstream's clients know it: `Code: text`.
    pub fn phoenix_reason(&self) -> String {
        format!("{}: {self}", self.limit.words().0)
    }

    /// For a WebSocket that is not to be: upstream's shape.
    pub fn upgrade_response(&self) -> Response {
        // Upstream, too, answers 429 where there are as many connections as may be.
        let status = if self.limit == Limit::Connections { StatusCode::TOO_MANY_REQUESTS } else { self.limit.status() };
        let body = json!({ "error": self.phoenix_reason() }).to_string();
        self.with_retry_after((status, [(header::CONTENT_TYPE, "application/json")], body).into_response())
    }

    fn retry_after_s(&self) -> u64 {
        self.retry_after.as_millis().div_ceil(1000).max(1) as u64
    }

    fn with_retry_after(&self, mut response: Response) -> Response {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(self.retry_after_s()));
        response
    }
}

impl fmt::Display for LimitRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (_, text) = self.limit.words();
        match self.limit {
            Limit::Draining => write!(f, "{text}; retry in {} ms", self.retry_after.as_millis()),
            Limit::Payload => write!(f, "{text} ({} = {})", self.limit.setting(), self.most),
            limit => write!(f, "{text} ({} = {}); try again in {} s", limit.setting(), self.most, self.retry_after_s()),
        }
    }
}

impl IntoResponse for LimitRefusal {
    fn into_response(self) -> Response {
        let problem = Problem::new(self.limit.status().as_u16(), self.limit.code(), self.to_string()).hint(self.limit.hint());
        let content_type = [(header::CONTENT_TYPE, Problem::CONTENT_TYPE)];
        self.with_retry_after((self.limit.status(), content_type, problem.body()).into_response())
    }
}
