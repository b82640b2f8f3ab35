//! The clinic's named queries: a write for one patient ends that patient's answers and leaves the others' cached.

mod support;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use support::{Server, migrate, reads::Reads};
use walcast_testkit::TestPostgres;

const PATIENT: i64 = 3;
const OTHERS: [i64; 2] = [4, 5];

const QUERIES: [&str; 5] = ["active_medications", "patient_alerts", "patient_dashboard", "patient_messages", "patient_vitals"];

fn demo(part: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo").join(part)
}

fn path(query: &str, patient: i64) -> String {
    format!("/query/v1/{query}?patient_id={patient}")
}

#[tokio::test]
async fn p4_a_write_for_one_patient_ends_that_patients_answers_and_leaves_the_others_cached() -> Result<()> {
    let postgres = TestPostgres::start().await?;
    let sql = |file: &str| std::fs::read_to_string(demo("sql").join(file)).with_context(|| file.to_owned());
    migrate(&postgres, &format!("{}\n{}", sql("0001_clinic.sql")?, sql("0002_people.sql")?), &[]).await?;
    let queries = demo("queries").to_string_lossy().into_owned();
    let server = Server::start(&postgres, &[("WALCAST_QUERIES__DIR", &queries)]).await?;
    let client = postgres.connect().await?;
    let user: String = client.query_one("select md5('clinic:provider:1')::uuid::text", &[]).await?.get(0);
    let service = Reads::service(&server);
    let provider = Reads::with_token(&server, server.token("authenticated", Some(&user)));

    // A plan's narrowing is trusted once all that it may have missed has settled.
    for reads in [&service, &provider] {
        for query in QUERIES {
            reads.get(&path(query, 9)).await?;
        }
    }
    service.settled().await?;

    // Each write with the queries that show what it wrote.
    let writes: [(String, &[&str]); 6] = [
        (
            format!(
                "insert into vital_signs (patient_id, heart_rate, systolic, diastolic, respiratory_rate, spo2, temperature_c)
                 values ({PATIENT}, 171, 120, 80, 15, 98, 36.6)"
            ),
            &["patient_dashboard", "patient_vitals"],
        ),
        (
            format!("update medications set instructions = '{{}}', dose = dose + 1 where patient_id = {PATIENT}"),
            &["active_medications", "patient_dashboard"],
        ),
        (
            format!(
                "insert into patient_alerts (patient_id, severity, kind, message) values ({PATIENT}, 'info', 'test', 'hello')"
            ),
            &["patient_alerts", "patient_dashboard"],
        ),
        (format!("delete from patient_alerts where patient_id = {PATIENT}"), &["patient_alerts", "patient_dashboard"]),
        (format!("update patients set bed = 'Z9' where id = {PATIENT}"), &["patient_dashboard"]),
        (
            format!(
                "insert into messages (patient_id, provider_id, sender, body) values ({PATIENT}, 1, 'provider', 'good morning')"
            ),
            &["patient_messages"],
        ),
    ];
    for (write, shown_by) in &writes {
        for (who, reads) in [("service_role", &service), ("provider", &provider)] {
            for query in QUERIES {
                for patient in [PATIENT].into_iter().chain(OTHERS) {
                    let seen = reads.get(&path(query, patient)).await?;
                    ensure!(seen.status == 200, "{who} {query}: {seen:?}");
                    let again = reads.get(&path(query, patient)).await?;
                    ensure!(again.is_fresh_hit(), "{who}: {query} of patient {patient} is not kept: {again:?}");
                }
            }
        }
        let shown = async |query: &str| provider.get(&path(query, PATIENT)).await.map(|seen| seen.body);
        let mut before = Vec::new();
        for query in *shown_by {
            before.push(shown(query).await?);
        }
        client.batch_execute(write).await?;
        service.heard().await?;
        for (who, reads) in [("service_role", &service), ("provider", &provider)] {
            for query in QUERIES {
                for patient in OTHERS {
                    let seen = reads.get(&path(query, patient)).await?;
                    // What a provider may see of a patient hangs on the patients' rows too, through the policies.
                    let hangs_on_patients = who == "provider" && write.contains("update patients");
                    ensure!(
                        hangs_on_patients || seen.is_fresh_hit(),
                        "{who}: {query} of patient {patient} fell with `{write}`: {seen:?}"
                    );
                }
            }
            for query in *shown_by {
                let seen = reads.get(&path(query, PATIENT)).await?;
                ensure!(!seen.is_hit(), "{who}: {query} of the patient stayed after `{write}`: {seen:?}");
            }
        }
        for (query, before) in shown_by.iter().zip(before) {
            ensure!(shown(query).await? != before, "control: {query} shows nothing of `{write}`");
        }
    }

    // Another's assignment ends what that provider saw, at once.
    let seen = provider.get(&path("patient_vitals", PATIENT)).await?;
    ensure!(seen.json()?.as_array().is_some_and(|rows| !rows.is_empty()), "{seen:?}");
    client
        .batch_execute(&format!("update assignments set ended_at = now() where provider_id = 1 and patient_id = {PATIENT}"))
        .await?;
    service.heard().await?;
    let seen = provider.get(&path("patient_vitals", PATIENT)).await?;
    ensure!(seen.body == "[]", "P3: no longer assigned: {seen:?}");
    server.stop().await
}
