//! A school whose entries carry tags of rules: from columns, under conditions, and by a lookup in the database.

use anyhow::{Context, Result, ensure};
use walcast_testkit::TestPostgres;

use super::{Server, migrate, reads::Reads};

pub const SCHEMA: &str = "
    create table enrolments (id bigint primary key, student_id bigint, course_id text, status text, note text);
    alter table enrolments replica identity full;
    create table products (id bigint primary key, title text);
    create table modules (id bigint primary key, product_id bigint, title text);
    alter table modules replica identity full;
    create table module_lessons (id bigint primary key, module_id bigint, title text);
    alter table module_lessons replica identity full;
    create table visits (id bigint primary key, ward bigint);
    insert into modules select i, i / 10, 'm' from generate_series(1, 100) i;
    insert into module_lessons select i, i, 'l' from generate_series(1, 100) i;
    grant select on enrolments, modules, module_lessons, visits to service_role;
    grant select on modules to walcast;";

pub const RULES: &str = r#"
[[tags]]
table = "enrolments"
when_changed = ["student_id", "status"]
raise = ["student:{student_id}"]

[[tags]]
table = "enrolments"
on = ["insert", "delete"]
raise = ["course:{course_id}"]

[[tags]]
table = "visits"
raise = ["ward:{ward}"]

[[tags]]
table = "modules"
raise = ["product:{product_id}"]

[[tags]]
table = "module_lessons"
cascade = "select product_id from modules where id = $1"
with = ["module_id"]
raise = ["product:{product_id}"]
"#;

pub struct School {
    pub postgres: TestPostgres,
    pub server: Server,
    pub reads: Reads,
}

impl School {
    pub async fn open() -> Result<School> {
        School::with(SCHEMA, RULES, &[]).await
    }

    pub async fn with(schema: &str, rules: &str, settings: &[(&str, &str)]) -> Result<School> {
        let postgres = TestPostgres::start().await?;
        migrate(&postgres, schema, &["module_lessons"]).await?;
        let server = Server::configured(&postgres, rules, settings).await?;
        let reads = Reads::service(&server);
        Ok(School { postgres, server, reads })
    }

    /// Stores a value with this tag alone.
    pub async fn fill(&self, tag: &str) -> Result<()> {
        if self.fresh(tag).await? {
            return Ok(());
        }
        let stored = self.reads.fill(&path(tag), tag, async || Ok("value".into())).await?;
        ensure!(stored == "stored", "{tag}: {stored}");
        ensure!(self.fresh(tag).await?, "{tag}");
        Ok(())
    }

    pub async fn fresh(&self, tag: &str) -> Result<bool> {
        Ok(self.reads.get(&path(tag)).await?.is_fresh_hit())
    }

    /// Fills all of these, runs the statements, and says which fell.
    pub async fn fallen<'t>(&self, tags: &[&'t str], sql: &str) -> Result<Vec<&'t str>> {
        // What is settled may be filled; whether it fell is known once the commits have raised all that they will.
        self.reads.settled().await?;
        for tag in tags {
            self.fill(tag).await?;
        }
        self.postgres.execute(sql).await?;
        self.reads.settled().await?;
        let mut fallen = Vec::new();
        for tag in tags {
            if !self.fresh(tag).await? {
                fallen.push(*tag);
            }
        }
        Ok(fallen)
    }

    pub async fn metric(&self, name: &str) -> Result<u64> {
        let text = reqwest::get(format!("{}/metrics", self.server.url)).await?.text().await?;
        let line = text.lines().find(|line| line.split(' ').next() == Some(name)).with_context(|| format!("{name}: {text}"))?;
        Ok(line.rsplit(' ').next().unwrap_or_default().parse::<f64>()? as u64)
    }
}

pub fn path(tag: &str) -> String {
    format!("/cache/v1/school/{}", tag.replace([':', '%'], "-"))
}
