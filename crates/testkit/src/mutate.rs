//! Valid inputs made wrong, millions of them: bytes changed, cut, repeated, spliced, lengths that lie. For fuzz tests that
//! run as ordinary tests: so many cases and no more. `WALCAST_SEED` repeats a run, `WALCAST_FUZZ_CASES` makes it longer.

use rand::{Rng, SeedableRng, rngs::StdRng};

/// Numbers at which code goes wrong.
const EDGES: [u32; 10] = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF];
/// Inputs do not grow without end.
const LONGEST: usize = 4_096;

pub struct Mutator<'a> {
    rng: StdRng,
    corpus: &'a [&'a [u8]],
    words: &'a [&'a [u8]],
}

/// As wanted by the environment, else as usual.
pub fn cases(usual: u64) -> u64 {
    number("WALCAST_FUZZ_CASES").unwrap_or(usual)
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

impl<'a> Mutator<'a> {
    /// `corpus`: valid inputs. `words`: what means something to the reader.
    pub fn new(corpus: &'a [&'a [u8]], words: &'a [&'a [u8]]) -> Mutator<'a> {
        let seed = number("WALCAST_SEED").unwrap_or_else(|| rand::rng().random());
        println!("WALCAST_SEED={seed}");
        Mutator { rng: StdRng::seed_from_u64(seed), corpus, words }
    }

    /// A valid input after one to three injuries.
    pub fn injured(&mut self) -> Vec<u8> {
        let mut bytes = self.one_of(self.corpus).to_vec();
        for _ in 0..self.rng.random_range(1..=3) {
            self.injure(&mut bytes);
        }
        bytes.truncate(LONGEST);
        bytes
    }

    fn injure(&mut self, bytes: &mut Vec<u8>) {
        let at = self.rng.random_range(0..=bytes.len());
        let end = self.rng.random_range(at..=bytes.len().min(at + 64));
        match self.rng.random_range(0..10) {
            0 if at < bytes.len() => bytes[at] ^= 1 << self.rng.random_range(0..8),
            1 if at < bytes.len() => bytes[at] = self.rng.random(),
            2 => drop(bytes.drain(at..end)),
            3 => bytes.truncate(at),
            4 => {
                let repeated = bytes[at..end].repeat(self.rng.random_range(1..8));
                bytes.splice(at..at, repeated);
            }
            5 => {
                let edge = EDGES[self.rng.random_range(0..EDGES.len())].to_be_bytes();
                let width = [1, 2, 4][self.rng.random_range(0..3)];
                let over = bytes.len().min(at + width);
                bytes.splice(at..over, edge[4 - width..].iter().copied());
            }
            6 => {
                let other = self.one_of(self.corpus);
                let from = self.rng.random_range(0..=other.len());
                bytes.splice(at..end, other[from..].iter().copied());
            }
            7 => bytes.insert(at, self.rng.random()),
            _ if !self.words.is_empty() => {
                let word = self.one_of(self.words);
                bytes.splice(at..end, word.iter().copied());
            }
            _ => {}
        }
    }

    fn one_of(&mut self, list: &'a [&'a [u8]]) -> &'a [u8] {
        list[self.rng.random_range(0..list.len())]
    }
}
