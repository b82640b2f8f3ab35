//! The one list of all settings. A new setting is a line here and a field of `Settings`.

use super::value::Kind;

pub struct Setting {
    pub key: &'static str,
    pub kind: Kind,
    /// As one would write it in the environment; empty: not set.
    pub default: &'static str,
    pub example: &'static str,
    pub help: &'static str,
    /// Never shown, and read from a file by `…_FILE`.
    pub secret: bool,
}

/// What an environment variable of another name than the rule's means.
pub const FIXED_ENV: &[(&str, &str)] =
    &[("WALCAST_DATABASE_URL", "database.url"), ("WALCAST_LISTEN", "server.listen"), ("WALCAST_JWT_SECRET", "auth.jwt_secret")];

/// Flags with a shorter name beside the rule's.
pub const FIXED_FLAGS: &[(&str, &str)] = &[("database-url", "database.url"), ("listen", "server.listen")];

/// Used where no `WALCAST_DATABASE_URL` is: what platforms set by themselves.
pub const FALLBACK_ENV: (&str, &str) = ("DATABASE_URL", "database.url");

/// Variables of the process that are no settings. A trailing `*` stands for any ending.
pub const PROCESS_ENV: &[&str] = &["WALCAST_CONFIG", "WALCAST_PG_BIN", "WALCAST_DEV_DIR", "WALCAST_LOG", "WALCAST_TEST_*"];

const fn setting(key: &'static str, kind: Kind, default: &'static str, example: &'static str, help: &'static str) -> Setting {
    Setting { key, kind, default, example, help, secret: false }
}

const fn secret(key: &'static str, kind: Kind, example: &'static str, help: &'static str) -> Setting {
    Setting { key, kind, default: "", example, help, secret: true }
}

const COUNT: Kind = Kind::Number { least: 1, most: 1_000_000_000 };
const BYTES: Kind = Kind::Bytes { least: 1 };
const TIME: Kind = Kind::Time { least_ms: 1 };
/// 0 is no limit.
const MOST: Kind = Kind::Number { least: 0, most: 1_000_000_000 };

pub const SETTINGS: &[Setting] = &[
    secret(
        "database.url",
        Kind::Url,
        "postgresql://walcast:password@localhost:5432/app",
        "The PostgreSQL server itself, not a pooler. For `serve` the role that `migrate` makes, for `migrate` an administrator",
    ),
    setting(
        "database.max_connections",
        Kind::Number { least: walcast_engine::EngineConfig::LEAST_CONNECTIONS as u64, most: 10_000 },
        "12",
        "12",
        "All connections that Walcast may open, replication included; at least 7",
    ),
    setting("database.statement_timeout", TIME, "5s", "5s", "Longest run of one statement"),
    setting("database.slot", Kind::SlotName, "walcast", "walcast", "Replication slot; `serve` makes it"),
    setting(
        "database.publication_cache",
        Kind::Text,
        "walcast",
        "walcast",
        "Publication that feeds the cache; `migrate` makes it",
    ),
    setting(
        "database.publication_realtime",
        Kind::Text,
        "supabase_realtime",
        "supabase_realtime",
        "Publication whose tables clients may subscribe to; `migrate` makes it",
    ),
    setting("server.listen", Kind::Address, "127.0.0.1:4000", "0.0.0.0:4000", "Address and port for HTTP and WebSocket"),
    setting(
        "server.max_connections",
        COUNT,
        "10000",
        "10000",
        "Open client connections; more are answered 429 (WebSocket) or 503 (event streams)",
    ),
    setting(
        "server.drain",
        Kind::Span,
        "5s",
        "30s",
        "When told to end, connections are sent away one by one over this time, each with a hint when to return; 0s: all at once",
    ),
    setting(
        "server.trusted_proxies",
        Kind::Networks,
        "",
        "10.0.0.0/8,192.168.1.7",
        "Proxies whose `X-Forwarded-For` says where a client comes from: addresses or networks",
    ),
    setting(
        "server.allowed_origins",
        Kind::Origins,
        "",
        "https://app.example.com",
        "Other origins whose pages may use cookies here (`sse.cookie`); with a token any page may ask",
    ),
    secret("auth.jwt_secret", Kind::Text, "at least 32 random bytes", "Secret that tokens are signed with (HS256, HS384, HS512)"),
    setting(
        "auth.allowed_roles",
        Kind::List,
        "anon,authenticated,service_role",
        "anon,authenticated",
        "Database roles that a token may name",
    ),
    setting(
        "auth.tenant_claim",
        Kind::Text,
        "tenant_id",
        "app_metadata.tenant",
        "Claim that names a client's tenant, by name or by the way to it; limits and statistics count by it",
    ),
    setting("cache.l1_bytes", BYTES, "64MiB", "256MiB", "Memory for cached values"),
    setting(
        "cache.l1_entries",
        COUNT,
        "",
        "100000",
        "Cached values in memory, however small; without it their bytes alone bound them",
    ),
    setting("cache.max_value_bytes", BYTES, "1MiB", "1MiB", "Largest value that is cached"),
    setting("cache.default_ttl", Kind::Ttl, "medium", "10m", "Life of an entry whose writer and namespace say nothing"),
    setting("cache.strict", Kind::Flag, "false", "true", "Only namespaces that the file names exist"),
    setting("cache.max_staleness", TIME, "5s", "5s", "Without news from the stream for this long, nothing is answered as fresh"),
    setting("cache.l2", Kind::Flag, "true", "false", "Keep values in PostgreSQL too, so that they survive a restart"),
    setting(
        "cache.l2_logged",
        Kind::Flag,
        "false",
        "true",
        "Write the cached values to the WAL, so that they outlive a crash's recovery as files; `migrate` changes the table",
    ),
    setting("cache.l2_max_bytes", BYTES, "1GiB", "4GiB", "Cached values in PostgreSQL; past it those of least use go"),
    setting("cache.l2_read_timeout", TIME, "250ms", "250ms", "A read of PostgreSQL's cache table that takes longer is skipped"),
    setting(
        "cache.upkeep_every",
        Kind::Time { least_ms: 1_000 },
        "1h",
        "1h",
        "How often the cache table is cleaned of what is over, never asked for, or of least use",
    ),
    setting(
        "cache.lease",
        Kind::Flag,
        "false",
        "true",
        "Where several processes share the cache table, one computes a missing value and the others wait for it",
    ),
    setting(
        "cache.deaf",
        Kind::Choice(&["stale", "compute"]),
        "stale",
        "compute",
        "Past max_staleness: answer marked stale, or compute each time",
    ),
    setting("queries.dir", Kind::Text, "", "queries", "Folder of named SQL queries"),
    setting(
        "queries.slow_ms",
        COUNT,
        "100",
        "250",
        "A query that takes longer, in milliseconds, is logged and kept with its plan: /admin/v1/queries/slow",
    ),
    setting(
        "queries.stream_timeout",
        TIME,
        "10m",
        "1h",
        "Longest life of one stream of rows (NDJSON), which holds a connection and a snapshot",
    ),
    setting(
        "stream.acknowledge_after",
        TIME,
        "60s",
        "60s",
        "How far behind the applied position the slot is acknowledged: the stretch that cursors survive a restart by",
    ),
    setting(
        "stream.acknowledge_bytes",
        BYTES,
        "256MiB",
        "256MiB",
        "The same in bytes of WAL; the smaller one counts, and never more than a tenth of max_slot_wal_keep_size",
    ),
    setting("stream.replay_bytes", BYTES, "64MiB", "64MiB", "Memory for changes that reconnecting clients may replay"),
    setting(
        "stream.settle_timeout",
        TIME,
        "30s",
        "30s",
        "Longest wait for a commit to become visible before subscribers are told to resync",
    ),
    setting("stream.settle_bytes", BYTES, "64MiB", "64MiB", "Memory for commits that are not yet visible"),
    setting(
        "stream.transaction_bytes",
        BYTES,
        "64MiB",
        "64MiB",
        "Memory for the changes of one transaction; a larger one touches whole tables",
    ),
    setting("stream.heartbeat", TIME, "1s", "1s", "How often Walcast writes a message to hear itself"),
    setting(
        "stream.intake_events",
        COUNT,
        "8192",
        "8192",
        "Messages between the decoder and the pipeline; when full the decoder waits",
    ),
    setting(
        "realtime.change_bytes",
        BYTES,
        "1MiB",
        "1MiB",
        "A change whose JSON is larger is told with error 413, its values above 64 bytes left out",
    ),
    setting(
        "realtime.outbox_bytes",
        BYTES,
        "256KiB",
        "1MiB",
        "Unsent bytes of one client; who reads more slowly is served from the replay ring as it reads",
    ),
    setting("realtime.outbox_frames", COUNT, "1000", "4000", "Unsent frames of one client; as for its bytes"),
    setting("realtime.max_topics_per_connection", COUNT, "100", "100", "Topics that one connection may join"),
    setting("realtime.max_frame_bytes", BYTES, "5000000", "5MB", "Largest frame that a client may send"),
    setting(
        "realtime.idle_timeout",
        TIME,
        "60s",
        "60s",
        "A WebSocket that sends nothing for this long, no heartbeat either, is closed; stock clients beat every 25 s",
    ),
    setting(
        "realtime.leak_window",
        Kind::Time { least_ms: 1_000 },
        "10m",
        "10m",
        "What looks like a leak in an application must look so for this long before `/admin/v1/leaks` tells of it",
    ),
    setting(
        "limits.connects_per_second",
        MOST,
        "1000",
        "200",
        "New connections (WebSocket and SSE) of all clients together; more are answered 503 and come back spread; 0: no limit",
    ),
    setting(
        "limits.connections_per_ip",
        MOST,
        "0",
        "200",
        "Connections of one address (IPv6: of one /64); behind a proxy name it in `server.trusted_proxies`; 0: no limit",
    ),
    setting("limits.connections_per_tenant", MOST, "0", "5000", "Connections of one tenant (`auth.tenant_claim`); 0: no limit"),
    setting(
        "limits.joins_per_second_per_connection",
        MOST,
        "100",
        "20",
        "Topics that one connection joins in a second; 0: no limit",
    ),
    setting(
        "limits.joins_per_second_per_tenant",
        MOST,
        "0",
        "500",
        "Topics that one tenant's clients join in a second; 0: no limit",
    ),
    setting("limits.subscribers_per_topic", MOST, "0", "10000", "Connections that one topic has at once; 0: no limit"),
    setting(
        "limits.messages_in_per_second_per_connection",
        MOST,
        "1000",
        "100",
        "Frames that one connection sends us in a second; more are refused; 0: no limit",
    ),
    setting("limits.messages_in_per_second_per_topic", MOST, "0", "500", "The same to one topic; 0: no limit"),
    setting("limits.messages_in_per_second_per_tenant", MOST, "0", "2500", "The same of one tenant; 0: no limit"),
    setting(
        "limits.messages_out_per_second_per_connection",
        MOST,
        "0",
        "500",
        "Messages that one connection is sent in a second; more wait in its outbox, which has its own bound; 0: no limit",
    ),
    setting(
        "limits.messages_out_per_second_per_tenant",
        MOST,
        "0",
        "100000",
        "The same to all clients of one tenant; 0: no limit",
    ),
    setting(
        "limits.payload_bytes",
        Kind::Bytes { least: 0 },
        "3MB",
        "256KB",
        "Largest message that a client may send, beside `realtime.max_frame_bytes`, which ends the connection; 0: no limit",
    ),
    setting(
        "limits.idle_without_topic",
        Kind::Span,
        "10m",
        "5m",
        "A WebSocket that has joined nothing for so long is closed with a reason; 0s: never",
    ),
    setting(
        "sse.max_streams_per_resource",
        MOST,
        "20",
        "5",
        "Event streams that one user has open at once on one table and filter; more are answered 429; 0: no limit",
    ),
    setting(
        "sse.cookie",
        Kind::Text,
        "",
        "access_token",
        "Cookie that holds a token, for `EventSource` on pages of this origin and of `server.allowed_origins`; without it cookies mean nothing",
    ),
    setting(
        "realtime.trace_payloads",
        Kind::Flag,
        "false",
        "true",
        "Traces and support files may show values of rows, subjects and addresses; else they are masked",
    ),
    setting("log.format", Kind::Choice(&["text", "json"]), "text", "json", "How log lines look"),
    setting("log.level", Kind::LogFilter, "info", "info,walcast_wal=debug", "Which log lines are written"),
];

/// Keys of each `[cache.namespaces.NAME]`; only the file has them.
pub const NAMESPACE: &[Setting] = &[
    setting("ttl", Kind::Ttl, "", "10m", "Life of an entry whose writer says nothing; else `cache.default_ttl`"),
    setting(
        "ttl_jitter",
        Kind::Percent { least: 0, most: 50 },
        "10%",
        "20%",
        "Each life is shortened by up to this much, so that what was stored together does not end together",
    ),
    setting(
        "source",
        Kind::Choice(&["database", "external"]),
        "database",
        "external",
        "Where values come from: `database` takes a ticket to store, `external` has TTL and tags only",
    ),
    setting("tags", Kind::List, "", "[\"patients\"]", "Tags that every entry carries beside its own; at most 64"),
    setting(
        "read",
        Kind::List,
        "",
        "[\"authenticated\", \"claim:app_role=nurse\"]",
        "Who may read, besides `service_role`: roles, or claims as `claim:app_metadata.roles=nurse`, equal to it or a list that has it",
    ),
    setting(
        "write",
        Kind::List,
        "",
        "[\"claim:permissions=cache.write\"]",
        "Who may store values, besides `service_role`; others read what they store",
    ),
    setting(
        "invalidate",
        Kind::List,
        "",
        "[\"authenticated\"]",
        "Who may invalidate by key or the whole namespace, besides `service_role`",
    ),
    setting(
        "per_context",
        Kind::Flag,
        "false",
        "true",
        "Role and claims are part of the key: nobody reads what another's token stored. Invalidating a key drops it for all",
    ),
    setting(
        "context",
        Kind::List,
        "",
        "[\"sub\"]",
        "The claims that tell callers apart where `per_context` is true; else all but exp, iat, nbf, jti",
    ),
    setting(
        "policy",
        Kind::Choice(&["adaptive", "lru", "lfu", "fifo"]),
        "adaptive",
        "lru",
        "What memory lets go first when it is full: what use teaches, the longest not read, the least often read, the oldest",
    ),
    setting(
        "share",
        Kind::Share,
        "",
        "20%",
        "Memory for this namespace alone, of `cache.l1_bytes` or in bytes; else it shares what the shares leave",
    ),
    setting(
        "grace",
        Kind::Span,
        "0s",
        "1h",
        "So long after its time an entry is still answered, marked stale, where computing fails",
    ),
    setting(
        "stale_while_revalidate",
        Kind::Span,
        "0s",
        "30s",
        "So long after its time an entry is answered, marked stale, while somebody computes it anew",
    ),
    setting(
        "refresh_ahead",
        Kind::Percent { least: 10, most: 99 },
        "",
        "80%",
        "From this part of its life on, an entry in use is computed anew before it ends",
    ),
    setting("negative_ttl", Kind::Ttl, "", "short", "How long \"there is nothing\" is kept; else it is not"),
    setting(
        "serve_stale",
        Kind::Flag,
        "false",
        "true",
        "An entry that a commit invalidated may be answered too, marked stale, within `grace` and `stale_while_revalidate`",
    ),
];

impl Setting {
    pub fn find(key: &str) -> Option<&'static Setting> {
        SETTINGS.iter().find(|setting| setting.key == key)
    }

    /// `WALCAST_CACHE__L1_BYTES`, or the fixed name.
    pub fn env(&self) -> String {
        let fixed = FIXED_ENV.iter().find(|(_, key)| *key == self.key).map(|(name, _)| (*name).to_owned());
        fixed.unwrap_or_else(|| self.nested_env())
    }

    /// The rule's name, which holds beside a fixed one.
    pub fn nested_env(&self) -> String {
        format!("WALCAST_{}", self.key.replace('.', "__").to_uppercase())
    }

    /// `cache.l1-bytes`, without the dashes before it.
    pub fn flag(&self) -> String {
        self.key.replace('_', "-")
    }

    /// True or false: its flag stands alone.
    pub fn is_flag(&self) -> bool {
        matches!(self.kind, Kind::Flag)
    }

    pub fn short_flag(&self) -> Option<&'static str> {
        FIXED_FLAGS.iter().find(|(_, key)| *key == self.key).map(|(name, _)| *name)
    }
}
