//! What fan-out costs: changes to many WebSocket subscribers, with and without row security, beside Nchan; and what an
//! idle connection and a subscription occupy. The clients are one thread ([`crowd`]).

mod crowd;
mod door;
mod fanout;
mod frames;
mod idle;
mod nchan;
mod window;

use anyhow::Context;
use clap::ValueEnum;
use futures_util::stream::{self, TryStreamExt};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::{
    Size,
    realtime::{
        crowd::{Crowd, Wire},
        door::{Guest, Wish},
    },
    stage::{Server, Stage},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Scenario {
    /// One table's changes to 1,000 subscribers, 25 a second
    #[value(name = "fanout-25")]
    Fanout25,
    /// The same, 200 a second
    #[value(name = "fanout-200")]
    Fanout200,
    /// The same, as fast as it goes
    #[value(name = "fanout-flat")]
    FanoutFlat,
    /// 500 subscribers × 64 changes a second: without row security, decided in memory, asked of PostgreSQL
    #[value(name = "rls")]
    Rls,
    /// 10,000 subscriptions on 1,000 connections, each on its own patient, with row security, 500 changes a second
    #[value(name = "own-patient")]
    OwnPatient,
    /// 20,000 connections that hear nothing
    #[value(name = "idle")]
    Idle,
}

/// Policies: everybody but one; one's own; one's patients, by another table.
const SCHEMA: &str = "
create table care_team (patient_id int not null, user_id uuid not null, primary key (patient_id, user_id));
create table readings (
  id bigint generated always as identity primary key, patient_id int not null, owner uuid not null, kind text not null,
  value numeric not null, at_us bigint not null default (extract(epoch from clock_timestamp()) * 1000000)::bigint);
create table readings_shared (like readings including all);
create table readings_owned (like readings including all);
create table readings_care (like readings including all);
alter table readings_shared enable row level security;
alter table readings_owned enable row level security;
alter table readings_care enable row level security;
create policy not_the_blocked on readings_shared for select to authenticated using (owner is distinct from auth.uid());
create policy my_own on readings_owned for select to authenticated using (owner = auth.uid());
create policy in_my_care on readings_care for select to authenticated
  using (patient_id in (select patient_id from care_team where user_id = (select auth.uid())));
grant select on readings, readings_shared, readings_owned, readings_care, care_team to authenticated, service_role;";

/// Connections that are being set up at once.
const AT_ONCE: usize = 32;
/// For everything in a process that is no client.
const SPARE_FILES: u64 = 300;

pub async fn run(size: &Size, only: &[Scenario], peer: bool) -> anyhow::Result<()> {
    let wanted = |scenario: Scenario| only.is_empty() || only.contains(&scenario);
    let stage = Stage::set_sql(SCHEMA).await?;
    stage
        .postgres
        .execute("alter publication supabase_realtime add table readings, readings_shared, readings_owned, readings_care")
        .await?;
    let fans: Vec<Scenario> =
        Scenario::value_variants().iter().copied().filter(|scenario| *scenario != Scenario::Idle && wanted(*scenario)).collect();
    if !fans.is_empty() {
        fanout::run(&stage, size, &fans, peer).await?;
    }
    if wanted(Scenario::Idle) {
        idle::run(&stage).await?;
    }
    Ok(())
}

/// The user whose number this is, as the tables' owner column has him.
fn user(n: u32) -> String {
    format!("00000000-0000-4000-8000-{n:012x}")
}

/// So many clients of walcast, all joined.
async fn admit(
    crowd: &Crowd,
    server: &Server,
    clients: std::ops::Range<u32>,
    token_of: impl Fn(u32) -> String,
    wishes_of: impl Fn(u32) -> Vec<Wish>,
) -> anyhow::Result<()> {
    let enter = async |n: u32| {
        let token = token_of(n);
        let path = format!("/realtime/v1/websocket?apikey={token}&vsn=2.0.0");
        let mut guest = Guest::enter(server.address(), &path, n).await?;
        for wish in wishes_of(n) {
            guest.join(&wish, &token).await?;
        }
        crowd.add(guest.leave_door()?, Wire::Realtime)
    };
    stream::iter(clients.map(Ok::<u32, anyhow::Error>)).try_for_each_concurrent(AT_ONCE, enter).await.context("admitting clients")
}

/// As many connections as files may be open, at most what is wanted. What is started later inherits the limit.
fn room_for(connections: u32) -> u32 {
    let needed = u64::from(connections) + SPARE_FILES;
    let limit = getrlimit(Resource::Nofile);
    let allowed = |limit: Option<u64>| limit.unwrap_or(u64::MAX);
    if allowed(limit.current) < needed {
        // Above the hard limit only where we may.
        let wider = Rlimit { current: Some(needed), maximum: Some(allowed(limit.maximum).max(needed)) };
        let hard = Rlimit { current: limit.maximum, maximum: limit.maximum };
        let _ = setrlimit(Resource::Nofile, wider).or_else(|_| setrlimit(Resource::Nofile, hard));
    }
    let open = allowed(getrlimit(Resource::Nofile).current).saturating_sub(SPARE_FILES);
    let room = u64::from(connections).min(open) as u32;
    if room < connections {
        println!("\nonly {room} of {connections} connections: no more files may be open (ulimit -n)");
    }
    room
}
