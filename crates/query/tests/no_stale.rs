//! Random small writes: whenever an answer changes, the write raises one of the answer's tags. No exception.

mod clinic;

use std::collections::{HashMap, HashSet};

use clinic::{Clinic, claims, params, user};
use walcast_model::{Claims, TableName, Tag};
use walcast_pg::{Catalog, TableFacts};
use walcast_query::Answer;

/// Every construct that narrows, under every kind of caller.
const QUERIES: [&str; 18] = [
    "select v.id, v.pulse, p.name from vital_signs v join patients p on p.id = v.patient_id where v.patient_id = $1",
    "select p.id, count(v.id) from patients p left join vital_signs v on v.patient_id = p.id and v.pulse > 50 where p.id = $1 group by p.id",
    "select p.id, v.pulse from patients p left join vital_signs v on v.patient_id = p.id and v.patient_id = $1",
    "select id from patients where id = $1 and not exists (select from alerts a where a.patient_id = patients.id and a.open)",
    "select id, kind from open_alerts where patient_id = $1",
    "select * from pulses where patient_id = $1",
    "with mine as (select * from patients where user_id = auth.uid()) select m.id, v.id as v from mine m join vital_signs v on v.patient_id = m.id where $1 > 0",
    "select id from vital_signs where patient_id = $1 union select patient_id from assignments where provider_id = $1",
    "select p.id, x.n from patients p, lateral (select count(*) n from vital_signs v where v.patient_id = p.id and v.patient_id = $1) x",
    "select id from patients where id in (select patient_id from assignments where provider_id = $1)",
    "select id from patients where (id = $1 and exists (select from alerts a where a.patient_id = patients.id)) or tenant = auth.jwt() ->> 'tenant'",
    "select id from patients where not (id = $1 and exists (select from alerts a where a.patient_id = patients.id))",
    "select a.id, v.id as v from alerts a full join vital_signs v on a.patient_id = v.patient_id and a.patient_id = $1",
    "select * from (select patient_id, max(pulse) from vital_signs group by rollup(patient_id)) x where patient_id = $1",
    "select * from (select *, row_number() over (order by kind, id) n from alerts) x where patient_id = $1",
    "select * from (select * from alerts order by kind, id limit 1) x where patient_id = $1",
    "select id from patients where id not in (select patient_id from alerts where patient_id is not null and kind = 'fall') and id <> $1",
    "select p.id, a.id as a, r.name from patients p left join assignments a on a.patient_id = p.id left join providers r on r.id = a.provider_id where p.id = $1",
];
const TABLES: [&str; 5] = ["patients", "providers", "assignments", "vital_signs", "alerts"];
const WRITES: u64 = 300;
/// Answers looked at after each write; what was raised meanwhile is remembered for the others.
const LOOKS: usize = 8;

struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }

    fn write(&mut self) -> String {
        let id = 1 + self.roll(5);
        let other = 1 + self.roll(4);
        let who = self.roll(3);
        let maybe_user = if who == 0 { "null".to_owned() } else { format!("'{}'", user(who)) };
        match self.roll(18) {
            0 => format!(
                "insert into patients values ({id}, null, 'n{other}', 't{}') on conflict (id) do update set name = excluded.name",
                other % 2
            ),
            1 => format!(
                "update patients set user_id = {maybe_user} where id = {id} and not exists (select from patients where user_id = {maybe_user})"
            ),
            2 => format!("update patients set tenant = 't{}' where id = {id}", other % 3),
            3 => format!("insert into providers values ({id}, null, 'r') on conflict do nothing"),
            4 => format!(
                "update providers set user_id = {maybe_user}, name = 'r{other}' where id = {id} and not exists (select from providers where user_id = {maybe_user})"
            ),
            5 | 6 => format!(
                "insert into assignments select {id}, p.id, r.id from patients p, providers r where p.id = {other} and r.id = {} on conflict do nothing",
                1 + self.roll(5)
            ),
            7 => format!("delete from assignments where id = {id}"),
            8 => format!(
                "update assignments set patient_id = {other} where id = {id} and exists (select from patients where id = {other})"
            ),
            9 | 10 => format!(
                "insert into vital_signs select {}, id, {} from patients where id = {other} on conflict do nothing",
                self.roll(12),
                40 + self.roll(40)
            ),
            11 => format!(
                "update vital_signs set patient_id = {other}, pulse = pulse + 1 where id = {} and exists (select from patients where id = {other})",
                self.roll(12)
            ),
            12 => format!("delete from vital_signs where id = {}", self.roll(12)),
            13 => format!(
                "insert into alerts select {}, id, true, '{}' from patients where id = {other} on conflict do nothing",
                self.roll(8),
                ["fall", "secret", "x"][self.roll(3) as usize]
            ),
            14 => format!(
                "update alerts set open = not open, kind = '{}' where id = {}",
                ["fall", "secret", "x"][self.roll(3) as usize],
                self.roll(8)
            ),
            15 => format!("delete from patients where id = {id}"),
            16 => format!("delete from providers where id = {id}"),
            _ => format!("delete from alerts where id = {}", self.roll(8)),
        }
    }
}

/// The stream's rule: the table, and for each tagged column its old and new value; what the old image lacks is unknown.
fn raised(
    facts: &TableFacts,
    full: bool,
    old: Option<&serde_json::Value>,
    new: Option<&serde_json::Value>,
    tags: &mut HashSet<Tag>,
) {
    tags.insert(Tag::table(&facts.name));
    for column in facts.columns.iter().filter(|column| column.tagged) {
        let mut value = |image: &serde_json::Value| match &image[&column.name] {
            serde_json::Value::Null => {}
            serde_json::Value::String(text) => tags.extend(Tag::row(&facts.name, &column.name, text)),
            serde_json::Value::Bool(yes) => tags.extend(Tag::row(&facts.name, &column.name, if *yes { "t" } else { "f" })),
            other => tags.extend(Tag::row(&facts.name, &column.name, &other.to_string())),
        };
        new.into_iter().for_each(&mut value);
        if let Some(old) = old {
            if full || column.name == "id" {
                value(old);
            } else {
                tags.insert(Tag::any_row(&facts.name, &column.name));
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whenever_an_answer_changes_one_of_its_tags_is_raised() {
    let clinic = Clinic::open().await;
    let audit = "create table audit (n bigserial, t text, o jsonb, w jsonb); \
        create function note() returns trigger language plpgsql as $f$ begin \
          insert into audit (t, o, w) values (tg_table_name, case when tg_op <> 'INSERT' then to_jsonb(old) end, case when tg_op <> 'DELETE' then to_jsonb(new) end); \
          return null; end $f$;";
    clinic.postgres.execute(audit).await.unwrap();
    let catalog = Catalog::new(clinic.pool.clone());
    let mut facts = HashMap::new();
    for table in TABLES {
        let trigger =
            format!("create trigger note after insert or update or delete on {table} for each row execute function note()");
        clinic.postgres.execute(&trigger).await.unwrap();
        let id = catalog.table_id(&TableName::new("public", table)).await.unwrap().unwrap();
        facts.insert(table.to_owned(), catalog.table(id).await.unwrap().unwrap());
    }
    // The order of rows is not the matter here, so each query gets one.
    let files: Vec<String> = QUERIES
        .iter()
        .enumerate()
        .map(|(n, sql)| format!("-- name: q{n}\n-- param: id bigint\nselect * from ({sql}) q order by q::text"))
        .collect();
    let queries = clinic.queries(&files);
    let callers: Vec<Claims> = vec![claims("authenticated", 1), claims("authenticated", 2), claims("service_role", 0)];
    for caller in ["authenticated", "service_role"] {
        for (n, text) in QUERIES.iter().enumerate() {
            let plan = queries.plan(&format!("q{n}"), caller).await.unwrap();
            assert_eq!((&plan.cacheable, &plan.not_narrowed), (&Ok(()), &None), "{text}");
        }
    }
    let asked = params(&[("id", "2")]);
    let mut dice = Dice(0x9E37_79B9_7F4A_7C15);
    let mut kept: HashMap<(usize, usize), (Answer, Vec<String>)> = HashMap::new();
    let (mut held, mut computed, mut seen) = (0, 0, 0_i64);
    for _ in 0..WRITES {
        let sql = dice.write();
        clinic.postgres.execute(&sql).await.unwrap();
        let rows = clinic.client.query("select n, t, o, w from audit where n > $1 order by n", &[&seen]).await.unwrap();
        let mut tags = HashSet::new();
        for row in &rows {
            seen = row.get(0);
            let table: String = row.get(1);
            let (old, new): (Option<serde_json::Value>, Option<serde_json::Value>) = (row.get(2), row.get(3));
            raised(&facts[&table], table != "vital_signs", old.as_ref(), new.as_ref(), &mut tags);
        }
        // An entry whose tag is raised leaves at once, as in the cache; the others remember what they outlived.
        kept.retain(|_, (answer, outlived)| {
            outlived.push(sql.clone());
            !answer.tags.iter().any(|tag| tags.contains(tag))
        });
        for _ in 0..LOOKS {
            let (n, c) = (dice.roll(QUERIES.len() as u64) as usize, dice.roll(callers.len() as u64) as usize);
            let fresh = queries.run(&queries.ask(&format!("q{n}"), &asked).unwrap(), &callers[c]).await.unwrap().0;
            if let Some((before, outlived)) = kept.get(&(n, c)) {
                held += 1;
                let about = (QUERIES[n], callers[c].json(), &before.tags);
                assert_eq!(before.body, fresh.body, "STALE: {about:?}\nafter {outlived:#?}");
            } else {
                computed += 1;
                kept.insert((n, c), (fresh, Vec::new()));
            }
        }
    }
    println!("{held} answers held, {computed} computed anew");
    assert!(held > computed / 4, "narrowing must spare answers: {held} held, {computed} computed");
}
