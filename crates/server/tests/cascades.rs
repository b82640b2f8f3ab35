//! P4 of cascades: between a commit and what its lookup lets fall nobody is told, nothing is promised, and no crash forgets.

mod support;

use anyhow::{Context, Result, ensure};
use support::{
    DEADLINE, Server,
    reads::Reads,
    school::{RULES, SCHEMA, School, path},
    unseen::{Unseen, no_standby, standby_never_answers},
};
use walcast_testkit::{SseStream, wait};

/// Who tells of a commit, and when.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Told {
    /// As it is built.
    ByTheStream,
    /// Control: as a pipeline would that announces what has settled and whose own rows have raised, and cascades afterwards.
    BeforeItsCascade,
}

/// Somebody changes a lesson of product 1, somebody is told: does he meet the product from before?
async fn meets_the_old(school: &School, events: &mut SseStream, told: Told, lesson: u32) -> Result<bool> {
    let own = format!("module_lessons:id={lesson}");
    school.reads.settled().await?;
    for tag in ["product:1", "product:9", &own] {
        school.fill(tag).await?;
    }
    let writer = school.postgres.connect().await?;
    let holder = school.postgres.connect().await?;
    if told == Told::BeforeItsCascade {
        // The lookup waits, and with it all that a sound pipeline does after it.
        holder.batch_execute("begin; lock table modules in access exclusive mode").await?;
    }
    writer.batch_execute(&format!("update module_lessons set title = title || '.' where id = {lesson}")).await?;
    match told {
        Told::ByTheStream => ensure!(events.next(DEADLINE).await?.event == "change"),
        Told::BeforeItsCascade => {
            let raised = async || school.fresh(&own).await.is_ok_and(|fresh| !fresh);
            wait::until(DEADLINE, "the lesson's own tag is raised", raised).await?;
        }
    }
    let old = school.fresh("product:1").await?;
    // What nothing ties to the lesson is there, so the reads can hit.
    ensure!(school.fresh("product:9").await?, "an unconcerned entry is gone: the check proves nothing");
    if told == Told::BeforeItsCascade {
        holder.batch_execute("rollback").await?;
        ensure!(events.next(DEADLINE).await?.event == "change");
        ensure!(!school.fresh("product:1").await?, "told by the stream, and met the product from before");
    }
    Ok(old)
}

#[tokio::test]
async fn p4_who_is_told_of_a_lesson_never_meets_the_product_from_before_it() -> Result<()> {
    let school = School::open().await?;
    let token = school.server.token("service_role", None);
    let url = format!("{}/sse/v1/changes?table=module_lessons", school.server.url);
    let mut events = SseStream::open(&url, Some(&token), None).await?;
    ensure!(events.next(DEADLINE).await?.event == "live");
    for round in 0..60 {
        let old = meets_the_old(&school, &mut events, Told::ByTheStream, 11 + round % 5).await?;
        ensure!(!old, "round {round}: told, and met the entry from before");
    }
    // A lookup that takes 2 s is given up, so on a busy machine not every round holds it for long enough.
    let mut caught = false;
    for round in 0..20 {
        caught = caught || meets_the_old(&school, &mut events, Told::BeforeItsCascade, 11 + round % 5).await?;
    }
    ensure!(caught, "a pipeline that announces before it cascades passes the check");
    school.server.stop().await
}

#[tokio::test]
async fn p4_a_kill_between_checkpoint_and_cascade_leaves_no_product_from_before() -> Result<()> {
    let soon = [("WALCAST_STREAM__ACKNOWLEDGE_AFTER", "1s")];
    let School { postgres, mut server, reads } = School::with(SCHEMA, RULES, &soon).await?;
    // Described already: a table in doubt whose commit does not settle would let everything of it fall.
    postgres.execute("update module_lessons set title = 'early' where id = 11").await?;
    reads.settled().await?;
    for tag in ["product:1", "product:9"] {
        ensure!(reads.fill(&path(tag), tag, async || Ok("value".into())).await? == "stored", "{tag}");
    }
    let looker = postgres.connect().await?;
    wait::until(DEADLINE, "the second tier has both", async || {
        let sql = "select from walcast.cache_entries where namespace = 'school'";
        looker.query(sql, &[]).await.is_ok_and(|rows| rows.len() == 2)
    })
    .await?;
    // Read, its own rows' tags raised, and its cascade cannot have been looked up: nobody sees the commit.
    standby_never_answers(&postgres).await?;
    let unseen = Unseen::commit(&postgres, "update module_lessons set title = 'x' where id = 11").await?;
    reads.heard().await?;
    ensure!(reads.get(&path("product:1")).await?.is_fresh_hit(), "the cascade is still to come");
    let written: String = looker.query_one("select now()::text", &[]).await?.get(0);
    wait::until(DEADLINE, "a checkpoint from after the commit was read", async || {
        let sql = format!("select from walcast.sentinel where updated_at > '{written}'");
        looker.query(&sql, &[]).await.is_ok_and(|rows| rows.len() == 1)
    })
    .await?;
    server.kill9().await?;
    unseen.settle().await?;
    no_standby(&postgres).await?;
    server.start_again().await?;
    let reads = Reads::service(&server);
    ensure!(!reads.get(&path("product:1")).await?.is_fresh_hit(), "answered from before the commit, as fresh");
    // Control: the restart let nothing else fall.
    ensure!(
        reads.get(&path("product:9")).await?.is_from_l2(),
        "the second tier is used: {:?}",
        reads.get(&path("product:9")).await?
    );
    reads.settled().await?;
    ensure!(!reads.get(&path("product:1")).await?.is_fresh_hit());
    server.stop().await
}

#[tokio::test]
async fn p4_a_position_is_promised_only_once_its_cascades_are_raised() -> Result<()> {
    let house = School::open().await?;
    // Described already: a table in doubt whose commit does not settle would let everything of it fall.
    house.postgres.execute("update module_lessons set title = 'early' where id = 11").await?;
    house.reads.settled().await?;
    house.fill("product:1").await?;
    house.fill("product:9").await?;
    // The commit is in the WAL and invisible: its lookup cannot have run.
    standby_never_answers(&house.postgres).await?;
    let unseen = Unseen::commit(&house.postgres, "update module_lessons set title = 'x' where id = 11").await?;
    house.reads.heard().await?;
    // Control: its row's own tag has been raised, so the commit has been read, and the product's has not.
    ensure!(house.fresh("product:1").await?, "nobody was told, and the product has not fallen");
    let before = house.reads.get(&path("product:9")).await?.position;
    let committed: String = {
        let sql = "select pg_current_wal_insert_lsn()::text";
        house.postgres.connect().await?.query_one(sql, &[]).await?.get(0)
    };
    ensure!(lsn(&before)? < parse(&committed)?, "{before} {committed}");
    let told = format!("{}/{committed}/0", before.split('/').next().unwrap_or_default());
    let asked = {
        let (reads, told) = (house.reads.clone(), told.clone());
        tokio::spawn(async move { reads.get_at_least(&path("product:1"), &told).await })
    };
    unseen.settle().await?;
    ensure!(!asked.await??.is_fresh_hit(), "asked for at least the commit, answered from before it");
    house.reads.settled().await?;
    ensure!(!house.fresh("product:1").await? && house.fresh("product:9").await?);
    let after = house.reads.get(&path("product:9")).await?.position;
    ensure!(lsn(&after)? > lsn(&before)?, "{before} {after}");
    house.server.stop().await
}

#[tokio::test]
async fn p4_entries_of_other_rules_do_not_survive_a_restart_and_those_of_the_same_do() -> Result<()> {
    let house = School::open().await?;
    house.reads.settled().await?;
    house.fill("product:1").await?;
    house.fill("sick:1").await?;
    let School { postgres, server, .. } = house;
    // The same rules: what was stored is still there, unless its cascade was missed.
    server.stop().await?;
    postgres.execute("update module_lessons set title = 'while nobody listened' where id = 11").await?;
    let server = Server::configured(&postgres, RULES, &[]).await?;
    let reads = Reads::service(&server);
    ensure!(!reads.get(&path("product:1")).await?.is_fresh_hit(), "a cascade of the time without us");
    ensure!(reads.get(&path("sick:1")).await?.is_from_l2(), "the same rules");
    server.stop().await?;
    // Another rule, which would have let it fall meanwhile.
    let other = format!("{RULES}\n[[tags]]\ntable = \"visits\"\nraise = [\"sick:{{ward}}\"]\n");
    let server = Server::configured(&postgres, &other, &[]).await?;
    ensure!(!Reads::service(&server).get(&path("sick:1")).await?.is_fresh_hit(), "other rules");
    server.stop().await
}

fn lsn(position: &str) -> Result<u64> {
    let (_, rest) = position.split_once('/').context("no epoch")?;
    parse(rest.rsplit_once('/').context("no index")?.0)
}

fn parse(lsn: &str) -> Result<u64> {
    let (high, low) = lsn.split_once('/').context("no LSN")?;
    Ok((u64::from_str_radix(high, 16)? << 32) | u64::from_str_radix(low, 16)?)
}
