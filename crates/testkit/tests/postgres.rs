//! The throw-away PostgreSQL does what the tests of the other rooms count on.

use walcast_testkit::TestPostgres;

async fn one(pg: &TestPostgres, sql: &str) -> String {
    let client = pg.connect().await.unwrap();
    client.query_one(sql, &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn a_test_server_is_ready_for_logical_replication() {
    let pg = TestPostgres::start().await.unwrap();
    for (name, wanted) in
        [("wal_level", "logical"), ("max_replication_slots", "20"), ("fsync", "on"), ("wal_sender_timeout", "10s")]
    {
        assert_eq!(one(&pg, &format!("show {name}")).await, wanted, "{name}");
    }
    assert_eq!(one(&pg, "select inet_server_addr()::text").await, "127.0.0.1/32");
}

#[tokio::test]
async fn rows_survive_kill_9_and_clients_find_the_server_where_it_was() {
    let pg = TestPostgres::builder().setting("work_mem", "5MB").start().await.unwrap();
    let url = pg.url();
    pg.execute("create table patients (id int primary key, name text); insert into patients values (7, 'Ada')").await.unwrap();
    pg.kill9().await.unwrap();
    assert!(pg.connect().await.is_err() && !pg.is_running());
    pg.start_again().await.unwrap();
    assert_eq!(one(&pg, "select name from patients where id = 7").await, "Ada");
    pg.restart().await.unwrap();
    pg.stop().await.unwrap();
    pg.stop().await.unwrap();
    pg.start_again().await.unwrap();
    assert_eq!(one(&pg, "select name from patients where id = 7").await, "Ada");
    assert_eq!(one(&pg, "show work_mem").await, "5MB");
    assert_eq!(pg.url(), url);
}

#[tokio::test]
async fn alter_system_wins_over_the_settings_of_the_test() {
    let pg = TestPostgres::start().await.unwrap();
    let client = pg.connect().await.unwrap();
    client.execute("alter system set wal_sender_timeout = '3s'", &[]).await.unwrap();
    pg.restart().await.unwrap();
    assert_eq!(one(&pg, "show wal_sender_timeout").await, "3s");
}

#[tokio::test]
async fn a_role_of_the_test_can_connect_and_is_that_role() {
    let pg = TestPostgres::start().await.unwrap();
    pg.execute("create role nurse login").await.unwrap();
    let client = pg.connect_as("nurse").await.unwrap();
    let role: String = client.query_one("select current_user::text", &[]).await.unwrap().get(0);
    assert_eq!(role, "nurse");
}

#[tokio::test]
async fn dropping_it_leaves_neither_server_nor_directory() {
    let pg = TestPostgres::start().await.unwrap();
    let directory = one(&pg, "show data_directory").await;
    let port = pg.port();
    assert!(std::path::Path::new(&directory).exists());
    drop(pg);
    assert!(!std::path::Path::new(&directory).exists());
    assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_err());
}

#[tokio::test]
async fn two_servers_are_strangers_when_asked_to_be() {
    let identity = "select system_identifier::text from pg_control_system()";
    let first = TestPostgres::start().await.unwrap();
    let second = TestPostgres::builder().own_identity().start().await.unwrap();
    assert_ne!(one(&first, identity).await, one(&second, identity).await);
}
