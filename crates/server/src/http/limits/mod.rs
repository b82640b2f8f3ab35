//! How much one client, one topic, one tenant and one address may do. Asked at the door, at joins, at messages.
//!
//! [`Limits::admit`] gives a [`ConnectionPermit`], which counts for as long as anybody holds it; its
//! [`ConnectionPermit::join`] gives a [`TopicPermit`] likewise. Nothing here waits but [`ConnectionPermit::pace_out`], and
//! nothing is dropped: what may not come in is refused with its limit's name, what may not go out waits.

mod address;
mod bucket;
mod refusal;
mod tally;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::settings::LimitsSettings;
pub use address::{ClientAddress, TrustedProxies};
use bucket::{Bucket, Buckets};
pub use refusal::{Limit, LimitRefusal};
pub use tally::{Held, Tally};

/// What may come at once where nothing came for a while, in seconds' worth of a rate.
const BURST_SECONDS: u32 = 10;
/// When to come back where something is full: at random in between, so that those who were refused together do not return so.
const COME_BACK_S: std::ops::Range<f64> = 1.0..5.0;
/// Tenants that are told apart in figures.
const TOP_TENANTS: usize = 100;

/// Cheap to clone; all clones count together.
#[derive(Debug, Clone)]
pub struct Limits {
    pub max_topics: usize,
    pub max_frame_bytes: usize,
    pub max_value_bytes: usize,
    /// A connection without a topic ends after this; zero: never.
    pub idle_without_topic: Duration,
    trusted_proxies: Arc<TrustedProxies>,
    shared: Arc<Shared>,
}

/// Sizes that other sections of the settings say.
#[derive(Debug, Clone, Default)]
pub struct Sizes {
    pub max_topics: usize,
    pub max_frame_bytes: usize,
    pub max_value_bytes: usize,
    pub max_connections: u64,
}

#[derive(Debug)]
struct Shared {
    settings: LimitsSettings,
    max_connections: u64,
    out_at_once: usize,
    connections: AtomicU64,
    connects: Bucket,
    by_address: Tally<ClientAddress>,
    by_tenant: Tally<Arc<str>>,
    subscriptions_by_tenant: Tally<Arc<str>>,
    by_topic: Tally<Arc<str>>,
    tenant_joins: Buckets,
    topic_in: Buckets,
    tenant_in: Buckets,
    tenant_out: Buckets,
}

/// A connection that is let in. Counts until its last clone is dropped.
#[derive(Debug, Clone)]
pub struct ConnectionPermit(Arc<Connection>);

#[derive(Debug)]
struct Connection {
    shared: Arc<Shared>,
    joins: Bucket,
    messages_in: Bucket,
    messages_out: Bucket,
    /// The first one that was named, by the connection's key or by a topic's token.
    tenant: Mutex<Option<Held<Arc<str>>>>,
    _address: Option<Held<ClientAddress>>,
    _alive: TaskTrackerToken,
}

/// A topic that a connection has joined. Counts until it is dropped.
#[derive(Debug)]
pub struct TopicPermit {
    connection: ConnectionPermit,
    topic: Arc<str>,
    tenant: Option<Arc<str>>,
    _subscriber: Option<Held<Arc<str>>>,
    _subscription: Option<Held<Arc<str>>>,
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct TenantCount {
    pub tenant: Arc<str>,
    pub connections: u64,
    pub subscriptions: u64,
}

impl Limits {
    pub fn new(settings: &LimitsSettings, sizes: &Sizes, trusted_proxies: TrustedProxies) -> Limits {
        metrics::describe_counter!(
            "walcast_limits_reached_total",
            "Times a limit refused somebody or made messages wait, by its setting"
        );
        metrics::describe_gauge!("walcast_connections", "Open WebSockets and event streams");
        metrics::describe_gauge!("walcast_sse_streams", "Open event streams");
        let shared = Shared {
            max_connections: sizes.max_connections,
            out_at_once: settings.out_at_once(),
            connections: AtomicU64::new(0),
            connects: Bucket::new(settings.connects_per_second, 1),
            by_address: Tally::default(),
            by_tenant: Tally::default(),
            subscriptions_by_tenant: Tally::default(),
            by_topic: Tally::default(),
            tenant_joins: Buckets::new(settings.joins_per_second_per_tenant, BURST_SECONDS),
            topic_in: Buckets::new(settings.messages_in_per_second_per_topic, BURST_SECONDS),
            tenant_in: Buckets::new(settings.messages_in_per_second_per_tenant, BURST_SECONDS),
            tenant_out: Buckets::new(settings.messages_out_per_second_per_tenant, BURST_SECONDS),
            settings: settings.clone(),
        };
        Limits {
            max_topics: sizes.max_topics,
            max_frame_bytes: sizes.max_frame_bytes,
            max_value_bytes: sizes.max_value_bytes,
            idle_without_topic: settings.idle_without_topic,
            trusted_proxies: Arc::new(trusted_proxies),
            shared: Arc::new(shared),
        }
    }

    /// `alive` is held for as long as the permit. `App::admit` is the way here.
    pub fn admit(
        &self,
        address: ClientAddress,
        tenant: Option<&str>,
        alive: TaskTrackerToken,
    ) -> Result<ConnectionPermit, LimitRefusal> {
        let shared = &self.shared;
        let settings = &shared.settings;
        let address = (settings.connections_per_ip > 0).then(|| {
            let most = settings.connections_per_ip;
            shared.by_address.take(address.counted(), most).ok_or_else(|| full(Limit::ConnectionsPerIp, most))
        });
        let address = address.transpose()?;
        let tenant = tenant.map(|tenant| shared.connection_of(tenant)).transpose()?;
        // Behind what is one client's own: whoever has too many does not use up everybody's.
        shared.connects.take(1).map_err(|_| full(Limit::Connects, settings.connects_per_second.into()))?;
        let most = shared.max_connections;
        let taken = shared.connections.fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| (now < most).then_some(now + 1));
        taken.map_err(|_| full(Limit::Connections, most))?;
        metrics::gauge!("walcast_connections").increment(1.0);
        Ok(ConnectionPermit(Arc::new(Connection {
            joins: Bucket::new(settings.joins_per_second_per_connection, BURST_SECONDS),
            messages_in: Bucket::new(settings.messages_in_per_second_per_connection, BURST_SECONDS),
            messages_out: Bucket::new(settings.messages_out_per_second_per_connection, BURST_SECONDS),
            tenant: Mutex::new(tenant),
            shared: shared.clone(),
            _address: address,
            _alive: alive,
        })))
    }

    /// The tenants with the most connections, at most 100.
    pub fn tenants(&self) -> Vec<TenantCount> {
        let of = |(tenant, connections): (Arc<str>, u64)| {
            let subscriptions = self.shared.subscriptions_by_tenant.of(&tenant);
            TenantCount { tenant, connections, subscriptions }
        };
        self.shared.by_tenant.top(TOP_TENANTS).into_iter().map(of).collect()
    }

    /// For `/metrics`. Not through the recorder, which would keep the name of every tenant that ever was.
    pub fn tenant_metrics(&self) -> String {
        use std::fmt::Write;
        let tenants = self.tenants();
        let mut text = format!("# TYPE walcast_tenants gauge\nwalcast_tenants {}\n", self.shared.by_tenant.names());
        let label = |name: &str| name.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let mut family = |name: &str, count: fn(&TenantCount) -> u64| {
            let _ = writeln!(text, "# TYPE {name} gauge");
            for tenant in &tenants {
                let _ = writeln!(text, "{name}{{tenant=\"{}\"}} {}", label(&tenant.tenant), count(tenant));
            }
        };
        family("walcast_tenant_connections", |tenant| tenant.connections);
        family("walcast_tenant_subscriptions", |tenant| tenant.subscriptions);
        text
    }
}

impl LimitsSettings {
    /// A tenth of a second's worth; everything, where nothing out is limited.
    fn out_at_once(&self) -> usize {
        let rates = [self.messages_out_per_second_per_connection, self.messages_out_per_second_per_tenant];
        rates.into_iter().filter(|rate| *rate > 0).min().map_or(usize::MAX, |rate| (rate / 10).max(1) as usize)
    }
}

impl Shared {
    fn connection_of(&self, tenant: &str) -> Result<Held<Arc<str>>, LimitRefusal> {
        let most = self.settings.connections_per_tenant;
        self.by_tenant.take(tenant.into(), most).ok_or_else(|| full(Limit::ConnectionsPerTenant, most))
    }
}

impl ConnectionPermit {
    /// `tenant` is that of the topic's own token. A connection whose key named none counts for the first that comes so.
    pub fn join(&self, topic: &str, tenant: Option<&str>) -> Result<TopicPermit, LimitRefusal> {
        let Connection { shared, joins, .. } = &*self.0;
        let settings = &shared.settings;
        let most = settings.joins_per_second_per_connection;
        joins.take(1).map_err(|wait| LimitRefusal::new(Limit::JoinsPerConnection, most.into(), wait))?;
        let tenant: Option<Arc<str>> = tenant.map(Into::into);
        if let Some(tenant) = &tenant {
            let most = settings.joins_per_second_per_tenant;
            let taken = shared.tenant_joins.take(tenant, 1);
            taken.map_err(|wait| LimitRefusal::new(Limit::JoinsPerTenant, most.into(), wait))?;
            let mut known = self.0.tenant.lock();
            if known.is_none() {
                *known = Some(shared.connection_of(tenant)?);
            }
        }
        let topic: Arc<str> = topic.into();
        let most = settings.subscribers_per_topic;
        let subscriber = (most > 0).then(|| {
            let held = shared.by_topic.take(topic.clone(), most);
            held.ok_or_else(|| full(Limit::SubscribersPerTopic, most))
        });
        let subscription = tenant.clone().and_then(|tenant| shared.subscriptions_by_tenant.take(tenant, 0));
        Ok(TopicPermit {
            connection: self.clone(),
            topic,
            tenant,
            _subscriber: subscriber.transpose()?,
            _subscription: subscription,
        })
    }

    /// One frame of the client, of whatever topic. One that is refused must not be acted upon.
    pub fn message_in(&self, bytes: usize) -> Result<(), LimitRefusal> {
        let settings = &self.0.shared.settings;
        if settings.payload_bytes > 0 && bytes as u64 > settings.payload_bytes {
            return Err(LimitRefusal::new(Limit::Payload, settings.payload_bytes, Duration::ZERO));
        }
        let most = settings.messages_in_per_second_per_connection;
        self.0.messages_in.take(1).map_err(|wait| LimitRefusal::new(Limit::MessagesInPerConnection, most.into(), wait))
    }

    /// How many messages may be paced together, so that those which may go do not wait for those which may not.
    pub fn out_at_once(&self) -> usize {
        self.0.shared.out_at_once
    }

    /// Before `messages` go out: waits until they may. What comes meanwhile fills the outbox, which has its own bound.
    pub async fn pace_out(&self, messages: usize) {
        let most = self.0.shared.settings.messages_out_per_second_per_connection;
        pace(Limit::MessagesOutPerConnection, most, || self.0.messages_out.take(messages)).await;
        let tenant = self.0.tenant.lock().as_ref().map(|held| held.name().clone());
        if let Some(tenant) = tenant {
            let most = self.0.shared.settings.messages_out_per_second_per_tenant;
            pace(Limit::MessagesOutPerTenant, most, || self.0.shared.tenant_out.take(&tenant, messages)).await;
        }
    }
}

impl TopicPermit {
    /// Beside [`ConnectionPermit::message_in`]: what the topic's and the tenant's limits say of a message to this topic.
    pub fn message_in(&self) -> Result<(), LimitRefusal> {
        let shared = &self.connection.0.shared;
        let most = shared.settings.messages_in_per_second_per_topic;
        let taken = shared.topic_in.take(&self.topic, 1);
        taken.map_err(|wait| LimitRefusal::new(Limit::MessagesInPerTopic, most.into(), wait))?;
        let Some(tenant) = &self.tenant else { return Ok(()) };
        let most = shared.settings.messages_in_per_second_per_tenant;
        let taken = shared.tenant_in.take(tenant, 1);
        taken.map_err(|wait| LimitRefusal::new(Limit::MessagesInPerTenant, most.into(), wait))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.shared.connections.fetch_sub(1, Ordering::AcqRel);
        metrics::gauge!("walcast_connections").decrement(1.0);
    }
}

async fn pace(limit: Limit, most: u32, take: impl Fn() -> Result<(), Duration>) {
    let mut waited = false;
    while let Err(wait) = take() {
        if !std::mem::replace(&mut waited, true) {
            // Counted as reached; nobody is refused.
            let _ = LimitRefusal::new(limit, most.into(), wait);
        }
        tokio::time::sleep(wait).await;
    }
}

/// Nobody knows when there will be room.
pub fn full(limit: Limit, most: u64) -> LimitRefusal {
    LimitRefusal::new(limit, most, Duration::from_secs_f64(rand::random_range(COME_BACK_S)))
}
