//! A server, everybody who listens to it, and the judge: one transaction at a time, heard out and judged before the next.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use tokio_postgres::Client;
use walcast_testkit::{TestPostgres, Vsn};

use crate::{
    ears::Ear,
    judge::{self, Identity, Sight, Touch, judge, sees},
    support::{SECRET, Server},
};

pub struct Room {
    pub server: Server,
    pub client: Client,
    pub identities: Vec<Identity>,
    /// By identity: its subscribers.
    pub ears: Vec<Vec<Ear>>,
    /// By identity and table: what it may select.
    pub columns: HashMap<(usize, String), Vec<String>>,
    pub mark: i64,
    pub right: usize,
    /// Times that a subscriber was told to read again.
    pub resyncs: usize,
    pub leaks: Vec<String>,
    pub missing: Vec<String>,
    /// Leaks that the judge finds if everybody were given the service's events.
    pub unfiltered_leaks: usize,
}

impl Room {
    pub async fn open(postgres: &TestPostgres, identities: Vec<Identity>, named: &[&str]) -> Result<Room> {
        // One of the policies is beyond PostgreSQL, which is said at every row.
        let server = Server::start(postgres, &[("WALCAST_LOG__LEVEL", "error")]).await?;
        let mut ears = Vec::new();
        for who in &identities {
            let token = who.token(SECRET);
            // Whole schemas and single tables are matched in different ways.
            let tables = if who.role == "authenticated" { named } else { &[] };
            ears.push(vec![
                Ear::socket(&server.url, &token, Vsn::V1, &[]).await?,
                Ear::socket(&server.url, &token, Vsn::V2, tables).await?,
                Ear::stream(&server.url, &token).await?,
            ]);
        }
        let client = postgres.connect().await?;
        Ok(Room {
            server,
            client,
            identities,
            ears,
            columns: Default::default(),
            mark: 0,
            right: 0,
            resyncs: 0,
            leaks: Vec::new(),
            missing: Vec::new(),
            unfiltered_leaks: 0,
        })
    }

    pub async fn sights(&mut self, touches: &[Touch], after: bool) -> Result<Vec<Vec<Option<judge::Row>>>> {
        let mut all = Vec::new();
        for (at, who) in self.identities.iter().enumerate() {
            let mut sights = Vec::new();
            for touch in touches {
                let place = (at, touch.table.clone());
                if !self.columns.contains_key(&place) {
                    self.columns.insert(place.clone(), judge::columns(&self.client, who, &touch.table).await?);
                }
                let id = if after { touch.after } else { touch.before };
                sights.push(sees(&self.client, who, &touch.table, touch.key, id, &self.columns[&place]).await?);
            }
            all.push(sights);
        }
        Ok(all)
    }

    /// Runs `sql` as one transaction, waits until everybody has heard what there is, and judges it.
    pub async fn step(&mut self, sql: &str, touches: &[Touch]) -> Result<()> {
        let before = self.sights(touches, false).await?;
        self.client.batch_execute(&format!("begin; {sql}; commit")).await.with_context(|| sql.to_owned())?;
        let after = self.sights(touches, true).await?;
        self.mark += 1;
        self.client.batch_execute(&format!("insert into public.marks values ({})", self.mark)).await?;

        let mut by_identity = Vec::new();
        for (at, (before, after)) in before.into_iter().zip(after).enumerate() {
            let sights: Vec<Sight> = before
                .into_iter()
                .zip(after)
                .zip(touches)
                .map(|((before, after), touch)| Sight {
                    before,
                    after,
                    columns: self.columns[&(at, touch.table.clone())].clone(),
                })
                .collect();
            let mut last = Vec::new();
            for ear in &mut self.ears[at] {
                let heard =
                    ear.until_mark(self.mark).await.with_context(|| format!("{} after {sql}", self.identities[at].name))?;
                let finding = judge(touches, &sights, &heard.changes, !heard.resyncs.is_empty());
                let whose = |text: String| format!("{}, after `{sql}`: {text}", self.identities[at].name);
                self.leaks.extend(finding.leaks.into_iter().map(whose));
                self.missing.extend(finding.missing.into_iter().map(whose));
                self.right += finding.right;
                self.resyncs += heard.resyncs.len();
                last = heard.changes;
            }
            by_identity.push((sights, last));
        }
        // The control: were nothing filtered, would the judge notice?
        if let Some((_, service)) = by_identity.last().cloned() {
            for (sights, _) in &by_identity[..by_identity.len() - 1] {
                self.unfiltered_leaks += judge(touches, sights, &service, true).leaks.len();
            }
        }
        Ok(())
    }

    pub fn verdict(&self, seed: u64) -> Result<()> {
        ensure!(
            self.leaks.is_empty(),
            "seed {seed}: {} leaks, the first: {:#?}",
            self.leaks.len(),
            &self.leaks[..self.leaks.len().min(5)]
        );
        let shown = &self.missing[..self.missing.len().min(5)];
        ensure!(self.missing.is_empty(), "seed {seed}: {} events fell out, the first: {shown:#?}", self.missing.len());
        ensure!(
            self.unfiltered_leaks > 50,
            "the judge is blind: of unfiltered events it reported {} leaks",
            self.unfiltered_leaks
        );
        ensure!(self.right > 300, "hardly anything was heard: {}", self.right);
        Ok(())
    }
}
