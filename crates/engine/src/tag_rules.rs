//! The config's rules for tags: what they say of a commit, raised at once, and what they have still to look up.
//!
//! Called by the intake in step 5. Waits for nothing: lookups go with the commit to `pipeline/cascade`. What a rule means
//! in this database is found out by `doctor/tag_rules`, at start and whenever the catalog moves.

use std::{collections::HashMap, sync::Arc};

use parking_lot::RwLock;
use tokio_postgres::Client;
use walcast_matcher::{Reference, Template};
use walcast_model::{Claims, Commit, Lsn, Stamp, Table, Tag, TagHash, Xid};
use walcast_pg::{PgError, Pool};

use crate::{
    Core,
    config::TagRuleConfig,
    doctor::{
        Finding, Level, NotReady,
        tag_rules::{CHECK, examine},
    },
    pipeline::cascade::Cascades,
};

pub struct TagRules {
    configured: Vec<TagRuleConfig>,
    state: RwLock<State>,
}

struct State {
    resolved: Arc<Resolved>,
    warnings: Vec<String>,
    /// The catalog moved and could not be looked at since.
    outdated: bool,
}

/// The rules as they hold in this database.
#[derive(Default)]
pub struct Resolved {
    pub rules: walcast_matcher::TagRules,
    /// By the rule's index.
    pub lookups: HashMap<usize, Lookup>,
}

/// What a cascade asks.
pub struct Lookup {
    /// For the log: where the rule stands.
    pub place: String,
    /// For many keys at once; the first parameters of a key are its own, the rest is for the templates.
    pub sql: String,
    pub params: usize,
    pub of_row: Vec<Reference>,
    pub columns: Vec<String>,
    pub raise: Vec<Template>,
    /// Who asks: the role that we log in as.
    pub claims: Claims,
    /// Tables that it reads and that only other cascades answer for: those raise after this one has read.
    pub unsure_after: Vec<TagHash>,
}

impl TagRules {
    /// Every rule, or the first that cannot hold and why.
    pub async fn start(
        client: &Client,
        pool: &Pool,
        configured: &[TagRuleConfig],
        publication: &str,
    ) -> Result<TagRules, NotReady> {
        let examined = examine(client, pool, configured, publication).await?;
        if let Some(Finding { check, line, fix, .. }) = examined.findings.iter().find(|f| f.level == Level::Fail).cloned() {
            return Err(NotReady::Unfit {
                code: check,
                sentence: line,
                hint: fix.unwrap_or_else(|| "run `walcast check`".into()),
            });
        }
        let state =
            State { resolved: Arc::new(examined.resolved), warnings: Finding::warnings(examined.findings), outdated: false };
        Ok(TagRules { configured: configured.to_vec(), state: RwLock::new(state) })
    }

    pub fn resolved(&self) -> Arc<Resolved> {
        self.state.read().resolved.clone()
    }

    pub fn has_cascades(&self) -> bool {
        self.configured.iter().any(|rule| rule.cascade.is_some())
    }

    /// The catalog moved: what the rules mean is to be looked at again.
    pub fn outdate(&self) {
        self.state.write().outdated = !self.configured.is_empty();
    }

    pub fn warnings(&self) -> Vec<String> {
        self.state.read().warnings.clone()
    }

    /// What a checkpoint is held against: entries made under other rules may lack tags that these would raise. Of the
    /// config alone: what the catalog adds is in the fingerprint.
    pub fn with_fingerprint(&self, fingerprint: &str) -> String {
        if self.configured.is_empty() {
            return fingerprint.to_owned();
        }
        let rules: Vec<String> = self.configured.iter().map(TagRuleConfig::meaning).collect();
        format!("{fingerprint} {:016x}", Tag::stored(&rules.join("\n")).hash().0)
    }
}

impl Core {
    /// With the commit's stamp, as its row tags.
    pub(crate) fn raise_by_rules(&self, commit: &Commit, xid: Xid) -> Option<Box<Cascades>> {
        let resolved = self.tag_rules.resolved();
        if resolved.rules.is_empty() {
            return None;
        }
        let raised = resolved.rules.raised(commit);
        self.raise_rule_tags(raised.tags, Stamp { lsn: commit.lsn, xid });
        if raised.lookups.is_empty() {
            return None;
        }
        // Held before the commit counts as read: from here on nobody is promised more than what came before it.
        let hold = self.cascades.hold(commit.lsn);
        Some(Box::new(Cascades { hold, lookups: raised.lookups, resolved }))
    }

    /// Of tables that were redefined.
    pub(crate) fn raise_rules_of<'a>(&self, tables: impl Iterator<Item = &'a Arc<Table>>, stamp: Stamp) {
        let resolved = self.tag_rules.resolved();
        tables.for_each(|table| self.raise_rule_tags(resolved.rules.of_table(table), stamp));
    }

    pub(crate) fn raise_rule_tags(&self, tags: impl IntoIterator<Item = TagHash>, stamp: Stamp) {
        for tag in tags {
            self.clock.raise(tag, stamp);
            self.metrics.rule_tags.increment(1);
        }
    }

    /// Once per change of the catalog: a lookup's views and functions may be others now.
    pub(crate) async fn look_at_tag_rules_again(&self, client: &Client) -> Result<(), PgError> {
        let rules = &self.tag_rules;
        if !rules.state.read().outdated {
            return Ok(());
        }
        // Also before looking, and whatever is found: what lookups answer may have moved already.
        let raise_all = |resolved: &Resolved| {
            let stamp = Stamp::unseen(Lsn(self.progress.read_to().0 + 1));
            self.raise_rule_tags(resolved.rules.everything(), stamp);
        };
        raise_all(&rules.resolved());
        // Before looking: what moves meanwhile is looked at once more.
        rules.state.write().outdated = false;
        let examined = examine(client, &self.pool, &rules.configured, &self.config.publication_cache).await;
        let examined = examined.inspect_err(|_| rules.outdate())?;
        let failed = examined.findings.iter().find(|finding| finding.level == Level::Fail).cloned();
        let mut state = rules.state.write();
        match failed {
            // They go on as they were: a lookup that fails widens.
            Some(failed) => {
                tracing::error!(rule = %failed.line, "a tag rule no longer fits the database; `walcast check` says what mends it");
                state.warnings = vec![format!("{}: {}", failed.check, failed.line)];
            }
            None => {
                state.warnings = Finding::warnings(examined.findings);
                state.resolved = Arc::new(examined.resolved);
            }
        }
        drop(state);
        raise_all(&rules.resolved());
        let mut told = self.warnings.lock();
        told.retain(|warning| !warning.starts_with(CHECK));
        told.extend(rules.warnings());
        Ok(())
    }
}
