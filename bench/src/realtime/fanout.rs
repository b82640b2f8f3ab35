//! Changes to many subscribers, scenario by scenario, and the same messages through Nchan, turn by turn.

use anyhow::Context;

use crate::{
    Size,
    figures::{Figures, table},
    process,
    realtime::{
        Scenario, admit,
        crowd::{Crowd, Wire},
        door::{Guest, Wish},
        nchan::Nchan,
        room_for, user,
        window::{Outcome, Pace, Payers, Source, measure},
    },
    stage::{Server, Stage},
};

const FANS: u32 = 1_000;
const WARDS: u32 = 500;
/// Each connection of `own-patient` has so many patients.
const PATIENTS_EACH: u32 = 10;
/// The first of those patients; the ones below are everybody's.
const FIRST_OWN: i32 = 1_000;
const EVERYBODYS: u64 = 10;
/// Nchan's messages are as long as ours; where ours were not measured, so long.
const USUAL_BYTES: f64 = 500.0;

/// One row of the table: what is measured again and again.
struct Cast {
    name: &'static str,
    pace: Pace,
    clients: u32,
    /// How many clients each change goes to.
    each: u64,
    table: &'static str,
    /// Else `service_role`, which no policy binds.
    users: bool,
    patient_of: fn(u64) -> i32,
}

pub async fn run(stage: &Stage, size: &Size, scenarios: &[Scenario], peer: bool) -> anyhow::Result<()> {
    room_for(FANS * 2);
    let care = format!(
        "insert into care_team
           select p, ('00000000-0000-4000-8000-' || lpad(to_hex(u), 12, '0'))::uuid
             from generate_series(0, {EVERYBODYS} - 1) p, generate_series(0, {FANS} - 1) u
         union all
           select {FIRST_OWN} + u * {PATIENTS_EACH} + p, ('00000000-0000-4000-8000-' || lpad(to_hex(u), 12, '0'))::uuid
             from generate_series(0, {PATIENTS_EACH} - 1) p, generate_series(0, {FANS} - 1) u;
         analyze care_team"
    );
    stage.postgres.execute(&care).await?;
    let mut table = Table::default();
    for cast in scenarios.iter().flat_map(|scenario| casts(*scenario)) {
        let peer = peer && cast.table == "readings" && cast.clients == FANS;
        play(stage, size, &cast, peer, &mut table).await.with_context(|| cast.name)?;
    }
    table.print(size);
    Ok(())
}

fn casts(scenario: Scenario) -> Vec<Cast> {
    let everybodys = |n: u64| (n % EVERYBODYS) as i32;
    let own = |n: u64| FIRST_OWN + (n.wrapping_mul(7919) % u64::from(FANS * PATIENTS_EACH)) as i32;
    let to_all = |name, pace| Cast {
        name,
        pace,
        clients: FANS,
        each: FANS.into(),
        table: "readings",
        users: false,
        patient_of: everybodys,
    };
    let ward = |name, table, users| Cast {
        name,
        pace: Pace::ASecond(64),
        clients: WARDS,
        each: WARDS.into(),
        table,
        users,
        patient_of: everybodys,
    };
    let patients =
        |name, table| Cast { name, pace: Pace::ASecond(500), clients: FANS, each: 1, table, users: true, patient_of: own };
    match scenario {
        Scenario::Fanout25 => vec![to_all("1,000 × 25/s", Pace::ASecond(25))],
        Scenario::Fanout200 => vec![to_all("1,000 × 200/s", Pace::ASecond(200))],
        Scenario::FanoutFlat => vec![to_all("1,000, as fast as it goes", Pace::AsFastAsItGoes)],
        Scenario::Rls => vec![
            ward("500 × 64/s, no RLS", "readings", false),
            ward("500 × 64/s, RLS in memory", "readings_shared", true),
            ward("500 × 64/s, RLS asked", "readings_care", true),
        ],
        Scenario::OwnPatient => vec![
            patients("10,000 own, 500/s, RLS in memory", "readings_owned"),
            patients("10,000 own, 500/s, RLS asked", "readings_care"),
        ],
        Scenario::Idle => Vec::new(),
    }
}

/// Nobody but the owner of a patient of one's own; of everybody's patients an owner who is none of the users.
fn owner(patient: i32) -> i32 {
    if patient < FIRST_OWN { 0x00FF_FFFF } else { (patient - FIRST_OWN) / PATIENTS_EACH as i32 }
}

async fn play(stage: &Stage, size: &Size, cast: &Cast, peer: bool, table: &mut Table) -> anyhow::Result<()> {
    let mut server = stage.serve(&[])?;
    server.ready().await?;
    let crowd = Crowd::gather()?;
    let before = process::resident(server.pid)?;
    join_all(cast, &crowd, &server).await?;
    let held = process::resident(server.pid)?;
    let subscriptions = if cast.each == 1 { cast.clients * PATIENTS_EACH } else { cast.clients };
    let held_each = (held.now_kib as f64 - before.now_kib as f64) / f64::from(subscriptions);
    let mut rows = Source::rows(stage.postgres.connect().await?, cast.table, cast.patient_of, owner).await?;
    let payers = Payers { server: server.pid, postmaster: Some(stage.postmaster().await?) };

    let other = if peer { Nchan::start(FANS).await? } else { None };
    if peer && other.is_none() {
        table.without_peer = true;
    }
    let audience = Crowd::gather()?;
    if let Some(nchan) = &other {
        for n in 0..cast.clients {
            audience.add(Guest::enter(&nchan.address, "/sub", n).await?.leave_door()?, Wire::Plain)?;
        }
    }
    let mut ours = Row::new(format!("walcast  {}", cast.name), Some(held_each));
    let mut theirs = Row::new(format!("nchan    {}", cast.name), None);
    for _ in 0..size.rounds {
        let outcome = measure(&crowd, &mut rows, cast.pace, size.seconds, cast.each, payers).await?;
        let bytes = if outcome.bytes_each > 0.0 { outcome.bytes_each } else { USUAL_BYTES };
        ours.add(&outcome, &crowd);
        if let Some(nchan) = &other {
            let wire = crate::wire::Wire::connect(&nchan.address).await?;
            // What stands around the padding has some 40 bytes.
            let mut posts = Source::Posts { wire, padding: "x".repeat((bytes as usize).saturating_sub(40)) };
            let payers = Payers { server: nchan.worker, postmaster: None };
            theirs.add(&measure(&audience, &mut posts, cast.pace, size.seconds, cast.each, payers).await?, &audience);
        }
    }
    table.rows.push(ours);
    if other.is_some() {
        table.rows.push(theirs);
    }
    drop(crowd);
    server.stop().await
}

async fn join_all(cast: &Cast, crowd: &Crowd, server: &Server) -> anyhow::Result<()> {
    let service = server.token("service_role", None);
    let token = |n: u32| if cast.users { server.token("authenticated", Some(&user(n))) } else { service.clone() };
    let wishes = |n: u32| {
        if cast.each > 1 {
            return vec![Wish { topic: "realtime:readings".into(), table: cast.table, filter: None }];
        }
        let patients = (0..PATIENTS_EACH).map(|p| FIRST_OWN as u32 + n * PATIENTS_EACH + p);
        let wish = |patient| Wish {
            topic: format!("realtime:patient-{patient}"),
            table: cast.table,
            filter: Some(format!("patient_id=eq.{patient}")),
        };
        patients.map(wish).collect()
    };
    admit(crowd, server, 0..cast.clients, token, wishes).await
}

#[derive(Default)]
struct Table {
    rows: Vec<Row>,
    without_peer: bool,
}

struct Row {
    name: String,
    deliveries: Figures,
    per_million: Figures,
    user_share: Figures,
    postgres: Figures,
    bench: Figures,
    p50: Figures,
    p99: Figures,
    arrived: u64,
    expected: u64,
    held_kib: Option<f64>,
    lost: Option<String>,
}

impl Row {
    fn new(name: String, held_kib: Option<f64>) -> Row {
        let none = Figures::default;
        Row {
            name,
            deliveries: none(),
            per_million: none(),
            user_share: none(),
            postgres: none(),
            bench: none(),
            p50: none(),
            p99: none(),
            arrived: 0,
            expected: 0,
            held_kib,
            lost: None,
        }
    }

    fn add(&mut self, outcome: &Outcome, crowd: &Crowd) {
        let millions = outcome.deliveries as f64 / 1e6;
        let cpu_s = outcome.server.user_s + outcome.server.system_s;
        self.deliveries.add(outcome.deliveries as f64 / outcome.seconds);
        self.per_million.add(cpu_s / millions);
        self.user_share.add(outcome.server.user_s / millions);
        self.postgres.add(outcome.postgres_s / millions);
        self.bench.add(outcome.bench_s / millions);
        self.p50.add(outcome.latency.value_at_quantile(0.5) as f64 / 1e3);
        self.p99.add(outcome.latency.value_at_quantile(0.99) as f64 / 1e3);
        self.arrived += outcome.deliveries;
        self.expected += outcome.expected;
        if let (lost, Some(why)) = crowd.lost() {
            self.lost = Some(format!("{lost} clients were let go, the first: {why}"));
        }
    }

    fn cells(&self) -> Vec<String> {
        let missing = self.expected.saturating_sub(self.arrived);
        vec![
            self.name.clone(),
            format!("{:.0}", self.deliveries.median()),
            self.per_million.show(2),
            format!("{:.2}", self.user_share.median()),
            format!("{:.2}", self.per_million.median() - self.user_share.median()),
            format!("{:.2}", self.postgres.median()),
            format!("{:.2}", self.bench.median()),
            format!("{:.1}", self.p50.median()),
            self.p99.show(1),
            if missing == 0 { "none".to_owned() } else { format!("{missing} of {}", self.expected) },
            self.held_kib.map_or_else(|| "-".to_owned(), |kib| format!("{kib:.1}")),
        ]
    }
}

impl Table {
    fn print(&self, size: &Size) {
        let head = [
            "",
            "deliveries/s",
            "CPU s/million",
            "user",
            "system",
            "PostgreSQL",
            "bench",
            "p50 ms",
            "p99 ms",
            "missing",
            "KiB each",
        ];
        let rows: Vec<_> = self.rows.iter().map(Row::cells).collect();
        let title = format!("realtime: {} rounds of {} s; CPU seconds for a million deliveries", size.rounds, size.seconds);
        table(&title, &head, &rows);
        if self.without_peer {
            println!("  nchan is not installed: apt-get install nginx libnginx-mod-nchan");
        }
        for row in &self.rows {
            if let Some(lost) = &row.lost {
                println!("  {}: {lost}", row.name);
            }
        }
    }
}
