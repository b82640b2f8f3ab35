//! Fill tickets: the fence of a miss, signed and handed to the application, which brings it back with the value.
//!
//! Stateless, opaque, under 1 KB. A ticket speaks for one key, one epoch and a short time. It grants nothing:
//! a forged fence could make a stale value pass, which is why it is signed.

use std::time::Duration;

use aws_lc_rs::{digest, hmac};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use walcast_model::{CacheKey, Epoch, Fence, Floor, Lsn, Snapshot, Xid};

pub struct Tickets {
    secret: hmac::Key,
    life_ms: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    #[error("the ticket cannot be read; send the `Walcast-Ticket` header of the miss unchanged")]
    Malformed,
    #[error("the ticket was not signed here, or the signing secret has changed; take a new one with the next miss")]
    Forged,
    #[error("the ticket is too old; compute sooner, or take a new one with the next miss")]
    Expired,
    #[error("the ticket was given for another key; send each value with the ticket of its own miss")]
    OtherKey,
    #[error("the ticket is from before the database was replaced or recovered; take a new one with the next miss")]
    OtherEpoch,
}

impl TicketError {
    pub fn code(self) -> &'static str {
        match self {
            TicketError::Malformed => "ticket_malformed",
            TicketError::Forged => "ticket_forged",
            TicketError::Expired => "ticket_expired",
            TicketError::OtherKey => "ticket_other_key",
            TicketError::OtherEpoch => "ticket_other_epoch",
        }
    }
}

const VERSION: u8 = 1;
const DOMAIN: &[u8] = b"walcast fill ticket\0";
const SIGNATURE_BYTES: usize = 32;
const MAX_TEXT_BYTES: usize = 1024;
/// More running transactions would make the ticket long: then all at or above xmin count as invisible.
const MAX_RUNNING: usize = 32;

impl Tickets {
    pub fn new(secret: &[u8; 32], life: Duration) -> Tickets {
        Tickets { secret: hmac::Key::new(hmac::HMAC_SHA256, secret), life_ms: life.as_millis() as u64 }
    }

    /// `now` in unix milliseconds.
    pub fn issue(&self, fence: &Fence, epoch: Epoch, key: &CacheKey, now: u64) -> String {
        let snapshot = fence.snapshot.bounded(MAX_RUNNING);
        let mut ticket = Vec::with_capacity(128 + snapshot.running().len() * 8);
        ticket.push(VERSION);
        ticket.extend_from_slice(&epoch.0.to_be_bytes());
        for number in [fence.floor.0, fence.settled.0, now, snapshot.xmin.0, snapshot.xmax.0] {
            ticket.extend_from_slice(&number.to_be_bytes());
        }
        ticket.extend_from_slice(&key_hash(key));
        for xid in snapshot.running() {
            ticket.extend_from_slice(&xid.0.to_be_bytes());
        }
        let signature = self.signed(&ticket);
        ticket.extend_from_slice(signature.as_ref());
        BASE64_URL_SAFE_NO_PAD.encode(ticket)
    }

    pub fn verify(&self, text: &str, key: &CacheKey, epoch: Epoch, now: u64) -> Result<Fence, TicketError> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(TicketError::Malformed);
        }
        let ticket = BASE64_URL_SAFE_NO_PAD.decode(text).map_err(|_| TicketError::Malformed)?;
        let split = ticket.len().checked_sub(SIGNATURE_BYTES).ok_or(TicketError::Malformed)?;
        let (body, signature) = ticket.split_at(split);
        hmac::verify(&self.secret, &[DOMAIN, body].concat(), signature).map_err(|_| TicketError::Forged)?;

        let mut body = Body(body);
        if body.take::<1>()? != [VERSION] {
            return Err(TicketError::Malformed);
        }
        let issued_in = Epoch(u32::from_be_bytes(body.take()?));
        let (floor, settled, issued_at) = (Floor(body.number()?), Lsn(body.number()?), body.number()?);
        let (xmin, xmax) = (Xid(body.number()?), Xid(body.number()?));
        let issued_for: [u8; 16] = body.take()?;
        let mut running = Vec::new();
        while !body.0.is_empty() {
            running.push(Xid(body.number()?));
        }
        if issued_for != key_hash(key) {
            return Err(TicketError::OtherKey);
        }
        if issued_in != epoch {
            return Err(TicketError::OtherEpoch);
        }
        // A ticket from the future means that the clock was set back: its age is not known.
        if now.abs_diff(issued_at) > self.life_ms {
            return Err(TicketError::Expired);
        }
        Ok(Fence { snapshot: Snapshot::new(xmin, xmax, running), settled, floor })
    }

    fn signed(&self, body: &[u8]) -> hmac::Tag {
        // The prefix keeps a signature made for something else with the same secret from passing here.
        hmac::sign(&self.secret, &[DOMAIN, body].concat())
    }
}

fn key_hash(key: &CacheKey) -> [u8; 16] {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(key.namespace().as_bytes());
    context.update(&[0]);
    context.update(key.key().as_bytes());
    let mut hash = [0; 16];
    hash.copy_from_slice(&context.finish().as_ref()[..16]);
    hash
}

struct Body<'a>(&'a [u8]);

impl Body<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], TicketError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(TicketError::Malformed)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn number(&mut self) -> Result<u64, TicketError> {
        self.take().map(u64::from_be_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000_000;
    const EPOCH: Epoch = Epoch(0x5f3a_09c1);

    fn tickets() -> Tickets {
        Tickets::new(&[7; 32], Duration::from_secs(60))
    }

    fn key(text: &str) -> CacheKey {
        CacheKey::new("patients", text).unwrap()
    }

    fn fence(snapshot: &str) -> Fence {
        Fence { snapshot: snapshot.parse().unwrap(), settled: Lsn(0x16_B374_D848), floor: Floor(3) }
    }

    #[test]
    fn a_ticket_brings_its_fence_back() {
        let ticket = tickets().issue(&fence("10:20:12,15"), EPOCH, &key("7"), NOW);
        assert_eq!(tickets().verify(&ticket, &key("7"), EPOCH, NOW + 60_000), Ok(fence("10:20:12,15")));
    }

    #[test]
    fn p7_a_ticket_stays_under_1_kb_and_a_longer_list_of_running_xids_only_sees_less() {
        let running = |n: u64| (0..n).map(|i| (10 + i).to_string()).collect::<Vec<_>>().join(",");
        let full = tickets().issue(&fence(&format!("10:90:{}", running(32))), EPOCH, &key("7"), NOW);
        assert!(full.len() < 1024, "{}", full.len());
        let bounded = tickets().issue(&fence(&format!("10:90:{}", running(33))), EPOCH, &key("7"), NOW);
        let back = tickets().verify(&bounded, &key("7"), EPOCH, NOW).unwrap();
        assert!(back.snapshot.sees(Xid(9)) && !back.snapshot.sees(Xid(10)) && !back.snapshot.sees(Xid(80)));
    }

    #[test]
    fn forged_expired_and_misplaced_tickets_are_refused_each_with_its_reason() {
        let ticket = tickets().issue(&fence("10:20:"), EPOCH, &key("7"), NOW);
        let verify = |text: &str, name: &str, epoch, now| tickets().verify(text, &key(name), epoch, now).unwrap_err();
        assert_eq!(verify(&ticket, "7", EPOCH, NOW + 60_001).code(), "ticket_expired");
        assert_eq!(verify(&ticket, "7", EPOCH, NOW - 60_001), TicketError::Expired, "the clock was set back");
        assert_eq!(verify(&ticket, "8", EPOCH, NOW), TicketError::OtherKey);
        assert_eq!(verify(&ticket, "7", Epoch(1), NOW), TicketError::OtherEpoch);
        for garbage in ["", "!!", "AAAA", &"A".repeat(2000)] {
            assert_eq!(verify(garbage, "7", EPOCH, NOW), TicketError::Malformed, "{garbage:.8}");
        }
        let other = Tickets::new(&[8; 32], Duration::from_secs(60)).issue(&fence("10:20:"), EPOCH, &key("7"), NOW);
        assert_eq!(verify(&other, "7", EPOCH, NOW), TicketError::Forged);
    }

    #[test]
    fn no_bit_of_a_ticket_can_be_changed() {
        let ticket = tickets().issue(&fence("10:20:12"), EPOCH, &key("7"), NOW);
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(&ticket).unwrap();
        for index in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[index] ^= 1;
            let text = BASE64_URL_SAFE_NO_PAD.encode(changed);
            assert_eq!(tickets().verify(&text, &key("7"), EPOCH, NOW), Err(TicketError::Forged), "byte {index}");
        }
    }
}
