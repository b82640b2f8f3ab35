//! A loopback port for our server: chosen once, kept beside the data, so that a URL stays good
//! over restarts. Never chosen from the range that outgoing connections take theirs from, or a
//! stranger's connection could sit on our port while the server is down.

use std::hash::{BuildHasher, RandomState};
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;

use crate::error::ClusterError;

const FROM: u16 = 20_000;
const TO: u16 = 32_000;
const ATTEMPTS: usize = 200;

pub(crate) fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

/// Random, so that parallel choosers seldom meet.
pub(crate) fn choose() -> Result<u16, ClusterError> {
    (0..ATTEMPTS)
        .map(|attempt| FROM + (RandomState::new().hash_one(attempt) % u64::from(TO - FROM)) as u16)
        .find(|port| is_free(*port))
        .ok_or(ClusterError::NoPort { from: FROM, to: TO })
}

/// The port kept in `file`, if there is one.
pub(crate) fn kept(file: &Path) -> Option<u16> {
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}

pub(crate) fn keep(file: &Path, port: u16) -> Result<(), ClusterError> {
    std::fs::write(file, format!("{port}\n")).map_err(ClusterError::io("writing", file))
}
