//! 20,000 connections that hear nothing, first without a channel, then with one subscription each: what the server holds
//! for them in user space, and what their heartbeats cost.

use std::time::Duration;

use crate::{
    figures::table,
    process,
    realtime::{admit, crowd::Crowd, door::Wish, room_for},
    stage::Stage,
};

const CONNECTIONS: u32 = 20_000;
/// So long nothing happens before memory is read.
const REST: Duration = Duration::from_secs(3);
/// Within it every client sends its heartbeat once.
const WATCHED: Duration = Duration::from_secs(25);

pub async fn run(stage: &Stage) -> anyhow::Result<()> {
    let half = room_for(CONNECTIONS) / 2;
    let most = (half * 2 + 100).to_string();
    let mut rows = Vec::new();
    for subscribed in [false, true] {
        let mut server = stage.serve(&[("WALCAST_SERVER__MAX_CONNECTIONS", &most)])?;
        server.ready().await?;
        let crowd = Crowd::gather()?;
        let token = server.token("service_role", None);
        let wishes = |n: u32| {
            let wish =
                Wish { topic: format!("realtime:patient-{n}"), table: "readings", filter: Some(format!("patient_id=eq.{n}")) };
            if subscribed { vec![wish] } else { Vec::new() }
        };
        tokio::time::sleep(REST).await;
        let mut before = process::resident(server.pid)?;
        // The first half may also pay for what is made once.
        for (from, to) in [(0, half), (half, half * 2)] {
            admit(&crowd, &server, from..to, |_| token.clone(), wishes).await?;
            tokio::time::sleep(REST).await;
            let now = process::resident(server.pid)?;
            let each = (now.now_kib as f64 - before.now_kib as f64) * 1024.0 / f64::from(half);
            let what = if subscribed { "each with a subscription" } else { "without a channel" };
            rows.push(vec![
                format!("{} connections {what}, {} more", to, to - from),
                format!("{:.1}", now.now_kib as f64 / 1024.0),
                format!("{each:.0}"),
                "-".to_owned(),
                "-".to_owned(),
            ]);
            before = now;
        }
        let cpu = process::cpu_s(server.pid)?;
        tokio::time::sleep(WATCHED).await;
        let (lost, why) = crowd.lost();
        if let (Some(row), spent) = (rows.last_mut(), process::cpu_s(server.pid)? - cpu) {
            row[3] = format!("{:.1}", spent / WATCHED.as_secs_f64() * 100.0);
            row[4] = why.map_or_else(|| "none".to_owned(), |why| format!("{lost}: {why}"));
        }
        drop(crowd);
        server.stop().await?;
    }
    let head = ["", "serve MiB", "bytes each", "CPU %", "lost"];
    table("idle: resident size of serve, and its CPU while every client sends a heartbeat each 25 s", &head, &rows);
    Ok(())
}
