//! Orders of requests for the hit ratio and for timing: always the same ones, from fixed seeds.

use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};

pub struct Load {
    pub name: String,
    /// Which key, request by request.
    pub order: Vec<u32>,
    pub keys: usize,
}

/// Draws numbers below `keys`: the one at rank r with weight 1 / r^exponent.
pub struct Zipf {
    /// Running sums of the weights.
    sums: Vec<f64>,
    /// Rank to number, so that neighbours in rank are no neighbours in number.
    number: Vec<u32>,
}

impl Zipf {
    pub fn new(keys: usize, exponent: f64, rng: &mut StdRng) -> Zipf {
        let mut sum = 0.0;
        let weigh = |rank: usize| {
            sum += (rank as f64).powf(-exponent);
            sum
        };
        let sums = (1..=keys).map(weigh).collect();
        let mut number: Vec<u32> = (0..keys as u32).collect();
        number.shuffle(rng);
        Zipf { sums, number }
    }

    pub fn draw(&self, rng: &mut StdRng) -> u32 {
        let all = self.sums.last().copied().unwrap_or(0.0);
        let point = rng.random::<f64>() * all;
        self.number[self.sums.partition_point(|sum| *sum <= point).min(self.number.len() - 1)]
    }
}

pub fn zipf(keys: usize, requests: usize, seed: u64) -> Vec<u32> {
    let mut rng = StdRng::seed_from_u64(seed);
    let zipf = Zipf::new(keys, 1.0, &mut rng);
    (0..requests).map(|_| zipf.draw(&mut rng)).collect()
}

/// The four shapes that tell policies apart.
pub fn generated(keys: usize, requests: usize) -> Vec<Load> {
    let load = |name: &str, order: Vec<u32>, keys| Load { name: name.to_owned(), order, keys };
    vec![
        load("zipf", zipf(keys, requests, 1), keys),
        load("zipf with scans", scans(keys, requests), keys * 2),
        load("loop", (0..requests).map(|turn| (turn % (keys / 5)) as u32).collect(), keys / 5),
        load("shifting zipf", shifting(keys, requests), keys),
    ]
}

/// Every 20,000 requests, 5,000 of a run through keys that nobody else asks for.
fn scans(keys: usize, requests: usize) -> Vec<u32> {
    let mut rng = StdRng::seed_from_u64(2);
    let zipf = Zipf::new(keys, 1.0, &mut rng);
    let mut at = 0;
    let next = |turn: usize| {
        if turn % 20_000 < 15_000 {
            return zipf.draw(&mut rng);
        }
        at = (at + 1) % keys;
        (keys + at) as u32
    };
    (0..requests).map(next).collect()
}

/// Ten times, others become the favourites.
fn shifting(keys: usize, requests: usize) -> Vec<u32> {
    let mut rng = StdRng::seed_from_u64(3);
    let mut zipf = Zipf::new(keys, 1.0, &mut rng);
    let next = |turn: usize| {
        if turn.is_multiple_of((requests / 10).max(1)) {
            zipf.number.shuffle(&mut rng);
        }
        zipf.draw(&mut rng)
    };
    (0..requests).map(next).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_favourite_of_a_zipf_is_asked_for_as_often_as_its_weight_says() {
        let order = zipf(1_000, 100_000, 1);
        let mut counts = vec![0; 1_000];
        order.iter().for_each(|key| counts[*key as usize] += 1);
        counts.sort_unstable();
        // 1 / H(1000) = 13.4 %
        assert!((12_700..14_100).contains(&counts[999]), "{}", counts[999]);
        assert!((6_200..7_200).contains(&counts[998]), "{}", counts[998]);
        assert_eq!(order, zipf(1_000, 100_000, 1), "the same every time");
    }

    #[test]
    fn loads_stay_within_their_keys() {
        for load in generated(1_000, 50_000) {
            assert_eq!(load.order.len(), 50_000);
            assert!(load.order.iter().all(|key| (*key as usize) < load.keys), "{}", load.name);
        }
    }
}
