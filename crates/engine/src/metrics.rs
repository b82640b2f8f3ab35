//! Counters with static handles: nothing is looked up by label on a hot path.

use metrics::{Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

pub struct Metrics {
    pub commits: Counter,
    pub delivered: Counter,
    pub hidden: Counter,
    pub withheld_errors: Counter,
    pub resyncs: Counter,
    pub catch_ups: Counter,
    pub asked: Counter,
    pub decided: Counter,
    pub remembered: Counter,
    pub stream_losses: Counter,
    pub unsettled: Counter,
    pub intake_waits: Counter,
    pub rule_tags: Counter,
    pub cascades: Counter,
    pub cascades_failed: Counter,
    pub invalidations: Counter,
    pub invalidations_widened: Counter,
    pub commit_to_announced: Histogram,
    pub subscriptions: Gauge,
    pub stream_attached: Gauge,
    pub lag_bytes: Gauge,
    pub replay_bytes: Gauge,
    pub heard_ago: Gauge,
}

impl Metrics {
    /// A change that is told without being shown: upstream's words, of which the number is the reason.
    pub fn withheld_error(&self, error: &'static str) {
        let code = error.split([' ', ':']).nth(1).unwrap_or_default();
        counter!("walcast_changes_unshown_total", "code" => code).increment(1);
    }

    pub fn register() -> Metrics {
        describe_counter!("walcast_commits_total", "Commits read from the slot");
        describe_counter!("walcast_changes_delivered_total", "Row changes handed to outboxes");
        describe_counter!("walcast_changes_hidden_total", "Row changes that a matching subscriber may not see");
        describe_counter!(
            "walcast_changes_withheld_errors_total",
            "Row changes withheld because authorisation could not be decided"
        );
        describe_counter!(
            "walcast_changes_unshown_total",
            "Row changes told without their values: 400 no primary key, 401 no privilege on it, 413 too large"
        );
        describe_counter!("walcast_resyncs_total", "Subscribers told to read again");
        describe_counter!("walcast_catch_ups_total", "Times a slow client was served from the replay ring");
        describe_counter!("walcast_visibility_decided_total", "Row changes whose visibility was decided in memory");
        describe_counter!("walcast_visibility_remembered_total", "Row images for which an answer of PostgreSQL was remembered");
        describe_counter!("walcast_visibility_asked_total", "Row images evaluated by PostgreSQL");
        describe_counter!("walcast_stream_losses_total", "Times the replication stream was lost or could not be opened");
        describe_counter!("walcast_unsettled_total", "Times a commit stayed invisible beyond the bound");
        describe_counter!("walcast_intake_waits_total", "Times the reader waited for room in the pipeline");
        describe_counter!("walcast_rule_tags_raised_total", "Tags raised by rules of the config, coarse forms included");
        describe_counter!("walcast_cascades_total", "Lookups that rules asked of the database, one for each rule and batch");
        describe_counter!(
            "walcast_cascades_failed_total",
            "Lookups without an answer: the rule's coarse form was raised instead"
        );
        describe_counter!("walcast_invalidations_total", "Invalidations by hand read from the stream");
        describe_counter!(
            "walcast_invalidations_widened_total",
            "Invalidations by hand that became one of everything: too many in a second, too large, or not readable"
        );
        describe_histogram!("walcast_commit_to_announced_seconds", "From commit to outbox, for the last commit of each batch");
        describe_gauge!("walcast_subscriptions", "Live bindings");
        describe_gauge!("walcast_stream_attached", "1 while the replication stream is attached");
        describe_gauge!("walcast_stream_lag_bytes", "WAL written but not read, as of the newest snapshot");
        describe_gauge!("walcast_replay_ring_bytes", "Bytes of commits kept for those who come back");
        describe_gauge!(
            "walcast_heartbeat_age_seconds",
            "Since our own heartbeat last came back through the stream; -1 while lost"
        );
        describe_gauge!("walcast_topics", "Topics and streams that are subscribed, those without a binding among them");
        describe_gauge!("walcast_outbox_frames", "Frames that wait for their sockets");
        describe_gauge!("walcast_outbox_bytes", "Bytes that wait for their sockets");
        describe_gauge!("walcast_leaks", "What looks like a leak in an application, by kind; /admin/v1/leaks tells");
        describe_gauge!("walcast_commit_to_socket_seconds", "From commit to socket, percentiles of the last minute");
        describe_counter!("walcast_commit_to_socket_writes_total", "Writes to sockets whose time since the commit was taken");
        describe_counter!("walcast_realtime_errors_total", "What went wrong on the live side, by kind");
        describe_counter!("walcast_connections_opened_total", "Connections that were opened");
        describe_counter!("walcast_joins_total", "Topics and streams that were joined");
        Metrics {
            commits: counter!("walcast_commits_total"),
            delivered: counter!("walcast_changes_delivered_total"),
            hidden: counter!("walcast_changes_hidden_total"),
            withheld_errors: counter!("walcast_changes_withheld_errors_total"),
            resyncs: counter!("walcast_resyncs_total"),
            catch_ups: counter!("walcast_catch_ups_total"),
            asked: counter!("walcast_visibility_asked_total"),
            decided: counter!("walcast_visibility_decided_total"),
            remembered: counter!("walcast_visibility_remembered_total"),
            stream_losses: counter!("walcast_stream_losses_total"),
            unsettled: counter!("walcast_unsettled_total"),
            intake_waits: counter!("walcast_intake_waits_total"),
            rule_tags: counter!("walcast_rule_tags_raised_total"),
            cascades: counter!("walcast_cascades_total"),
            cascades_failed: counter!("walcast_cascades_failed_total"),
            invalidations: counter!("walcast_invalidations_total"),
            invalidations_widened: counter!("walcast_invalidations_widened_total"),
            commit_to_announced: histogram!("walcast_commit_to_announced_seconds"),
            subscriptions: gauge!("walcast_subscriptions"),
            stream_attached: gauge!("walcast_stream_attached"),
            lag_bytes: gauge!("walcast_stream_lag_bytes"),
            replay_bytes: gauge!("walcast_replay_ring_bytes"),
            heard_ago: gauge!("walcast_heartbeat_age_seconds"),
        }
    }
}
