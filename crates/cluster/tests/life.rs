//! The life of a PostgreSQL of our own, against the real binaries.

use std::fs;
use std::path::Path;

use walcast_cluster::{Access, Binaries, Cluster, ClusterConfig, ClusterError, Durability};

fn config(dir: &Path) -> ClusterConfig {
    let binaries = Binaries::find(None).expect("a PostgreSQL server is installed");
    ClusterConfig { durability: Durability::Unsynced, access: Access::Trust, ..ClusterConfig::new(binaries, dir) }
}

/// A directory that the service user can reach, also where root's temp directory is closed.
fn home() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn accepts(port: u16) -> bool {
    std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
}

#[test]
fn the_second_start_finds_the_data_and_the_port_of_the_first() {
    let home = home();
    let dir = home.path().join("dev");
    let mut first = Cluster::open(config(&dir)).unwrap();
    first.start().unwrap();
    assert!(first.is_running() && accepts(first.port()));
    let (port, url) = (first.port(), first.url());
    fs::write(dir.join("pgdata").join("ours"), "still here").unwrap();
    first.stop().unwrap();
    assert!(!first.is_running() && !accepts(port));
    drop(first);

    let mut second = Cluster::open(config(&dir)).unwrap();
    second.start().unwrap();
    assert_eq!((second.port(), second.url()), (port, url));
    assert_eq!(fs::read_to_string(dir.join("pgdata").join("ours")).unwrap(), "still here");
}

#[test]
fn a_second_owner_of_the_directory_is_refused_and_told_who_has_it() {
    let home = home();
    let dir = home.path().join("dev");
    let _first = Cluster::open(config(&dir)).unwrap();
    let refused = Cluster::open(config(&dir)).unwrap_err();
    assert!(matches!(&refused, ClusterError::Locked { pid, .. } if *pid == std::process::id().to_string()), "{refused}");
}

#[test]
fn after_kill_9_the_server_starts_again_on_the_same_port() {
    let home = home();
    let mut cluster = Cluster::open(config(&home.path().join("dev"))).unwrap();
    cluster.start().unwrap();
    let port = cluster.port();
    cluster.kill9().unwrap();
    assert!(!cluster.is_running());
    assert!(matches!(cluster.kill9(), Err(ClusterError::NotRunning)));
    cluster.start().unwrap();
    assert!(cluster.is_running() && cluster.port() == port);
}

#[test]
fn a_stale_pid_file_that_names_a_living_stranger_is_no_obstacle() {
    let home = home();
    let dir = home.path().join("dev");
    let mut cluster = Cluster::open(config(&dir)).unwrap();
    let stale = format!("{}\n{}\n", std::process::id(), dir.join("pgdata").display());
    fs::write(dir.join("pgdata").join("postmaster.pid"), stale).unwrap();
    cluster.start().unwrap();
    assert!(cluster.is_running());
}

#[test]
fn a_fixed_port_that_is_taken_is_named_and_a_kept_one_is_replaced() {
    let home = home();
    let dir = home.path().join("dev");
    let stranger = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = stranger.local_addr().unwrap().port();
    let mut fixed = Cluster::open(ClusterConfig { port: Some(taken), ..config(&dir) }).unwrap();
    assert!(matches!(fixed.start(), Err(ClusterError::PortTaken { port }) if port == taken));
    drop(fixed);

    fs::write(dir.join("port"), taken.to_string()).unwrap();
    let mut kept = Cluster::open(config(&dir)).unwrap();
    kept.start().unwrap();
    assert_ne!(kept.port(), taken);
    assert_eq!(fs::read_to_string(dir.join("port")).unwrap().trim(), kept.port().to_string());
}

#[test]
fn a_setting_that_the_server_refuses_is_shown_from_its_log() {
    let home = home();
    let settings = vec![("shared_buffers".to_owned(), "many".to_owned())];
    let mut cluster = Cluster::open(ClusterConfig { settings, ..config(&home.path().join("dev")) }).unwrap();
    let error = cluster.start().unwrap_err().to_string();
    assert!(error.contains("shared_buffers"), "{error}");
}
