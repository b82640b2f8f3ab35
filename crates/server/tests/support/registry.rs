//! What is registered, asked three ways: the admin JSON, the gauges, and the table that mirrors it.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use walcast_testkit::TestPostgres;

use super::Server;

/// How often each (subject, topic) is registered.
pub type Topics = BTreeMap<(String, String), usize>;

/// A page of `/admin/v1/…`, or any other JSON of the server's, asked for by `service_role`.
pub async fn admin(server: &Server, path: &str) -> Result<Value> {
    let answer = reqwest::Client::new()
        .get(format!("{}{path}", server.url))
        .bearer_auth(server.token("service_role", None))
        .send()
        .await?;
    let status = answer.status();
    let body = answer.text().await?;
    ensure!(status.is_success(), "GET {path}: {status} {body}");
    serde_json::from_str(&body).with_context(|| format!("GET {path}: {body}"))
}

/// Every page of subscriptions.
pub async fn in_memory(server: &Server) -> Result<Topics> {
    let mut topics = Topics::new();
    for offset in (0..).step_by(1_000) {
        let page = admin(server, &format!("/admin/v1/subscriptions?sort=id&limit=1000&offset={offset}")).await?;
        let page = page["subscriptions"].as_array().context("no list")?;
        for entry in page {
            let text = |name: &str| entry[name].as_str().unwrap_or_default().to_owned();
            *topics.entry((text("subject"), text("topic"))).or_default() += 1;
        }
        if page.len() < 1_000 {
            break;
        }
    }
    Ok(topics)
}

pub async fn in_the_table(postgres: &TestPostgres) -> Result<Topics> {
    let sql = "select coalesce(subject, ''), topic, count(*) from walcast.subscription_registry group by 1, 2";
    let rows = postgres.connect().await?.query(sql, &[]).await?;
    Ok(rows.iter().map(|row| ((row.get(0), row.get(1)), row.get::<_, i64>(2) as usize)).collect())
}

/// A line of `/metrics`, by its beginning.
pub async fn gauge(server: &Server, name: &str) -> Result<Option<f64>> {
    let text = reqwest::get(format!("{}/metrics", server.url)).await?.text().await?;
    Ok(text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()))
}
