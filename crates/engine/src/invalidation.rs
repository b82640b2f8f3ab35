//! Invalidation by hand: what somebody names becomes one message in the WAL, with an LSN and a transaction id like any
//! commit, and holds wherever the stream is read once it has come by.
//!
//! What tags express goes through the tag clock. A pattern, "all of" and everything soft is a [`Selection`] that the cache
//! keeps beside it. Called by the door; [`Hands`] is called by the intake, for every message that it meets.

use std::time::{Duration, Instant};

use rand::Rng;
use walcast_cache::{Glob, Keeping, Selection, Survey};
use walcast_model::{CacheKey, Position, Stamp, TableName, Tag};
use walcast_pg::{PgError, quote_literal};
use walcast_protocol::message::{Invalidate, Message, PREFIX, Selected, Unreadable};
use walcast_wal::checkpoint::{Beside, SelectionImage};

use crate::{Core, Engine};

/// What somebody wants gone.
#[derive(Debug, Clone)]
pub struct Invalidation {
    /// Only entries of this namespace.
    pub namespace: Option<String>,
    pub what: What,
    /// Counts as expired instead: stale where the namespace answers stale, until it is made anew.
    pub soft: bool,
}

#[derive(Debug, Clone)]
pub enum What {
    All,
    Keys(Vec<CacheKey>),
    AnyOf(Vec<Tag>),
    AllOf(Vec<Tag>),
    KeysLike(Glob),
    /// Every entry that depends on the table or on rows of it.
    Table(TableName),
}

#[derive(Debug, Clone)]
pub struct Invalidated {
    /// From here on no node answers the old entries as fresh.
    pub position: Position,
    pub found: Survey,
}

#[derive(Debug, thiserror::Error)]
pub enum InvalidateError {
    #[error("more than {0} keys or tags in one request; invalidate a namespace, a pattern or a table instead")]
    TooMany(usize),
    #[error("there is no table {0}; name it as schema.table, as the catalog spells it")]
    UnknownTable(TableName),
    #[error("the invalidation is written but was not heard within {0} s: the stream is behind")]
    Unheard(u64),
    #[error(transparent)]
    Database(#[from] PgError),
}

const WAIT_FOR_STREAM: Duration = Duration::from_secs(5);
const MOST_NAMES: usize = 1_000;

impl Engine {
    /// Answers once the message has come back: then it holds here, and in every node that reads the same stream, by that
    /// position.
    pub async fn invalidate(&self, asked: &Invalidation) -> Result<Invalidated, InvalidateError> {
        let core = &self.core;
        let selection = core.selection_of(asked).await?;
        let id = format!("{:032x}", rand::rng().random::<u128>());
        let mut message = message_of(asked, &selection);
        message.id = Some(id.clone());
        // Before it holds, or there would be nothing left to count.
        let found = match &asked.what {
            What::Keys(keys) => core.cache.count_keys(keys, &selection),
            _ => core.cache.count_local(&selection),
        };
        let mut echo = core.echoes.listen(&id);
        let doing = "writing an invalidation";
        let lease = core.pool.lease(doing).await?;
        // One statement string: a caller who goes away in the middle leaves no transaction open behind him.
        let sql = format!(
            "begin; set local synchronous_commit = local; select pg_logical_emit_message(true, {}, {}); commit",
            quote_literal(PREFIX),
            quote_literal(&Message::Invalidate(message).text())
        );
        if let Err(error) = lease.batch_execute(&sql).await {
            lease.discard();
            return Err(PgError::from_driver(doing, error).into());
        }
        drop(lease);
        let heard = tokio::time::timeout(WAIT_FOR_STREAM, echo.heard()).await.ok().flatten();
        let (lsn, index) = heard.ok_or(InvalidateError::Unheard(WAIT_FOR_STREAM.as_secs()))?;
        // Whoever reads on from here must not meet what a table's own DDL before it has made old.
        if !core.suspected.passed(lsn, WAIT_FOR_STREAM).await {
            return Err(InvalidateError::Unheard(WAIT_FOR_STREAM.as_secs()));
        }
        if let (What::Keys(keys), false) = (&asked.what, asked.soft) {
            // Judged over already; what is gone takes no memory.
            keys.iter().for_each(|key| core.cache.delete_local_if_over(key));
        }
        Ok(Invalidated { position: Position { epoch: core.progress.epoch(), lsn, index }, found })
    }

    /// What [`Engine::invalidate`] would take, of both tiers. Takes nothing.
    pub async fn survey_invalidation(&self, asked: &Invalidation) -> Result<Survey, InvalidateError> {
        let selection = self.core.selection_of(asked).await?;
        Ok(self.core.cache.survey(&selection).await)
    }
}

impl Core {
    async fn selection_of(&self, asked: &Invalidation) -> Result<Selection, InvalidateError> {
        let base = Selection::default().in_namespace(asked.namespace.as_deref()).softly(asked.soft);
        let few = |count: usize| if count > MOST_NAMES { Err(InvalidateError::TooMany(MOST_NAMES)) } else { Ok(()) };
        Ok(match &asked.what {
            What::All => base,
            What::Keys(keys) => {
                few(keys.len())?;
                base.with_any_of(keys.iter().map(Tag::key))
            }
            What::AnyOf(tags) => {
                few(tags.len())?;
                base.with_any_of(tags.iter().cloned())
            }
            What::AllOf(tags) => {
                few(tags.len())?;
                base.with_all_of(tags.iter().cloned())
            }
            What::KeysLike(pattern) => base.with_keys_like(Some(pattern.clone())),
            What::Table(table) => base.with_any_of(self.tags_of_table(table).await?),
        })
    }

    /// The table's tag and the companions of all its columns, as a change of unknown rows raises them.
    async fn tags_of_table(&self, table: &TableName) -> Result<Vec<Tag>, InvalidateError> {
        let unknown = || InvalidateError::UnknownTable(table.clone());
        let id = self.catalog.table_id(table).await?.ok_or_else(unknown)?;
        let facts = self.catalog.table(id).await?.ok_or_else(unknown)?;
        let columns = facts.columns.iter().map(|column| Tag::any_row(table, &column.name));
        Ok(std::iter::once(Tag::table(table)).chain(columns).collect())
    }

    /// A checkpoint's list, at a start. What cannot be read may have meant anything.
    pub(crate) fn stand_again(&self, images: &[SelectionImage]) {
        for image in images {
            match serde_json::from_str(&image.content).ok().and_then(|selected: Selected| selection(&selected)) {
                Some(selection) => self.cache.select(selection, image.stamp, Some(image.heard_at_ms)),
                None => self.clock.raise(Tag::everything().hash(), image.stamp),
            }
        }
    }
}

/// In the clock where tags alone say it, beside it where they do not.
fn message_of(asked: &Invalidation, selection: &Selection) -> Invalidate {
    let tags: Option<Vec<Tag>> = match (&asked.what, &asked.namespace) {
        _ if asked.soft => None,
        (What::All, _) => Some(vec![selection.widest_tag()]),
        // A key's own tag names its namespace.
        (What::Keys(_), _) | (What::AnyOf(_) | What::Table(_), None) => Some(selection.any_of().to_vec()),
        (What::AllOf(tags), None) if tags.len() == 1 => Some(tags.clone()),
        _ => None,
    };
    match tags {
        Some(tags) => Invalidate { tags: tags.iter().map(|tag| tag.as_str().to_owned()).collect(), ..Invalidate::default() },
        None => Invalidate { selection: Some(selected(selection)), ..Invalidate::default() },
    }
}

fn selected(selection: &Selection) -> Selected {
    let texts = |tags: &[Tag]| tags.iter().map(|tag| tag.as_str().to_owned()).collect();
    Selected {
        namespace: selection.namespace().map(str::to_owned),
        pattern: selection.pattern().map(ToString::to_string),
        all_of: texts(selection.all_of()),
        any_of: texts(selection.any_of()),
        soft: selection.is_soft(),
    }
}

/// None if it names what nothing can be called: it was not written by us, and nobody knows what it meant.
fn selection(selected: &Selected) -> Option<Selection> {
    let pattern = selected.pattern.as_deref().map(str::parse::<Glob>).transpose().ok()?;
    if let Some(namespace) = &selected.namespace {
        CacheKey::new(namespace, "any").ok()?;
    }
    let tags = |texts: &[String]| -> Option<Vec<Tag>> {
        let is_plain = |text: &String| !text.is_empty() && !text.chars().any(char::is_control);
        texts.iter().map(|text| is_plain(text).then(|| Tag::stored(text))).collect()
    };
    let base = Selection::default().in_namespace(selected.namespace.as_deref()).with_keys_like(pattern).softly(selected.soft);
    Some(base.with_all_of(tags(&selected.all_of)?).with_any_of(tags(&selected.any_of)?))
}

/// What a checkpoint of the clock holds beside it.
pub(crate) fn beside(keeping: Option<&Keeping>) -> Beside {
    let Some(keeping) = keeping else { return Beside::default() };
    let images = keeping.kept.iter().map(|kept| SelectionImage {
        stamp: kept.stamp,
        heard_at_ms: kept.since_ms,
        content: serde_json::to_string(&selected(&kept.selection)).unwrap_or_else(|_| "null".to_owned()),
    });
    Beside { selections: Some(images.collect()) }
}

/// Hears what hands wrote, in the order of the stream. Anyone may emit a message: past a rate nobody is listened to in
/// detail, everything falls instead, and the stream is not held up.
pub(crate) struct Hands {
    allowed: f64,
    allowed_at_us: i64,
    said_at: Option<Instant>,
}

/// Invalidations of others than ourselves, by the time of their commits.
const PER_SECOND: f64 = 10_000.0;
const AT_ONCE: f64 = 50_000.0;
const SAY_AGAIN: Duration = Duration::from_secs(60);

impl Hands {
    pub(crate) fn new() -> Hands {
        Hands { allowed: AT_ONCE, allowed_at_us: 0, said_at: None }
    }

    pub(crate) fn hear(&mut self, core: &Core, content: &[u8], stamp: Stamp, committed_at_us: i64) {
        let asked = match Message::parse(content) {
            Ok(Message::Heartbeat { .. }) => return,
            Ok(Message::Invalidate(asked)) => asked,
            Err(Unreadable::Foreign) => return self.say("a logical message with prefix `walcast` cannot be read and is ignored"),
            Err(Unreadable::Invalidates) => {
                core.metrics.invalidations_widened.increment(1);
                core.clock.raise(Tag::everything().hash(), stamp);
                return self.say("an invalidation in the WAL cannot be read or names too much: everything is invalidated");
            }
        };
        core.metrics.invalidations.increment(1);
        let is_ours = asked.id.as_deref().is_some_and(|id| core.echoes.awaits(id));
        if !is_ours && !self.allows(committed_at_us) {
            core.metrics.invalidations_widened.increment(1);
            core.clock.raise(Tag::everything().hash(), stamp);
            return self
                .say("more than 10,000 invalidations per second are written to the WAL: everything is invalidated instead");
        }
        asked.tags.iter().for_each(|tag| core.clock.raise(Tag::stored(tag).hash(), stamp));
        match asked.selection.as_ref().map(selection) {
            None => {}
            Some(Some(selection)) => core.cache.select(selection, stamp, None),
            Some(None) => {
                core.metrics.invalidations_widened.increment(1);
                core.clock.raise(Tag::everything().hash(), stamp);
                self.say("an invalidation in the WAL names what nothing can be called: everything is invalidated");
            }
        }
    }

    /// By commit time, so that a stretch which is read again in one go counts as it was written.
    fn allows(&mut self, committed_at_us: i64) -> bool {
        let passed_us = (committed_at_us - self.allowed_at_us).max(0);
        self.allowed_at_us = self.allowed_at_us.max(committed_at_us);
        self.allowed = (self.allowed + passed_us as f64 / 1e6 * PER_SECOND).min(AT_ONCE);
        let allows = self.allowed >= 1.0;
        self.allowed -= f64::from(u8::from(allows));
        allows
    }

    fn say(&mut self, what: &str) {
        if self.said_at.is_none_or(|at| at.elapsed() >= SAY_AGAIN) {
            self.said_at = Some(Instant::now());
            tracing::warn!("{what}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(namespace: Option<&str>, what: What, soft: bool) -> String {
        let asked = Invalidation { namespace: namespace.map(str::to_owned), what, soft };
        let tags = |tags: &[Tag]| tags.to_vec();
        let base = Selection::default().in_namespace(namespace).softly(soft);
        let selection = match &asked.what {
            What::All | What::Table(_) => base,
            What::Keys(keys) => base.with_any_of(keys.iter().map(Tag::key)),
            What::AnyOf(any) => base.with_any_of(tags(any)),
            What::AllOf(all) => base.with_all_of(tags(all)),
            What::KeysLike(glob) => base.with_keys_like(Some(glob.clone())),
        };
        Message::Invalidate(message_of(&asked, &selection)).text()
    }

    #[test]
    fn what_tags_say_is_raised_and_only_the_rest_is_a_selection() {
        let tags = || vec![Tag::parse("a").unwrap(), Tag::parse("b").unwrap()];
        let keys = || What::Keys(vec![CacheKey::new("n", "k").unwrap()]);
        for (said, expected) in [
            (message(None, What::All, false), r#"{"invalidate":{"tags":["~all"]}}"#),
            (message(Some("n"), What::All, false), r#"{"invalidate":{"tags":["~ns:n"]}}"#),
            (message(Some("n"), keys(), false), r#"{"invalidate":{"tags":["~key:n:k"]}}"#),
            (message(None, What::AnyOf(tags()), false), r#"{"invalidate":{"tags":["a","b"]}}"#),
            (
                message(Some("n"), What::AnyOf(tags()), false),
                r#"{"invalidate":{"selection":{"namespace":"n","any_of":["a","b"]}}}"#,
            ),
            (message(None, What::AllOf(tags()), false), r#"{"invalidate":{"selection":{"all_of":["a","b"]}}}"#),
            (
                message(Some("n"), What::KeysLike("k*".parse().unwrap()), false),
                r#"{"invalidate":{"selection":{"namespace":"n","pattern":"k*"}}}"#,
            ),
            (message(None, What::All, true), r#"{"invalidate":{"selection":{"soft":true}}}"#),
            (
                message(Some("n"), keys(), true),
                r#"{"invalidate":{"selection":{"namespace":"n","any_of":["~key:n:k"],"soft":true}}}"#,
            ),
        ] {
            assert_eq!(said, expected);
        }
    }

    #[test]
    fn a_selection_is_read_as_it_was_written_and_an_impossible_one_is_not() {
        let text = r#"{"namespace":"n","pattern":"a?*","all_of":["a"],"any_of":["b","~ns:m"],"soft":true}"#;
        let read: Selected = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&selected(&selection(&read).unwrap())).unwrap(), text);
        for wrong in [r#"{"namespace":"a b"}"#, r#"{"pattern":""}"#, r#"{"all_of":["a\u0000"]}"#, r#"{"any_of":[""]}"#] {
            assert!(selection(&serde_json::from_str(wrong).unwrap()).is_none(), "{wrong}");
        }
    }

    #[test]
    fn p7_others_are_heard_up_to_a_rate_counted_by_the_time_of_their_commits() {
        let mut hands = Hands::new();
        let allowed = |hands: &mut Hands, at_us: i64| (0..100_000).filter(|_| hands.allows(at_us)).count();
        assert_eq!(allowed(&mut hands, 1_000_000), 50_000);
        assert_eq!(allowed(&mut hands, 1_000_000), 0);
        assert_eq!(allowed(&mut hands, 2_000_000), 10_000);
        assert_eq!(allowed(&mut hands, 1_500_000), 0, "a clock that was set back gives nothing");
        assert_eq!(allowed(&mut hands, 900_000_000), 50_000);
    }
}
