//! Queries behind PgBouncer in transaction mode: more of our connections than of PostgreSQL's, so every transaction may meet
//! another server process. Needs `pgbouncer`: named by WALCAST_TEST_PGBOUNCER, or on the PATH.

mod clinic;

use std::{
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use clinic::{Clinic, claims, params, user};
use futures_util::future::join_all;
use walcast_pg::{ConnectConfig, Pool};
use walcast_query::{NamedQuery, Queries};

const OURS: usize = 8;
const DEBIANS: &str = "/usr/sbin/pgbouncer";

/// Ends with the value.
struct Pooler {
    child: Child,
    port: u16,
    _directory: tempfile::TempDir,
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn pooler(postgres: u16) -> Pooler {
    use std::os::unix::fs::PermissionsExt;
    // Debian keeps it where only root's PATH looks.
    let usual = || if std::path::Path::new(DEBIANS).exists() { DEBIANS.into() } else { "pgbouncer".into() };
    let program: String = std::env::var("WALCAST_TEST_PGBOUNCER").unwrap_or_else(|_| usual());
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let file = directory.path().join("pgbouncer.ini");
    // Two server processes for all of us, whatever they call themselves.
    let text = format!(
        "[databases]\npostgres = host=127.0.0.1 port={postgres} dbname=postgres user=postgres\n\
         [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = any\npool_mode = transaction\n\
         default_pool_size = 2\nmax_client_conn = 50\nignore_startup_parameters = extra_float_digits\nunix_socket_dir =\n"
    );
    std::fs::write(&file, text).unwrap();
    let mut command = Command::new(&program);
    // It refuses to run as root.
    if std::fs::read_to_string("/proc/self/status").is_ok_and(|status| status.contains("Uid:\t0\t")) {
        command.args(["-u", "nobody"]);
    }
    let child = command.arg(&file).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let child = child.unwrap_or_else(|error| panic!("{program}: {error}; install pgbouncer, or set WALCAST_TEST_PGBOUNCER"));
    let pooler = Pooler { child, port, _directory: directory };
    walcast_testkit::wait::until(Duration::from_secs(30), "pgbouncer listens", async || {
        TcpStream::connect(("127.0.0.1", port)).is_ok()
    })
    .await
    .unwrap();
    pooler
}

#[tokio::test]
async fn p8_many_connections_of_ours_share_two_of_postgresqls_and_nobody_gets_anothers_rows() {
    let clinic = Clinic::open().await;
    let sql: String = (1..=20).map(|n| format!("insert into patients values ({n}, '{}', 'P{n}', null);", user(n))).collect();
    clinic.postgres.execute(&sql).await.unwrap();
    let pooler = pooler(clinic.postgres.port()).await;
    let connect = ConnectConfig::parse(&format!("postgres://postgres@127.0.0.1:{}/postgres", pooler.port)).unwrap();
    let pool = Pool::new(&connect, OURS, Duration::from_secs(60)).unwrap();
    let files = [
        "-- name: mine\n-- param: from bigint = 0\nselect id, name from patients where id > $1 order by id",
        "-- name: pages\n-- page: 1 by id\nselect id from patients",
        "-- name: bad\n-- param: n int\nselect 1 / $1 as x",
        "-- name: secret\nselect * from walcast_nothing",
    ];
    let files = files.map(|text| NamedQuery::parse("q.sql", text).unwrap()).to_vec();
    let queries = Arc::new(Queries::new(files, pool, Duration::from_secs(60), "walcast"));

    let one = async |n: u64| {
        let caller = claims("authenticated", n);
        let own = format!("[{{\"id\":{n},\"name\":\"P{n}\"}}]");
        for round in 0..20 {
            let mine = queries.ask("mine", &params(&[])).unwrap();
            let (answer, _) = queries.run(&mine, &caller).await.unwrap_or_else(|error| panic!("{n}: {error}"));
            assert_eq!(String::from_utf8_lossy(&answer.body), own);
            match round % 5 {
                0 => queries.forget_plans(),
                1 => {
                    let many = ["0", "0"].map(|from| queries.ask("mine", &params(&[("from", from)])).unwrap());
                    let (answers, _) = queries.run_many(&many, &caller).await.unwrap();
                    assert!(answers.iter().all(|answer| answer.as_ref().is_ok_and(|answer| answer.body == own)));
                }
                2 => {
                    let mut lines = queries.stream(&mine, &caller).await.unwrap();
                    let line = lines.next().await.unwrap().unwrap();
                    assert_eq!(format!("[{}]", String::from_utf8_lossy(&line).trim_end()), own);
                    assert!(lines.next().await.unwrap().is_none());
                    lines.end().await.unwrap();
                }
                3 => {
                    let wrong = queries.ask("bad", &params(&[("n", "0")])).unwrap();
                    assert_eq!(queries.run(&wrong, &caller).await.unwrap_err().code(), "query_refused");
                    assert_eq!(queries.plan("secret", caller.role()).await.unwrap_err().code(), "query_refused");
                }
                _ => {
                    let page = queries.ask("pages", &params(&[])).unwrap();
                    assert_eq!(queries.run(&page, &caller).await.unwrap().0.rows, 1);
                }
            }
        }
    };
    join_all((1..=16).map(one)).await;
    let sql = "select count(*) from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid()";
    let servers: i64 = clinic.client.query_one(sql, &[]).await.unwrap().get(0);
    // Those of the pooler, and the two of the clinic's own pool.
    assert!(servers <= 4, "{servers} server processes");

    // Control: what keeps a statement prepared breaks here, so the pooler does mix.
    let (client, connection) =
        tokio_postgres::connect(&format!("postgres://postgres@127.0.0.1:{}/postgres", pooler.port), tokio_postgres::NoTls)
            .await
            .unwrap();
    tokio::spawn(connection);
    let prepared = client.prepare("select 1 as prepared_here").await.unwrap();
    let mut broken = false;
    for _ in 0..200 {
        let other = queries.ask("mine", &params(&[])).unwrap();
        let caller = claims("authenticated", 1);
        let (outcome, _, _) =
            tokio::join!(client.query(&prepared, &[]), queries.run(&other, &caller), queries.run(&other, &caller));
        broken |= outcome.is_err();
    }
    assert!(broken, "control: a prepared statement survived, so nothing was shared");
}
