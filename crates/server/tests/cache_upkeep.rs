//! What the operator sees of the cache: its tiers, what was cleaned up, and who may look.

mod support;

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;
use support::{DEADLINE, Server, migrate, reads::Reads};
use walcast_testkit::{TestPostgres, wait};

const SCHEMA: &str = "create table items (id bigint primary key, version bigint not null);
    insert into items select i, 1 from generate_series(1, 100) i; grant select on items to service_role;";

#[tokio::test]
async fn p10_the_admin_page_tells_of_the_tiers_and_of_clean_ups_to_service_role_alone() -> Result<()> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &[]).await?;
    let server = Server::start(&postgres, &[("WALCAST_CACHE__UPKEEP_EVERY", "1s")]).await?;
    let reads = Reads::service(&server);
    for id in 1..=3 {
        let stored = reads.fill(&format!("/cache/v1/items/{id}"), &format!("items:id={id}"), async || Ok("1".into())).await?;
        ensure!(stored == "stored", "{stored}");
    }
    let client = postgres.connect().await?;
    wait::until(DEADLINE, "the second tier has them", async || {
        client.query_one("select count(*) from walcast.cache_entries", &[]).await.is_ok_and(|row| row.get::<_, i64>(0) == 3)
    })
    .await?;
    client.batch_execute("update walcast.cache_entries set stale_until = now() - interval '1 s' where key = '1'").await?;
    wait::until(DEADLINE, "the clean-up has taken it", async || {
        client.query_one("select count(*) from walcast.cache_entries", &[]).await.is_ok_and(|row| row.get::<_, i64>(0) == 2)
    })
    .await?;
    let report = wait::until_some(DEADLINE, "the clean-up is told of", async || {
        let report: Value = serde_json::from_str(&reads.get("/admin/v1/cache").await.ok()?.body).ok()?;
        let lines = report["l2"]["last_cleanups"].as_array()?.clone();
        lines.iter().any(|line| line["rows"] == 1 && line["reason"] == "expired").then_some(report)
    })
    .await?;
    ensure!(report["l1"]["entries"] == 3 && report["l1"]["bytes"].as_u64() > Some(0), "{report:#}");
    let l2 = &report["l2"];
    ensure!(l2["state"] == "on" && l2["estimate"]["rows"] == 2 && l2["estimate"]["bytes"].as_u64() > Some(500), "{report:#}");
    let days = l2["days"].as_array().cloned().unwrap_or_default();
    ensure!(days.iter().map(|day| day["rows"].as_u64().unwrap_or(0)).sum::<u64>() == 1, "{report:#}");
    ensure!(report["stats"]["l2_cleaned_rows"]["expired"] == 1, "{report:#}");

    let other = Reads::with_token(&server, server.token("authenticated", None));
    ensure!(other.get("/admin/v1/cache").await?.status == 403);
    let nobody = reqwest::get(format!("{}/admin/v1/cache", server.url)).await?;
    ensure!(nobody.status() == 401);

    // P6: with the database gone it still tells what it knows, in time.
    postgres.stop().await?;
    let seen = tokio::time::timeout(DEADLINE, reads.get("/admin/v1/cache")).await??;
    let report = seen.json()?;
    ensure!(seen.status == 200 && report["l2"]["last_cleanups"].is_null() && report["l1"]["entries"] == 3, "{report:#}");
    tokio::time::timeout(Duration::from_secs(60), server.stop()).await?
}
